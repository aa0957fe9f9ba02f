"""Server optimizers against plain loops over numbers, and through a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpeft.errors import AdapterError, ConfigError
from fedpeft.strategies.averaging.server_optimizers import DEFAULTS, PREFIX, ServerOptimizer, second_moment

KINDS = ("avgm", "adagrad", "adam", "yogi")
ADAPTIVE = ("adagrad", "adam", "yogi")
SHAPES = {"layer.lora_B.weight": (5, 2), "layer.lora_A.weight": (2, 3), "classifier.bias": ()}
Tensors = dict[str, Tensor]


def draw(seed: int, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)


def close(actual: Mapping[str, Tensor], expected: Mapping[str, np.ndarray], tolerance: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == torch.float64
        np.testing.assert_allclose(actual[name].numpy(), values, rtol=0, atol=tolerance)


def recurrence(
    kind: str, x: float, targets: Sequence[float], eta: float, beta1: float, beta2: float, tau: float
) -> list[float]:
    """Return x_1 .. x_T of one coordinate, by Algorithm 2 as it is printed; target_t is the clients' mean."""
    path, m, v = [], 0.0, tau**2
    for target in targets:
        delta = target - x
        if kind == "avgm":
            m = beta1 * m + delta
            x = x + eta * m
            path.append(x)
            continue
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        elif v > delta**2:
            v = v - (1 - beta2) * delta**2
        elif v < delta**2:
            v = v + (1 - beta2) * delta**2
        x = x + eta * m / (math.sqrt(v) + tau)
        path.append(x)
    return path


def optimizer(kind: str, eta: float, beta1: float, beta2: float, tau: float) -> ServerOptimizer:
    return ServerOptimizer(
        kind,
        eta,
        beta1,
        beta2 if kind in ("adam", "yogi") else None,
        tau if kind in ADAPTIVE else None,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**20),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.9, 0.99]),
    st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_three_steps_follow_the_printed_recurrences(
    kind: str, seed: int, eta: float, beta1: float, beta2: float, tau: float
) -> None:
    x, means = draw(seed), [draw(seed + t) for t in (1, 2, 3)]
    expected: list[dict[str, np.ndarray]] = [{n: np.zeros(s) for n, s in SHAPES.items()} for _ in means]
    for name, shape in SHAPES.items():
        for index in np.ndindex(shape):
            targets = [float(mean[name][index]) for mean in means]
            for t, value in enumerate(recurrence(kind, float(x[name][index]), targets, eta, beta1, beta2, tau)):
                expected[t][name][index] = value
    server = optimizer(kind, eta, beta1, beta2, tau)
    for t, mean in enumerate(means):
        x = server.step(x, mean)
        close(x, expected[t], 1e-11)


def test_three_steps_of_adam_and_yogi_in_numbers() -> None:
    # Delta = 2, 2, 2 and 0.5, 0.5, 0.5 as x is put back each round; tau = 1, so v_0 = 1.
    v = {"adam": [[1.3, 1.57, 1.813], [0.925, 0.8575, 0.79675]], "yogi": [[1.4, 1.8, 2.2], [0.975, 0.95, 0.925]]}
    m = [[1.0, 1.5, 1.75], [0.25, 0.375, 0.4375]]
    for kind, moments in v.items():
        server = ServerOptimizer(kind, learning_rate=0.5, beta1=0.5, beta2=0.9, tau=1.0)
        for t in range(3):
            stepped = server.step({"x": torch.tensor([1.0, 1.0])}, {"x": torch.tensor([3.0, 1.5])})
            expected = [1 + 0.5 * m[i][t] / (math.sqrt(moments[i][t]) + 1) for i in (0, 1)]
            close(stepped, {"x": np.asarray(expected)}, 1e-14)


