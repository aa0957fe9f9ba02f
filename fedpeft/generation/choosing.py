"""Answers that a model does not write but chooses: of those that the test rows have, the likeliest one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.data.columns import IGNORED
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import DataError
from fedpeft.generation.decoding import Limits, batches, kept_tokens, limits_of, own_settings_aside
from fedpeft.tasks.losses import batch_losses

MOST_OPTIONS = 32  # different answers of a split: each is read once a row
LOOKED_AT = 16  # rows with the same answer, for one of which it was not cut


def options_of(split: EncodedSplit) -> dict[str, Tensor]:
    """Return the different answers of a split's rows, in sorted order, as tokens to the end of the turn, ``(k,)``.

    Raises
    ------
    DataError
        There is but one, or there are too many for rows of multiple choice.
    """
    every = range(len(split))
    held: dict[str, list[int]] = {}
    for row, (prompt, reference) in enumerate(zip(split.prompts(every), split.references(every), strict=True)):
        if len(prompt):
            held.setdefault(reference, []).append(row)
    if not 2 <= len(held) <= MOST_OPTIONS:
        raise DataError(
            f"data.metric asks for the likeliest of the answers that the test rows have: these are {len(held)} "
            f"different ones, and 2 to {MOST_OPTIONS} are wanted, such as A, B, C, D. Ask for answers that the model "
            "writes; lm-eval's tasks have options that differ by row."
        )
    # of rows with the same answer, the first that was cut least
    return {text: max(_answers(split, held[text][:LOOKED_AT]), key=len) for text in sorted(held)}


def _answers(split: EncodedSplit, rows: list[int]) -> list[Tensor]:
    """Return the tokens of the last answers of some rows, as far as they count."""
    found = []
    for row, prompt in zip(rows, split.prompts(rows), strict=True):
        batch = split.batch([row])
        counted = (batch["labels"][0] != IGNORED).nonzero()  # (c, 1)
        found.append(batch["input_ids"][0, len(prompt) : int(counted.max()) + 1 if len(counted) else None])
    return found


def choose(model: nn.Module, split: EncodedSplit, rows: NDArray[np.int64], config: RunConfig) -> list[str]:
    """Return for some rows of a split which of its answers the model finds the likeliest, its end of turn included.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model, see `fedpeft.generation.generate`.
    split : EncodedSplit
        Holds the rows.
    rows : array of int64, shape (m,)
        Which.
    config : RunConfig
        Gives the precision.

    Raises
    ------
    DataError
        See `options_of`.
    """
    options, task = options_of(split), tasks.of(config)
    texts, tokens = list(options), list(options.values())
    limits = limits_of(model, Limits(max(map(len, tokens))))
    prompts = [kept_tokens(prompt, limits) for prompt in split.prompts(rows)]
    pairs = [(row, option) for row in range(len(rows)) for option in range(len(texts))]
    losses = torch.zeros(len(rows), len(texts), dtype=torch.float64)  # (m, o)
    with own_settings_aside(model), torch.no_grad():
        for part in batches([len(prompts[row]) for row, _ in pairs], limits):
            some = [pairs[each] for each in part]
            batch = _batch([(prompts[row], tokens[option]) for row, option in some], split.pad_token_id or 0)
            found, _ = batch_losses(task, model, batch, config.train.precision)
            at = torch.tensor(some)  # (b, 2)
            losses[at[:, 0], at[:, 1]] = found.cpu()
    return [texts[int(best)] for best in losses.argmin(1)]


def _batch(pairs: list[tuple[Tensor, Tensor]], padding: int) -> Mapping[str, Any]:
    """Return a model's inputs for prompts with answers behind them, of which the answers count."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), longest), padding, dtype=torch.int64)  # (b, t)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[row, :start], ids[row, start:end] = prompt, answer
        mask[row, :end], labels[row, start:end] = 1, answer
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
