"""A causal language model in two: the trunk, which makes hidden states, and the head, which makes logits of them.

Logits are by far the largest thing that a small language model computes: 64 rows of 1024 tokens and a vocabulary of
49 152 take 12.9 GB in float32. A loss needs them only where tokens count, and of these only some at a time. So the
trunk runs once, and what comes after it runs in blocks of positions.

What comes after it stays the model's own code, whatever it does beside the product with the vocabulary (a bias, an
adapter, a scale, a soft cap): for a block, the model's own forward runs with the block's states in place of what its
trunk returns. Whether that gives the model's logits is tried on the model at hand, once; where it does not, the whole
model runs, and the run says so (`runs_whole`).

Under a frozen head, the forward pass takes each position's gradient by its hidden state at once, as the fused losses of
Liger (arXiv 2410.10989) and CCE (arXiv 2411.09009) do: no block's logits outlive it, and none is computed twice. A head
that is trained runs again in the backward pass, block by block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedpeft.data.columns import IGNORED
from fedpeft.errors import AdapterError
from fedpeft.precision import arithmetic
from fedpeft.tasks import packing
from fedpeft.tasks.packing import packed, packing_of

BLOCK_BYTES = 2**25  # of a block's logits in float32: 170 positions of a vocabulary of 49 152
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest logit, by which the two ways may differ
CLOSE_AT_16_BITS = 0.05
PROBED = 3  # tokens of each row on which the two ways are compared
SHORT = (5, 3, 4)  # tokens of the rows on which packing is tried
FORWARD, KEPT = "forward", "_fedpeft_divided"  # attributes of modules

Head = Callable[[Tensor], Tensor]

_together: ContextVar[bool] = ContextVar("together", default=False)


class _ReachedError(Exception):
    """The trunk has run; nothing after it is wanted."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Let models that are called inside the block run whole, also while one of them is halted after its trunk."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


class DividedModel:
    """A model whose trunk and head run apart.

    Parameters
    ----------
    model : torch.nn.Module
        What is called for a batch, with or without an adapter.
    trunk : torch.nn.Module
        The part of it that gives ``last_hidden_state``.
    """

    def __init__(self, model: nn.Module, trunk: nn.Module) -> None:
        self.model, self.trunk, self.inner = model, trunk, inner_of(model)
        self._output: Any = None  # the class of what the trunk returns
        held = set(trunk.modules())
        self._beside = [module for module in self.inner.modules() if module not in held]
        self._adapted = any(isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper) for each in self._beside)

    @property
    def head_is_adapted(self) -> bool:
        """Whether anything after the trunk is trained, or is there to be trained by somebody."""
        return self._adapted or any(
            parameter.requires_grad for module in self._beside for parameter in module.parameters(recurse=False)
        )

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the trunk; return its hidden states of the batch's own tokens, ``(b, t, d)``.

        Raises
        ------
        RuntimeError
            The model does not run its trunk.
        """

        def halt(*given: Any, **settings: Any) -> Any:
            output = run(*given, **settings)
            if _together.get():
                return output
            raise _ReachedError(output)

        run = self.trunk.forward
        with _forward_of(self.trunk, halt):
            try:
                self.model(**inputs)
            except _ReachedError as reached:
                self._output = type(reached.output)
                states: Tensor = reached.output.last_hidden_state
                return states[:, -inputs["input_ids"].shape[1] :]  # an adapter's own tokens stand in front
        raise RuntimeError("the model does not run its trunk")

    def packed_hidden(self, inputs: Mapping[str, Tensor], length: int) -> Tensor:
        """Return the same hidden states ``(b, t, d)``, rounding aside, of rows that lie behind each other."""
        together = packed(inputs, length)
        # where there is a cache of keys, transformers does not look for rows behind each other
        return together.unpacked(self.hidden({**together.inputs, "use_cache": False}))

    def logits(self, states: Tensor) -> Tensor:
        """Run what comes after the trunk on hidden states ``(b, m, d)``; return logits ``(b, m, vocabulary)``."""

        def give(*_: Any, **__: Any) -> Any:
            return self._output(last_hidden_state=states)

        tokens = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        with _forward_of(self.trunk, give):
            logits: Tensor = self.inner(input_ids=tokens).logits
        return logits


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get(FORWARD)
    vars(module)[FORWARD] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)[FORWARD]
        else:
            vars(module)[FORWARD] = before


def inner_of(model: nn.Module) -> nn.Module:
    """Return the model of transformers within an adapted one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def divided(model: nn.Module, inputs: Mapping[str, Tensor]) -> DividedModel | None:
    """Return a model in two; None where the parts do not give the logits of the whole.

    Parameters
    ----------
    model : torch.nn.Module
        It is tried once, without drawing random numbers; later calls return what was found.
    inputs : mapping of str to Tensor
        A batch, on the model's device; the beginnings of its rows are what is tried.
    """
    if KEPT not in vars(model):
        vars(model)[KEPT] = _divide(model, {name: value[:, :PROBED] for name, value in inputs.items()})
    found: DividedModel | None = vars(model)[KEPT]
    return found


