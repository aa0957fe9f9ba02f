"""LoRA-FAIR's lambda, over regimes in which its correction is small and large: the tables in docs/methods.md.

Run it with ``python -m benchmarks.lora_fair_lambda``; it takes ten minutes of one core, goes on where it was stopped,
and writes its tables into the document between their marks. Runs are short: the correction is largest in early rounds.
The last regime is no training of a model: clients of rank 2 regress matrices of rank 8 that differ between them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.methods import DOCUMENT, between
from benchmarks.mixed_ranks import LAYER, begun, target, trained
from fedpeft.adapters.state import ClientUpdate
from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.runs.history import History
from fedpeft.simulations.compare import split_words
from fedpeft.simulations.jobs import Job, plan_jobs
from fedpeft.simulations.running import run_jobs
from fedpeft.strategies import STRATEGIES
from fedpeft.strategies.algebra.factors import round_errors

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
}
MARK = "lora-fair's lambda"
LOW_RANK, CLIENTS, DIFFERENCE, ROUNDS = 2, 6, 1.0, 6  # DIFFERENCE: of a client's own part beside the common one


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
    lines.append(regression(asked.seeds))
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


def regression(seeds: int) -> str:
    """Return the row of the low-rank regression: excess of the squared distance to the mean of the clients' targets."""
    cells, errors = ["low-rank regression, excess loss"], []
    for label in METHODS:
        name, _, option = label.partition(":regularization=")
        options = {"regularization": float(option)} if option else {}
        found = [regress(name, seed, options) for seed in range(seeds)]
        losses = [loss for loss, _ in found]
        cells.append(f"{statistics.fmean(losses):.4f} ± {_spread(losses):.4f}")
        errors.append(statistics.fmean(error for _, error in found))
    return "| " + " | ".join([*cells, f"{errors[-1]:.3f}", f"{errors[0]:.3f}"]) + " |"


def regress(name: str, seed: int, options: Mapping[str, float]) -> tuple[float, float]:
    """Return a federation's excess loss, and its aggregation error in round 2."""
    wanted = [target(seed) + DIFFERENCE * target(100 * (seed + 1) + k) for k in range(CLIENTS)]
    mean = torch.stack(wanted).mean(dim=0)
    state, method = begun(seed, LOW_RANK), STRATEGIES[name](seed=seed, **options)
    error = 0.0
    for server_round in range(1, ROUNDS + 1):
        updates = [ClientUpdate(str(k), 1, {LAYER: trained(state.factors[LAYER], own)}) for k, own in enumerate(wanted)]
        merged = method.aggregate(iter(updates), state, server_round)
        if server_round == 2:
            error = round_errors(updates, state, merged).of_step
        state = merged
    best = float(torch.linalg.svdvals(mean)[LOW_RANK:].square().sum())
    loss = float((state.factors[LAYER].product() - mean).square().sum())
    return (loss - best) / float(mean.square().sum()), error


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(lines: Sequence[str]) -> str:
    """Put rows under their header."""
    header = ["regime", *(f"lambda {each}" for each in LAMBDAS), "infinite (fedit)", "error: fedit", "lambda 0"]
    return "\n".join(["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1), *lines])


if __name__ == "__main__":
    main()
