"""Which modules of a base are adapted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedpeft.adapters.base_change import check_plain
from fedpeft.adapters.beyond import check_beyond, embeddings, expert_stacks, in_head
from fedpeft.adapters.kinds import INITS, KINDS
from fedpeft.adapters.stacks import within
from fedpeft.config import AdapterConfig
from fedpeft.config.values import PATTERN
from fedpeft.errors import AdapterError, nearest
from fedpeft.models import BaseModel
from fedpeft.quantization import held_as

# the query and value projections by the names that transformers gives them, in order of preference
QUERY_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("qkv",),
    ("Wqkv",),
    ("c_attn",),
    ("in_proj",),
)
ALL_LINEAR = "all-linear"
MAMBAS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # as PEFT lists them
OF_MODELS = ("transformers.models.", "transformers_modules.")  # where layers of one model are defined


def output_layer(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Return a language model's output layer by name with ``(d_out, d_in)``, empty where there is none to name.

    It is adapted only where a target names it: `linear_modules` leaves it out.
    """
    model: Any = base.model
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        return {}
    shape = (output.out_features, output.in_features)
    outside = [n for n, module in model.named_modules() if module is output and not in_head(base, n)]
    return dict.fromkeys(outside, shape)


def adaptable_modules(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Return the linear modules outside the head that PEFT adapts by full name, with ``(d_out, d_in)``."""
    modules, unfit = linear_modules(base), unfit_modules(base)
    return {name: shape for name, shape in modules.items() if name not in unfit}


def linear_modules(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Return the linear modules outside the head by full name, with ``(d_out, d_in)``."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[int, int]] = {}
    model: Any = base.model  # a transformers model, which has this method
    output = model.get_output_embeddings()
    for name, module in base.model.named_modules():
        if module is output or in_head(base, name):
            continue
        if isinstance(module, nn.Linear) or held_as(module) is not None:
            found[name] = (cast(int, module.out_features), cast(int, module.in_features))
        elif isinstance(module, Conv1D):
            d_in, d_out = cast(Tensor, module.weight).shape
            found[name] = (d_out, d_in)
    return found


def unfit_modules(base: BaseModel) -> set[str]:
    """Name the linear modules that PEFT refuses, takes for others, or adapts without any effect."""
    model: Any = base.model
    modules = {name: base.model.get_submodule(name) for name in linear_modules(base)}
    unfit = {name for name, module in modules.items() if not _computes_as_linear(module)}
    if getattr(model.config, "model_type", None) in MAMBAS:  # whose kernel takes the weight and calls no layer
        unfit |= {name for name in modules if name.endswith("out_proj")}
    # where experts were linear layers once, PEFT takes what is still called as they were for them
    asked = LoraConfig(target_modules=sorted(modules.keys() - unfit))
    convert_peft_config_for_transformers(asked, model, None)
    return unfit | (modules.keys() - set(asked.target_modules or ()))


def _computes_as_linear(module: nn.Module) -> bool:
    """Tell whether a module gives what its class promises: routers among the subclasses give more than one tensor."""
    kind = type(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention reads its weight past PEFT's layer
        return False
    if (
        kind.forward is nn.Linear.forward
        or not kind.__module__.startswith(OF_MODELS)
        or not isinstance(module, nn.Linear)
    ):
        return True
    with torch.no_grad():
        try:
            scores = module(module.weight.new_ones(1, module.in_features))
        except (RuntimeError, TypeError):
            return False
    return isinstance(scores, Tensor) and scores.shape == (1, module.out_features)


def choose_targets(base: BaseModel, targets: Sequence[str] | None, rank: int, layers: str | None = None) -> list[str]:
    """Return the full names of the modules to adapt, and of the parameters that hold experts' weights.

    Parameters
    ----------
    base : BaseModel
        The model whose real module names count.
    targets : sequence of str or None
        Module names, or their last parts, ``all-linear``, or ``re:`` and a regular expression of whole names; None
        takes the attention's query and value projections. Only a name or an expression reaches the output layer, only
        a name embeddings, and experts' parameters only a name with that of their module, ``experts.down_proj``.
    rank : int
        Must not exceed the smaller side of any target.
    layers : str, optional
        ``adapter.layers``: only modules of these blocks, and those of none.

    Raises
    ------
    AdapterError
        Blocks that there are not, a target that matches nothing, or a rank larger than a layer that is named.
        ``all-linear`` leaves such layers out, see `left_out`.
    """
    modules = adaptable_modules(base)
    if not modules:
        raise AdapterError(
            f"'{base.folder}' ({type(base.model).__name__}) has no linear layers outside its head, and every "
            "adapter.kind needs some. Take a base that has, such as ViT, Swin or ConvNeXt for images, BERT for texts."
        )
    kept = within(base.model, base.head, modules, layers)
    if not kept:
        raise AdapterError(f"adapter.layers = '{layers}' leaves no linear module of '{base.folder}' to adapt.")
    modules = {name: modules[name] for name in kept}
    leaves = Counter(name.rpartition(".")[2] for name in modules)
    if targets is None:
        known = [names for names in QUERY_VALUE if all(name in leaves for name in names)]
        if not known:
            raise AdapterError(
                f"'{base.folder}' has no query and value projections by a known name. Give adapter.targets, such as "
                f"{ALL_LINEAR}. {nearest('query', leaves)}"
            )
        targets = known[0]
    if tuple(targets) == (ALL_LINEAR,):
        if fitting := [name for name, shape in modules.items() if rank <= min(shape)]:
            return fitting
        largest = max(min(shape) for shape in modules.values())
        raise AdapterError(f"adapter.rank = {rank} is larger than every layer of '{base.folder}'; at most {largest}.")
    chosen = _named(base, targets, modules, layers)
    whole = ALL_LINEAR in targets
    for name, shape in list(chosen.items()):
        if rank <= min(shape):
            continue
        if whole and not any(_matches(target, name) for target in targets):
            del chosen[name]  # see `left_out`
            continue
        raise AdapterError(
            f"adapter.rank = {rank} is larger than layer '{name}' of shape {shape}; "
            f"at most {min(shape)} is allowed here."
        )
    return list(chosen)


def _named(
    base: BaseModel, targets: Sequence[str], modules: Mapping[str, tuple[int, int]], layers: str | None
) -> dict[str, tuple[int, int]]:
    """Return what names, ``all-linear`` or a regular expression match, with ``(d_out, d_in)``; `modules` are linear."""
    linear = {**modules, **output_layer(base)}
    stacks = expert_stacks(base)
    beside = {**embeddings(base), **stacks}
    beside = {name: beside[name] for name in within(base.model, base.head, beside, layers)}

    def reaches(target: str, name: str) -> bool:
        if target == ALL_LINEAR:
            return name in modules
        if name in beside and (target.startswith(PATTERN) or (name in stacks and "." not in target)):
            return False
        return _matches(target, name)

    every = {**linear, **beside}
    for target in targets:
        if not any(reaches(target, name) for name in every):
            _refuse(base, target, linear, beside, layers)
    return {name: shape for name, shape in every.items() if any(reaches(target, name) for target in targets)}


def _refuse(
    base: BaseModel, target: str, linear: Collection[str], beside: Collection[str], layers: str | None
) -> NoReturn:
    """Raise AdapterError for a target that matches nothing, and say what would."""
    if meant := next((name for name in beside if _matches(target, name)), None):
        how = (
            "an expression reaches linear layers alone" if target.startswith(PATTERN) else "experts go by their module"
        )
        raise AdapterError(
            f"adapter.targets: '{target}' matches no linear module of '{base.folder}' that PEFT adapts"
            f"{_among(layers)}, but '{meant}': {how}, so name it: adapter.targets={'.'.join(meant.split('.')[-2:])}."
        )
    raise AdapterError(
        f"adapter.targets: '{target}' matches no linear module of '{base.folder}' that PEFT "
        f"adapts{_among(layers)}. {nearest(target, {name.rpartition('.')[2] for name in (*linear, *beside)})}"
    )


def _matches(target: str, name: str) -> bool:
    if target.startswith(PATTERN):
        return re.fullmatch(target.removeprefix(PATTERN), name) is not None
    return name == target or name.endswith(f".{target}")


def _among(layers: str | None) -> str:
    return "" if layers is None else f", within adapter.layers = '{layers}'"


def left_out(base: BaseModel, rank: int, chosen: Collection[str]) -> list[str]:
    """Say what ``all-linear`` does not adapt: layers smaller than the rank, and weights that are no linear layers.

    A gate or router that is a linear layer is adapted like any other, as PEFT does it.

    Parameters
    ----------
    base : BaseModel
        The base.
    rank : int
        The layers'.
    chosen : collection of str
        What is adapted.
    """
    small = [name for name, shape in adaptable_modules(base).items() if rank > min(shape) and name not in chosen]
    blocks = sorted(expert_stacks(base).keys() - {*chosen})
    said = []
    if unfit := unfit_modules(base):
        said.append(
            f"all-linear leaves out {_counted(sorted(unfit), 'linear layer')} that PEFT cannot adapt here: "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in unfit}))}"
        )
    if small:
        said.append(
            f"all-linear leaves out {_counted(small, 'layer')} smaller than adapter.rank = {rank}: "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in small}))}"
        )
    if blocks:
        said.append(
            f"all-linear leaves out the experts, which are {_counted(blocks, 'tensor')} of all experts together "
            f"({', '.join(sorted({name.rpartition('.')[2] for name in blocks}))}) and no linear layers; to adapt "
            f"them too, add {','.join(sorted({'.'.join(name.split('.')[-2:]) for name in blocks}))} to adapter.targets"
        )
    return said


def _counted(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}" + ("s" if len(names) > 1 else "")


def check_layers(base: BaseModel, targets: Sequence[str], adapter: AdapterConfig) -> None:
    """Raise AdapterError for what PEFT cannot do with these layers, or does wrongly."""
    from transformers.pytorch_utils import Conv1D

    kind, init = adapter.facts, adapter.beginning
    beside = {**embeddings(base), **expert_stacks(base)}
    check_beyond(base, [name for name in targets if name in beside], adapter)
    modules = [(name, base.model.get_submodule(name)) for name in targets if name not in beside]
    quantised = next((how for _, module in modules if (how := held_as(module)) is not None), None)
    if quantised is not None:
        adapter.check_quantised(quantised.name)
    elif init.of_base:
        check_plain(dict(modules), f"adapter.init = '{init.name}'")
    elif kind.reads_base:
        check_plain(dict(modules), f"adapter.kind = '{kind.name}'")
    conv1d = next((name for name, module in modules if isinstance(module, Conv1D)), None)
    if conv1d is not None and not kind.conv1d:
        raise AdapterError(
            f"adapter.kind = '{kind.name}' cannot adapt layer '{conv1d}', a transposed one (Conv1D, as in GPT-2). "
            f"Allowed here: {', '.join(sorted(name for name, each in KINDS.all().items() if each.conv1d))}."
        )
    if conv1d is not None and not init.conv1d:
        able = [name for name in kind.inits if INITS.find(name).of_base and INITS.find(name).conv1d]
        raise AdapterError(
            f"adapter.init = '{init.name}' cannot initialise layer '{conv1d}', a transposed one (Conv1D, as in GPT-2); "
            f"use another adapter.init, such as {(able or ['default'])[0]}."
        )
    for name, module in modules:
        smaller = min(cast(Tensor, module.weight).shape) if init.ranks > 1 else 0
        if init.ranks > 1 and init.ranks * adapter.rank > smaller:
            raise AdapterError(
                f"adapter.init = '{init.name}' takes {init.ranks} x adapter.rank directions of a gradient, and layer "
                f"'{name}' has {smaller}; at most rank {smaller // init.ranks} is allowed here."
            )
