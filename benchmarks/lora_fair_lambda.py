"""LoRA-FAIR's lambda, over regimes in which its correction is small and large: the table in docs/methods.md.

Run it with ``python benchmarks/lora_fair_lambda.py``; it takes ten minutes on one core, goes on where it was stopped,
and writes its table into the document between its marks. Runs are short: the correction is largest in early rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.methods import DOCUMENT, between
from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.report.history import History
from fedpeft.simulations.compare import Job, plan_jobs, run_jobs, split_words

LAMBDAS = ("0", "0.01", "0.1", "1")
METHODS = [*(f"lora-fair:regularization={each}" for each in LAMBDAS), "fedit"]
SHORT: dict[str, object] = {"federation.rounds": 4, "train.batch_size": 16}
LONG: dict[str, object] = {
    "federation.rounds": 3, "train.local_steps": 20, "train.batch_size": 8,
    "train.learning_rate": 1.5e-2, "adapter.head": "frozen",
}  # fmt: skip
REGIMES: dict[str, dict[str, object]] = {
    "feature skew": SHORT,
    "label skew": {**SHORT, "partition.scheme": "dirichlet", "partition.alpha": 0.3},
    "long rounds": LONG,
    "low rank": {**LONG, "adapter.rank": 2, "adapter.alpha": 4.0},
}
MARK = "lora-fair's lambda"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all regimes, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/lora-fair-lambda"))
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    asked = parser.parse_args(arguments)
    silence()
    lines = []
    for name, settings in REGIMES.items():
        rows, _ = split_words(METHODS)
        common = {"simulation.workers": 0, "run.evaluate_every": 100, **settings}
        config = configure(common, preset="digits")
        jobs = plan_jobs(rows, config, asked.seeds, asked.out / name.replace(" ", "-"))
        run_jobs(jobs, config)
        lines.append(line(name, {row.label: [job for job in jobs if job.row is row] for row in rows}))
    text = asked.document.read_text(encoding="utf-8")
    asked.document.write_text(between(text, MARK, table(lines)), encoding="utf-8")


def line(regime: str, jobs: Mapping[str, Sequence[Job]]) -> str:
    """Return a row: test loss and accuracy of each lambda, and the share of FedIT's error that is left in round 2."""
    histories = {label: [History.read(job.path) for job in each] for label, each in jobs.items()}
    cells = [regime]
    for found in histories.values():
        losses, scores = ([(h.last or {})[key] for h in found] for key in ("loss", "accuracy"))
        cells.append(f"{statistics.fmean(losses):.4f} / {statistics.fmean(scores):.4f} ± {_spread(scores):.4f}")
    nearest, fedit = (
        statistics.fmean(h.rounds[2]["aggregation_error"] for h in histories[label]) for label in (METHODS[0], "fedit")
    )
    return "| " + " | ".join([*cells, f"{fedit:.3f}", f"{nearest:.3f}"]) + " |"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(lines: Sequence[str]) -> str:
    """Put rows under their header."""
    header = ["regime", *(f"lambda {each}" for each in LAMBDAS), "infinite (fedit)", "error: fedit", "lambda 0"]
    return "\n".join(["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1), *lines])


if __name__ == "__main__":
    main()
