"""Blocks that run again in the backward pass leave the gradients that they would leave otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft.adapters.stacks import blocks_of
from fedpeft.config import nest, resolve
from fedpeft.errors import AdapterError
from fedpeft.models import torch_seed
from fedpeft.privacy.independence import row_engine
from fedpeft.resident import Resident
from fedpeft.tasks.losses import mean_loss
from fedpeft.training.batched.together import JointPlainGradients, Part, Stacks
from fedpeft.training.checkpointing import checkpoint_blocks
from fedpeft.training.local import Turn, training_mode
from fedpeft.training.prefix import feeding

Homes = Callable[..., Resident]


@pytest.fixture(scope="module")
def homes(
    tiny_bert: Path, tiny_llama: Path, tiny_vit: Path, text_csv: Path, pairs_jsonl: Path, image_folder: Path
) -> Homes:
    """Return ``homes(task, on, ...)``, a tiny model with rows, whose adapter has begun elsewhere than at zero."""
    of_task: dict[str, dict[str, object]] = {
        "sequence-classification": {"model.name": str(tiny_bert), "data.source": str(text_csv)},
        "image-classification": {"model.name": str(tiny_vit), "data.source": str(image_folder), "data.image": "image"},
        "causal-lm": {"model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "data.completion": "completion"},
    }

    def home(task: str, on: bool, **more: object) -> Resident:
        settings = {"federation.clients": 2, "adapter.rank": 2, "train.gradient_checkpointing": on}
        own = {name.replace("__", "."): value for name, value in more.items()}
        made = Resident(resolve([nest({**settings, **of_task[task], "model.task": task, **own})]))
        torch.manual_seed(3)
        adapted = made.adapted
        adapted.load({name: t + 0.1 * torch.randn_like(t) for name, t in adapted.initial.items()}, adapted.scaling)
        return made

    return home


def runs_of(model: nn.Module) -> list[nn.Module]:
    """Return a list that grows whenever one of the model's blocks runs its first layer."""
    ran: list[nn.Module] = []
    for block in blocks_of(model).values():
        next(block.children()).register_forward_pre_hook(lambda module, _: ran.append(module))
    return ran


def step(home: Resident, rows: list[int]) -> tuple[dict[str, Tensor], int]:
    """Return a step's gradients, and how often a block ran."""
    adapted = home.adapted
    adapted.begin_training(adapted.trained)
    training_mode(adapted.model)
    ran = runs_of(adapted.model.get_base_model())  # type: ignore[arg-type]
    config = home.config
    with torch_seed(0):
        mean_loss(adapted.task, adapted.model, home.data.train.batch(rows), config.train.precision).backward()  # type: ignore[no-untyped-call]
    return {name: each.grad for name in adapted.trained if (each := adapted.parameter(name)).grad is not None}, len(ran)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["sequence-classification", "image-classification", "causal-lm"])
def test_gradients_are_the_same_to_the_last_bit_dropout_included(task: str, precision: str, homes: Homes) -> None:
    more = {"train__precision": precision, "adapter__dropout": 0.2}
    plain, once = step(homes(task, False, **more), [0, 1, 2])
    again, twice = step(homes(task, True, **more), [0, 1, 2])
    assert twice == once + 2  # whose first step may have looked for the model's head besides
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_so_are_those_of_single_rows(task: str, homes: Homes) -> None:
    found: list[dict[str, Tensor]] = []
    for on in (False, True):
        home = homes(task, on, adapter__dropout=0.2, privacy__level="record", privacy__noise_multiplier=1.0)
        engine, adapted = row_engine(home), home.adapted
        adapted.begin_training(adapted.trained)
        training_mode(adapted.model)
        ran = runs_of(adapted.model.get_base_model())  # type: ignore[arg-type]
        engine.reset()
        with torch_seed(0):
            engine.backward(home.data.train.batch([0, 1, 2]), "fp32")
        assert len(ran) == (4 if on else 2)
        parameters: list[Any] = [adapted.parameter(name) for name in adapted.trained]
        engine.check(parameters, 3)
        found.append({name: each.grad_sample for name, each in zip(adapted.trained, parameters, strict=True)})
    assert any(bool(each.any()) for each in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_blocks_whose_states_are_kept_run_neither_once_nor_again(homes: Homes) -> None:
    found = []
    for on in (False, True):
        home = homes("causal-lm", on, adapter__layers="last:1", simulation__prefix_cache="on")
        config = home.config.model_copy(
            update={"simulation": resolve([nest({"simulation.prefix_cache": "on"})]).simulation}
        )
        with feeding(home.adapted.model, config):
            step(home, [0, 1, 2])  # makes and keeps the states
            home.adapted.model.zero_grad()
            found.append(step(home, [0, 1, 2])[0])
    assert any(bool(each.any()) for each in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_clients_trained_together_have_the_same_gradients(homes: Homes) -> None:
    found = []
    for on in (False, True):
        home = homes("causal-lm", on)
        adapted, train = home.adapted, home.config.train
        owners = zip(home.partition.client_ids, home.partition.indices, strict=True)
        parts = [
            Part(adapted.tensors(adapted.initial), adapted.scaling, own, Turn(0, who, 1, 1)) for who, own in owners
        ]
        gradients = JointPlainGradients(adapted, home.own_layers, home.data.train, train, parts)
        stacks = Stacks.of(adapted, parts, [0, 1], adapted.trained)
        adapted.begin_training(())
        training_mode(adapted.model)
        gradients.compute(stacks, [np.array([0, 1]), np.array([2, 3])])
        found.append({name: whole.grad for name, whole in stacks.trained.items()})
    assert all(each is not None and bool(each.any()) for each in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_model_that_cannot_is_refused_by_name(homes: Homes) -> None:
    model = homes("causal-lm", False).adapted.model
    inner: Any = model.get_base_model()
    inner.supports_gradient_checkpointing = False
    with pytest.raises(AdapterError, match=r"train.gradient_checkpointing = true: the code of LlamaForCausalLM"):
        checkpoint_blocks(model)
