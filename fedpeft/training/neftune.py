"""NEFTune: uniform noise on the embeddings of tokens, in training alone.

N. Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", ICLR 2024, arXiv 2310.05914: each number of
a row's embeddings gets alpha / sqrt(L d) times a draw from [-1, 1), where d is the width and L the row's length. L
counts the row's own tokens here, as in the paper's text; transformers and TRL take the padded length, by which a row's
noise would depend on the rows beside it.

At record level that matters. Given its own tokens, the noise of a row has the same distribution whatever the other
rows are, and is independent of theirs. So runs on neighbouring data can be coupled to give the rows that they share the
same noise; under any such noise one row moves the sum of clipped gradients by the bound at most, and what holds of each
holds of their mixture. Dropout's masks are covered by the same argument. Like them, the noise must not be known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.errors import AdapterError
from fedpeft.tasks.packing import packing_of

Draw = Callable[[Tensor], Tensor]


def uniform(like: Tensor) -> Tensor:
    """Return numbers from [-1, 1) of this shape, from torch's generator."""
    return torch.rand(like.shape, device=like.device) * 2 - 1


class EmbeddingNoise:
    """Noise for a model's embeddings.

    Parameters
    ----------
    model : torch.nn.Module
        With or without an adapter.
    alpha : float
        Of the noise; 0 is none, and draws nothing.
    draw : callable
        Makes numbers in [-1, 1], ``(b, t, d)``, for embeddings of that shape; from torch's generator if not given.
    """

    def __init__(self, model: nn.Module, alpha: float, draw: Draw = uniform) -> None:
        self._model, self._alpha, self._draw = model, alpha, draw
        self._lengths = torch.empty(0)

    @contextlib.contextmanager
    def of(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Add noise to what is embedded inside the block.

        Parameters
        ----------
        batch : mapping of str to Tensor
            See `fedpeft.data.splits.EncodedSplit.batch`.
        """
        if not self._alpha:
            yield
            return
        self._lengths = batch["attention_mask"].sum(1)  # (b,)
        handle = embeddings_of(self._model).register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
        if len(embedded) != len(self._lengths):  # such as virtual tokens, which a kind may look up here
            return embedded
        if not module.training:  # the first batch of a process has a look at the model before it trains it
            return embedded
        lengths = self._lengths.to(embedded.device)
        size = self._alpha / (lengths * embedded.shape[-1]).sqrt()  # (b,)
        drawn = self._draw(embedded)  # (b, t, d)
        return embedded + (drawn * size[:, None, None]).to(embedded.dtype)


def embeddings_of(model: nn.Module) -> nn.Module:
    """Return the layer that embeds tokens."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return embeddings


def check_noise(model: nn.Module, *, reads_tokens: bool) -> None:
    """Raise AdapterError where ``train.neftune_alpha`` has nothing to add noise to, or rows share a sequence."""
    if not reads_tokens:
        raise AdapterError("train.neftune_alpha adds noise to the embeddings of tokens, and this task reads images.")
    if packing_of(model) is not None:
        raise AdapterError(
            "train.neftune_alpha scales a row's noise by its length, and data.packing = true puts several rows into a "
            "sequence. Leave one of them."
        )
