"""Clients trained together hold what each would hold alone, but for the rounding of sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedpeft.adapters.draws import first_ranks
from fedpeft.adapters.state import Role, role_of
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.resident import Resident
from fedpeft.training.batched.layers import OwnLayers
from fedpeft.training.batched.together import JointPlainGradients, Part, Stacks, train_together, why_not
from fedpeft.training.local import LocalResult, Turn, train_locally

Make = Callable[..., RunConfig]


def still(home: Resident) -> Resident:
    """Take the dropout out of a resident base."""
    for module in home.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return home


def parts_of(home: Resident, ranks: Sequence[int] = (), rows: Sequence[int] = ()) -> list[Part]:
    """Return a part for each client, whose adapters have begun at different values."""
    adapted, parts = home.adapted, []
    for index, (client, own) in enumerate(zip(home.partition.client_ids, home.partition.indices, strict=True)):
        torch.manual_seed(index)
        tensors = {name: t + 0.05 * torch.randn_like(t) for name, t in adapted.initial.items()}
        rank = ranks[index] if ranks else 0
        if rank:
            tensors = first_ranks(tensors, rank)
        kept = own[: rows[index]] if rows else own
        scaling = adapted.scaling if not rank else home.config.adapter.scaling_of(rank)
        parts.append(Part(tensors, scaling, kept, Turn(home.config.run.seed, client, 2, 4)))
    return parts


def alone(home: Resident, part: Part, names: Sequence[str]) -> tuple[dict[str, Tensor], LocalResult]:
    home.adapted.load(part.tensors, part.scaling)
    result = train_locally(home.adapted, home.data.train, part.rows, home.config.train, part.turn, names=names)
    return home.adapted.tensors(names), result


def compare(home: Resident, parts: Sequence[Part], names: Sequence[str] | None = None) -> None:
    """Train together and one by one, and hold the two against each other."""
    still(home)
    adapted, train = home.adapted, home.config.train
    names = adapted.trained if names is None else names
    layers = OwnLayers(adapted)
    assert not why_not(adapted, layers, train)
    joint = train_together(
        adapted, train, parts, names, JointPlainGradients(adapted, layers, home.data.train, train, parts)
    )
    for part, trained in zip(parts, joint, strict=True):
        tensors, result = alone(home, part, names)
        assert tensors.keys() == trained.tensors.keys()
        for name, tensor in tensors.items():
            assert tensor.shape == trained.tensors[name].shape
            moved = (tensor - part.tensors[name]).norm()
            assert moved > 0, f"{name} is to move"
            assert (tensor - trained.tensors[name]).norm() <= 2e-3 * moved, name
        assert trained.result.loss == pytest.approx(result.loss, rel=1e-5)
        assert trained.result.steps == result.steps


@pytest.mark.parametrize("kind", ["lora", "ffa-lora", "rslora"])
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_clients_trained_together_hold_what_each_would_hold_alone(text_config: Make, kind: str, head: str) -> None:
    home = Resident(text_config(adapter__kind=kind, adapter__head=head, train__local_steps=3, train__batch_size=4))
    compare(home, parts_of(home))


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "adamw", "weight_decay": 0.1, "max_grad_norm": 0.05},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.1},
        {"optimizer": "sgd", "learning_rate": 0.1, "proximal_mu": 0.5, "max_grad_norm": 0.1},
        {"lr_schedule": "cosine"},
    ],
)
def test_every_client_has_its_own_optimiser_clipping_and_proximal_term(
    text_config: Make, train: dict[str, float]
) -> None:
    settings = {f"train__{key}": value for key, value in train.items()}
    home = Resident(text_config(train__local_steps=4, train__batch_size=4, **settings))
    compare(home, parts_of(home))


def test_clients_with_other_numbers_of_steps_and_rows_drop_out_when_they_are_done(text_config: Make) -> None:
    home = Resident(text_config(train__local_epochs=2, train__batch_size=4))
    parts = parts_of(home, rows=(6, 17, 3))
    assert len({part.steps(home.config.train) for part in parts}) == 3
    compare(home, parts)


def test_clients_of_mixed_ranks_are_trained_together_and_keep_their_ranks(text_config: Make) -> None:
    home = Resident(text_config(train__local_steps=3, train__batch_size=4, train__weight_decay=0.1))
    compare(home, parts_of(home, ranks=(1, 4, 2)))


def test_only_what_a_round_trains_moves(text_config: Make) -> None:
    home = Resident(text_config(train__local_steps=2, train__batch_size=4))
    compare(home, parts_of(home), [name for name in home.adapted.trained if role_of(name) is Role.B])


def test_a_language_model_and_an_image_classifier_are_trained_together(
    tiny_llama: Path, pairs_jsonl: Path, tiny_vit: Path, image_folder: Path
) -> None:
    common = {"partition.scheme": "iid", "federation.clients": 3, "train.local_steps": 3, "train.batch_size": 4}
    common |= {"train.learning_rate": 0.01, "adapter.rank": 2}
    chat = {"model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "data.prompt": "prompt"}
    images = {"model.name": str(tiny_vit), "data.source": str(image_folder), "data.image": "image"}
    for own in ({**chat, "data.completion": "completion"}, images):
        home = Resident(resolve([nest({**common, **own})]))
        compare(home, parts_of(home))


def test_layers_have_the_forwards_again_that_they_had(text_config: Make) -> None:
    home = still(Resident(text_config()))
    layer = next(module for module in home.adapted.model.modules() if hasattr(module, "base_layer"))
    calls: list[int] = []
    whole = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs)
    held = layer.forward
    stacks = Stacks.of(home.adapted, parts_of(home), [0, 1], home.adapted.trained)
    with home.own_layers.with_stacks({**stacks.frozen, **stacks.trained}, stacks.scaling):
        assert layer.forward is not held
    assert layer.forward is held


def test_models_whose_clients_cannot_be_trained_together_are_told_apart(text_config: Make) -> None:
    def reason(**settings: object) -> str:
        home = Resident(text_config(**settings))
        return why_not(home.adapted, OwnLayers(home.adapted), home.config.train)

    assert "dropout is active" in reason(model__dropout="checkpoint")
    for kind in ("ia3", "dora", "lora-xs"):
        assert kind in reason(adapter__kind=kind) or "no plain" in reason(adapter__kind=kind)
