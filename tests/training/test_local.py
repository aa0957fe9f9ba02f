from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RunConfig, TrainConfig
from fedpeft.precision import dtype_of
from fedpeft.resident import Resident
from fedpeft.training.local import (
    PlainGradients,
    Turn,
    batches,
    num_steps,
    scoring_mode,
    train_locally,
    training_mode,
)
from fedpeft.training.neftune import EmbeddingNoise, embeddings_of

Make = Callable[..., RunConfig]


@given(
    rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True),
    size=st.integers(1, 50),
    steps=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_each_pass_takes_every_row_once_in_a_new_order(rows: list[int], size: int, steps: int, seed: int) -> None:
    held = np.asarray(rows, dtype=np.int64)
    drawn = list(batches(held, size, steps, np.random.default_rng(seed)))
    assert len(drawn) == steps
    a_pass = math.ceil(len(rows) / size)
    for start in range(0, steps - a_pass + 1, a_pass):
        assert sorted(np.concatenate(drawn[start : start + a_pass])) == sorted(rows)
    again = batches(held, size, steps, np.random.default_rng(seed))
    assert all(np.array_equal(one, two) for one, two in zip(drawn, again, strict=True))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    size=st.integers(1, 9),
    bucket=st.integers(2, 5),
    seed=st.integers(0, 2**32),
)
def test_sorted_by_length_a_pass_still_takes_every_row_once(
    lengths: list[int], size: int, bucket: int, seed: int
) -> None:
    of, rows = np.asarray(lengths), np.arange(len(lengths))
    a_pass = math.ceil(len(rows) / size)
    plain, sorted_, again = (
        list(batches(rows, size, 2 * a_pass, np.random.default_rng(seed), **settings))
        for settings in ({}, {"lengths": of, "bucket": bucket}, {"lengths": of, "bucket": bucket})
    )
    for half in (sorted_[:a_pass], sorted_[a_pass:]):
        assert sorted(np.concatenate(half)) == list(rows)
        assert sorted(len(batch) for batch in half) == sorted(len(batch) for batch in plain[:a_pass])
    assert all(np.array_equal(one, two) for one, two in zip(sorted_, again, strict=True))
    if len(set(lengths)) == 1:  # images, above all: nothing changes
        assert all(np.array_equal(one, two) for one, two in zip(sorted_, plain, strict=True))


def test_batches_of_like_lengths_are_padded_less() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    rows = np.arange(400)
    padded = {
        bucket: sum(
            len(batch) * lengths[batch].max()
            for batch in batches(rows, 16, 25, np.random.default_rng(1), lengths=lengths, bucket=bucket)
        )
        for bucket in (1, 8)
    }
    assert lengths.sum() <= padded[8] < 0.7 * padded[1]


def test_every_module_is_back_in_the_mode_it_was_found_in() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.Dropout(0.5)))
    for _ in range(2):
        training_mode(model)
        assert [module.training for module in model.modules()] == [True, False, True, True]
        scoring_mode(model)
        assert not any(module.training for module in model.modules())


def test_steps_are_those_named_else_those_of_the_epochs() -> None:
    assert num_steps(TrainConfig(local_steps=7), 100) == 7
    assert num_steps(TrainConfig(local_epochs=2, batch_size=16), 33) == 6
    assert num_steps(TrainConfig(batch_size=16), 33) == 3


def trained(config: RunConfig, server_round: int = 1, client_id: str = "site-0") -> dict[str, torch.Tensor]:
    """Train a fresh adapter for one round and return its change."""
    home = Resident(config)
    adapted = home.adapted
    train_locally(
        adapted,
        home.data.train,
        home.partition.indices[0],
        config.train,
        Turn(config.run.seed, client_id, server_round, 4),
    )
    return {name: tensor - adapted.initial[name] for name, tensor in adapted.tensors(adapted.initial).items()}


def length(change: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in change.values()))


def test_only_what_is_to_be_trained_moves(text_config: Make) -> None:
    change = trained(text_config(adapter__kind="ffa-lora"))
    assert all(tensor.any() == ("lora_A" not in name) for name, tensor in change.items())


def test_a_round_depends_on_seed_round_and_client_and_on_no_global_state(text_config: Make) -> None:
    config = text_config(adapter__dropout=0.3)
    torch.manual_seed(1)
    first = trained(config)
    torch.manual_seed(2)
    again = trained(config)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (trained(config, server_round=2), trained(config, client_id="site-1")):
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_one_sgd_step_is_the_gradient_times_the_rate(text_config: Make) -> None:
    settings = {"train__optimizer": "sgd", "train__local_steps": 1, "train__batch_size": 64}
    small, large = (trained(text_config(**settings, train__learning_rate=rate)) for rate in (0.01, 0.02))
    for name in small:
        torch.testing.assert_close(2 * small[name], large[name], rtol=1e-3, atol=1e-6)


def test_the_proximal_term_adds_mu_times_the_distance_from_what_was_sent(text_config: Make) -> None:
    rate, mu = 0.1, 3.0
    settings = {"train__optimizer": "sgd", "train__learning_rate": rate}
    first = trained(text_config(**settings, train__local_steps=1))
    free, pulled = (trained(text_config(**settings, train__local_steps=2, train__proximal_mu=m)) for m in (0.0, mu))
    assert length(first) > 0
    for name in first:  # the second step's gradient is the same but for that term
        torch.testing.assert_close(pulled[name] - free[name], -rate * mu * first[name], rtol=1e-3, atol=1e-6)


def test_clipping_bounds_a_step(text_config: Make) -> None:
    settings = {"train__optimizer": "sgd", "train__local_steps": 1, "train__learning_rate": 1.0}
    assert length(trained(text_config(**settings, train__max_grad_norm=1e-3))) == pytest.approx(1e-3, rel=1e-2)


