"""Private gradients against a loop over single rows that anyone can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import PrivacyError
from fedpeft.privacy.dp_sgd import PrivateGradients, RowEngine
from fedpeft.privacy.independence import probing, row_engine
from fedpeft.privacy.levels import find_level
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import secure, seeded
from fedpeft.resident import Resident
from fedpeft.training.local import Turn, train_locally
from fedpeft.training.neftune import EmbeddingNoise, uniform

TASKS = ("sequence-classification", "image-classification", "causal-lm")
KINDS = ("lora", "ffa-lora", "rslora", "lora-xs")
RECORD = find_level("record")


@pytest.fixture(scope="module")
def homes(
    tiny_bert: Path, tiny_llama: Path, tiny_vit: Path, text_csv: Path, pairs_jsonl: Path, image_folder: Path
) -> Callable[[str, str], Resident]:
    """Return ``homes(task, kind)``, a resident model whose B is not zero, so that A has a gradient too."""
    made: dict[tuple[str, str], Resident] = {}
    of_task: dict[str, dict[str, Any]] = {
        "sequence-classification": {"model.name": str(tiny_bert), "data.source": str(text_csv)},
        "image-classification": {"model.name": str(tiny_vit), "data.source": str(image_folder), "data.image": "image"},
        "causal-lm": {
            "model.name": str(tiny_llama),
            "data.source": str(pairs_jsonl),
            "data.prompt": "prompt",
            "data.completion": "completion",
        },
    }

    def home(task: str, kind: str) -> Resident:
        if (task, kind) not in made:
            common = {"federation.clients": 2, "adapter.rank": 2, "adapter.kind": kind, "train.local_steps": 2}
            made[task, kind] = Resident(resolve([nest(of_task[task] | common | {"model.task": task})]))
            adapted = made[task, kind].adapted
            torch.manual_seed(5)
            for name in adapted.trained:
                parameter = adapted.parameter(name)
                parameter.data += 0.1 * torch.randn_like(parameter)
            assert row_engine(made[task, kind]) is row_engine(made[task, kind])
        return made[task, kind]

    return home


def private(
    home: Resident, mechanism: RecordMechanism, physical: int = 8, seed: int = 0
) -> tuple[list[torch.nn.Parameter], PrivateGradients]:
    parameters = home.adapted.begin_training(home.adapted.trained)
    home.adapted.model.train()
    for module in home.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # masks are drawn anew in each forward pass
    rows = np.arange(len(home.data.train), dtype=np.int64)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return parameters, PrivateGradients(
        row_engine(home), home.data.train, rows, mechanism, seeded(seed, "t"), optimizer, physical=physical
    )


def oracle(home: Resident, parameters: list[torch.nn.Parameter], batch: list[int], bound: float) -> list[torch.Tensor]:
    """Return the sum of clipped gradients, one row at a time, through the model's own loss."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in batch:
        for p in parameters:
            p.grad = None
        home.adapted.model(**home.data.train.batch([row])).loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        norm = sum(float(g.double().pow(2).sum()) for g in grads) ** 0.5
        for into, g in zip(total, grads, strict=True):
            into += g.double() * min(1.0, bound / norm) if norm else 0.0
    for p in parameters:
        p.grad = None
    return total


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_the_gradient_is_the_mean_of_clipped_gradients_of_single_rows(
    task: str, kind: str, homes: Callable[[str, str], Resident]
) -> None:
    home = homes(task, kind)

    @settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        batch=st.lists(st.integers(0, 47), max_size=9),
        bound=st.sampled_from([1e-3, 0.3, 2.0, 1e6]),
        physical=st.sampled_from([1, 2, 4, 100]),
    )
    def check(batch: list[int], bound: float, physical: int) -> None:
        mechanism = RecordMechanism(0.0, 0.5, 1, 7.5, bound)
        parameters, gradients = private(home, mechanism, physical)
        expected = oracle(home, parameters, batch, bound)
        gradients.compute(np.asarray(batch, dtype=np.int64))
        scale = max(1.0, max(float(total.abs().max()) for total in expected))
        for parameter, total in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad.double(), total / 7.5, atol=1e-5 * scale, rtol=0.0)

    check()


