"""What runs come to: one by itself, methods over seeds, and adapters and methods at budgets, as plain data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft import tasks
from fedpeft.formats import finite
from fedpeft.privacy.statement import read_statement
from fedpeft.privacy.words import accountants
from fedpeft.runs import read_config
from fedpeft.runs.history import ERRORS, History, domain_scores, worst
from fedpeft.simulations.jobs import CENTRALIZED, Job, bounds

Facts = dict[str, Any]
MEANS = ("own_rows", "worst_domain", *ERRORS, "bytes", "seconds")  # of what a comparison shows of each run


def run_facts(job: Job) -> Facts:
    """Return what a comparison shows of one run."""
    history = History.read(job.path)
    metric = tasks.of(job.config).main_metric
    domains = domain_scores(history.last, metric)
    federated = job.row.method != CENTRALIZED  # else what moved and merged says nothing
    statement = read_statement(job.path) or {}
    clients = (history.last or {}).get("clients")
    own_rows = clients.get(metric) if isinstance(clients, Mapping) and federated else None
    return {
        "label": job.label,
        "seed": job.seed,
        "path": str(job.path),
        "metric": metric,
        "score": finite((history.last or {}).get(metric)),
        "own_rows": finite(own_rows.get("mean")) if isinstance(own_rows, Mapping) else None,
        "worst_domain": domains[worst(domains, metric)] if domains else None,
        **{key: finite(history.rounds.get(history.done, {}).get(key)) if federated else None for key in ERRORS},
        "bytes": history.bytes_up + history.bytes_down if federated and history.is_counted else None,
        "seconds": history.seconds if history.is_counted else None,
        "epsilon": finite(statement.get("epsilon_max")),
    }


def comparison(labels: Sequence[str], seeds: Sequence[int], rounds: int, runs: Sequence[Mapping[str, Any]]) -> Facts:
    """Summarise runs by method.

    Parameters
    ----------
    labels : sequence of str
        The methods, in the order in which they are shown.
    seeds : sequence of int
        What each was to be run with.
    rounds : int
        Of each run.
    runs : sequence of mapping
        The complete ones; see `run_facts`.

    Returns
    -------
    dict
        ``rows`` with mean and spread of each method, and the ``runs`` that they were made of.
    """
    rows = []
    for label in labels:
        of_label = [run for run in runs if run["label"] == label]
        means = {key: _mean([run[key] for run in of_label if run.get(key) is not None]) for key in MEANS}
        rows.append({"method": label, **_over_seeds(of_label), **means, "epsilon": _largest_epsilon(of_label)})
    metric = runs[0]["metric"] if runs else "score"
    facts = {"metric": metric, "rounds": rounds, "seeds": list(seeds), "rows": rows, "runs": [dict(r) for r in runs]}
    return facts | {"notes": _notes_of_methods(facts)}


def _over_seeds(runs: Sequence[Mapping[str, Any]]) -> Facts:
    """Return how many runs there are, their mean score and its spread, the sample standard deviation."""
    scores = [run["score"] for run in runs if run["score"] is not None]
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return {"runs": len(runs), "score": _mean(scores), "spread": spread}


def _largest_epsilon(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the largest epsilon that runs state; None where one of them states none, which leaves none for all."""
    claims = [run["epsilon"] for run in runs]
    return max(claims) if claims and None not in claims else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _notes_of_methods(facts: Facts) -> list[str]:
    many = len(facts["seeds"])
    over = f"means over seeds {facts['seeds'][0]} to {facts['seeds'][-1]}" if many > 1 else f"seed {facts['seeds'][0]}"
    spread = "; ± is the sample standard deviation" if many > 1 else ""
    notes = [
        f"After {facts['rounds']} rounds, {over}{spread}. Aggregation error is the last round's, |DW - sent|, relative "
        "to what the round was to change, |DW - s B_t A_t|; of total, in comparison.md, to all that has been learned. "
        "Moved is up and down in all rounds, and time that of all rounds, of one run."
    ]
    if any(row["own_rows"] is not None for row in facts["rows"]):
        notes.append(
            "Own rows: the mean over clients of each one's score on its own share of the test rows, by "
            f"its own model where it has one; {facts['metric']} is on all test rows."
        )
    if any(row["epsilon"] is not None for row in facts["rows"]):
        notes.append(
            "Epsilon, the largest over seeds, is what each run states in its privacy.json, beside what it rests on."
        )
    methods = {row["method"].partition(":")[0] for row in facts["rows"]}
    return notes + [note for name, note in bounds().items() if name in methods]


