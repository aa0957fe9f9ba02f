"""DP-SGD on the adapter: clipped gradients of single rows, and noise on their sum.

M. Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133. At every step a batch is drawn
by Poisson sampling, each row's gradient g_i over ALL trained tensors together (factors and head) becomes

    g_i min(1, C / |g_i|),

and what the optimizer gets is (sum_i of those + sigma C N(0, I)) / (q n), also where no row was drawn. Gradients of
single rows come from Opacus's hooks, which are attached to a resident model once and sleep while nobody trains
privately. Where experts or embeddings are adapted, of which hooks see nothing, each row is a batch by itself.

Three things that Opacus leaves to its caller. A row's loss must not depend on the other rows: the loss of a causal
language model is a mean over all tokens of a batch, so here each row's own mean is taken. Clipping must bound ANY row:
norms are computed in float32 whatever the precision of the model, and a row whose gradient is not finite counts as
zero. And a layer must see the rows as its batch: one that is also called with positions (a batch of one), with tokens
or with windows has no gradient of single rows, though Opacus books one. Such a call is refused by name; what no shape
tells of, `fedpeft.privacy.independence` finds.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.utils.tensor_utils import sum_over_all_but_batch_and_last_n
from torch import Tensor, nn

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.config import TrainConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import PrivacyError
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import Randomness
from fedpeft.tasks.losses import batch_losses
from fedpeft.tasks.packing import packing_of
from fedpeft.training.checkpointing import suit_hooks
from fedpeft.training.local import batches
from fedpeft.training.neftune import EmbeddingNoise

Rows = NDArray[np.int64]
FLOOR = 1e-6  # added to a norm before dividing by it; a clipped gradient stays below the bound


def layer_norm_gradients(
    layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return each row's gradient of a layer normalisation, which may have no bias; Opacus's own rule needs one.

    Parameters
    ----------
    layer : nn.LayerNorm
        The layer.
    activations : list of Tensor
        Its input, ``(b, ..., *normalized_shape)``.
    backprops : Tensor
        The loss's gradient by its output, of the same shape.
    """
    found: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        normalised = nn.functional.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
        found[layer.weight] = sum_over_all_but_batch_and_last_n(normalised * backprops, layer.weight.dim())
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = sum_over_all_but_batch_and_last_n(backprops, layer.bias.dim())
    return found


