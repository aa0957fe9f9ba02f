"""The adapter in a resident model: made once by PEFT, then only its tensors are swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, TaskType, get_peft_model_state_dict
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedpeft import tasks
from fedpeft.adapters import beyond, embeddings, expert_layers
from fedpeft.adapters.base_change import BaseWeights, check_plain
from fedpeft.adapters.beyond import expert_stacks, shared_weights
from fedpeft.adapters.draws import draw_a, first_ranks
from fedpeft.adapters.export import PEFT_PREFIX, write_adapter, write_labels
from fedpeft.adapters.fused import fuse
from fedpeft.adapters.initial import adapt
from fedpeft.adapters.kinds import INITS, Kind
from fedpeft.adapters.stacks import within
from fedpeft.adapters.state import A_SUFFIX, AdapterState, LoraFactors, Role, base_changes, fingerprint, role_of
from fedpeft.adapters.targets import ALL_LINEAR, check_layers, choose_targets, left_out
from fedpeft.adapters.warm import begin
from fedpeft.allocation import keep_freed_memory
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError, nearest
from fedpeft.models import BaseModel, num_threads, scoring_layers, seeded


def _tensors_of(model: PeftModel, kind: Kind) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return the live tensors of the adapter under the names that PEFT saves them by, and names of those it does not.

    Those are drawn anew wherever the adapter is loaded, such as the places of a sparse update; they count as frozen,
    so that server and clients find out if theirs differ.
    """
    aside = _kept_aside(model)
    live = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers(), *aside.values()]}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = dict(kind.live(model)) if kind.live is not None else {}
    for name, tensor in expert_layers.live(model).items():
        tensors[name] = live.pop(tensor.data_ptr())
    for name in sorted(saved, key=lambda name: (name.count("."), name)):
        # RandLoRA names its one pair of projections for the model, and once more for every layer
        if (tensor := live.pop(saved[name].data_ptr(), None)) is not None:
            for part, called in kind.names.items():
                name = name.replace(part, called)
            tensors[embeddings.named(name)] = tensor
    unsaved = {name: tensor for name, tensor in aside.items() if tensor.data_ptr() in live}
    return tensors | unsaved, frozenset(unsaved)