def _divide(model: nn.Module, inputs: Mapping[str, Tensor]) -> DividedModel | None:
    inner: Any = inner_of(model)
    trunks = [getattr(inner, "base_model", None)]
    with contextlib.suppress(AttributeError, TypeError):
        trunks.append(inner.get_decoder())
    modes = {module: module.training for module in model.modules()}
    on = next(model.parameters()).device
    # what feeds an adapted model with kept states would keep some of these rows too
    fed = vars(model).pop(FORWARD, None) if isinstance(model, PeftModel) else None
    try:
        with torch.no_grad(), torch.random.fork_rng([on] if on.type == "cuda" else []):
            model.eval()
            whole = model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
            for trunk in trunks:
                if isinstance(trunk, nn.Module) and trunk is not inner:
                    parts = DividedModel(model, trunk)
                    if _gives(parts, inputs, whole):
                        return parts
    finally:
        for module, training in modes.items():
            module.training = training
        if fed is not None:
            vars(model)[FORWARD] = fed
    return None


def _gives(parts: DividedModel, inputs: Mapping[str, Tensor], whole: Tensor) -> bool:
    """Tell whether the parts give the whole model's logits; a model of any other making may raise anything."""
    try:
        states = parts.hidden(inputs)
        logits = (
            torch.cat([parts.logits(states[:, :1]), parts.logits(states[:, 1:])], 1)
            if states.shape[1] > 1
            else (parts.logits(states))
        )
        if logits.shape != whole.shape:
            return False
        size = whole.abs().max()
        return bool(size.isfinite() and (logits - whole).abs().max() <= _close(parts.model, whole.dtype) * size)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


def runs_whole(model: nn.Module, *, by_hooks: bool) -> str:
    """Say why a model computes the logits of all positions of a batch at once, in words; empty if it does not.

    Parameters
    ----------
    model : torch.nn.Module
        With or without an adapter; it is tried on tokens that are made up, so that nothing depends on a row.
    by_hooks : bool
        Whether hooks will take gradients of single rows from its layers.
    """
    parts = divided(model, _made_up(model))
    if parts is None:
        return f"{type(inner_of(model)).__name__}, with this adapter, cannot be run in two parts"
    if by_hooks and parts.head_is_adapted:
        return "gradients of single rows need a head that is trained or adapted to see each row whole"
    return ""


def _made_up(model: nn.Module) -> dict[str, Tensor]:
    """Return three short rows of tokens, drawn from a generator of their own."""
    on, shape = next(model.parameters()).device, (len(SHORT), max(SHORT))
    mask = (torch.arange(max(SHORT)) < torch.tensor(SHORT)[:, None]).long()  # (3, t)
    ids = torch.randint(0, vocabulary_of(inner_of(model)), shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(on), "attention_mask": mask.to(on)}


def pack_rows(model: nn.Module, length: int) -> None:
    """Let a model train on rows that lie behind each other in sequences, after a look at whether it keeps them apart.

    Parameters
    ----------
    model : torch.nn.Module
        With or without an adapter.
    length : int
        Tokens of a sequence, at most.

    Raises
    ------
    AdapterError
        Packed rows have other hidden states.
    """
    inputs = _made_up(model)
    parts = divided(model, inputs)
    unfit = AdapterError(
        f"data.packing = true: {type(inner_of(model)).__name__}, with this adapter, gives rows that lie behind "
        "each other in a sequence other hidden states than rows by themselves. Set data.packing to false."
    )
    try:
        fits = parts is not None and _keeps_rows_apart(parts, inputs)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise unfit from error  # a model's own code raises what it likes of positions that begin anew
    if not fits:
        raise unfit
    vars(model)[packing.KEPT] = length


def _keeps_rows_apart(parts: DividedModel, inputs: Mapping[str, Tensor]) -> bool:
    modes = {module: module.training for module in parts.model.modules()}
    try:
        with torch.no_grad():
            parts.model.eval()
            alone, together = parts.hidden(inputs), parts.packed_hidden(inputs, sum(SHORT))
    finally:
        for module, training in modes.items():
            module.training = training
    held = inputs["attention_mask"].bool()
    return bool((alone - together)[held].abs().max() <= _close(parts.model, alone.dtype) * alone[held].abs().max())


