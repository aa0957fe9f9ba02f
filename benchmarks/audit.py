"""What planted rows show of runs whose privacy is known: with budgets, without noise, without clipping, in the clear.

Run it with ``python -m benchmarks.audit``; it takes some minutes on two cores. It prints one table in Markdown, and
``--out`` writes it. All runs train alike, long enough to learn rows by heart where nothing keeps them from it. A bound
above what is claimed would be a bug, and is the exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.privacy.audit import audit_run
from fedpeft.report.audited import downwards
from fedpeft.rounding import upwards
from fedpeft.simulations.simulate import simulate

RECORD = {"privacy.level": "record"}
NOISELESS = {**RECORD, "privacy.noise_multiplier": 0.0}
CASES: dict[str, dict[str, object]] = {
    **{f"budget of {epsilon}": {**RECORD, "privacy.epsilon": float(epsilon)} for epsilon in (1, 3, 8)},
    "clipping, no noise": NOISELESS,
    "no noise, no clipping": {**NOISELESS, "privacy.max_grad_norm": 1e6},
    "plain training": {},
}
SETTINGS: dict[str, object] = {
    "strategy.name": "fedit",
    "partition.scheme": "iid",
    "federation.clients": 2,
    "federation.rounds": 4,
    "train.local_steps": 100,
    "train.batch_size": 64,
    "privacy.canaries": 500,
    "simulation.workers": 0,
    "run.evaluate_every": 4,
    "run.aggregation_error": False,
}
HEADERS = ("run", "claimed epsilon", "epsilon is at least", "guesses", "right", "accuracy", "seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and audit every case, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each case")
    parser.add_argument("--out", type=Path, help="where the table is written too")
    given = parser.parse_args(arguments)
    silence()
    rows = []
    for name, case in CASES.items():
        for seed in range(given.seeds):
            found = audited({**SETTINGS, **case, "run.seed": seed})
            rows.append({**found, "case": name if given.seeds == 1 else f"{name}, seed {seed}"})
            print(f"{rows[-1]['case']}: {found['epsilon_lower_bound']:.2f}", file=sys.stderr, flush=True)
    text = table(rows)
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text)
    if broken := [row["case"] for row in rows if row["violated"]]:
        raise SystemExit(f"shown to be less private than claimed: {', '.join(broken)}")


def audited(settings: Mapping[str, object]) -> dict[str, Any]:
    """Run once on the digits; return what the audit says, the accuracy, and how long the run took."""
    config = configure(dict(settings), preset="digits")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        outcome = simulate(config, Path(folder) / "run")
        seconds = time.perf_counter() - begun
        return {**audit_run(outcome.path), "accuracy": outcome.scores["accuracy"], "seconds": seconds}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the figures out in Markdown."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" + "|---:" * (len(HEADERS) - 1) + "|"]
    for row in rows:
        claimed = row["claimed_epsilon"]
        cells = (
            row["case"],
            "none" if claimed is None else upwards(claimed),
            downwards(row["epsilon_lower_bound"]),
            str(row["guesses"]),
            str(row["correct"]),
            f"{row['accuracy']:.3f}",
            f"{row['seconds']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