def _kept_aside(model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors that PEFT's layers hold in plain dictionaries, or as buffers that need not be saved."""
    prefix = str(getattr(model.base_model, "prefix", ""))
    kept = {}
    for path, layer in model.named_modules():
        for attribute in getattr(layer, "other_param_names", ()) if isinstance(layer, BaseTunerLayer) else ():
            values = getattr(layer, attribute, None)
            if not isinstance(values, dict | BufferDict) or "default" not in values:
                continue
            if isinstance(tensor := values["default"], Tensor):
                kept[f"{path}.{prefix}{attribute.removeprefix(prefix)}"] = tensor
    return kept


def _rank_of(layer: LoraLayer) -> int:
    if isinstance(layer, expert_layers.StackedExperts):
        return layer.rank
    if isinstance(layer, LoraEmbedding):
        return len(layer.lora_embedding_A["default"])
    return int(layer.lora_A["default"].weight.shape[0])


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
        Names of the adapted modules in the base, and of the parameters that hold adapted experts.
    stacks : tuple of str
        Those of `layers` that are such parameters.
    beside : tuple of str
        Those of `layers` that are no linear layers: such parameters, and embeddings.
    notes : tuple of str
        What a user should know of base and adapter, in words.
    offset : mapping of str to LoraFactors
        By layer, what the initialisation took out of the base, which it put into the adapter; mostly empty.
    """

    def __init__(self, base: BaseModel, config: RunConfig) -> None:
        adapter = config.adapter
        self.kind, self.init = adapter.facts, adapter.beginning
        self.base, self.task = base, tasks.of(config)
        self.scaling = adapter.scaling
        self.layers = tuple(self._choose(config))
        # the names of parameters change when PEFT puts a layer around their module
        self.stacks = tuple(sorted(expert_stacks(base).keys() & {*self.layers})) if self.kind.beyond_linear else ()
        tokens = beyond.embeddings(base).keys() & {*self.layers} if self.kind.beyond_linear else set()
        self.beside = (*self.stacks, *sorted(tokens))
        common = {
            "task_type": self.task.peft and TaskType[self.task.peft],
            "modules_to_save": list(base.head) or None,
            "base_model_name_or_path": str(base.folder),
            **self._targets(),
        }
        labels = self._labels()
        scoring = scoring_layers(base.model, base.head, len(labels))  # before PEFT copies them
        # the last digits of a decomposition depend on the number of threads
        with seeded(config.run.seed, "adapter"), num_threads(1):
            self.peft_config, self.model = adapt(base, config, common)
        expert_layers.part(self.model)
        self._tensors, self._unsaved = _tensors_of(self.model, self.kind)
        for tensor in self._tensors.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        if adapter.start is not None:
            of_labels = {f"{PEFT_PREFIX}{name}.{part}" for name in scoring for part in ("weight", "bias")}
            self.notes += begin(self.model, self._tensors, adapter, labels, of_labels)
        if self.kind.moved(self.peft_config):
            self.notes += (
                f"adapter.kind = '{self.kind.name}' begins at random values, equal at all clients, with which the "
                "model computes something else than its base",
            )
        fuse(self.model)
        keep_freed_memory()
        self._layers = [each for each in self.model.modules() if isinstance(each, LoraLayer) and self.kind.resizable]
        self._base_weights = self._weights_of_layers()
        self._check_roles()
        self._split(config)
        self._seed = config.run.seed
        self.initial = self.tensors(self._tensors)
        start = AdapterState.from_tensors(self.initial, self.scaling).factors
        self.offset: Mapping[str, LoraFactors] = start if self.init.of_base else {}
        self.frozen_hash = fingerprint({name: self.initial[name] for name in self.frozen}) if self.frozen else ""

    def _labels(self) -> list[str]:
        named = getattr(self.base.model.config, "id2label", None) if self.base.head else None
        return [str(name) for _, name in sorted((named or {}).items())]

    def _choose(self, config: RunConfig) -> list[str]:
        """Return the names of the modules to adapt, after a look at what the kind can do with them."""
        adapter, base = config.adapter, self.base
        everything = ALL_LINEAR in (adapter.targets or ())
        if self.kind.choose is not None:
            self.notes: tuple[str, ...] = tuple(base.notes)
            chosen = self.kind.choose(base.model, adapter.targets)
            kept = within(base.model, base.head, chosen, adapter.layers)
            if adapter.layers is not None and not kept:
                raise AdapterError(
                    f"adapter.layers = '{adapter.layers}' leaves adapter.kind = '{adapter.kind}' nothing to adapt; "
                    "drop it."
                )
            return kept
        needed = self.init.ranks * adapter.rank if everything else adapter.rank
        needed = needed if self.kind.rank else 1
        targets = choose_targets(base, adapter.targets, needed, adapter.layers)
        check_layers(base, targets, adapter)
        aside = left_out(base, needed, targets) if everything else ()
        self.notes = (*base.notes, *aside, *beyond.remarks(base, targets))
        return targets

    def _targets(self) -> dict[str, list[str]]:
        """Return PEFT's fields that say what is adapted."""
        modules = [name for name in self.layers if name not in self.stacks]
        if self.stacks:  # without a list of modules PEFT takes those that it knows for the model
            return {"target_modules": modules, "target_parameters": list(self.stacks)}
        return {"target_modules": modules} if modules else {}

    def _check_roles(self) -> None:
        """Raise AdapterError for a tensor that is neither the kind's own nor of the head."""
        heads = tuple(f"{self.kind.prefix}{head}." for head in self.base.head)
        factors = (Role.A, Role.B, Role.R)
        for name in self._tensors:
            role = role_of(name)
            if role is Role.HEAD and not name.startswith(heads):
                problem = "neither it nor the model's head claims"
            elif role is Role.PARAMETER and self.kind.has_factors:
                problem = f"is no factor of its update (it has {', '.join(factors)} alone)"
            else:
                continue
            raise AdapterError(
                f"adapter.kind = '{self.kind.name}': PEFT made a tensor '{name}' that {problem}; leave out the options "
                "under [adapter] that ask for it."
            )

    def _weights_of_layers(self) -> BaseWeights:
        if not self.kind.resizable:  # whose base no method moves
            return BaseWeights({})
        weights: dict[str, Tensor] = {}
        transposed: set[str] = set()
        for name, layer in self.model.named_modules():
            if isinstance(layer, expert_layers.StackedExperts):
                found = {f"{name}#{number}": weight for number, weight in enumerate(layer.weights())}
                transposed |= found.keys() if layer.is_transposed else set()
            elif isinstance(layer, LoraLayer):
                of_tokens = isinstance(layer, LoraEmbedding)
                found = {name + embeddings.TOKENS * of_tokens: cast(Tensor, layer.get_base_layer().weight)}
                transposed |= found.keys() if of_tokens or getattr(layer, "fan_in_fan_out", False) else set()
            else:
                continue
            weights |= found
        return BaseWeights(weights, frozenset(transposed))

    def check_movable(self, what: str) -> None:
        """Raise AdapterError if the adapted layers' weights cannot be changed as the setting `what` does."""
        modules = self._targets().get("target_modules", [])
        layers = {name: cast(LoraLayer, self.model.get_submodule(PEFT_PREFIX + name)) for name in modules}
        check_plain({name: layer.get_base_layer() for name, layer in layers.items()}, what)
        if shared := shared_weights(self.base, modules):
            raise AdapterError(
                f"{what} moves the base's weights, and that of '{shared[0]}' is at once the embeddings' and the output "
                "layer's (tie_word_embeddings). Leave it out of adapter.targets, or take another strategy."
            )

    def _split(self, config: RunConfig) -> None:
        head = {name for name in self._tensors if role_of(name) is Role.HEAD}
        frozen = set(head) if config.adapter.head == "frozen" else set()
        frozen |= {name for name in self._tensors if role_of(name) in self.kind.fixed}
        # random projections are buffers of PEFT's models, or parameters that it freezes
        frozen |= {name for name, tensor in self._tensors.items() if not tensor.requires_grad}
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
            layer.r["default"] = _rank_of(layer)
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
            settings |= dict.fromkeys(self.kind.begun(self.init)) | self.kind.begun(INITS.find("default"))
        factors = {layer: self._as_plain(layer, f) for layer, f in state.factors.items()}
        dense = {name: tensor for name, tensor in state.dense.items() if name not in self._unsaved}
        if self.kind.export is not None:
            dense = dict(self.kind.export(self.model, dense))
        write_adapter(directory, settings, AdapterState(factors, dense))
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
