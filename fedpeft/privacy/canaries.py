"""Planted rows, by which a run's privacy can be put to the test: see `fedpeft.privacy.audit`.

A canary is a training row that is wrong: a copy with another label, or a prompt with another row's completion. It can
be learned by heart only. It belongs to one client, and was among the rows that the client trains on by the toss of a
fair coin, before anything is trained. The coins are drawn from the run's seed, as all else is; only the audit looks at
them.

Row counts are public (`privacy.public_counts`) and set the sample rate, the noise and the client's weight. Were they
those of the included canaries, they would tell of the coins. So every canary counts as a row of its client; one that is
left out is a ghost: no batch ever holds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.config import RunConfig
from fedpeft.data.partition import Partition
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import ConfigError
from fedpeft.jsons import strict_json
from fedpeft.resident import Resident
from fedpeft.runs import CANARIES
from fedpeft.seeds import generator
from fedpeft.training.evaluation import score

TRIES = 1000  # draws of another completion, before all are taken to be alike


@dataclass(frozen=True, eq=False)
class Canaries:
    """The planted rows of a run.

    Parameters
    ----------
    split : EncodedSplit
        The training rows, and all m canaries behind them.
    sources : array of int64, shape (m,)
        Which training row each is a copy of.
    owners : array of int64, shape (m,)
        Place of each one's client in the partition.
    included : array of bool, shape (m,)
        The coins: whether the client trains on it.
    """

    split: EncodedSplit
    sources: NDArray[np.int64]
    owners: NDArray[np.int64]
    included: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.included)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Where the canaries are in `split`, shape ``(m,)``."""
        return np.arange(len(self.split) - len(self), len(self.split), dtype=np.int64)

    def of(self, owner: int) -> tuple[NDArray[np.int64], int]:
        """Return the rows in `split` of a client's included canaries, and the number of those left out."""
        own = self.owners == owner
        return self.rows[own & self.included], int((own & ~self.included).sum())


def canaries_of(home: Resident) -> Canaries | None:
    """Return the planted rows, which are no part of the resident rows; None where none are configured."""
    return home.once(_planted) if home.key.canaries else None


def _planted(home: Resident) -> Canaries:
    return plant(home.config, home.key.canaries, home.data.train, home.partition, len(home.labels))


def plant(config: RunConfig, count: int, train: EncodedSplit, held: Partition, num_labels: int) -> Canaries:
    """Make a run's canaries and toss their coins; what is made depends on rows and seed alone.

    Parameters
    ----------
    config : RunConfig
        Gives the seed, and how long a row may be.
    count : int
        How many.
    train : EncodedSplit
        The training rows.
    held : Partition
        The clients, to whom canaries are dealt in turn.
    num_labels : int
        Number of labels; 0 where rows have none.

    Raises
    ------
    ConfigError
        More canaries than training rows, or labels or completions that are all alike.
    """
    if count > len(train):
        raise ConfigError(
            f"privacy.canaries = {count}, but there are {len(train)} training rows to copy. "
            f"Plant {len(train)} or fewer."
        )
    if train.labels is not None and num_labels < 2:
        raise ConfigError("privacy.canaries: the training rows have one label, and no canary can be wrong.")
    if train.labels is None and not _answered(train):
        raise ConfigError(f"privacy.canaries: {train.task} rows have neither labels nor completions to be made wrong.")
    rng = generator(config.run.seed, "canaries", "rows")
    sources = rng.choice(len(train), count, replace=False).astype(np.int64)
    if train.labels is None:
        more = _crossed(train, sources, rng, config.data.max_length or int(train.lengths.max()))
    else:
        more = _mislabelled(train, sources, rng, num_labels)
    # coins of their own: neither rows nor labels tell of them
    included = generator(config.run.seed, "canaries").integers(2, size=count).astype(bool)
    owners = np.arange(count, dtype=np.int64) % len(held.client_ids)
    return Canaries(train.append(more), sources, owners, included)


def _mislabelled(
    train: EncodedSplit, sources: NDArray[np.int64], rng: np.random.Generator, num_labels: int
) -> dict[str, Tensor]:
    """Copy rows, each with one of the other labels, all equally likely."""
    assert train.labels is not None
    right = train.labels[torch.from_numpy(sources)]
    shift = torch.from_numpy(rng.integers(1, num_labels, size=len(sources)))
    stored = _stored(train, sources)
    labels = ((right + shift) % num_labels).to(right.dtype)
    if "pixels" in train.tensors:
        return _named(train, stored) | {"labels": labels, "pixels": train.tensors["pixels"][stored]}
    texts = [_text(train, int(at)) for at in stored]
    more = _named(train, stored) | {"labels": labels} | _joined([train.tensors["tokens"][text] for text in texts])
    if "cut" in train.tensors:
        more["cut"] = train.tensors["cut"][stored]
    if "types" in train.tensors:
        more["types"] = torch.cat([train.tensors["types"][text] for text in texts])
    return more


