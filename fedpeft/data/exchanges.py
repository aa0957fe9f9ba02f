"""Rows of turns, and of raw text, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from fedpeft.bases import Inputs
from fedpeft.config import RunConfig
from fedpeft.data.chat.notes import Cuts, no_cuts
from fedpeft.data.chat.rows import Row, RowEncoder
from fedpeft.data.readers import Place, plain_batches
from fedpeft.data.splits import Encoding
from fedpeft.data.tokens import BATCH_ROWS, check_vocabulary, length_of, load_tokenizer
from fedpeft.errors import DataError


def encode_conversations(
    config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset
) -> Encoding:
    """Tokenise all rows of a place: turns by the chat template, or raw texts.

    Parameters
    ----------
    config : RunConfig
        Names template, length, what gives way and what counts.
    model_dir : Path
        Folder of the tokenizer.
    inputs : Inputs
        What the model can be given.
    place : Place
        Where the rows lie, for messages.
    rows : datasets.Dataset
        Normalised rows: column ``conversation`` or ``text``.

    Returns
    -------
    Encoding
        Of which the tensors are ``tokens``, ``offsets``, ``counted``, ``answers``, ``references``,
        ``reference_offsets`` and ``cut``; see `fedpeft.data.splits.EncodedSplit`.

    Raises
    ------
    DataError
        The length does not fit the model, a row cannot be written by the template, or has no token that counts and is
        not to be skipped.
    ModelError
        There is no tokenizer, or one without a token that can pad, or its chat template refuses plain turns, or what it
        makes is not what the model can be given.
    """
    tokenizer, pad_token_id = load_tokenizer(config, model_dir)
    max_length = length_of(config, inputs, continues=True)
    if max_length < 2:
        raise DataError(
            f"data.max_length = {max_length}, but a prompt and a completion are two tokens. Set it to more."
        )
    data = config.data
    encoder = RowEncoder(tokenizer, max_length, data.truncate or "longest", data.train_on or "assistant")
    made, kept, cuts = _made(encoder, place, rows, skips=data.empty == "skip")
    tensors = _tensors(made)
    check_vocabulary(model_dir, inputs, tokenizer, max(pad_token_id, int(tensors["tokens"].max())))
    some = np.array(kept, dtype=np.int64) if cuts["empty"] else None
    return Encoding(tensors, pad_token_id, cuts, kept=some)


def _made(
    encoder: RowEncoder, place: Place, rows: datasets.Dataset, *, skips: bool
) -> tuple[list[Row], list[int], Cuts]:
    """Encode rows, and return those that have a token that counts, which they are, and what became of all."""
    cuts = no_cuts()
    made: list[Row] = []
    kept: list[int] = []
    for batch in plain_batches(rows, BATCH_ROWS):
        names = [place.row(row) for row in batch["row"]]
        for name, row in zip(names, encoder.rows(batch, names), strict=True):
            if row.counts:
                kept.append(len(kept) + cuts["empty"])
                made.append(row)
                _count(cuts, row)
            elif skips:
                cuts["empty"] += 1
            else:
                raise DataError(
                    row.why
                    or f"{name} becomes no tokens{' that the loss could count' if len(row.ids) else ''}. Remove it, or "
                    "write it in other characters, or set data.empty = 'skip' to leave such rows out."
                )
    if not made:
        raise DataError(f"no row of {place} has a token that the loss could count. See data.train_on, data.max_length.")
    return made, kept, cuts


def _count(cuts: Cuts, row: Row) -> None:
    for name in row.lost:
        cuts[name] += 1
    cuts["folded"] += row.folded


def _tensors(rows: Sequence[Row]) -> dict[str, Tensor]:
    references = [row.reference.encode(errors="surrogatepass") for row in rows]
    lengths = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)
    letters = np.cumsum([0, *map(len, references)], dtype=np.int64)
    return {
        "tokens": torch.from_numpy(np.concatenate([row.ids for row in rows])),
        "offsets": torch.from_numpy(lengths),
        "counted": torch.from_numpy(np.concatenate([row.counted for row in rows]).astype(np.uint8)),
        "answers": torch.tensor([row.answer for row in rows], dtype=torch.int32),
        "cut": torch.tensor([row.cut for row in rows], dtype=torch.int32),
        "references": torch.from_numpy(np.frombuffer(b"".join(references), dtype=np.uint8).copy()),
        "reference_offsets": torch.from_numpy(letters),
    }
