"""A plain Flower + PEFT application, in the manner of Flower's own for fine-tuning language models; without fedpeft.

A `ServerApp` with FedAvg and a `ClientApp`; each message loads the base model anew, texts are padded to one length, and
everything else is as the libraries come. Rows are encoded once a process, as a careful user would.

    python -m benchmarks.peer_app SETTINGS.json

prints a line of JSON for each round that the server has scored. `benchmarks.peer` writes the settings.
"""
