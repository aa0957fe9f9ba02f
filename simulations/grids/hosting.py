"""What the process beside a command runs, see `fedpeft.simulations.grids.host`: Ray, until the command has ended."""

from __future__ import annotations

import json
import os
import sys

import ray

from fedpeft.simulations.grids.cluster import OWN, own_folder, ray_connection


def main() -> None:
    """Hold Ray as long as standard input is open, and say in a line of JSON where it is."""
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print
    with ray_connection(address=OWN):
        facts = {"address": ray.get_runtime_context().gcs_address, "folder": str(own_folder())}
        os.write(answer, f"{json.dumps(facts)}\n".encode())
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
