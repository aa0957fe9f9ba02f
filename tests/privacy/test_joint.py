"""Private training of many clients at once: the same batches, the same noise, the same clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from fedpeft.adapters.draws import first_ranks
from fedpeft.config import RunConfig
from fedpeft.privacy.independence import row_engine
from fedpeft.privacy.joint import JointPrivateGradients
from fedpeft.privacy.levels import find_level
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import seeded
from fedpeft.resident import Resident
from fedpeft.training.batched.layers import OwnLayers
from fedpeft.training.batched.together import Part, Stacks, train_together
from fedpeft.training.local import Turn, train_locally

Make = Callable[..., RunConfig]


def private(make: Make, **settings: object) -> Resident:
    home = Resident(
        make(
            privacy__level="record", privacy__noise_multiplier=0.7, privacy__rng="seeded", privacy__max_grad_norm=0.1,
            train__batch_size=4, train__local_steps=4, **settings,
        )
    )  # fmt: skip
    for module in home.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return home


def mechanism(noise: float, rate: float = 0.1) -> RecordMechanism:
    return RecordMechanism(noise, rate, steps=4, denominator=4.0, max_grad_norm=0.1)


def parts_of(home: Resident, ranks: Sequence[int]) -> list[Part]:
    parts = []
    for index, rank in enumerate(ranks):
        torch.manual_seed(index)
        tensors = {name: t + 0.05 * torch.randn_like(t) for name, t in home.adapted.initial.items()}
        client = home.partition.client_ids[index]
        turn = Turn(0, client, 1, 2)
        parts.append(Part(first_ranks(tensors, rank), 2.0 / rank, home.partition.indices[index], turn))
    return parts


def joint(home: Resident, mechanisms: Sequence[RecordMechanism], physical: int = 8) -> JointPrivateGradients:
    randomness = [seeded(3, "test", client) for client in range(len(mechanisms))]
    rows = home.partition.indices
    return JointPrivateGradients(
        home.adapted, OwnLayers(home.adapted), home.data.train, "fp32", rows, mechanisms, randomness, physical
    )


@pytest.mark.parametrize("kind", ["lora", "ffa-lora"])
@pytest.mark.parametrize("physical", [1, 8])
def test_private_clients_trained_together_hold_what_each_would_hold_alone(
    text_config: Make, kind: str, physical: int
) -> None:
    home = private(text_config, adapter__kind=kind)
    adapted, train = home.adapted, home.config.train
    mechanisms = [mechanism(0.7), mechanism(1.5, 0.02), mechanism(0.0, 0.3)]  # the second draws empty batches
    parts = parts_of(home, (2, 1, 2))
    got = train_together(adapted, train, parts, adapted.trained, joint(home, mechanisms, physical))
    engine, level = row_engine(home), find_level("record")
    for client, (part, trained) in enumerate(zip(parts, got, strict=True)):
        adapted.load(part.tensors, part.scaling)
        source = level.gradients(home, home.data.train, part.rows, mechanisms[client], seeded(3, "test", client))
        result = train_locally(adapted, home.data.train, part.rows, train, part.turn, private=source)
        for name, tensor in adapted.tensors(adapted.trained).items():
            moved = (tensor - part.tensors[name]).norm()
            assert moved > 0
            assert tensor.shape == trained.tensors[name].shape
            assert (tensor - trained.tensors[name]).norm() <= 2e-3 * moved, name
        assert trained.result.loss == pytest.approx(result.loss, rel=1e-5, nan_ok=True)
    engine.reset()


def test_a_row_whose_gradient_is_not_finite_counts_as_zero_in_its_own_client_alone(text_config: Make) -> None:
    home = private(text_config)
    parts = parts_of(home, (2, 2))
    broken = {name: torch.full_like(t, torch.inf) for name, t in parts[0].tensors.items()}
    parts[0] = Part(broken, 1.0, parts[0].rows, parts[0].turn)
    stacks = Stacks.of(home.adapted, parts, [0, 1], home.adapted.trained)
    joint(home, [mechanism(0.0), mechanism(0.0)]).compute(stacks, [rows[:3] for rows in home.partition.indices[:2]])
    for parameter in stacks.trained.values():
        assert parameter.grad is not None
        assert not parameter.grad[0].any()
        assert parameter.grad[1].any()


def test_no_row_moves_a_sum_by_more_than_the_bound(text_config: Make) -> None:
    home = private(text_config)
    rows = home.partition.indices[0]
    for batch in (rows[:1], rows[1:2]):
        stacks = Stacks.of(home.adapted, parts_of(home, (2,)), [0], home.adapted.trained)
        joint(home, [mechanism(0.0)]).compute(stacks, [batch])
        total = np.sqrt(sum(float(p.grad.square().sum()) for p in stacks.trained.values() if p.grad is not None))
        assert total * 4.0 == pytest.approx(0.1, rel=1e-3)