def test_yogi_leaves_a_second_moment_that_equals_the_square() -> None:
    v, delta = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([2.0, -2.0, 2.0])
    torch.testing.assert_close(second_moment("yogi", v, delta, 0.5), torch.tensor([4.0, 3.0, 7.0]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([1e-8, 1.0, 1e8]))
def test_avgm_without_momentum_is_the_plain_mean_exactly(seed: int, scale: float) -> None:
    server = ServerOptimizer("avgm", learning_rate=1.0, beta1=0.0)
    x = draw(seed, 1 / scale)
    for t in range(1, 4):
        mean = draw(seed + t, scale)
        x = server.step(x, mean)
        assert same(x, mean)


def test_the_first_step_of_avgm_is_the_mean_and_the_second_goes_past_it() -> None:
    server = ServerOptimizer("avgm")
    assert server.step({"x": torch.tensor([1.0])}, {"x": torch.tensor([3.0])})["x"].item() == 3.0
    assert server.step({"x": torch.tensor([3.0])}, {"x": torch.tensor([4.0])})["x"].item() == pytest.approx(5.8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_that_stays_where_it_is_moves_nothing(kind: str) -> None:
    x = draw(1)
    server = ServerOptimizer(kind)
    for _ in range(3):
        assert same(server.step(x, x), x)


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_large_changes_step_by_about_the_learning_rate_and_small_ones_in_proportion(kind: str) -> None:
    x = {"x": torch.zeros(3, dtype=torch.float64)}
    mean = {"x": torch.tensor([100.0, 1e-6, 2e-6], dtype=torch.float64)}
    first = ServerOptimizer(kind, 0.01, beta1=0.0, tau=1e-3, beta2=None if kind == "adagrad" else 0.0).step(x, mean)[
        "x"
    ]
    assert first[0].item() == pytest.approx(0.01, rel=1e-4)
    # With beta2 = 0, adam forgets v_0 = tau^2; yogi and adagrad keep it.
    expected = 0.01 * 1e-6 / (1e-6 + 1e-3) if kind == "adam" else 0.01 * 1e-6 / 2e-3
    assert first[1].item() == pytest.approx(expected, rel=1e-5)
    assert first[2].item() == pytest.approx(2 * first[1].item(), rel=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ADAPTIVE), st.integers(0, 2**20), st.sampled_from([0.0, 0.9, 0.99]))
def test_the_second_moment_is_never_negative(kind: str, seed: int, beta2: float) -> None:
    v = torch.full((200,), 1e-6, dtype=torch.float64)
    for t in range(20):
        generator = torch.Generator().manual_seed(seed + t)
        v = second_moment(kind, v, 1e-3 * torch.randn(200, generator=generator, dtype=torch.float64), beta2)
        assert (v >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_names_do_not_influence_each_other(kind: str) -> None:
    together, alone = ServerOptimizer(kind), {name: ServerOptimizer(kind) for name in SHAPES}
    x = draw(1)
    for t in range(2, 5):
        mean = draw(t)
        stepped = together.step(x, dict(reversed(mean.items())))
        for name, server in alone.items():
            assert torch.equal(stepped[name], server.step({name: x[name]}, {name: mean[name]})[name])
        x = stepped


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_stay_as_they_are_and_results_are_float64(kind: str) -> None:
    x = {n: t.to(torch.bfloat16) for n, t in draw(1).items()}
    mean = {n: t.to(torch.float32) for n, t in draw(2).items()}
    before = [{n: t.clone() for n, t in tensors.items()} for tensors in (x, mean)]
    server = ServerOptimizer(kind)
    first = server.step(x, mean)
    wide = ServerOptimizer(kind).step({n: t.double() for n, t in x.items()}, {n: t.double() for n, t in mean.items()})
    assert {t.dtype for t in first.values()} == {torch.float64}
    assert same(first, wide)
    for tensor in first.values():
        tensor.fill_(9.0)  # nor is the optimizer's state the tensors that it returned
    assert same(x, before[0])
    assert same(mean, before[1])
    assert not any((t == 9.0).any() for t in server.state_dict().values())


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(kind: str, tmp_path: Path) -> None:
    whole, x = ServerOptimizer(kind), draw(1)
    for t in (2, 3):
        x = whole.step(x, draw(t))
    save_file(whole.state_dict(), tmp_path / "state.safetensors")
    resumed = ServerOptimizer(kind)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same(resumed.state_dict(), whole.state_dict())
    fresh, y, z = ServerOptimizer(kind), x, x
    for t in (4, 5):
        x, y, z = whole.step(x, draw(t)), resumed.step(y, draw(t)), fresh.step(z, draw(t))
        assert same(y, x)
        assert not same(z, x)  # the state matters


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_named_and_copied(kind: str) -> None:
    server = ServerOptimizer(kind)
    assert server.state_dict() == {}
    server.step(draw(1), draw(2))
    state = server.state_dict()
    moments = ["momentum"] if kind == "avgm" else ["momentum", "second_moment"]
    assert sorted(state) == sorted(f"{PREFIX}{moment}.{name}" for moment in moments for name in SHAPES)
    kept = {n: t.clone() for n, t in state.items()}
    for tensor in state.values():
        tensor.zero_()
    assert same(server.state_dict(), kept)
    server.load_state_dict(kept)
    for tensor in kept.values():
        tensor.zero_()
    assert any(t.any() for t in server.state_dict().values())


def test_an_empty_state_starts_anew() -> None:
    server = ServerOptimizer("adam")
    first = server.step(draw(1), draw(2))
    assert not same(server.step(draw(1), draw(2)), first)
    server.load_state_dict({})
    assert same(server.step(draw(1), draw(2)), first)


@pytest.mark.parametrize(("saved", "loaded"), [("avgm", "adam"), ("yogi", "avgm")])
def test_the_state_of_another_kind_is_refused(saved: str, loaded: str) -> None:
    other = ServerOptimizer(saved)
    other.step(draw(1), draw(2))
    with pytest.raises(ConfigError, match=f"{saved}.*not of server optimizer '{loaded}'"):
        ServerOptimizer(loaded).load_state_dict(other.state_dict())


def test_a_state_that_is_none_is_refused_and_changes_nothing() -> None:
    server = ServerOptimizer("adam")
    server.step(draw(1), draw(2))
    state = server.state_dict()
    name = f"{PREFIX}second_moment.classifier.bias"
    with pytest.raises(AdapterError, match=r"'classifier\.bias' is no state .* begin with 'server_optimizer\.'"):
        server.load_state_dict({**state, "classifier.bias": torch.zeros(1)})
    with pytest.raises(AdapterError, match=r"second moment has classifier\.bias with shape None where the saved mom"):
        server.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(AdapterError, match=r"classifier\.bias with shape \(3,\)"):
        server.load_state_dict({**state, name: torch.ones(3)})
    assert same(server.state_dict(), state)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(kind: str) -> None:
    server, x = ServerOptimizer(kind), draw(1)
    server.step(x, draw(2))
    state = server.state_dict()
    less = {n: t for n, t in x.items() if n != "classifier.bias"}
    with pytest.raises(AdapterError, match=r"the mean has classifier\.bias with shape None where the current adapter"):
        server.step(x, less)
    with pytest.raises(AdapterError, match=r"the mean has classifier\.bias with shape \(2,\)"):
        server.step(x, {**x, "classifier.bias": torch.zeros(2)})  # would broadcast
    with pytest.raises(
        AdapterError, match=r"the current adapter has classifier\.bias with shape None .* state has \(\)"
    ):
        server.step(less, less)
    assert same(server.state_dict(), state)


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'adamw'. Did you mean 'adam'\? Allowed: adagrad, adam, avgm, yogi"):
        ServerOptimizer("adamw")


@pytest.mark.parametrize(
    ("kind", "name", "value"), [("avgm", "beta2", 0.9), ("avgm", "tau", 1e-3), ("adagrad", "beta2", 0.99)]
)
def test_a_parameter_that_the_kind_has_not_is_refused(kind: str, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}' has no {name}, but {name} = {value}"):
        ServerOptimizer(kind, **{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", [0.0, -1.0, math.inf, math.nan]),
        ("beta1", [-0.1, 1.0, math.nan]),
        ("beta2", [-0.1, 1.0, math.nan]),
        ("tau", [0.0, -1e-3, math.inf, math.nan]),
    ],
)
def test_a_parameter_out_of_range_is_refused(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"{name} = {value}"):
            ServerOptimizer("adam", **{name: value})


def test_defaults_are_those_of_the_papers() -> None:
    avgm, adagrad = ServerOptimizer("avgm").hyperparameters, ServerOptimizer("adagrad").hyperparameters
    assert (avgm.learning_rate, avgm.beta1) == (1.0, 0.9)
    assert (adagrad.beta1, adagrad.tau) == (0.0, 1e-3)
    for kind in ("adam", "yogi"):
        values = ServerOptimizer(kind).hyperparameters
        assert (values.beta1, values.beta2, values.tau) == (0.9, 0.99, 1e-3)
    assert DEFAULTS.keys() == set(KINDS)


def test_a_zero_that_is_given_is_not_taken_for_a_default() -> None:
    assert ServerOptimizer("adam", beta1=0.0, beta2=0.0).hyperparameters.beta1 == 0.0
    assert ServerOptimizer("adam", beta1=0.0, beta2=0.0).hyperparameters.beta2 == 0.0
