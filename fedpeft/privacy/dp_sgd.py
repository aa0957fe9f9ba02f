"""DP-SGD on the adapter: clipped gradients of single rows, and noise on their sum.

M. Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133. At every step a batch is drawn
by Poisson sampling, each row's gradient g_i over ALL trained tensors together (factors and head) becomes

    g_i min(1, C / |g_i|),

and what the optimizer gets is (sum_i of those + sigma C N(0, I)) / (q n), also where no row was drawn. Gradients of
single rows come from Opacus's hooks, which are attached to a resident model once and sleep while nobody trains
privately.

Two things that Opacus leaves to its caller. A row's loss must not depend on the other rows: the loss of a causal
language model is a mean over all tokens of a batch, so here each row's own mean is taken. And clipping must bound ANY
row: norms are computed in float32 whatever the precision of the model, and a row whose gradient is not finite counts as
zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedpeft.adapters import AdaptedModel
from fedpeft.data.encoding import EncodedSplit
from fedpeft.errors import PrivacyError
from fedpeft.losses import row_losses
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import Randomness
from fedpeft.training import batches

Rows = NDArray[np.int64]
FLOOR = 1e-6  # added to a norm before dividing by it; a clipped gradient stays below the bound


class RowGradients(GradSampleHooks):  # type: ignore[misc]
    """Opacus's hooks on a model whose trained tensors change from round to round."""

    def capture_backprops_hook(self, module: nn.Module, *arguments: Any, **settings: Any) -> None:
        """Look away where nothing is trained: a frozen factor's inputs were not kept either."""
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            super().capture_backprops_hook(module, *arguments, **settings)


class ClippingOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer, with norms in float32, rows that are not finite left out, and our source of noise.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        What makes the step.
    mechanism : RecordMechanism
        How to clip, divide and add noise.
    randomness : Randomness
        Where noise comes from.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: RecordMechanism, randomness: Randomness) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_grad_norm,
            expected_batch_size=mechanism.denominator,
        )
        self._randomness = randomness

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of these rows to ``summed_grad``."""
        samples = [self._get_flat_grad_sample(parameter).float() for parameter in self.params]  # (b, *shape) each
        squares = torch.stack([sample.flatten(1).pow(2).sum(1) for sample in samples])  # (tensors, b)
        norms = squares.sum(0).sqrt()  # (b,)
        finite = norms.isfinite()
        factors = torch.where(finite, (self.max_grad_norm / (norms + FLOOR)).clamp(max=1.0), 0.0)
        whole = bool(finite.all())
        for parameter, sample in zip(self.params, samples, strict=True):
            rows = sample if whole else sample[finite]  # zero times infinity is not zero
            clipped = torch.einsum("n,n...->...", factors if whole else factors[finite], rows)
            parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad + clipped

    def add_noise(self) -> None:
        """Put the noised sum where the optimizer looks for gradients; all noise comes from one draw."""
        deviation = self.noise_multiplier * self.max_grad_norm
        sizes = [parameter.numel() for parameter in self.params]
        drawn = self._randomness.normal((sum(sizes) if deviation else 0,)).mul_(deviation)
        noises = torch.split(drawn, sizes) if deviation else ()
        for index, parameter in enumerate(self.params):
            total = parameter.summed_grad
            if deviation:
                noise = noises[index].view(total.shape).to(total.device)
                total = (total.double() + noise).to(total)
            parameter.grad = total.view_as(parameter)

    def scale_grad(self) -> None:
        """Divide by the expected number of rows."""
        for parameter in self.params:
            parameter.grad /= self.expected_batch_size


class RowEngine:
    """Gradients of single rows of one resident model; made once for it, and used for every message.

    Parameters
    ----------
    adapted : AdaptedModel
        The model.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted
        trained = [name for name in adapted.trained if adapted.parameter(name).requires_grad]
        adapted.begin_training(adapted.trained)  # hooks go where something may ever be trained
        self._hooks = RowGradients(adapted.model, loss_reduction="sum", strict=False)
        self._hooks.disable_hooks()
        adapted.begin_training(trained)  # of a round that has begun already
        self.has_moved = False  # whether a step was seen to reach the weights

    def reset(self) -> None:
        """Forget what a training that broke off has left: Opacus counts forward passes against backward passes."""
        for module in self.adapted.model.modules():
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        for name in self.adapted.trained:
            parameter: Any = self.adapted.parameter(name)
            parameter.grad_sample, parameter.summed_grad, parameter._forward_counter = None, None, 0
            vars(parameter).pop("_current_grad_sample", None)

    def backward(self, inputs: Mapping[str, Tensor], precision: str) -> float:
        """Leave each row's gradient in ``grad_sample`` of every tensor that is trained; return the sum of losses.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            Of b rows, see `fedpeft.data.splits.EncodedSplit.batch`.
        precision : str
            ``train.precision``.
        """
        adapted = self.adapted
        held = {name: value.to(adapted.device) for name, value in inputs.items()}
        targets = held.pop("labels")
        self._hooks.enable_hooks()
        try:
            with torch.autocast(adapted.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = adapted.model(**held).logits
            losses, counted = row_losses(logits, targets)
            loss = (losses / counted.clamp(min=1)).sum()  # each row's own mean, whatever the others are
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # nobody needs inputs' gradients
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._hooks.disable_hooks()
        return float(loss.detach())

    def check(self, parameters: Sequence[nn.Parameter], rows: int) -> None:
        """Raise PrivacyError where hooks saw something else than one gradient a row."""
        for parameter in parameters:
            sample = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, Tensor) or len(sample) != rows:
                raise PrivacyError(
                    f"privacy.level = 'record': '{self.adapted.base.folder}' gives no gradient of each row for a "
                    f"tensor of shape {tuple(parameter.shape)} (it mixes rows, or uses a layer more than once); "
                    "choose other adapter.targets, adapter.head=frozen, or another model."
                )


