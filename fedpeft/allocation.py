"""How this process keeps memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache

# glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
LARGEST = 32 * 2**20  # the most that glibc takes as MMAP_THRESHOLD on 64 bits


@cache
def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for the next step, rather than give it back to the system.

    Activations of a step are as large as those of the step before, and asking for them anew costs a page fault per
    4 KB: a tenth of a bf16 step. The peak stays as it is.

    Returns
    -------
    bool
        Whether this system's malloc could be told so: glibc's can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS and Windows have none
        return False
    told = (mallopt(MMAP_THRESHOLD, LARGEST), mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(TOP_PAD, 2 * LARGEST))
    return all(told)


def few_arenas() -> None:
    """Let the threads of this process share two of malloc's arenas, as ``MALLOC_ARENA_MAX=2`` does from the start."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(ARENA_MAX, 2)