@pytest.mark.parametrize("kind", ["lora", "ffa-lora"])
def test_one_row_moves_the_sum_by_no_more_than_the_bound(kind: str, homes: Callable[[str, str], Resident]) -> None:
    """Also where rows are of unequal length: what one row contributes must not depend on the others."""
    home = homes("causal-lm", kind)
    mechanism = RecordMechanism(0.0, 0.5, 1, 1.0, 0.05)
    sums = []
    for batch in ([0, 1, 2, 3], [0, 1, 2, 3, 4]):
        parameters, gradients = private(home, mechanism)
        gradients.compute(np.asarray(batch))
        sums.append(torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]))
    assert float((sums[1] - sums[0]).norm()) <= 0.05 + 1e-6


def test_a_batch_without_rows_takes_the_same_noise_and_moves_the_weights(
    homes: Callable[[str, str], Resident],
) -> None:
    home = homes("sequence-classification", "lora")
    mechanism = RecordMechanism(2.0, 0.5, 1, 4.0, 0.5)
    parameters, gradients = private(home, mechanism)
    gradients.compute(np.empty(0, dtype=np.int64))
    noise = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 4.0, rel=0.1)
    assert abs(float(noise.mean())) < 0.05


def test_a_row_whose_gradient_is_not_finite_counts_as_zero(homes: Callable[[str, str], Resident]) -> None:
    home = homes("sequence-classification", "lora")
    mechanism = RecordMechanism(0.0, 0.5, 1, 1.0, 0.5)
    parameters, gradients = private(home, mechanism)
    expected = oracle(home, parameters, [1], 0.5)
    row_engine(home).backward(home.data.train.batch([0, 1]), "fp32")
    for parameter in parameters:
        parameter.grad_sample[0] = float("nan")  # type: ignore[attr-defined]
    gradients._clipping.pre_step()
    for parameter, total in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad.double(), total, atol=1e-5)
        parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]


@pytest.mark.parametrize("source", [lambda: seeded(3, "t"), secure])
def test_batches_are_poisson_samples(source: Callable[[], Any], homes: Callable[[str, str], Resident]) -> None:
    home = homes("sequence-classification", "lora")
    rows = np.arange(10, 90, dtype=np.int64)
    mechanism = RecordMechanism(1.0, 0.1, 2000, 8.0, 1.0)
    parameters = home.adapted.begin_training(home.adapted.trained)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    row_engine(home).has_moved = True
    drawn = PrivateGradients(row_engine(home), home.data.train, rows, mechanism, source(), optimizer, physical=8)
    batches = list(drawn.batches())
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(8.0, abs=0.4)
    assert sizes.var() == pytest.approx(80 * 0.1 * 0.9, rel=0.2)  # binomial: not a fixed size
    counts = np.bincount(np.concatenate(batches), minlength=100)
    assert counts[:10].sum() == counts[90:].sum() == 0
    assert abs(counts[10:90] - 200).max() < 75  # 5 standard deviations of each row's count


def test_training_privately_moves_every_trained_tensor_and_repeats_to_the_byte(
    homes: Callable[[str, str], Resident],
) -> None:
    home = homes("sequence-classification", "ffa-lora")
    adapted = home.adapted
    results = []
    for _ in range(2):
        adapted.load(adapted.initial, adapted.scaling)
        rows = home.partition.indices[0]
        mechanism = RecordMechanism(1.0, 0.2, 3, 0.2 * len(rows), 1.0)
        make = lambda optimizer, rows=rows, mechanism=mechanism: PrivateGradients(  # noqa: E731
            row_engine(home), home.data.train, rows, mechanism, seeded(0, "t"), optimizer, physical=4
        )
        train = home.config.train.model_copy(update={"local_steps": 3, "proximal_mu": 0.1})
        done = train_locally(adapted, home.data.train, rows, train, Turn(0, "0", 1, 1), private=make)
        assert done.steps == 3
        results.append(adapted.tensors(adapted.trained))
    for name in adapted.trained:
        assert torch.equal(results[0][name], results[1][name])
        assert not torch.equal(results[0][name], adapted.initial[name])


