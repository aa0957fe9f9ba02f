"""Whether rows that are looked at in the clear, as test rows are, are among those that are to be protected."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.config import RunConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import FedpeftError
from fedpeft.resident import Resident
from fedpeft.runs import CONFIG_FILE, read_config
from fedpeft.tasks.encoding import encode_rows

LONGEST_CHAIN = 64  # runs of which each began with the adapter of the one before
ABOVE = 3  # folders above an adapter in which its run may be: RUN/clients/NAME/adapter


@dataclass(frozen=True)
class InTheClear:
    """What of a run's training rows no noise covers.

    Parameters
    ----------
    held_out : bool
        Whether test rows were held out of the clients' own source: they are scored in the clear.
    scored : int
        Test rows that are training rows too, and scored in the clear all the same, as far as that is known.
    begun : int
        Rows of ``adapter.init_data`` that are training rows too, likewise.
    owned : int
        Test rows that the source itself says are of the run's clients, and scored in the clear all the same.
    started : str
        The run on the same source whose adapter this one began with; empty where none is known of.
    """

    held_out: bool = False
    scored: int = 0
    begun: int = 0
    owned: int = 0
    started: str = ""

    @property
    def in_scores(self) -> bool:
        """Whether scores and answers tell of what was to be protected."""
        return bool(self.held_out or self.scored or self.owned)


def in_the_clear(home: Resident) -> InTheClear:
    """Return what is looked at in the clear, as far as training rows are here; found once, as files may go."""
    return home.once(_in_the_clear)


def _in_the_clear(home: Resident) -> InTheClear:
    return InTheClear(
        home.holds_out_test_rows,
        scored_training_rows(home),
        home.once(initial_training_rows),
        test_rows_of_clients(home),
        home.once(run_begun_with),
    )


def scored_training_rows(home: Resident) -> int:
    """Return how many of the given test rows are training rows too, as far as training rows are here."""
    if home.config.data.source is None or home.holds_out_test_rows:
        return 0
    return shared_rows(home.data.train, home.test)


def initial_training_rows(home: Resident) -> int:
    """Return how many of the rows that an adapter's start looks at are training rows too, as far as these are here."""
    given = home.config.adapter.init_data
    if home.config.data.source is None or given is None:
        return 0
    return shared_rows(home.data.train, encode_rows(home.config, home.folder, given, home.labels))


def test_rows_of_clients(home: Resident) -> int:
    """Return how many test rows are of the run's clients by their own source, such as each client's own file.

    Rows of ``data.test`` are not among them: who names them says that they may be public.
    """
    data = home.config.data
    if data.source is None or data.test is not None or home.holds_out_test_rows or home.test.clients is None:
        return 0
    return sum(str(client) in home.partition.client_ids for client in home.test.clients)


def run_begun_with(home: Resident) -> str:
    """Return the run on the same source whose adapter this one begins with, also by others between; empty for none.

    It is known by the folders that ``adapter.start`` lies in. An adapter that was copied elsewhere is not recognised.
    """
    source, start = home.key.data.source, home.config.adapter.start
    for _ in range(LONGEST_CHAIN):
        found = None if start is None else _run_of(Path(start).expanduser())
        if found is None:
            break
        path, config = found
        if source is not None and _is_same(source, config.data.source):
            return str(path)
        start = config.adapter.start
    return ""


def _run_of(adapter: Path) -> tuple[Path, RunConfig] | None:
    adapter = adapter.resolve()
    for path in (adapter, *adapter.parents[:ABOVE]):
        if (path / CONFIG_FILE).is_file():
            try:
                return path, read_config(path)
            except FedpeftError:  # of another program, or of a version to come
                return None
    return None


def _is_same(source: str, other: str | None) -> bool:
    return other is not None and (source == other or os.path.realpath(source) == os.path.realpath(other))


def shared_rows(train: EncodedSplit, test: EncodedSplit) -> int:
    """Return how many test rows are training rows too, by the digest of what the model reads of them.

    Whatever label they have there: how a model scores a text or an image under another label tells of it as well.

    Parameters
    ----------
    train, test : EncodedSplit
        Encoded alike: tokens or pixels.
    """
    protected = set(_digests(train))
    return sum(digest in protected for digest in _digests(test))


def _digests(split: EncodedSplit) -> Iterator[bytes]:
    index = split.indices_stored
    if "pixels" in split.tensors:
        for at in index:
            yield _digest(split.tensors["pixels"][int(at)].contiguous().numpy().tobytes())
        return
    tokens, offsets = split.tensors["tokens"].numpy(), split.tensors["offsets"].numpy()
    for at in index:
        yield _digest(tokens[offsets[at] : offsets[at + 1]].tobytes())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