def test_adapters_stay_in_32_bits_over_a_16_bit_base(text_config: Make) -> None:
    config = text_config(train__precision="bf16")
    home = Resident(config)
    assert {tensor.dtype for tensor in home.adapted.initial.values()} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for parameter in home.adapted.model.parameters()}
    assert length(trained(config)) > 0


def first_gradient(home: Resident, train: TrainConfig, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the gradient of one batch of rows."""
    adapted = home.adapted
    parameters = adapted.begin_training(adapted.trained)
    gradients = PlainGradients(adapted, home.data.train, rows, train, 1, np.random.default_rng(0))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        gradients.compute(rows)
    found = {name: p.grad.clone() for name, p in zip(adapted.trained, parameters, strict=True) if p.grad is not None}
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.fixture(scope="module")
def chat_config(text_config: Make, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Of a tiny language model, whose rows are of many lengths."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    words = [f"w{index}" for index in range(40)]
    pairs = [(words[i % 30 : i % 30 + 2 + i % 3], words[i % 20 : i % 20 + 1 + i % 7]) for i in range(40)]
    lines = [
        {"prompt": " ".join(one), "completion": " ".join(two), "client": f"c{i % 2}"}
        for i, (one, two) in enumerate(pairs)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    source = {"model__name": str(tiny_llama), "data__source": str(path), "data__completion": "completion"}
    return lambda **settings: text_config(**source, **settings)


@pytest.fixture(scope="module")
def chat_home(chat_config: Make) -> Resident:
    """A tiny language model whose rows count unequally many tokens."""
    return Resident(chat_config())


def test_accumulated_parts_are_the_large_batch_weighted_by_tokens(chat_home: Resident) -> None:
    rows = np.arange(13)  # the last of four parts is smaller
    large = first_gradient(chat_home, TrainConfig(batch_size=16), rows)
    parts = first_gradient(chat_home, TrainConfig(batch_size=4, accumulation=4), rows)
    assert any(tensor.any() for tensor in large.values())
    for name in large:
        torch.testing.assert_close(parts[name], large[name], rtol=1e-4, atol=1e-7)
    lengths = chat_home.data.train.lengths[rows]
    assert len(set(lengths)) > 1
    by_rows = [first_gradient(chat_home, TrainConfig(batch_size=4), rows[i : i + 4]) for i in range(0, 13, 4)]
    mean = {name: torch.stack([each[name] for each in by_rows]).mean(0) for name in large}
    assert any((mean[name] - large[name]).norm() > 1e-2 * large[name].norm() for name in large if large[name].any())


def test_accumulation_draws_the_rows_of_the_large_batch(text_config: Make) -> None:
    large = trained(text_config(train__batch_size=8, train__local_steps=3))
    parts = trained(text_config(train__batch_size=2, train__accumulation=4, train__local_steps=3))
    for name in large:
        torch.testing.assert_close(parts[name], large[name], rtol=1e-2, atol=2e-4)
    assert num_steps(TrainConfig(batch_size=4, accumulation=4), 33) == 3


def test_a_step_privately_is_the_same_whether_parts_are_accumulated_or_not(text_config: Make) -> None:
    from fedpeft.privacy.mechanism import record_mechanism

    private = {"privacy__level": "record", "privacy__epsilon": 3}
    large = text_config(train__batch_size=8, **private)
    parts = text_config(train__batch_size=2, train__accumulation=4, **private)
    assert record_mechanism(large, 40, None) == record_mechanism(parts, 40, None)
    assert (Resident(large).physical_rows, Resident(parts).physical_rows) == (16, 4)
    # and parts of that many rows change no sum: see tests/privacy/test_dp_sgd.py


def test_noise_on_embeddings_is_as_large_as_a_rows_own_tokens_allow(chat_home: Resident) -> None:
    model, batch = chat_home.adapted.model, chat_home.data.train.batch(np.arange(6))
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    embeddings = embeddings_of(model)
    plain = embeddings(ids)
    torch.manual_seed(0)
    with EmbeddingNoise(model, 5.0).of(batch):
        assert torch.equal(embeddings(ids), plain), "a look at the model is no training"
        training_mode(model)
        noise = (embeddings(ids) - plain).abs()
        scoring_mode(model)
    bound = 5.0 / (lengths * plain.shape[-1]).sqrt()
    largest = noise.flatten(1).amax(1)
    assert (largest <= bound + 1e-6).all()
    assert (largest > 0.9 * bound).all()  # of many uniform draws
    assert torch.equal(embeddings(ids), plain)


def test_noise_on_embeddings_is_of_training_alone_and_follows_from_the_turn(chat_config: Make) -> None:
    noisy = chat_config(train__neftune_alpha=20, train__local_steps=2)
    torch.manual_seed(1)
    first = trained(noisy)
    torch.manual_seed(2)
    again, other = trained(noisy), trained(chat_config(train__local_steps=2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_fp16_trains_nearly_as_fp32(chat_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which runs it though slowly: what a GPU does beyond it is its own arithmetic."""
    monkeypatch.setattr("fedpeft.models.dtype_on", lambda on, precision: dtype_of(precision))
    settings = {"train__local_steps": 3, "train__optimizer": "sgd", "train__learning_rate": 0.1}
    short, whole = (trained(chat_config(train__precision=each, **settings)) for each in ("fp16", "fp32"))
    apart = {name: short[name].float() - whole[name] for name in whole}
    assert all(each.dtype == torch.float32 for each in short.values())
    assert 0 < length(apart) < 0.02 * length(whole)