def test_a_proximal_term_keeps_its_gradient(homes: Callable[[str, str], Resident]) -> None:
    home = homes("sequence-classification", "lora")
    adapted, rows = home.adapted, home.partition.indices[0]
    moved = {}
    for mu in (0.0, 5.0):
        adapted.load(adapted.initial, adapted.scaling)
        mechanism = RecordMechanism(3.0, 0.2, 12, 4.0, 1.0)
        make = lambda optimizer, mechanism=mechanism: PrivateGradients(  # noqa: E731
            row_engine(home), home.data.train, rows, mechanism, seeded(0, "t"), optimizer, physical=4
        )
        update = {"local_steps": 12, "proximal_mu": mu, "optimizer": "sgd", "learning_rate": 0.1}
        train = home.config.train.model_copy(update=update)
        train_locally(adapted, home.data.train, rows, train, Turn(0, "0", 1, 1), private=make)
        now = adapted.tensors(adapted.trained)
        moved[mu] = sum(float((now[name] - adapted.initial[name]).pow(2).sum()) for name in now) ** 0.5
    assert moved[5.0] < 0.8 * moved[0.0]


def test_frozen_factors_of_a_round_do_not_disturb_the_hooks(homes: Callable[[str, str], Resident]) -> None:
    """RoLoRA trains B in one round and A in the next, on hooks that were attached once."""
    home = homes("sequence-classification", "lora")
    adapted = home.adapted
    for part in ("lora_B", "lora_A", "classifier"):
        names = [name for name in adapted.trained if part in name]
        parameters = adapted.begin_training(names)
        adapted.model.train()
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        mechanism = RecordMechanism(0.0, 0.5, 1, 1.0, 1e6)
        rows = np.arange(8, dtype=np.int64)
        gradients = PrivateGradients(
            row_engine(home), home.data.train, rows, mechanism, seeded(0, "t"), optimizer, physical=8
        )
        gradients.compute(rows)
        assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)


def test_a_training_that_broke_off_leaves_nothing_behind(homes: Callable[[str, str], Resident]) -> None:
    home = homes("sequence-classification", "lora")
    mechanism = RecordMechanism(0.0, 0.5, 1, 1.0, 1e6)
    batch = np.arange(5, dtype=np.int64)
    parameters, gradients = private(home, mechanism)
    gradients.compute(batch)
    whole = [p.grad.clone() for p in parameters if p.grad is not None]
    row_engine(home)._hooks.enable_hooks()
    home.adapted.model(**home.data.train.batch(batch))  # a forward pass without its backward pass
    row_engine(home)._hooks.disable_hooks()
    parameters, gradients = private(home, mechanism)
    gradients.compute(batch)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, whole, strict=True) if p.grad is not None)


def test_a_first_training_of_one_factor_leaves_the_other_frozen(text_config: Callable[..., RunConfig]) -> None:
    home = Resident(text_config(run__seed=77, adapter__kind="lora"))
    names = [name for name in home.adapted.trained if "lora_B" in name]
    home.adapted.begin_training(names)
    assert row_engine(home).adapted is home.adapted  # made in the midst of a round
    assert {name for name in home.adapted.trained if home.adapted.parameter(name).requires_grad} == set(names)


def test_a_layer_that_does_not_see_one_row_at_a_time_is_refused(homes: Callable[[str, str], Resident]) -> None:
    home = homes("image-classification", "lora")
    parameters = home.adapted.begin_training(home.adapted.trained)
    for parameter in parameters:
        parameter.grad_sample = torch.zeros(6, *parameter.shape)  # type: ignore[attr-defined]
    with pytest.raises(PrivacyError, match="gives no gradient of each row"):
        row_engine(home).check(parameters, 3)
    for parameter in parameters:
        parameter.grad_sample = None  # type: ignore[attr-defined]
    with pytest.raises(PrivacyError, match="gives no gradient of each row"):
        row_engine(home).check(parameters, 3)


