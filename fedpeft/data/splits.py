"""Encoded rows, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.data.columns import IGNORED
from fedpeft.places import in_file


@dataclass(frozen=True)
class Normalisation:
    """How stored 8-bit pixels become the model's input: ``(pixel * scale - mean) / std``, by channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Origin:
    """Where rows stood in their source.

    Parameters
    ----------
    files : tuple of tuple
        As `fedpeft.places.Place.files`.
    skipped : tuple of int
        Numbers of rows of the source, from 1, that are not among the stored ones, ascending.
    """

    files: tuple[tuple[int, str], ...] = ()
    skipped: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return vars(self)

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Origin:
        """Read what `to_json` returned."""
        return cls(tuple((start, name) for start, name in held["files"]), tuple(held["skipped"]))

    def of(self, stored: int) -> tuple[int, str | None]:
        """Return the number of a stored row, from 1, in its source or its own file, and what that file is called."""
        number = stored + 1
        for skipped in self.skipped:
            if skipped > number:
                break
            number += 1
        return in_file(self.files, number)


@dataclass(frozen=True)
class Encoding:
    """What a task makes of rows.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        As `EncodedSplit` holds them, without labels, numbers, domains and clients.
    pad_token_id : int, optional
        What pads texts.
    cuts : mapping of str to int
        How many rows lost what; see `fedpeft.data.tokens.cut_notes`.
    normalisation : Normalisation, optional
        How pixels of 8 bits are scaled.
    write_pixels : callable, optional
        Writes ``pixels``, which need not fit in memory, to a file of safetensors.
    kept : array of int64, optional
        Which of the rows these are, where some were skipped; all if None.
    """

    tensors: Mapping[str, Tensor]
    pad_token_id: int | None = None
    cuts: Mapping[str, int] = field(default_factory=dict)
    normalisation: Normalisation | None = None
    write_pixels: Callable[[Path], None] | None = None
    kept: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Encoded rows, of which batches are made.

    Parameters
    ----------
    task : str
        Name of what they are for.
    tensors : mapping of str to Tensor
        As stored: ``tokens`` (all rows' ids in one row, int32) with ``offsets`` (n + 1,) and ``types``; or ``pixels``
        (n, C, H, W), uint8 or ready float32; ``labels`` (n,), ids, or ``targets`` (n,), numbers, or ``counted``, uint8,
        one for each of ``tokens``: whether the loss counts it. Rows of turns have ``answers`` (n,), the place in the
        row of the first token of its last answer, and the whole text of that, UTF-8, in ``references``, uint8, with
        ``reference_offsets`` (n + 1,). ``cut`` (n,) says how many tokens a row lost. ``domains`` and ``clients`` (n,)
        are indices into `names`. ``more_pixels`` are those of rows that were appended.
    names : mapping of str to tuple of str
        Names of domains and clients.
    pad_token_id : int, optional
        What pads texts.
    normalisation : Normalisation, optional
        How pixels of 8 bits are scaled.
    fingerprint : str
        SHA-256 of the stored contents.
    rows : array of int64, optional
        Which of the stored rows these are; all if None.
    notes, cautions : tuple of str
        What whoever holds the rows should know, in one line each: how they were read, and what is amiss.
    origin : Origin
        Where the stored rows stood in their source.
    """

    task: str
    tensors: Mapping[str, Tensor]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pad_token_id: int | None = None
    normalisation: Normalisation | None = None
    fingerprint: str = ""
    rows: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)

    def __len__(self) -> int:
        return len(self.indices_stored)

    @cached_property
    def indices_stored(self) -> NDArray[np.int64]:
        """Which of the stored rows these are, shape ``(n,)``."""
        if self.rows is not None:
            return self.rows
        stored = len(self.tensors["pixels"]) if "pixels" in self.tensors else len(self.tensors["offsets"]) - 1
        return np.arange(stored, dtype=np.int64)

    @cached_property
    def labels(self) -> Tensor | None:
        """Label ids, shape ``(n,)``, int64; None where rows have none."""
        return self.tensors["labels"][torch.from_numpy(self.indices_stored)] if "labels" in self.tensors else None

    @cached_property
    def domains(self) -> tuple[str, ...] | None:
        """Each row's domain, where `data.domain` is configured."""
        return self._named("domains")

    @cached_property
    def clients(self) -> tuple[str, ...] | None:
        """Each row's client, where `partition.by` is configured."""
        return self._named("clients")

    def _named(self, column: str) -> tuple[str, ...] | None:
        if column not in self.tensors:
            return None
        names = self.names[column]
        return tuple(names[code] for code in self.tensors[column].numpy()[self.indices_stored])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, shape ``(n,)``; ones for images."""
        if "offsets" not in self.tensors:
            return np.ones(len(self), dtype=np.int64)
        lengths: NDArray[np.int64] = np.diff(self.tensors["offsets"].numpy())[self.indices_stored]
        return lengths

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Shape ``(C, H, W)`` of an image; None for texts."""
        return tuple(self.tensors["pixels"].shape[1:]) if "pixels" in self.tensors else None

    def take(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> EncodedSplit:
        """Return some of the rows, without copying what is stored."""
        return replace(self, rows=self.indices_stored[np.asarray(indices, dtype=np.int64)])

    def append(self, more: Mapping[str, Tensor]) -> EncodedSplit:
        """Return these rows with others behind them.

        Parameters
        ----------
        more : mapping of str to Tensor
            The same tensors as this split's, of the m rows to append.
        """
        tensors = {name: torch.cat([held, more[name]]) for name, held in self.tensors.items() if "pixels" not in name}
        for name in ("offsets", "reference_offsets"):
            if name in more:
                tensors[name] = torch.cat([self.tensors[name], self.tensors[name][-1] + more[name][1:]])
        if "offsets" in more:
            stored, count = len(self.tensors["offsets"]) - 1, len(more["offsets"]) - 1
        else:
            # pixels are mapped from a file that may be larger than the memory: they stay there
            before = self.tensors.get("more_pixels", self.tensors["pixels"][:0])
            tensors |= {"pixels": self.tensors["pixels"], "more_pixels": torch.cat([before, more["pixels"]])}
            stored, count = len(self.tensors["pixels"]) + len(before), len(more["pixels"])
        return replace(self, tensors=tensors, rows=np.concatenate([self.indices_stored, stored + np.arange(count)]))

    def batch(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> dict[str, Tensor]:
        """Return a model's inputs for some rows.

        Parameters
        ----------
        indices : sequence of int
            The b rows, in the order wanted.

        Returns
        -------
        dict of str to Tensor
            Texts, padded on the right to the longest row of the batch: ``input_ids``, ``attention_mask`` and, where
            the tokenizer makes them, ``token_type_ids``, each ``(b, t)`` and int64. Images: ``pixel_values``
            ``(b, C, H, W)``, float32. ``labels``: ``(b,)``, ids or numbers, or where tokens are counted ``(b, t)``, the
            tokens with -100 on padding and on those that the loss leaves out.
        """
        index = torch.from_numpy(self.indices_stored[np.asarray(indices, dtype=np.int64)])  # (b,)
        inputs = self._pixels(index) if "pixels" in self.tensors else self._texts(index)
        for name in ("labels", "targets"):
            if name in self.tensors:
                inputs["labels"] = self.tensors[name][index]
        return inputs

    def _pixels(self, index: Tensor) -> dict[str, Tensor]:
        stored = self.tensors["pixels"]
        pixels = stored[index.clamp(max=len(stored) - 1)].float()  # (b, C, H, W)
        if "more_pixels" in self.tensors:
            late = index >= len(stored)  # (b,)
            pixels[late] = self.tensors["more_pixels"][index[late] - len(stored)].float()
        if self.normalisation is not None:
            mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (self.normalisation.mean, self.normalisation.std))
            pixels = pixels.mul_(self.normalisation.scale).sub_(mean).div_(std)
        return {"pixel_values": pixels}

    def _texts(self, index: Tensor) -> dict[str, Tensor]:
        assert self.pad_token_id is not None
        offsets, tokens = self.tensors["offsets"], self.tensors["tokens"]
        start, length = offsets[index], offsets[index + 1] - offsets[index]  # (b,)
        position = torch.arange(int(length.max()) if len(index) else 0)  # (t,)
        held = position < length[:, None]  # (b, t)
        at = (start[:, None] + position).clamp_(max=len(tokens) - 1)
        ids = tokens[at].long().masked_fill_(~held, self.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": held.long()}
        if "types" in self.tensors:
            inputs["token_type_ids"] = self.tensors["types"][at].long().masked_fill_(~held, 0)
        if "counted" in self.tensors:
            counted = held & self.tensors["counted"][at].bool()
            inputs["labels"] = ids.masked_fill(~counted, IGNORED)
        return inputs

    def prompts(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[Tensor]:
        """Return what a model is given that is to write the last answers itself.

        Parameters
        ----------
        indices : sequence of int
            The rows, which must be of turns.

        Returns
        -------
        list of Tensor
            Token ids before each row's last answer, ``(t,)``, int64: earlier turns and what the template writes to
            open an answer. Empty where a row has no answer.
        """
        starts, answers = self.tensors["offsets"], self.tensors["answers"]
        stored = self.indices_stored[np.asarray(indices, dtype=np.int64)].tolist()
        return [self.tensors["tokens"][int(starts[at]) :][: int(answers[at])].long() for at in stored]

    def references(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """Return the last answer of each of some rows, whole, as it stands in the source; empty where there is none."""
        offsets, letters = self.tensors["reference_offsets"], self.tensors["references"]
        stored = self.indices_stored[np.asarray(indices, dtype=np.int64)].tolist()
        return [bytes(letters[int(offsets[at]) : int(offsets[at + 1])].numpy()).decode() for at in stored]


@dataclass(frozen=True, eq=False)
class EncodedData:
    """Everything that a run reads.

    Parameters
    ----------
    train, test : EncodedSplit
        Its rows.
    labels : tuple of str
        Label names in the order of their ids; empty where rows have none.
    fingerprint : str
        SHA-256 of the contents of both splits.
    task : str
        Name of what they are for.
    pad_token_id : int, optional
        What pads texts; a model's configuration must name it.
    """

    train: EncodedSplit
    test: EncodedSplit
    labels: tuple[str, ...]
    fingerprint: str
    task: str
    pad_token_id: int | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """How the rows were read, in one line each; no record of a private run may hold it."""
        return tuple(dict.fromkeys([*self.train.notes, *self.test.notes]))

    @property
    def cautions(self) -> tuple[str, ...]:
        """What is amiss with the rows, in one line each; no record of a private run may hold it."""
        return tuple(dict.fromkeys([*self.train.cautions, *self.test.cautions]))
