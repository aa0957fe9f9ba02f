"""DP-SGD of many clients at once: gradients of single rows without hooks, and each client's own noise.

Every row is a group of its own in the layers' batched products (`fedpeft.training.batched`): it goes through a copy of
its client's tensors, and what the backward pass leaves at the copy is the row's own gradient. From there on all is as
in `fedpeft.privacy.dp_sgd`: norms in float32 over all that is trained, rows that are not finite left out, one draw of
noise a client and step from the client's own randomness, also where no row was drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.data.splits import EncodedSplit
from fedpeft.privacy.dp_sgd import FLOOR, Rows, drawn_batches
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import Randomness
from fedpeft.tasks.losses import batch_losses
from fedpeft.training.batched.layers import OwnLayers, unstacked
from fedpeft.training.batched.together import Stacks


@dataclass(frozen=True)
class JointPrivateGradients:
    """The private gradients of many clients; see `fedpeft.training.batched.together.JointGradients`.

    Parameters
    ----------
    adapted : AdaptedModel
        The model, whose rows were shown to be independent.
    layers : OwnLayers
        Its layers.
    split : EncodedSplit
        The encoded rows.
    precision : str
        ``train.precision``.
    rows : sequence of array of int
        Each client's rows.
    mechanisms : sequence of RecordMechanism
        How each client's are drawn, clipped and noised.
    randomness : sequence of Randomness
        Decides on each client's batches and noise.
    physical : int
        Rows of each client that are worked on at a time, on average; more are split, which changes no sum.
    """

    adapted: AdaptedModel
    layers: OwnLayers
    split: EncodedSplit
    precision: str
    rows: Sequence[Rows]
    mechanisms: Sequence[RecordMechanism]
    randomness: Sequence[Randomness]
    physical: int

    def batches(self, client: int) -> Iterator[Rows]:
        """Draw each step's batch as the client would by itself."""
        return drawn_batches(self.rows[client], self.mechanisms[client], self.randomness[client])

    def compute(self, stacks: Stacks, batches: Sequence[Rows]) -> tuple[Tensor, Sequence[int]]:
        """Leave the noised mean gradients in ``.grad``; the losses that are returned are NOT private."""
        owners = torch.from_numpy(np.repeat(np.arange(len(batches)), [len(batch) for batch in batches]))
        rows = np.concatenate(batches)
        sums = {name: torch.zeros_like(whole, dtype=torch.float32) for name, whole in stacks.trained.items()}
        losses = torch.zeros(len(batches), dtype=torch.float64)
        physical = self.physical * len(batches)
        for start in range(0, len(rows), physical):
            chunk = slice(start, start + physical)
            losses.index_add_(0, owners[chunk], self._accumulate(stacks, rows[chunk], owners[chunk], sums))
        for place in range(len(batches)):
            self._release(stacks, sums, place)
        for name, whole in stacks.trained.items():
            whole.grad = sums[name].to(whole)
        return losses, [len(batch) for batch in batches]

    def _accumulate(self, stacks: Stacks, rows: Rows, owners: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """Add these rows' clipped gradients to their clients' sums; return the rows' losses."""
        bounds = torch.tensor([self.mechanisms[client].max_grad_norm for client in stacks.clients])[owners]  # (b,)
        on = self.adapted.device
        owners, bounds = owners.to(on), bounds.to(on)
        copies = {name: whole.detach()[owners].requires_grad_() for name, whole in stacks.trained.items()}
        frozen = {name: whole[owners] for name, whole in stacks.frozen.items()}
        inputs = self.split.batch(rows)
        with self.layers.with_stacks({**frozen, **copies}, stacks.scaling[owners]):
            losses, counted = batch_losses(self.adapted.task, self.adapted.model, inputs, self.precision)
            losses = losses / counted.clamp(min=1)  # each row's own mean, whatever the others are
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # hooks that sleep are no concern
                losses.sum().backward()  # type: ignore[no-untyped-call] # some layers may run again, in the stacks
        samples = {name: copy.grad.float() for name, copy in copies.items() if copy.grad is not None}
        squares = torch.stack([sample.flatten(1).pow(2).sum(1) for sample in samples.values()])  # (tensors, b)
        norms = squares.sum(0).sqrt()  # (b,)
        finite = norms.isfinite()
        factors = torch.where(finite, (bounds / (norms + FLOOR)).clamp(max=1.0), 0.0)
        whole = bool(finite.all())
        for name, sample in samples.items():
            clipped = sample * factors.view(-1, *[1] * (sample.ndim - 1))
            if not whole:  # zero times infinity is not zero
                clipped[~finite] = 0.0
            sums[name].index_add_(0, owners, clipped)
        return losses.detach().cpu()

    def _release(self, stacks: Stacks, sums: dict[str, Tensor], place: int) -> None:
        """Add one client's noise to its sum, all from one draw and at its own ranks, and divide."""
        client = stacks.clients[place]
        mechanism, randomness = self.mechanisms[client], self.randomness[client]
        deviation = mechanism.noise_multiplier * mechanism.max_grad_norm
        totals = {name: unstacked(sums[name][place], stacks.shapes[place][name]) for name in stacks.trained}
        if deviation:
            sizes = [total.numel() for total in totals.values()]
            noises = torch.split(randomness.normal((sum(sizes),)).mul_(deviation), sizes)
            for total, noise in zip(totals.values(), noises, strict=True):
                total.copy_(total.double() + noise.view(total.shape).to(total.device))
        for total in totals.values():
            total /= mechanism.denominator
