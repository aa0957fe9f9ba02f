"""Whether rows that are looked at in the clear, as test rows are, are among those that are to be protected."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from fedpeft.data.splits import EncodedSplit
from fedpeft.resident import Resident
from fedpeft.tasks.encoding import encode_rows


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
    """

    held_out: bool = False
    scored: int = 0
    begun: int = 0


def in_the_clear(home: Resident) -> InTheClear:
    """Return what is looked at in the clear, as far as training rows are here; found once, as files may go."""
    return home.once(_in_the_clear)


def _in_the_clear(home: Resident) -> InTheClear:
    return InTheClear(home.holds_out_test_rows, scored_training_rows(home), home.once(initial_training_rows))


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