class PrivateGradients:
    """The private gradients of one client's round; see `fedpeft.training.Gradients`.

    Parameters
    ----------
    engine : RowEngine
        Of the model that is trained.
    split : EncodedSplit
        The encoded rows.
    rows : array of int, shape (n,)
        Which of them are the client's.
    mechanism : RecordMechanism
        How rows are drawn, clipped and noised.
    randomness : Randomness
        Decides on batches and noise.
    optimizer : torch.optim.Optimizer
        Over what is trained in this round; its steps are for the caller to make.
    physical : int
        Rows that are worked on at a time; larger batches are split, which changes no sum.
    precision : str
        ``train.precision``.
    shuffled : int, optional
        Size of batches that are cut from shuffled rows in place of Poisson sampling: voids the guarantee.
    """

    def __init__(
        self,
        engine: RowEngine,
        split: EncodedSplit,
        rows: Rows,
        mechanism: RecordMechanism,
        randomness: Randomness,
        optimizer: torch.optim.Optimizer,
        *,
        physical: int,
        precision: str = "fp32",
        shuffled: int | None = None,
    ) -> None:
        self._engine, self._split, self._rows, self._mechanism = engine, split, rows, mechanism
        self._randomness, self._physical, self._precision, self._shuffled = randomness, physical, precision, shuffled
        engine.reset()
        self._clipping = ClippingOptimizer(optimizer, mechanism, randomness)

    def batches(self) -> Iterator[Rows]:
        """Draw each step's batch: independent of each other, and possibly empty."""
        before = None if self._engine.has_moved else [p.detach().clone() for p in self._clipping.params]
        for batch in self._drawn():
            yield batch
            if before is not None:
                self._see_that_weights_moved(before)
                before = None

    def _drawn(self) -> Iterator[Rows]:
        if self._shuffled is not None:
            rng = np.random.default_rng(self._randomness.seed())
            yield from batches(self._rows, self._shuffled, self._mechanism.steps, rng)
            return
        for _ in range(self._mechanism.steps):
            yield self._rows[self._randomness.uniform(len(self._rows)) < self._mechanism.sample_rate]

    def compute(self, batch: Rows) -> tuple[float, int]:
        """Leave the noised mean gradient in ``.grad``; the losses that are returned are NOT private."""
        clipping = self._clipping
        chunks = [batch[start : start + self._physical] for start in range(0, len(batch), self._physical)]
        total = 0.0
        for index, chunk in enumerate(chunks):
            total += self._engine.backward(self._split.batch(chunk), self._precision)
            self._engine.check(clipping.params, len(chunk))
            clipping.signal_skip_step(do_skip=index < len(chunks) - 1)
            clipping.pre_step()
            for parameter in clipping.params:
                parameter.grad_sample = None
        if not chunks:  # nobody was drawn: noise alone
            for parameter in clipping.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            clipping.pre_step()
        for parameter in clipping.params:
            parameter.grad_sample = parameter.summed_grad = None
        return total, len(batch)

    def _see_that_weights_moved(self, before: Sequence[Tensor]) -> None:
        """Raise PrivacyError if the first step changed nothing: noise that reaches no weight protects nobody."""
        parameters = self._clipping.params
        pushed = any(p.grad is not None and bool(p.grad.any()) for p in parameters)
        if pushed and all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True)):
            raise PrivacyError(
                "the first private step moved no weight: the optimizer holds other tensors than the model, or "
                "train.learning_rate is too small to be felt."
            )
        self._engine.has_moved = self._engine.has_moved or pushed
