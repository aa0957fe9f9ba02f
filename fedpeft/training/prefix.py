"""What lies below the lowest adapted block is computed once a row: the frozen prefix of a model.

With adapters in the last blocks alone (``adapter.layers=last:2``), the hidden states that enter the lowest of them
depend on the row and on frozen weights only. They are computed for each row alone, at its own length and with one
thread, so that they depend neither on the rows beside it nor on who computes them;
`fedpeft.training.hidden_states` keeps them. While a model is fed, the blocks below give these states in place of
running, padded to the batch's width with zeros, which the attention mask leaves out. All else of the model runs as
ever: embeddings, masks and positions included.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fedpeft.adapters.stacks import blocks_of
from fedpeft.cache import cache_dir
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError
from fedpeft.jsons import to_json
from fedpeft.models import num_threads
from fedpeft.precision import arithmetic
from fedpeft.quantization import dense_weight, held_as
from fedpeft.tasks.heads import undivided
from fedpeft.tasks.packing import packing_of
from fedpeft.training.checkpointing import checkpointed
from fedpeft.training.hidden_states import HiddenStates
from fedpeft.training.local import training_mode

FOLDER = "prefix"  # in the cache
VERSION = 2  # of what is stored and how it is computed
CLOSE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}  # largest difference that rounding makes, of the largest value
CHECKED = 6  # rows
VERSIONED = {"torch", "transformers", "peft", "fedpeft", "opacus"}  # libraries
ROUNDING = ("ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")  # environment variables
KEPT, FORWARD = "fedpeft_prefix", "forward"  # attributes of modules


class UnfitError(Exception):
    """A model whose prefix cannot be kept; the text says why, after 'the model'."""


class _ReachedError(Exception):
    """The last block of the prefix has run; nothing after it is wanted."""


class Prefix:
    """The blocks below the lowest adapted one of a model, and their hidden states.

    Parameters
    ----------
    model : torch.nn.Module
        The adapted model; while it is fed, its blocks below do not run.
    precision : str
        ``train.precision``.

    Attributes
    ----------
    blocks : list of torch.nn.Module
        Those that do not run, lowest first.
    count : int
        Blocks of the model in all.
    row_bytes, row_tokens : int
        Of the states of the row that was computed last.

    Raises
    ------
    UnfitError
        Nothing lies below.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model, self.precision = model, precision
        self.blocks, self._above, self.count = _divide(model)
        self._rest: tuple[Any, ...] | None = None  # what a block returns beside its states; None where it is no tuple
        self._checked = False
        self.row_bytes = self.row_tokens = 0

    @cached_property
    def states(self) -> HiddenStates:
        """The states of rows, under the fingerprint of all that they depend on but the row."""
        return HiddenStates(cache_dir() / FOLDER / self.fingerprint()[:32])

    @contextlib.contextmanager
    def feeding(self) -> Iterator[None]:
        """Feed the model inside the block with what is known of its batches' rows; compute and keep the others."""
        vars(self.model)[FORWARD] = self._forward
        try:
            yield
        finally:
            del vars(self.model)[FORWARD]
            self.states.settle()

    def _forward(self, **inputs: Tensor) -> Any:
        if not self._checked and (problem := self.problem({name: t[:CHECKED] for name, t in inputs.items()})):
            raise AdapterError(
                f"simulation.prefix_cache = 'on': the model {problem}, on this machine. Set "
                "simulation.prefix_cache=off."
            )
        hidden = self.hidden(inputs)
        if checkpointed(self.model) and torch.is_grad_enabled() and hidden.is_floating_point():
            hidden.requires_grad_()  # else a block that runs again may be held to need no gradient
        with self._given(hidden):
            return self._plain(inputs)

    def _plain(self, inputs: Mapping[str, Tensor]) -> Any:
        return type(self.model).forward(self.model, **inputs)

    @contextlib.contextmanager
    def _given(self, hidden: Tensor) -> Iterator[None]:
        """Let the blocks return these states in place of running."""
        output = hidden if self._rest is None else (hidden, *self._rest)

        def forward(*_: Any, **__: Any) -> Any:
            return output

        before = [vars(block).get(FORWARD) for block in self.blocks]
        for block in self.blocks:
            vars(block)[FORWARD] = forward
        try:
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                if own is None:
                    del vars(block)[FORWARD]
                else:
                    vars(block)[FORWARD] = own

    # --- states of rows ----------------------------------------------------------------------------------------------

    def hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the hidden states of a batch.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            See `fedpeft.data.splits.EncodedSplit.batch`, without labels.

        Returns
        -------
        Tensor
            ``(b, t, d)``, zeros where a text is padded.
        """
        rows = _rows(inputs)
        keys = [_key(row) for row in rows]
        if any(self.states.get(key) is None for key in keys):
            self.states.refresh()
        found: dict[bytes, Tensor] = {}
        for key, row in zip(keys, rows, strict=True):
            states = found.get(key)
            states = self.states.get(key) if states is None else states
            if states is None:
                states = self.of_row(row)
                self.states.put(key, states)
            found[key] = states
        every = [found[key] for key in keys]
        mask = inputs.get("attention_mask")
        if mask is None:
            return torch.stack(every).to(rows[0]["pixel_values"].device)
        hidden = every[0].new_zeros((len(every), mask.shape[1], *every[0].shape[1:]))  # (b, t, d)
        for index, states in enumerate(every):
            hidden[index, : len(states)] = states
        return hidden.to(mask.device)

    def of_row(self, row: Mapping[str, Tensor]) -> Tensor:
        """Compute the hidden states ``(t, d)`` of one row, of inputs ``(1, t)``, on the CPU."""
        with num_threads(1), torch.no_grad():
            output = self._run(row)
        states, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(states, Tensor) or any(isinstance(each, Tensor) for each in rest):
            raise UnfitError("hands more from block to block than hidden states")
        self._rest = tuple(rest) if isinstance(output, tuple) else None
        mask = row.get("attention_mask")
        if states.ndim < 2 or len(states) != 1 or (mask is not None and states.shape[1] != mask.shape[1]):
            raise UnfitError(f"makes hidden states of shape {tuple(states.shape)} of a row, not one for each token")
        self.row_bytes, self.row_tokens = states.nbytes, states.shape[1]
        return states[0].to("cpu", copy=True).contiguous()

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model up to its last block below, and return what that gives."""
        reached: list[Any] = []

        def stop(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            reached.append(output)
            raise _ReachedError

        handle = self.blocks[-1].register_forward_hook(stop)
        try:
            self._plain(inputs)
        except _ReachedError:
            return reached[0]
        finally:
            handle.remove()
        raise UnfitError("does not run its blocks")

    # --- whether that is the same ------------------------------------------------------------------------------------

    def problem(self, batch: Mapping[str, Tensor]) -> str:
        """Return what is wrong with keeping the prefix of this model, after 'the model'; empty if nothing is.

        Parameters
        ----------
        batch : mapping of str to Tensor
            A few rows, best of different lengths, on any device.
        """
        on = next(self.model.parameters()).device
        inputs = {name: value.to(on) for name, value in batch.items() if name != "labels"}
        modes = {module: module.training for module in self.model.modules()}
        devices = [on] if on.type == "cuda" else []
        try:
            with undivided(), torch.random.fork_rng(devices), arithmetic(on, self.precision):
                self._draw_nothing(_rows(inputs)[0], on)
                self.model.eval()
                self._compare(inputs)
        except UnfitError as error:
            return str(error)
        finally:
            for module, training in modes.items():
                module.training = training
        self._checked = True
        return ""

    def _draw_nothing(self, row: Mapping[str, Tensor], on: torch.device) -> None:
        """Raise UnfitError where the prefix draws anything while training, or holds what is trained."""
        called: list[nn.Module] = []
        adapted = [module for module in _inner(self.model).modules() if _is_adapted(module)]
        handles = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in adapted]
        training_mode(self.model)
        before = _state(on)
        try:
            self.of_row(row)
        finally:
            for handle in handles:
                handle.remove()
        if called:
            raise UnfitError("is adapted before its blocks too, where rows enter")
        if not all(torch.equal(one, other) for one, other in zip(before, _state(on), strict=True)):
            raise UnfitError("draws dropout below its lowest adapted block")

    @torch.no_grad()
    def _compare(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise UnfitError where hidden states or scores are others than those of a plain run, rounding aside."""
        mask = inputs.get("attention_mask")
        held = torch.ones((), dtype=torch.bool) if mask is None else mask.bool()  # (b, t)
        hidden = self.hidden(inputs)
        output = self._run(inputs)
        self._close(hidden, output[0] if isinstance(output, tuple) else output, held)
        plain = self._plain(inputs).logits
        with self._given(hidden):
            fed = self._plain(inputs).logits
        each_token = mask is not None and plain.ndim == 3 and plain.shape[:2] == mask.shape
        self._close(fed, plain, held if each_token else None)

    def _close(self, one: Tensor, other: Tensor, held: Tensor | None) -> None:
        if one.shape == other.shape:
            one, other = (each[held] if held is not None and held.ndim else each for each in (one, other))
            size = other.abs().max()
            if (one - other).abs().max() <= CLOSE[self.precision] * size and size.isfinite():
                return
        raise UnfitError("computes something else when its lower blocks do not run")

    def fingerprint(self) -> str:
        """Return the SHA-256 of all that states depend on but the row: weights, configuration, arithmetic, machine."""
        inner: Any = _inner(self.model)
        on = next(inner.parameters()).device
        config = inner.config.to_dict() if hasattr(inner, "config") else {}
        config.pop("_name_or_path", None)
        facts = {
            "version": VERSION,
            "versions": [torch.__version__, transformers.__version__],
            "model": [type(inner).__name__, _sources(inner)],
            "config": config,
            "attention": getattr(getattr(inner, "config", None), "_attn_implementation", None),
            "below": len(self.blocks),
            "precision": self.precision,
            "machine": [on.type, torch.cuda.get_device_name(on)] if on.type == "cuda" else _processor(),
            "arithmetic": [torch.get_float32_matmul_precision(), *_arithmetic()],
        }
        digest = hashlib.sha256(to_json(facts, sort_keys=True).encode())
        aside = {id(tensor) for module in self._above for tensor in chain(module.parameters(), module.buffers())}
        for name, tensor in sorted(chain(inner.named_parameters(), inner.named_buffers()), key=lambda each: each[0]):
            if id(tensor) not in aside and not tensor.requires_grad and type(tensor.data) is Tensor:
                held = tensor.detach().cpu().contiguous()
                digest.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
                digest.update(held.reshape(-1).view(torch.uint8).numpy().data)
        for name, module in inner.named_modules():
            if held_as(module) is not None:  # whose scales are no tensors of the module
                held = dense_weight(module).cpu().contiguous()
                digest.update(f"{name} {tuple(held.shape)}".encode())
                digest.update(held.numpy().data)
        return digest.hexdigest()


@contextlib.contextmanager
def feeding(model: nn.Module, config: RunConfig) -> Iterator[None]:
    """Feed a model inside the block with kept states, if the run says so; else, or if it is fed already, do nothing.

    Parameters
    ----------
    model : torch.nn.Module
        With its adapter.
    config : RunConfig
        Says ``simulation.prefix_cache = on`` where that has been decided.

    Raises
    ------
    AdapterError
        It is on, and this model has nothing that could be kept.
    """
    if config.simulation.prefix_cache != "on" or FORWARD in vars(model):
        yield
        return
    try:
        prefix = prefix_of(model, config.train.precision)
    except UnfitError as error:
        raise AdapterError(f"simulation.prefix_cache = 'on': the model {error}. Set it to off.") from None
    gigabytes = config.simulation.prefix_cache_limit
    prefix.states.limit = None if gigabytes is None else gigabytes * 1e9
    with prefix.feeding():
        yield


def prefix_of(model: nn.Module, precision: str) -> Prefix:
    """Return the prefix of a model, made once for it.

    Raises
    ------
    UnfitError
        Nothing lies below its lowest adapted block.
    """
    kept: dict[str, Prefix] = vars(model).setdefault(KEPT, {})
    if precision not in kept:
        kept[precision] = Prefix(model, precision)
    return kept[precision]


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _divide(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module], int]:
    """Return the blocks below the lowest adapted one, what may change in a run, and the number of blocks."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise UnfitError("is given virtual tokens, which all blocks see")
    if packing_of(model) is not None:
        raise UnfitError("is given packed rows (data.packing), whose states belong to a batch")
    inner = _inner(model)
    if unsteady := [how.name for module in inner.modules() if (how := held_as(module)) is not None and not how.steady]:
        raise UnfitError(f"is held as {unsteady[0]}, which computes something else in training than in scoring")
    blocks = blocks_of(inner)
    if not blocks:
        raise UnfitError("has no stack of equal blocks")
    names = list(blocks)
    lowest = next((n for n, block in blocks.items() if any(map(_is_adapted, block.modules()))), names[-1])
    stack = [name for name in names if name.rpartition(".")[0] == lowest.rpartition(".")[0]]
    adapted = [module for module in inner.modules() if _is_adapted(module)]
    cut = stack.index(lowest)
    if not any(map(_is_adapted, blocks[lowest].modules())):
        cut += 1  # the head alone is trained
    if not cut:
        raise UnfitError("is adapted in its first block, below which nothing is to be kept")
    return [blocks[name] for name in stack[:cut]], [*(blocks[name] for name in stack[cut:]), *adapted], len(blocks)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or any(
        parameter.requires_grad for parameter in module.parameters(recurse=False)
    )


def _rows(inputs: Mapping[str, Tensor]) -> Sequence[dict[str, Tensor]]:
    """Return each row's inputs, without padding."""
    count, mask = len(next(iter(inputs.values()))), inputs.get("attention_mask")
    if mask is None:
        return [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(count)]
    lengths = mask.sum(1).clamp(min=1).tolist()
    return [{name: t[row : row + 1, : lengths[row]] for name, t in inputs.items()} for row in range(count)]


def _key(row: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        value = row[name].cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.digest()


def _state(on: torch.device) -> list[Tensor]:
    """Return the states of the generators that a model may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(on)] if on.type == "cuda" else [])]


def _sources(model: nn.Module) -> list[str]:
    """Return the hashes of all code of a model that no library's version stands for, such as a base's own."""
    names = {type(module).__module__ for module in model.modules()}
    foreign = [sys.modules[name] for name in names if name.partition(".")[0] not in VERSIONED and name in sys.modules]
    own = [Path(module.__file__) for module in foreign if module.__file__]
    beside = {path for file in own for path in file.parent.glob("*.py")}  # which it may import
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in beside)


def _arithmetic() -> list[str]:
    """Return what else decides how products are rounded."""
    mkldnn: Any = torch.backends.mkldnn
    kinds = [mkldnn, *(getattr(mkldnn, name, None) for name in ("matmul", "conv", "rnn"))]
    return [*(str(getattr(kind, "fp32_precision", "")) for kind in kinds), *(os.environ.get(n, "") for n in ROUNDING)]


def _processor() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return [line.partition(":")[2].strip(), torch.backends.cpu.get_cpu_capability()]
    return [platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()]