def _answered(train: EncodedSplit) -> bool:
    """Tell whether rows are prompts and answers, rather than texts of which every token counts."""
    return "answers" in train.tensors and bool(train.tensors["answers"].any())


def _crossed(
    train: EncodedSplit, sources: NDArray[np.int64], rng: np.random.Generator, max_length: int
) -> dict[str, Tensor]:
    """Put what stands before each row's last answer before that of another row, which alone counts.

    Too long ones lose the beginning of the prompt.
    """
    tokens, counted, answers = (train.tensors[name] for name in ("tokens", "counted", "answers"))
    everything = _stored(train, np.arange(len(train)))

    def parts(row: int) -> tuple[Tensor, Tensor, Tensor]:
        at = int(everything[row])
        text, border = _text(train, at), int(answers[at])
        return tokens[text][:border], tokens[text][border:], counted[text][border:]

    texts, masks, heads, chosen = [], [], [], []
    for source in sources:
        prompt, completion, _ = parts(int(source))
        for _ in range(TRIES):
            drawn = int(rng.integers(len(train)))
            _, other, told = parts(drawn)
            if not torch.equal(other, completion):
                break
        else:
            raise ConfigError("privacy.canaries: the training rows have one completion, and no canary can be wrong.")
        kept = prompt[max(0, len(prompt) + len(other) - max_length) :]
        texts.append(torch.cat([kept, other])[:max_length])
        masks.append(torch.cat([torch.zeros(len(kept), dtype=counted.dtype), told])[:max_length])
        heads.append(len(kept))
        chosen.append(drawn)
    words = [text.encode() for text in train.references(chosen)]
    return (
        _named(train, everything[sources])
        | _joined(texts)
        | {
            "counted": torch.cat(masks),
            "answers": torch.tensor(heads, dtype=answers.dtype),
            "cut": torch.zeros(len(texts), dtype=torch.int32),
            "references": torch.tensor(list(b"".join(words)), dtype=torch.uint8),
            "reference_offsets": torch.tensor([0, *map(len, words)], dtype=torch.int64).cumsum(0),
        }
    )


def _stored(train: EncodedSplit, rows: NDArray[np.int64]) -> Tensor:
    stored = train.take(rows).rows
    assert stored is not None
    return torch.from_numpy(stored)


def _named(train: EncodedSplit, stored: Tensor) -> dict[str, Tensor]:
    """Copy what says whose rows these are, and of which domain."""
    return {name: train.tensors[name][stored] for name in ("domains", "clients") if name in train.tensors}


def _text(train: EncodedSplit, at: int) -> slice:
    offsets = train.tensors["offsets"]
    return slice(int(offsets[at]), int(offsets[at + 1]))


def _joined(texts: list[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([0, *map(len, texts)], dtype=torch.int64)
    return {"tokens": torch.cat(texts), "offsets": lengths.cumsum(0)}


def write_scores(path: Path, home: Resident, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Score every canary of a run, and write what the audit reads.

    A canary's score is its loss under the adapter before the first round, less that under the last one: higher where it
    was learned. The loss is in nats, for causal language modelling the mean over the completion's tokens. Parts of the
    adapter that stay with the clients are as drawn: an audit sees what a server sees.

    Parameters
    ----------
    path : Path
        The run directory.
    home : Resident
        The process's model and rows.
    before, after : mapping of str to Tensor
        The adapter that the run began with, and the last one.
    """
    canaries = canaries_of(home)
    assert canaries is not None
    planted = canaries.split.take(canaries.rows)
    losses = [_losses(home, planted, tensors) for tensors in (before, after)]
    facts: dict[str, Any] = {
        "included": canaries.included.tolist(),
        "scores": (losses[0] - losses[1]).tolist(),
        "clients": [home.partition.client_ids[owner] for owner in canaries.owners],
        "loss_before": losses[0].tolist(),
        "loss_after": losses[1].tolist(),
    }
    (path / CANARIES).write_text(json.dumps(strict_json(facts), allow_nan=False) + "\n", encoding="utf-8")


def _losses(home: Resident, planted: EncodedSplit, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    adapted = home.adapted
    adapted.load({**adapted.initial, **tensors}, adapted.scaling)
    scores = score(adapted.model, planted, home.config)
    return scores.loss / scores.tokens
