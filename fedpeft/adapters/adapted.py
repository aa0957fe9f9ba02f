"""The adapter in a resident model: made once by PEFT, then only its tensors are swapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedpeft import tasks
from fedpeft.adapters.base_change import BaseWeights, check_plain
from fedpeft.adapters.draws import draw_a, first_ranks
from fedpeft.adapters.export import PEFT_PREFIX, write_adapter, write_labels
from fedpeft.adapters.initial import adapt
from fedpeft.adapters.kinds import ALL_KINDS, INITS_OF_BASE, R_KINDS, WITHOUT_CONV1D, peft_config
from fedpeft.adapters.lora_sb import R_IN_PEFT
from fedpeft.adapters.state import A_SUFFIX, AdapterState, LoraFactors, Role, base_changes, fingerprint, role_of
from fedpeft.config import AdapterConfig, RunConfig
from fedpeft.errors import AdapterError, nearest
from fedpeft.models import BaseModel, num_threads, seeded
from fedpeft.seeds import derive_seed

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
# what nobody trains of a kind
FIXED = {"ffa-lora": frozenset({Role.A}), **dict.fromkeys(R_KINDS, frozenset({Role.A, Role.B}))}


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
        if module is output or any(name == head or name.startswith(f"{head}.") for head in base.head):
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.out_features, module.in_features)
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


def choose_targets(base: BaseModel, targets: Sequence[str] | None, rank: int) -> list[str]:
    """Return the full names of the modules to adapt.

    Parameters
    ----------
    base : BaseModel
        The model whose real module names count.
    targets : sequence of str or None
        Module names, or their last parts, or ``all-linear``; None takes the attention's query and value projections.
    rank : int
        Must not exceed the smaller side of any target.

    Raises
    ------
    AdapterError
        A target that matches nothing, or a rank larger than a layer that is named. ``all-linear`` leaves such layers
        out, see `left_out`.
    """
    modules = adaptable_modules(base)
    if not modules:
        raise AdapterError(
            f"'{base.folder}' ({type(base.model).__name__}) has no linear layers outside its head, and every "
            "adapter.kind needs some. Take a base that has, such as ViT, Swin or ConvNeXt for images, BERT for texts."
        )
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
        if chosen := [name for name, shape in modules.items() if rank <= min(shape)]:
            return chosen
        largest = max(min(shape) for shape in modules.values())
        raise AdapterError(f"adapter.rank = {rank} is larger than every layer of '{base.folder}'; at most {largest}.")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise AdapterError(
                f"adapter.targets: '{target}' matches no linear module of '{base.folder}' that PEFT adapts. "
                f"{nearest(target, leaves)}"
            )
    chosen = [n for n in modules if any(n == target or n.endswith(f".{target}") for target in targets)]
    for name in chosen:
        if rank > min(modules[name]):
            raise AdapterError(
                f"adapter.rank = {rank} is larger than layer '{name}' of shape {modules[name]}; "
                f"at most {min(modules[name])} is allowed here."
            )
    return chosen


def left_out(base: BaseModel, rank: int) -> list[str]:
    """Say what ``all-linear`` does not adapt: layers smaller than the rank, and weights that are no linear layers.

    A gate or router that is a linear layer is adapted like any other, as PEFT does it.
    """
    small = [name for name, shape in adaptable_modules(base).items() if rank > min(shape)]
    blocks = sorted(
        name
        for name, tensor in base.model.named_parameters()
        if not any(name.startswith(f"{head}.") for head in base.head) and tensor.ndim == 3 and _of_experts(name)
    )
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
            f"({', '.join(sorted({name.rpartition('.')[2] for name in blocks}))}) and no linear layers"
        )
    return said


def _of_experts(name: str) -> bool:
    return "experts" in name.split(".")


def _counted(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}" + ("s" if len(names) > 1 else "")


def _check_layers(base: BaseModel, targets: Sequence[str], adapter: AdapterConfig) -> None:
    """Raise AdapterError for what PEFT cannot do with these layers, or does wrongly."""
    from transformers.pytorch_utils import Conv1D

    modules = [(name, base.model.get_submodule(name)) for name in targets]
    if adapter.init in INITS_OF_BASE:
        check_plain(dict(modules), f"adapter.init = '{adapter.init}'")
    elif FIXED.get(adapter.kind, frozenset()) >= {Role.A, Role.B}:  # which are then singular vectors of the weights
        check_plain(dict(modules), f"adapter.kind = '{adapter.kind}'")
    conv1d = next((name for name, module in modules if isinstance(module, Conv1D)), None)
    if conv1d is not None and adapter.kind in WITHOUT_CONV1D:
        raise AdapterError(
            f"adapter.kind = '{adapter.kind}' cannot adapt layer '{conv1d}', a transposed one (Conv1D, as in GPT-2). "
            f"Allowed here: {', '.join(sorted(ALL_KINDS - WITHOUT_CONV1D))}."
        )
    if conv1d is not None and adapter.init == "olora":  # PEFT decomposes the transposed weight
        raise AdapterError(
            f"adapter.init = 'olora' cannot initialise layer '{conv1d}', a transposed one (Conv1D, as in GPT-2); "
            "use another adapter.init, such as pissa."
        )
    for name, module in modules:
        smaller = min(cast(Tensor, module.weight).shape)
        if adapter.init == "lora-ga" and 2 * adapter.rank > smaller:
            raise AdapterError(
                f"adapter.init = 'lora-ga' takes 2 x adapter.rank directions of a gradient, and layer '{name}' has "
                f"{smaller}; at most rank {smaller // 2} is allowed here."
            )


def _tensors_on_the_wire(model: PeftModel) -> dict[str, Tensor]:
    """Return the live parameters and buffers of the adapter under the names that PEFT saves them by."""
    live = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = {}
    for name in sorted(saved, key=lambda name: (name.count("."), name)):
        # RandLoRA names its one pair of projections for the model, and once more for every layer
        if (tensor := live.pop(saved[name].data_ptr(), None)) is not None:
            found[name.replace(R_IN_PEFT, ".lora_R.")] = tensor
    return found


class AdaptedModel:
    """A frozen base with one adapter whose tensors can be read and replaced by name.

    Parameters
    ----------
    base : BaseModel
        The frozen base; it is changed in place.
    config : RunConfig
        Names kind, rank, targets, head and seed.

    Attributes
    ----------
    model : peft.PeftModel
        The model to run.
    trained : tuple of str
        Names of the tensors that clients train, in sorted order.
    frozen : tuple of str
        Names of the adapter's tensors that nobody trains: A0 under FFA-LoRA, random projections, a frozen head.
    personal : tuple of str
        Those of `trained` that never leave their client: a local head.
    layers : tuple of str
        Names of the adapted modules in the base.
    notes : tuple of str
        What a user should know of base and adapter, in words.
    offset : mapping of str to LoraFactors
        By layer, what the initialisation took out of the base, which it put into the adapter; mostly empty.
    """

    def __init__(self, base: BaseModel, config: RunConfig) -> None:
        adapter = config.adapter
        self.base, self.task = base, tasks.of(config)
        self.scaling = adapter.scaling
        everything = tuple(adapter.targets or ()) == (ALL_LINEAR,)
        # LoRA-GA takes twice the rank out of a layer's gradient
        needed = 2 * adapter.rank if everything and adapter.init == "lora-ga" else adapter.rank
        targets = choose_targets(base, adapter.targets, needed)
        _check_layers(base, targets, adapter)
        self.notes = (*base.notes, *(left_out(base, needed) if everything else ()))
        self.layers = tuple(targets)
        self.peft_config = peft_config(
            adapter,
            derive_seed(config.run.seed, "adapter"),
            task_type=self.task.peft and TaskType[self.task.peft],
            target_modules=targets,
            modules_to_save=list(base.head) or None,
            base_model_name_or_path=str(base.folder),
        )
        # the last digits of a decomposition depend on the number of threads
        with seeded(config.run.seed, "adapter"), num_threads(1):
            self.model = adapt(base, self.peft_config, config)
        self._tensors = _tensors_on_the_wire(self.model)
        for tensor in self._tensors.values():
            tensor.data = tensor.data.float()
        self._layers = [
            module for module in self.model.modules() if isinstance(module, LoraLayer) and adapter.kind != "adalora"
        ]
        self._base_weights = self._weights_of_layers()
        self._split(config)
        self._seed = config.run.seed
        self.initial = self.tensors(self._tensors)
        start = AdapterState.from_tensors(self.initial, self.scaling).factors
        self.offset: Mapping[str, LoraFactors] = start if adapter.init in INITS_OF_BASE else {}
        self.frozen_hash = fingerprint({name: self.initial[name] for name in self.frozen}) if self.frozen else ""

    def _weights_of_layers(self) -> BaseWeights:
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}
        transposed = frozenset(name for name, layer in layers.items() if getattr(layer, "fan_in_fan_out", False))
        weights = {name: cast(nn.Parameter, layer.get_base_layer().weight) for name, layer in layers.items()}
        return BaseWeights(weights, transposed)

    def check_movable(self, what: str) -> None:
        """Raise AdapterError if the adapted layers' weights cannot be changed as the setting `what` does."""
        layers = {name: cast(LoraLayer, self.model.get_submodule(PEFT_PREFIX + name)) for name in self.layers}
        check_plain({name: layer.get_base_layer() for name, layer in layers.items()}, what)

    def _split(self, config: RunConfig) -> None:
        head = {name for name in self._tensors if role_of(name) is Role.HEAD}
        frozen = set(head) if config.adapter.head == "frozen" else set()
        fixed = FIXED.get(config.adapter.kind, frozenset())
        frozen |= {name for name in self._tensors if role_of(name) in fixed}
        # random projections are buffers of PEFT's models
        frozen |= {name for name, tensor in self._tensors.items() if not isinstance(tensor, nn.Parameter)}
        self.frozen = tuple(sorted(frozen))
        self.trained = tuple(sorted(self._tensors.keys() - frozen))
        self.personal = tuple(sorted(head - frozen)) if config.adapter.head == "local" else ()

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        on: torch.device = next(self.model.parameters()).device
        return on

    def begin_training(self, names: Sequence[str]) -> list[nn.Parameter]:
        """Let these tensors, and no others, have gradients; return the live parameters."""
        for name, tensor in self._tensors.items():
            tensor.requires_grad_(name in names)
        return [self.parameter(name) for name in names]

    def tensors(self, names: Sequence[str] | Mapping[str, object]) -> dict[str, Tensor]:
        """Return copies of these tensors, on the CPU."""
        return {name: self._tensors[name].detach().to("cpu", copy=True) for name in sorted(names)}

    def drawn(self, draw: int, rank: int) -> dict[str, Tensor]:
        """Return the adapter as it is drawn from the run's seed, on the CPU.

        Parameters
        ----------
        draw : int
            0 is what the run begins with; for others see `fedpeft.adapters.draws`: A anew, B zero.
        rank : int
            Ranks of A and B, the first of all; 0 means all.
        """
        tensors = dict(self.initial)
        for name, tensor in self.initial.items():
            role = role_of(name)
            if draw and role is Role.A:
                tensors[name] = draw_a(self._seed, draw, name.removesuffix(A_SUFFIX), *tensor.shape)
            elif draw and role is Role.B:
                tensors[name] = torch.zeros_like(tensor)
        return first_ranks(tensors, rank) if rank else tensors

    def parameter(self, name: str) -> nn.Parameter:
        """Return a live parameter of the adapter."""
        return cast(nn.Parameter, self._tensors[name])

    def load(self, tensors: Mapping[str, Tensor], scaling: float) -> None:
        """Write these tensors into the resident adapter; ranks may differ from those before.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            By PEFT's names; and changes of the base, which else is as the run began with it.
        scaling : float
            Of every layer's update from now on, where updates have factors.

        Raises
        ------
        AdapterError
            A name that this adapter does not have.
        """
        self._base_weights.set(base_changes(tensors))
        for name, tensor in tensors.items():
            if role_of(name) is Role.BASE:
                continue
            if name not in self._tensors:
                raise AdapterError(f"tensor '{name}' does not belong to this adapter. {nearest(name, self._tensors)}")
            live = self._tensors[name]
            if live.shape == tensor.shape:
                live.data.copy_(tensor)
            else:
                live.data = tensor.detach().to(live.device, live.dtype, copy=True)
        for layer in self._layers:
            layer.r["default"] = layer.lora_A["default"].weight.shape[0]
            layer.scaling["default"] = scaling

    def save(self, directory: Path, state: AdapterState, labels: Sequence[str]) -> None:
        """Write an adapter that ``PeftModel.from_pretrained`` loads, into the base as it was before any adapter.

        Parameters
        ----------
        directory : Path
            Made if it does not exist.
        state : AdapterState
            Every tensor of the adapter, the head included; layers may differ in rank and scaling.
        labels : sequence of str
            Label names in the order of their ids, written to labels.json.
        """
        settings = self.peft_config.to_dict()
        if state.factors:  # PEFT would initialise as it is told to whenever it loads, and change its base once more
            settings |= {"init_lora_weights": True, "eva_config": None, "lora_ga_config": None}
        factors = {layer: self._as_plain(layer, f) for layer, f in state.factors.items()}
        write_adapter(directory, settings, AdapterState(factors, state.dense))
        write_labels(directory, labels)

    def _as_plain(self, layer: str, f: LoraFactors) -> LoraFactors:
        """Return one layer's update of the original base, as A and B alone."""
        plain = f.plain()
        if layer not in self.offset:
            return plain
        out = self.offset[layer]
        A = torch.cat([plain.A, out.A])
        B = torch.cat([plain.B, out.B * (-out.scaling / plain.scaling)], dim=1)
        return LoraFactors(A, B, plain.scaling)
