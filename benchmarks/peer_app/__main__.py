"""Flower's simulation runtime: one CPU a client, as many at a time as there are cores."""

import os
import sys

from benchmarks.peer_app.task import VARIABLE, settings

if __name__ == "__main__":
    os.environ[VARIABLE] = os.path.abspath(sys.argv[1])
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    from flwr.simulation import run_simulation

    from benchmarks.peer_app.client_app import app as client_app
    from benchmarks.peer_app.server_app import app as server_app

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=len(settings()["partitions"]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": settings()["cores"]},
        },
    )