def sweep(
    points: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    rounds: int,
    runs: Sequence[Mapping[str, Any]],
    statements: Sequence[Mapping[str, Any]],
) -> Facts:
    """Summarise runs by adapter, strategy and budget.

    Parameters
    ----------
    points : sequence of mapping
        What was asked for, in the order in which it is shown: ``label`` of its runs, ``adapter`` (None where it is left
        to the method), ``strategy`` and ``budget``, an epsilon, or None for no privacy.
    seeds : sequence of int
        What each was to be run with.
    rounds : int
        Of each run.
    runs : sequence of mapping
        The complete ones; see `run_facts`.
    statements : sequence of mapping
        What the private ones among them state; see `fedpeft.privacy.statement.state`.

    Returns
    -------
    dict
        ``lines``, each of one adapter and strategy with its ``points``, and the ``runs`` that they were made of.
    """
    lines: dict[tuple[str | None, str], list[Facts]] = {}
    labels: dict[tuple[str | None, str], list[str]] = {}
    for point in points:
        line = point["adapter"], point["strategy"]
        of_point = [run for run in runs if run["label"] == point["label"]]
        labels.setdefault(line, []).append(point["label"])
        lines.setdefault(line, []).append(
            {"budget": point["budget"], **_over_seeds(of_point), "epsilon_max": _largest_epsilon(of_point)}
        )
    facts: Facts = {
        "metric": runs[0]["metric"] if runs else "score",
        "rounds": rounds,
        "seeds": list(seeds),
        "budgets": sorted({point["budget"] for point in points}, key=_position_of_budget),
        "lines": [
            {
                "adapter": adapter or _kind_used(runs, labels[adapter, strategy]),
                "strategy": strategy,
                "points": sorted(placed, key=lambda point: _position_of_budget(point["budget"])),
            }
            for (adapter, strategy), placed in lines.items()
        ],
        "runs": [dict(run) for run in runs],
    }
    return facts | {"notes": _notes_of_budgets(facts, statements)}


def _kind_used(runs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str | None:
    """Return what kind of adapter the runs of a line had, where it was left to configuration and method."""
    kinds = dict.fromkeys(
        read_config(Path(run["path"])).adapter.kind for run in runs if run["label"] in labels and "path" in run
    )
    return ", ".join(kinds) or None


def _position_of_budget(budget: float | None) -> float:
    return math.inf if budget is None else budget


def _notes_of_budgets(facts: Facts, statements: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = facts["seeds"]
    over = f"means over seeds {seeds[0]} to {seeds[-1]}; ± is the sample standard deviation"
    notes = [
        f"After {facts['rounds']} rounds, {over if len(seeds) > 1 else f'seed {seeds[0]}'}. A column is a budget; "
        "epsilon is what the runs state in their privacy.json, the largest over seeds."
    ]
    if statements:
        notes.append(_assumptions(statements))
    if None in facts["budgets"]:
        notes.append("no privacy: privacy.level = none, epsilon is infinite.")
    notes.append(
        "Each epsilon is of one run alone: adapters of several runs on the same rows, or a setting chosen by their "
        "scores, cost more."
    )
    strategies = {line["strategy"].partition(":")[0] for line in facts["lines"]}
    return notes + [note for name, note in bounds().items() if name in strategies]


def _assumptions(statements: Sequence[Mapping[str, Any]]) -> str:
    """Say on one line what all the epsilons rest on."""
    one = statements[0]
    computed = sorted({name for each in statements for name in each.get("computed_by", ())})
    by = accountants({**one, "computed_by": computed})
    reasons = dict.fromkeys(reason for each in statements for reason in each["reasons"])
    warnings = dict.fromkeys(warning for each in statements for warning in each["warnings"])
    return " ".join(
        [
            f"Privacy of level {one['level']} at delta = {one['delta']:g} ({by}); neighbours: {one['adjacency']}.",
            *([f"No guarantee: {'; '.join(reasons)}."] if reasons else []),
            *(f"Warning: {warning}." for warning in warnings),
        ]
    )