class RowGradients(GradSampleHooks):  # type: ignore[misc]
    """Opacus's hooks on a model whose trained tensors change from round to round.

    Attributes
    ----------
    rows : int
        Rows of the batch at work: the first dimension of all that a trained layer may be given.
    strangers : dict of Module to tuple of int
        Trained layers that were given something else, and the shape of it.
    """

    GRAD_SAMPLERS = GradSampleHooks.GRAD_SAMPLERS | {nn.LayerNorm: layer_norm_gradients}

    def __init__(self, model: nn.Module) -> None:
        self.rows, self.strangers = 0, dict[nn.Module, tuple[int, ...]]()
        super().__init__(model, loss_reduction="sum", strict=False)

    def capture_activations_hook(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        """Keep what a trained layer is given, if that is one entry a row."""
        if not self.hooks_enabled or not torch.is_grad_enabled() or not _is_trained(module):
            return
        if shape := self._strange(*given[:1], output):
            self.strangers[module] = shape
            return
        super().capture_activations_hook(module, given, output)

    def capture_backprops_hook(
        self, module: nn.Module, inputs: Any, backprops: tuple[Tensor, ...], **settings: Any
    ) -> None:
        """Look away where nothing is trained: a frozen factor's inputs were not kept either."""
        if not self.hooks_enabled or not _is_trained(module):
            return
        if shape := self._strange(backprops[0]):
            self.strangers[module] = shape
            return
        super().capture_backprops_hook(module, inputs, backprops, **settings)

    def _strange(self, *tensors: Any) -> tuple[int, ...] | None:
        """Return the first shape that is not one entry a row."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (tensor.ndim == 0 or tensor.shape[0] != self.rows):
                return tuple(tensor.shape)
        return None


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


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

    def release(self) -> None:
        """Make what the optimizer gets of ``summed_grad``, and forget it."""
        self.add_noise()
        self.scale_grad()
        for parameter in self.params:
            parameter.summed_grad = None

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
        if packing_of(adapted.model) is not None:
            raise PrivacyError(
                "privacy.level = 'record' clips the gradient of each row, and data.packing = true puts several rows "
                "into a sequence. Set data.packing to false, or take privacy.level=client."
            )
        trained = [name for name in adapted.trained if adapted.parameter(name).requires_grad]
        adapted.begin_training(adapted.trained)  # hooks go where something may ever be trained
        try:
            self._hooks = RowGradients(adapted.model)
        except NotImplementedError as error:  # a trained layer with buffers, such as a batch normalisation
            for handle in vars(adapted.model).pop("autograd_grad_sample_hooks", ()):
                handle.remove()
            adapted.begin_training(trained)
            raise PrivacyError(
                self._refusal(f"has a trained layer without gradients of single rows ({error})")
            ) from None
        self._hooks.disable_hooks()
        suit_hooks(adapted.model, by_hooks=True)
        adapted.begin_training(trained)  # of a round that has begun already
        self.has_moved = False  # whether a step was seen to reach the weights

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.remove_hooks()
        suit_hooks(self.adapted.model, by_hooks=False)

    def reset(self) -> None:
        """Forget what a training that broke off has left: Opacus counts forward passes against backward passes."""
        for module in self.adapted.model.modules():
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        for name in self.adapted.trained:
            parameter: Any = self.adapted.parameter(name)
            parameter.grad_sample, parameter.summed_grad, parameter._forward_counter = None, None, 0
            vars(parameter).pop("_current_grad_sample", None)

    def backward(self, inputs: Mapping[str, Tensor], precision: str, noise: EmbeddingNoise | None = None) -> float:
        """Leave each row's gradient in ``grad_sample`` of every tensor that is trained; return the sum of losses.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            Of b rows, see `fedpeft.data.splits.EncodedSplit.batch`.
        precision : str
            ``train.precision``.
        noise : EmbeddingNoise, optional
            Of the rows' tokens, each row's independent of all others.
        """
        adapted, hooks = self.adapted, self._hooks
        for name in adapted.trained:
            adapted.parameter(name).grad = None  # tells afterwards whether the loss depends on it at all
        hooks.rows = len(inputs["labels"])
        if adapted.beside:
            return self._one_by_one(inputs, precision, noise)
        hooks.enable_hooks()
        try:
            with contextlib.nullcontext() if noise is None else noise.of(inputs):
                losses, counted = batch_losses(adapted.task, adapted.model, inputs, precision, by_hooks=True)
            self._see_rows_alone()
            loss = (losses / counted.clamp(min=1)).sum()  # each row's own mean, whatever the others are
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # nobody needs inputs' gradients
                loss.backward()  # type: ignore[no-untyped-call]
            self._see_rows_alone()
        finally:
            hooks.disable_hooks()
            hooks.strangers.clear()
        return float(loss.detach())

    def _one_by_one(self, inputs: Mapping[str, Tensor], precision: str, noise: EmbeddingNoise | None) -> float:
        """Do what `backward` does without hooks: each row is a batch of its own, and its gradient the batch's.

        Hooks see nothing of experts, whose layer is given the tokens of all rows together, nor of embeddings.
        """
        adapted, total = self.adapted, 0.0
        every: list[Any] = [adapted.parameter(name) for name in adapted.trained]
        trained = [parameter for parameter in every if parameter.requires_grad]
        samples = [parameter.new_zeros((self._hooks.rows, *parameter.shape)) for parameter in trained]
        for row in range(self._hooks.rows):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            with contextlib.nullcontext() if noise is None else noise.of(alone):
                losses, counted = batch_losses(adapted.task, adapted.model, alone, precision)
            loss = (losses / counted.clamp(min=1)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            for parameter, sample in zip(trained, samples, strict=True):
                if parameter.grad is not None:
                    sample[row] = parameter.grad
                parameter.grad = None
        for parameter, sample in zip(trained, samples, strict=True):
            parameter.grad_sample, parameter.grad = sample, sample.sum(0)
        return total

    def check(self, parameters: Sequence[nn.Parameter], rows: int) -> None:
        """Raise PrivacyError where hooks saw something else than one gradient a row."""
        for parameter in parameters:
            sample = getattr(parameter, "grad_sample", None)
            if sample is None and parameter.grad is None and self._hooks.rows == rows:
                held: Any = parameter  # the loss does not depend on it, of no row
                held.grad_sample = parameter.new_zeros((rows, *parameter.shape))
            elif not isinstance(sample, Tensor) or len(sample) != rows:
                name = next((name for name in self.adapted.trained if self.adapted.parameter(name) is parameter), "")
                raise PrivacyError(
                    self._refusal(
                        f"gives no gradient of each row for '{name}' of shape {tuple(parameter.shape)}, which is used "
                        "outside of its own layer, or by a layer that mixes rows",
                        layer_of(name),
                    )
                )

    def _see_rows_alone(self) -> None:
        """Raise PrivacyError if a trained layer was given anything but one entry a row."""
        strangers = self._hooks.strangers
        if not strangers:
            return
        names = {module: name for name, module in self.adapted.model.named_modules()}
        layers = dict.fromkeys(layer_of(names[module]) for module in strangers)
        module, shape = next(iter(strangers.items()))
        raise PrivacyError(
            self._refusal(
                f"calls the trained layer '{layer_of(names[module])}' on a tensor of shape {shape} where the first "
                f"dimension must be the batch's {self._hooks.rows} rows: gradients of single rows cannot be told there",
                *layers,
            )
        )

    def _refusal(self, what: str, *layers: str) -> str:
        """Say what the model does, and what could be trained in place of these layers."""
        return f"privacy.level = 'record': '{self.adapted.base.folder}' {what}. {advice(self.adapted, layers)}"


def layer_of(name: str) -> str:
    """Return the name that a model gives to the layer of a tensor or module of PEFT's.

    Parameters
    ----------
    name : str
        Such as ``base_model.model.encoder.0.query.lora_A.default.weight``.
    """
    inner = name.removeprefix("base_model.model.").partition(".lora_")[0].partition(".modules_to_save.")[0]
    return inner.removesuffix(".weight").removesuffix(".bias")


def advice(adapted: AdaptedModel, layers: Collection[str]) -> str:
    """Say what to do where these layers cannot be trained privately."""
    bad = {layer.rpartition(".")[2] for layer in layers if layer in adapted.layers}
    in_head = any(layer not in adapted.layers for layer in layers)
    good = sorted({layer.rpartition(".")[2] for layer in adapted.layers} - bad)
    steps = []
    if bad or not layers:
        than = f" than {', '.join(sorted(bad))}" if bad else ""
        such = f" (such as adapter.targets={','.join(good)})" if bad and good else ""
        steps.append(f"other adapter.targets{than}{such}")
    if in_head or not layers:
        steps.append("adapter.head=frozen")
    return f"Choose {', '.join(steps)}, another model, or privacy.level=client."


def drawn_batches(rows: Rows, mechanism: RecordMechanism, randomness: Randomness) -> Iterator[Rows]:
    """Draw each step's batch of a client's rows, when it is asked for: its noise comes from the same randomness."""
    if mechanism.shuffled is not None:
        rng = np.random.default_rng(randomness.seed())
        yield from batches(rows, mechanism.shuffled, mechanism.steps, rng)
        return
    for _ in range(mechanism.steps):
        yield rows[randomness.uniform(len(rows)) < mechanism.sample_rate]


class PrivateGradients:
    """The private gradients of one client's round; see `fedpeft.training.local.Gradients`.

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
    train : TrainConfig
        Names the precision, and the noise of tokens' embeddings.
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
        train: TrainConfig | None = None,
    ) -> None:
        train = train or TrainConfig()
        self._engine, self._split, self._rows, self._mechanism = engine, split, rows, mechanism
        self._randomness, self._physical, self._precision = randomness, physical, train.precision
        self._noise = EmbeddingNoise(engine.adapted.model, train.neftune_alpha)
        engine.reset()
        self._clipping = ClippingOptimizer(optimizer, mechanism, randomness)

    def batches(self) -> Iterator[Rows]:
        """Draw each step's batch: independent of each other, and possibly empty."""
        before = None if self._engine.has_moved else [p.detach().clone() for p in self._clipping.params]
        for batch in drawn_batches(self._rows, self._mechanism, self._randomness):
            yield batch
            if before is not None:
                self._see_that_weights_moved(before)
                before = None

    def compute(self, batch: Rows) -> tuple[float, int]:
        """Leave the noised mean gradient in ``.grad``; the losses that are returned are NOT private."""
        total = self._accumulate(batch)
        self._clipping.release()
        return total, len(batch)

    def clipped_sum(self, batch: Rows) -> Tensor:
        """Return the sum of a batch's clipped gradients WITHOUT noise, in one vector: for audits, never to be released.

        Parameters
        ----------
        batch : array of int, shape (b,)
            The rows.
        """
        self._accumulate(batch)
        parameters = self._clipping.params
        total = torch.cat([parameter.summed_grad.flatten().double() for parameter in parameters])
        for parameter in parameters:
            parameter.summed_grad = None
        return total

    def noised(self, total: Tensor) -> Tensor:
        """Return what the mechanism releases of such a sum: the noised sum, drawn anew at each call."""
        parameters = self._clipping.params
        parts = torch.split(total, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.summed_grad = part.view(parameter.shape).to(parameter.device, torch.float32)
        self._clipping.release()
        released = torch.cat([parameter.grad.flatten().double() for parameter in parameters])
        return (released * self._mechanism.denominator).to(total.device)

    def _accumulate(self, batch: Rows) -> float:
        """Leave the sum of clipped gradients in ``summed_grad``; return the sum of losses."""
        clipping = self._clipping
        for parameter in clipping.params:
            parameter.summed_grad = None
        total = 0.0
        for start in range(0, len(batch), self._physical):
            chunk = batch[start : start + self._physical]
            total += self._engine.backward(self._split.batch(chunk), self._precision, self._noise)
            self._engine.check(clipping.params, len(chunk))
            clipping.clip_and_accumulate()
            for parameter in clipping.params:
                parameter.grad_sample = None
        if not len(batch):  # nobody was drawn: noise alone
            for parameter in clipping.params:
                parameter.summed_grad = torch.zeros_like(parameter, dtype=torch.float32)
        return total

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
