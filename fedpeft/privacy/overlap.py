"""Whether test rows, which are scored in the clear, are among the rows that are to be protected."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from fedpeft.data.splits import EncodedSplit


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
