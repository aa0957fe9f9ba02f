"""Whether test rows, which are scored in the clear, are among the rows that are to be protected."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from fedpeft.data.splits import EncodedSplit


def shared_rows(train: EncodedSplit, test: EncodedSplit) -> int:
    """Return how many test rows are training rows too, by the digest of all that the task reads of them.

    Parameters
    ----------
    train, test : EncodedSplit
        Encoded alike: tokens or pixels, and labels.
    """
    protected = set(_digests(train))
    return sum(digest in protected for digest in _digests(test))


def _digests(split: EncodedSplit) -> Iterator[bytes]:
    index = split.indices_stored
    # a completion's prompt is part of its tokens, and the loss leaves it out
    columns = [split.tensors[name].numpy() for name in ("labels", "prompts") if name in split.tensors]
    if "pixels" in split.tensors:
        for at in index:
            content = split.tensors["pixels"][int(at)].contiguous().numpy()
            yield _digest(content.tobytes(), [column[at].tobytes() for column in columns])
        return
    tokens, offsets = split.tensors["tokens"].numpy(), split.tensors["offsets"].numpy()
    for at in index:
        content = tokens[offsets[at] : offsets[at + 1]]
        yield _digest(content.tobytes(), [column[at].tobytes() for column in columns])


def _digest(content: bytes, columns: list[bytes]) -> bytes:
    return hashlib.blake2b(content + b"".join(columns), digest_size=16).digest()
