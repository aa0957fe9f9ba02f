"""The runs of a comparison, one after the other on the same workers; those that are done are not repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpeft.config import RunConfig
from fedpeft.config.federation import MACHINE_KEYS
from fedpeft.errors import FedpeftError
from fedpeft.formats import duration, number
from fedpeft.report.privacy import epsilon
from fedpeft.simulations.jobs import Job
from fedpeft.simulations.judging import run_facts
from fedpeft.simulations.simulate import ray_grid, resume, simulate

if TYPE_CHECKING:
    from fedpeft.simulations.grids.ray import RayGrid
    from fedpeft.strategies.rounds.records import Outcome

INTERRUPTED = 130  # by the keyboard
Facts = dict[str, Any]


@dataclass
class Compared:
    """What a comparison gave.

    Parameters
    ----------
    runs : list of dict
        Facts of each run that is complete.
    failed : dict of str to str
        Why the others stopped, by folder.
    interrupted : int
        How a command is to exit, where somebody stopped it; 0 where nobody did.
    """

    runs: list[Facts] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: int = 0


def run_jobs(
    jobs: Sequence[Job], config: RunConfig, *, tell: Callable[[str], None] = print, verbose: bool = False
) -> Compared:
    """Run what is not done yet; an interrupted comparison that is asked for again goes on where it was.

    Parameters
    ----------
    jobs : sequence of Job
        See `plan_jobs`.
    config : RunConfig
        What they have in common; names the workers, which all runs share.
    tell : callable
        Is told of each run in one line.
    verbose : bool
        Let the libraries below speak.
    """
    compared = Compared()
    undone = sum(not job.is_done for job in jobs)
    started, done = time.monotonic(), 0
    with (ray_grid(config, verbose=verbose) if undone else None) or nullcontext() as grid:
        for index, job in enumerate(jobs, 1):
            name = f"run {index}/{len(jobs)}  {job.label}  seed {job.seed}"
            if job.is_done:
                compared.runs.append(run_facts(job))
                tell(f"{name}  {_score(compared.runs[-1])}  done before")
                continue
            begun = time.monotonic()
            try:
                outcome = _simulated(job, grid, verbose)
            except KeyboardInterrupt as interruption:
                compared.interrupted = getattr(interruption, "exit_code", INTERRUPTED)
                break
            except FedpeftError as error:  # of this row; the others may have cost hours
                compared.failed[str(job.path)] = str(error)
                tell(f"{name}  failed: {error}")
                continue
            if outcome.reason == "interrupted":
                compared.interrupted = outcome.exit_code
                break
            done += 1
            now = time.monotonic()
            left = f"  ETA {duration((now - started) / done * (undone - done))}" if undone > done else ""
            if outcome.is_complete:
                compared.runs.append(run_facts(job))
                tell(f"{name}  {_score(compared.runs[-1])}  {duration(now - begun)}{left}")
            else:
                compared.failed[str(job.path)] = outcome.reason
                tell(f"{name}  failed: {outcome.error or outcome.reason}{left}")
    return compared


def _simulated(job: Job, grid: RayGrid | None, verbose: bool) -> Outcome:
    """Run a job, or go on with it where it was interrupted."""
    if not job.is_begun:
        return simulate(job.config, job.path, verbose=verbose, grid=grid)
    here = job.config.model_dump(exclude_none=True)
    kept = {key: here["run"][key] for key in ("checkpoint_every", "keep_checkpoints")}
    machine = {key: value for key, value in here["simulation"].items() if key in MACHINE_KEYS}
    return resume(job.path, {"simulation": machine, "run": kept}, verbose=verbose, grid=grid)


def _score(facts: Facts) -> str:
    score = f"{facts['metric']} {number(facts['score'])}"
    return score if facts["epsilon"] is None else f"{score}  epsilon {epsilon(facts['epsilon'])}"