def _close(model: nn.Module, dtype: torch.dtype) -> float:
    """Return by what share of the largest number two computations of the same may differ."""
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters()):
        return CLOSE_AT_16_BITS
    return CLOSE.get(dtype, CLOSE_AT_16_BITS)


# --- losses ----------------------------------------------------------------------------------------------------------


def token_losses(parts: DividedModel, inputs: Mapping[str, Tensor], following: Tensor, precision: str) -> Tensor:
    """Return the negative log-likelihood of each token that follows, ``(b, t)``, zeros where none counts.

    Parameters
    ----------
    parts : DividedModel
        The model.
    inputs : mapping of str to Tensor
        A batch without labels, on the model's device.
    following : Tensor
        The id of the token after each position, ``(b, t)``; -100 where it does not count.
    precision : str
        ``train.precision``.
    """

    def head(block: Tensor) -> Tensor:
        with arithmetic(following.device, precision):
            return parts.logits(block)

    length = packing_of(parts.model) if torch.is_grad_enabled() else None
    with arithmetic(following.device, precision):
        states = parts.hidden(inputs) if length is None else parts.packed_hidden(inputs, length)  # (b, t, d)
    held = following != IGNORED  # (b, t)
    if parts.head_is_adapted:
        return _of_rows(head, states, following, held, vocabulary_of(parts.inner))
    size = block_size(vocabulary_of(parts.inner))
    found = _FrozenHead.apply(states[held], following[held], head, size)  # type: ignore[no-untyped-call]
    losses: Tensor = found.new_zeros(held.shape).masked_scatter(held, found)
    return losses


def vocabulary_of(model: nn.Module) -> int:
    """Return how many scores a token has."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def block_size(vocabulary: int) -> int:
    """Return how many positions' logits are computed at a time."""
    return max(1, BLOCK_BYTES // (4 * vocabulary))


def nll(logits: Tensor, following: Tensor) -> Tensor:
    """Return the negative log-likelihoods of tokens ``(m,)`` under logits ``(m, vocabulary)``, at least in float32."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(scores, following, ignore_index=IGNORED, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Losses of positions, block by block, with each one's gradient by its own hidden state.

    A position's loss depends on its own state alone, so that the gradient of any weighted sum is these, weighted.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, following: Tensor, head: Head, size: int) -> Tensor:
        """Return ``(n,)`` of states ``(n, d)``."""
        wanted = ctx.needs_input_grad[0]
        # losses go where they stay: a small tensor that is kept between two blocks of logits stops glibc before 2.38
        # from using the freed one again, which then costs as much memory as all logits do
        exact = states.dtype == torch.float64
        losses = states.new_empty(len(states), dtype=torch.float64 if exact else torch.float32)
        gradients = torch.empty_like(states) if wanted else None
        for start in range(0, len(states), size):
            block = states[start : start + size].detach()
            with torch.set_grad_enabled(wanted):
                block.requires_grad_(wanted)
                found = nll(head(block[None])[0], following[start : start + size])
                if gradients is not None:
                    (gradients[start : start + size],) = torch.autograd.grad(found.sum(), block)
            losses[start : start + size] = found.detach()
            del block, found
        ctx.gradients = gradients
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None, None]:
        """Weigh each position's gradient by that of its loss, ``(n,)``."""
        gradients: Tensor = ctx.gradients
        return gradients * given[:, None].to(gradients), None, None, None


def _of_rows(head: Head, states: Tensor, following: Tensor, held: Tensor, vocabulary: int) -> Tensor:
    """Return losses ``(b, t)`` under a head that may be trained, and have tensors of each row's own: rows stay rows."""
    most = int(held.sum(1).max()) if len(held) else 0
    at = held.long().argsort(dim=1, descending=True, stable=True)[:, :most]  # (b, m): a row's own positions first
    chosen = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))  # (b, m, d)
    targets = following.gather(1, at)  # (b, m), -100 behind a row's own

    def losses_of(block: Tensor, wanted: Tensor) -> Tensor:
        return nll(head(block).flatten(0, 1), wanted.flatten()).view(wanted.shape)

    size = max(1, block_size(vocabulary) // max(1, len(states)))
    found = []
    for start in range(0, most, size):
        block, wanted = chosen[:, start : start + size], targets[:, start : start + size]
        if torch.is_grad_enabled():
            found.append(checkpoint(losses_of, block, wanted, use_reentrant=False))
        else:
            found.append(losses_of(block, wanted))
    every = torch.cat(found, 1) if found else states.sum(2)[:, :0]
    return every.new_zeros(held.shape).scatter(1, at, every)
