"""What these tests have workers do that is no client's: in a file of its own, because workers import it by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import torch

from fedpeft.errors import DataError


def where(job: int) -> tuple[int, int, int]:
    return job, os.getpid(), torch.get_num_threads()


def plus(job: int, array: np.ndarray, more: float) -> float:
    return float(array.sum()) + job + more


def refuse(job: int) -> int:
    if job == 1:
        raise DataError(f"job {job} holds no rows")
    if job == 3:
        raise KeyError(job)
    return job


def die(job: tuple[str, int]) -> str:
    """Kill the worker in its first so many attempts."""
    attempts, deaths = Path(job[0]), job[1]
    with attempts.open("a") as file:
        file.write("x")
    if len(attempts.read_text()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempts.name
