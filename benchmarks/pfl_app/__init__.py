"""The same work on pfl, Apple's simulator, as its own examples are written; without fedpeft.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.pfl_app SETTINGS.json

Model and rows are those of `benchmarks.peer_app`; the base stays in memory, as in pfl, and a batch is cut to its
longest row. It prints a line of JSON for each round that was scored.
"""
