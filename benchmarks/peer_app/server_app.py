"""FedAvg, and the score of each round on the server."""

import json

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.peer_app.task import accuracy, get_weights, load_model, load_rows, set_weights, settings

app = ServerApp()


def tell(event):
    print(json.dumps(event), flush=True)


@app.main()
def main(grid, context):
    serve(grid, tell)


def serve(grid, tell):
    given = settings()
    torch.manual_seed(given["seed"])
    model = load_model()
    rows = load_rows(None)

    def evaluate(server_round, arrays):
        set_weights(model, arrays.to_torch_state_dict())
        score = accuracy(model, rows)
        tell({"event": "evaluate", "round": server_round, "accuracy": score})
        return MetricRecord({"accuracy": score})

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=len(given["partitions"]))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_weights(model)),
        num_rounds=given["rounds"],
        evaluate_fn=evaluate,
    )
