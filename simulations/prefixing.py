"""Whether a run keeps the hidden states below its lowest adapted block: decided as it begins, and then fixed.

With and without them last digits differ, so that what ``auto`` came to is written to config.toml. It is a rule and no
timing: a quarter of the blocks or more lie below, each state is used twice or more, all of them fit, and a look at
made-up rows shows that the model computes the same. Of a private run no row is looked at, nor how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedpeft.cache import cache_dir
from fedpeft.config import RunConfig, cohort_size
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import AdapterError
from fedpeft.formats import size
from fedpeft.resident import Resident
from fedpeft.training.hidden_states import default_limit
from fedpeft.training.local import num_steps
from fedpeft.training.prefix import FOLDER, UnfitError, prefix_of

LEAST_SHARE, LEAST_USES = 0.25, 2.0


@dataclass(frozen=True)
class Prefixing:
    """What was decided, and by what.

    Parameters
    ----------
    on : bool
        Whether states are kept.
    below, blocks : int
        Blocks that run once a row, of all.
    nbytes : int, optional
        Bytes of the states of all rows; None where rows are not looked at, or there are no such states.
    limit : float
        Bytes that states may take on disk, those of other runs included.
    why : str
        Why not; empty if they are kept.
    surprising : bool
        Whether `why` is no rule of thumb, and should be said where nobody asked.
    """

    on: bool
    below: int = 0
    blocks: int = 0
    nbytes: int | None = None
    limit: float = 0.0
    why: str = ""
    surprising: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for ``--json``."""
        return {
            "on": self.on,
            "blocks_below": self.below,
            "blocks": self.blocks,
            "bytes": self.nbytes,
            "limit_bytes": round(self.limit),
            "why_not": self.why,
        }

    def __str__(self) -> str:
        """Say it in one line."""
        if not self.on:
            return f"off: {self.why}"
        much = "" if self.nbytes is None else f", {size(self.nbytes)} of all rows"
        return f"on: the first {self.below} of {self.blocks} blocks run once a row{much}, at most {size(self.limit)}"


NOTHING_KEPT = Prefixing(on=False, why="not asked")


def decide(config: RunConfig, home: Resident) -> Prefixing:
    """Decide whether a run keeps hidden states.

    Parameters
    ----------
    config : RunConfig
        The run.
    home : Resident
        Its model and rows.

    Raises
    ------
    AdapterError
        ``simulation.prefix_cache = on`` where it cannot be.
    """
    asked, gigabytes = config.simulation.prefix_cache, config.simulation.prefix_cache_limit
    if asked == "off":
        return Prefixing(on=False, why="simulation.prefix_cache = 'off'")
    if config.train.neftune_alpha:
        return _off(asked, "train.neftune_alpha draws noise below the states at each step")
    limit = default_limit(cache_dir() / FOLDER) if gigabytes is None else gigabytes * 1e9
    try:
        prefix = prefix_of(home.adapted.model, config.train.precision)
    except UnfitError as error:
        return _off(asked, f"the model {error}")
    below, blocks = len(prefix.blocks), prefix.count
    if asked == "auto":
        if below < LEAST_SHARE * blocks:
            return _off(asked, f"only {below} of {blocks} blocks lie below the lowest adapted one")
        if (uses := _uses(config, home)) < LEAST_USES:
            return _off(asked, f"a row's states would be used {uses:.2g} times on average")
    problem, of_token = home.once(_look)
    if problem:
        return _off(asked, f"the model {problem}", surprising=True)
    lengths = [] if config.privacy.is_private else [home.data.train.lengths, home.test.lengths]
    nbytes = sum(int(each.sum()) for each in lengths) * of_token if lengths else None
    if asked == "auto" and nbytes is not None and nbytes > limit:
        why = f"the states of all rows take {size(nbytes)}, of at most {size(limit)} (simulation.prefix_cache_limit)"
        return _off(asked, why, surprising=True)
    return Prefixing(on=True, below=below, blocks=blocks, nbytes=nbytes, limit=limit)


def _off(asked: str, why: str, *, surprising: bool = False) -> Prefixing:
    if asked == "on":
        raise AdapterError(f"simulation.prefix_cache = 'on': {why}. Set it to auto or off.")
    return Prefixing(on=False, why=why, surprising=surprising)


def with_prefix_cache(config: RunConfig, home: Resident, tell: Callable[[str], None]) -> RunConfig:
    """Return the configuration with ``simulation.prefix_cache`` on or off.

    Parameters
    ----------
    config : RunConfig
        The run's.
    home : Resident
        Its model and rows.
    tell : callable
        Is told what was decided, where that is worth a line.
    """
    decided = decide(config, home)
    if decided.on or decided.surprising:
        tell(f"prefix cache {decided}")
    simulation = config.simulation.model_copy(update={"prefix_cache": "on" if decided.on else "off"})
    return config.model_copy(update={"simulation": simulation})


def _look(home: Resident) -> tuple[str, int]:
    """Return what is wrong with keeping states, and the bytes of a token's, or of an image's."""
    from fedpeft.privacy.independence import public_rows  # which loads Opacus

    prefix = prefix_of(home.adapted.model, home.config.train.precision)
    rows: EncodedSplit = public_rows(home)
    if problem := prefix.problem(rows.batch(range(len(rows)))):
        return problem, 0
    return "", prefix.row_bytes // (1 if rows.image_shape else prefix.row_tokens)


def _uses(config: RunConfig, home: Resident) -> float:
    """Return how often a row's states would be used, on average over training and test rows."""
    federation, every = config.federation, config.run.evaluate_every
    clients = len(home.partition.client_ids)
    cohort = cohort_size(clients, federation.fraction, federation.min_clients)
    if config.privacy.is_private:  # whose rows are not counted
        return federation.rounds * cohort / clients
    train, test = len(home.data.train), len(home.test)
    one = min(num_steps(config.train, train // clients) * config.train.rows_a_step, max(train, 1))
    trained = federation.rounds * cohort * one
    scored = (1 + federation.rounds // every) * test
    return (trained + scored) / max(1, min(trained, train) + test)
