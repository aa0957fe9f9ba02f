"""One engine with the echoing client, in a process of its own.

    python -m benchmarks.echo flower|ray|inline BYTES CLIENTS ROUNDS WORKERS

prints a line of JSON: seconds of each round, and the driver's memory before the first and at its peak.
"""

import json
import sys

from benchmarks.echo.sides import through_flower, through_ours

if __name__ == "__main__":
    side, *numbers = sys.argv[1:]
    bytes_, clients, count, workers = map(int, numbers)
    through = through_flower if side == "flower" else through_ours
    print(json.dumps({"event": "echo", **through(bytes_, clients, count, 0 if side == "inline" else workers)}))
