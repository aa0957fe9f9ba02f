"""What holds of every kind of adapter, on a tiny BERT that classifies and a tiny Llama that writes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedpeft.adapters.kinds import KINDS, Kind
from fedpeft.adapters.state import AdapterState, ClientUpdate, Role, fingerprint, role_of
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.models import load_base
from fedpeft.resident import Resident
from fedpeft.strategies.fedit import FedIt
from fedpeft.training.local import Turn, train_locally

Make = Callable[..., RunConfig]
# PEFT computes the updates of these in float32, whatever the layer's type
IN_FLOAT32 = {"c3a", "boft", "fourierft", "deft", "adamss"}
# PEFT gives keys and values to causal models alone
NOT_HERE = {("prefix-tuning", "bert")}
# what they freeze follows from the base, or the public rows, alone
FROM_BASE = {"lora-xs", "supertuning", "delora", "psoft", "osf", "peanut", "glora"}


@dataclass(frozen=True)
class Round:
    """An adapter, what two clients made of it, and their mean."""

    kind: Kind
    home: Resident
    again: Callable[..., Resident]
    clients: list[dict[str, Tensor]]
    mean: dict[str, Tensor]


def _train(home: Resident, client: int) -> dict[str, Tensor]:
    adapted = home.adapted
    adapted.load(adapted.initial, adapted.scaling)
    two_steps = home.config.train.model_copy(update={"local_steps": 2})  # where B is zero, the first moves B alone
    train_locally(
        adapted,
        home.data.train,
        home.partition.indices[client],
        two_steps,
        Turn(0, str(client), 1, 2),
    )
    return adapted.tensors(adapted.initial)


def _mean(home: Resident, clients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    adapted = home.adapted
    updates = []
    for number, tensors in enumerate(clients):
        state = AdapterState.from_tensors(tensors, adapted.scaling)
        dense = {name: tensor for name, tensor in state.dense.items() if name not in adapted.frozen}
        updates.append(ClientUpdate(str(number), 1 + 2 * number, state.factors, dense))
    current = AdapterState.from_tensors(adapted.initial, adapted.scaling)
    return FedIt(scaling=adapted.scaling, frozen=adapted.frozen).aggregate(updates, current).to_tensors()


def config_of(model: str, kind: str, small: Any, text: Make, llama: Path, pairs: Path, **own: Any) -> RunConfig:
    own = {"adapter__kind": kind, **small.get(kind, {}), **own}
    linear = KINDS.find(kind).choose is None
    if model == "bert":
        rows = {"adapter__init_data": text().data.source} if kind == "lora-sb" else {}
        return text(**({"adapter__targets": "query,value,intermediate.dense"} if linear else {}) | rows | own)
    base = {
        "model.name": str(llama),
        "model.task": "causal-lm",
        "data.source": str(pairs),
        "federation.clients": 2,
        "adapter.rank": 2,
        **({"adapter.targets": "q_proj,v_proj,down_proj"} if linear else {}),
        "train.batch_size": 8,
        "train.learning_rate": 0.01,
    }
    rows = {"adapter.init_data": str(pairs)} if kind == "lora-sb" else {}
    return resolve([nest(base | rows), nest({name.replace("__", "."): value for name, value in own.items()})])


@pytest.fixture(
    scope="module",
    params=[(kind, model) for kind in KINDS.ours for model in ("bert", "llama") if (kind, model) not in NOT_HERE],
    ids="-".join,
)
def made(request: pytest.FixtureRequest, small: Any, text_config: Make, tiny_llama: Path, pairs_jsonl: Path) -> Round:
    kind, model = request.param

    def again(**own: Any) -> Resident:
        return Resident(config_of(model, kind, small, text_config, tiny_llama, pairs_jsonl, **own))

    torch.manual_seed(1)
    home = again()
    clients = [_train(home, client) for client in (0, 1)]
    return Round(KINDS.find(kind), home, again, clients, _mean(home, clients))


def logits(model: Any, home: Resident) -> Tensor:
    model.eval()
    inputs = home.data.test.batch(np.arange(6))
    inputs.pop("labels")
    with torch.no_grad():
        computed: Tensor = model(**inputs).logits
    # PEFT gives those of virtual tokens too
    return computed[:, -inputs["input_ids"].shape[1] :] if computed.ndim == 3 else computed


def base_of(home: Resident, seed: int | None = None) -> Any:
    config = home.config
    if seed is not None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    return load_base(config, home.folder, home.labels).model


def resident_logits(made: Round) -> Tensor:
    made.home.adapted.load(made.mean, made.home.adapted.scaling)
    return logits(made.home.adapted.model, made.home)


def test_only_the_kinds_tensors_and_the_head_are_trained(made: Round) -> None:
    adapted = made.home.adapted
    adapted.begin_training(adapted.trained)
    live = {id(each) for each in adapted.model.parameters() if each.requires_grad}
    assert live == {id(adapted.parameter(name)) for name in adapted.trained}
    own = [name for name in adapted.trained if role_of(name) is not Role.HEAD]
    assert own
    assert all(any(f".{part}" in f".{name}" for part in made.kind.parts) for name in own)
    heads = tuple(f"{made.kind.prefix}{head}." for head in made.home.adapted.base.head)
    assert all(name.startswith(heads) for name in set(adapted.trained) - set(own))


def test_the_seed_alone_draws_it(made: Round) -> None:
    one = made.home.adapted
    torch.manual_seed(2)
    two = made.again().adapted
    assert fingerprint(one.initial) == fingerprint(two.initial)
    assert one.frozen_hash == two.frozen_hash
    assert one.frozen_hash or not one.frozen
    if one.frozen_hash and made.kind.name not in FROM_BASE:
        assert made.again(run__seed=2).adapted.frozen_hash != one.frozen_hash
    one.load(one.initial, one.scaling)
    begun, base = logits(one.model, made.home), logits(base_of(made.home), made.home)
    assert torch.equal(begun, logits(two.model, made.home))
    moved = made.kind.moved(one.peft_config)
    assert moved == any("begins at random values" in note for note in one.notes)
    if made.kind.name != "lora-sb":  # whose start is a step of training
        rounding = 1e-4 if made.kind.name == "lora-xs" else 2e-6  # of which R is drawn
        if made.kind.name in {"vblora", "unilora"}:  # products of two small draws
            assert moved
            assert not torch.equal(begun, base)
        else:
            assert torch.allclose(begun, base, rtol=0, atol=rounding) == (not moved)


def test_a_round_moves_all_that_is_trained_and_nothing_else(made: Round) -> None:
    adapted = made.home.adapted
    for tensors in made.clients:
        for name, before in adapted.initial.items():
            if made.kind.name == "glora" and ".glora_D." in name:
                continue  # it multiplies the base's biases, which are zero here
            assert torch.equal(tensors[name], before) == (name in adapted.frozen), name
    factors = made.kind.has_factors or made.kind.name == "dora"
    roles = {role_of(name) for name in adapted.initial}
    assert roles.isdisjoint({Role.A, Role.B, Role.R}) == (not factors)


def test_fedit_averages_what_is_trained(made: Round) -> None:
    adapted = made.home.adapted
    assert made.mean.keys() == adapted.initial.keys()
    for name in adapted.initial:
        if name in adapted.frozen:
            assert torch.equal(made.mean[name], adapted.initial[name])
        else:
            mean = 0.25 * made.clients[0][name].double() + 0.75 * made.clients[1][name].double()
            torch.testing.assert_close(made.mean[name].double(), mean, rtol=1e-6, atol=1e-7)


def reloaded(made: Round, folder: Path) -> Any:
    """Return what PEFT makes of the exported mean, into a base whose head is drawn otherwise."""
    home = made.home
    home.adapted.save(folder, AdapterState.from_tensors(made.mean, home.adapted.scaling), home.labels)
    return PeftModel.from_pretrained(base_of(home, seed=9), str(folder))


def test_peft_reloads_what_is_exported(made: Round, tmp_path: Path) -> None:
    expected = resident_logits(made)
    torch.testing.assert_close(logits(reloaded(made, tmp_path), made.home), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(base_of(made.home), made.home), rtol=1e-4, atol=1e-5)


def test_peft_merges_it_into_the_base_or_refuses(made: Round, tmp_path: Path) -> None:
    model = reloaded(made, tmp_path)
    if made.kind.merges:
        expected = resident_logits(made)
        torch.testing.assert_close(logits(model.merge_and_unload(), made.home), expected, rtol=1e-4, atol=1e-4)
    elif not made.home.labels:  # whose layers have no biases to merge into
        with pytest.raises((ValueError, AttributeError, NotImplementedError, TypeError)):
            model.merge_and_unload()


def outputs_of(made: Round) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Return what computes the outputs of all adapted layers of a copy, in float64 if it can, for fixed inputs."""
    adapted = made.home.adapted
    paths = {id(each): name for name, each in adapted.model.named_parameters()}
    number = torch.float32 if made.kind.name in IN_FLOAT32 else torch.float64
    model = copy.deepcopy(adapted.model).to(number).eval()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 5, _width(layer.get_base_layer()), generator=draw, dtype=number) for layer in layers]
    live = {name: model.get_parameter(paths[id(adapted.parameter(name))]) for name in adapted.trained}

    def outputs(tensors: dict[str, Tensor]) -> list[Tensor]:
        for name, tensor in tensors.items():
            live[name].data.copy_(tensor)
        if made.kind.prompts:
            return [model.get_prompt_embedding_to_save("default")]
        with torch.no_grad():
            return [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    return outputs


def _width(layer: nn.Module) -> int:
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[-1])  # type: ignore[arg-type]


def test_the_mean_is_exact_where_the_update_is_linear_in_what_is_trained(made: Round) -> None:
    adapted = made.home.adapted
    own = [name for name in adapted.trained if role_of(name) is not Role.HEAD]
    draw = torch.Generator().manual_seed(0)
    one, other = (
        {name: adapted.initial[name].double() + 0.5 * torch.randn(adapted.initial[name].shape, generator=draw)
         for name in own}
        for _ in range(2)
    )  # fmt: skip
    outputs = outputs_of(made)
    middle = outputs({name: (one[name] + other[name]) / 2 for name in own})
    deviations = [
        float((at - (first + second) / 2).abs().max() / (first - second).abs().max())
        for at, first, second in zip(middle, outputs(one), outputs(other), strict=True)
    ]
    if made.kind.linear:
        assert max(deviations) < (1e-5 if made.kind.name in IN_FLOAT32 else 1e-9)
    else:
        assert min(deviations) > 1e-3