def test_weights_that_do_not_move_are_an_error(homes: Callable[[str, str], Resident]) -> None:
    home = homes("sequence-classification", "rslora")
    parameters = home.adapted.begin_training(home.adapted.trained)
    engine = RowEngine.__new__(RowEngine)
    engine.adapted, engine.has_moved, engine._hooks = home.adapted, False, row_engine(home)._hooks
    home.adapted.model.train()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    mechanism = RecordMechanism(1.0, 0.5, 2, 4.0, 1.0)
    rows = np.arange(8, dtype=np.int64)
    gradients = PrivateGradients(engine, home.data.train, rows, mechanism, seeded(0, "t"), optimizer, physical=8)
    batches = gradients.batches()
    gradients.compute(next(batches))  # and no step of the optimizer
    with pytest.raises(PrivacyError, match="moved no weight"):
        next(batches)


def test_norms_are_taken_in_float32_where_the_model_computes_in_bf16(homes: Callable[[str, str], Resident]) -> None:
    home = homes("sequence-classification", "lora")
    parameters, gradients = private(home, RecordMechanism(0.0, 0.5, 1, 1.0, 0.01))
    gradients._precision = "bf16"
    gradients.compute(np.array([3]))
    norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double().norm()
    assert float(norm) <= 0.01 * (1 + 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_noise_on_embeddings_a_rows_gradient_is_that_of_the_row_alone_with_the_same_noise(
    checkpointing: bool, tiny_llama: Path, pairs_jsonl: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in pairs_jsonl.read_text().splitlines()[:3]]
    rows[1]["completion"] = "w1"  # so that it is padded beside the others
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model.name": str(tiny_llama),
        "data.source": str(tmp_path / "rows.jsonl"),
        "data.completion": "completion",
    }
    rest = {"train.gradient_checkpointing": checkpointing, "adapter.rank": 2, "federation.clients": 1}
    home = Resident(resolve([nest({**given, **rest, "data.test": str(pairs_jsonl), "train.neftune_alpha": 30.0})]))
    engine, adapted, train = row_engine(home), home.adapted, home.data.train
    parameters: list[Any] = [adapted.parameter(name) for name in adapted.trained]
    with probing(adapted, 3):

        def gradients(batch: list[int], draw: Callable[[torch.Tensor], torch.Tensor], alpha: float = 30.0) -> list[Any]:
            engine.reset()
            engine.backward(train.batch(batch), "fp32", EmbeddingNoise(adapted.model, alpha, draw))
            engine.check(parameters, len(batch))
            return [parameter.grad_sample for parameter in parameters]

        drawn: list[torch.Tensor] = []

        def kept(like: torch.Tensor) -> torch.Tensor:
            drawn.append(uniform(like))
            return drawn[-1]

        together, still = gradients([0, 1, 2], kept), gradients([0, 1, 2], kept, alpha=0.0)
        assert len(drawn) == 1
        assert any(not torch.allclose(one, other, rtol=0.1) for one, other in zip(together, still, strict=True))
        for row in range(3):
            noise = drawn[0][row : row + 1, : train.lengths[row]]
            alone = gradients([row], lambda like, noise=noise: noise)  # type: ignore[misc]
            for one, other in zip(together, alone, strict=True):
                assert torch.allclose(one[row], other[0], rtol=1e-4, atol=1e-6)


def test_a_private_round_draws_noise_on_embeddings_from_its_own_seed(tiny_llama: Path, pairs_jsonl: Path) -> None:
    found = []
    for alpha, seed in ((30.0, 1), (30.0, 1), (30.0, 2), (0.0, 1)):
        given = {"model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "data.completion": "completion"}
        rest = {"train.neftune_alpha": alpha, "adapter.rank": 2, "federation.clients": 1, "train.local_steps": 2}
        home = Resident(resolve([nest({**given, **rest})]))
        rows, mechanism = np.arange(8), RecordMechanism(0.0, 1.0, 2, 8.0, 1e-3)
        make = RECORD.gradients(home, home.data.train, rows, mechanism, seeded(0, "t"))
        turn = Turn(0, "a", 1, 1, dropout_seed=seed)
        train_locally(home.adapted, home.data.train, rows, home.config.train, turn, private=make)
        found.append(torch.cat([home.adapted.parameter(name).detach().flatten() for name in home.adapted.trained]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])
