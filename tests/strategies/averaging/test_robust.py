"""Robust means against loops in NumPy, and against clients that send anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.errors import AdapterError, ConfigError, TooFewClientsError
from fedpeft.strategies.averaging.robust import (
    ROBUST,
    Robustness,
    coordinate_median,
    krum,
    krum_scores,
    norm_clip,
    robust_mean,
    trimmed_clients,
    trimmed_mean,
)

SHAPES = {
    "layer.lora_B.weight": (5, 2),
    "layer.lora_A.weight": (2, 3),
    "classifier.bias": (),
    "classifier.weight": (4,),
}
Update = dict[str, Tensor]


def draw(seed: int, clients: int) -> tuple[list[Update], list[float], Update]:
    """Return clients near a common centre, their rows, and a start some way off."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Update:
        return {n: scale * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}

    centre = normal(1.0)
    updates = [{n: centre[n] + t for n, t in normal(0.3).items()} for _ in range(clients)]
    rows = torch.randint(1, 60, (clients,), generator=generator).tolist()
    return updates, rows, normal(1.0)


def cohorts(smallest: int = 1) -> st.SearchStrategy[tuple[list[Update], list[float], Update]]:
    return st.builds(draw, st.integers(0, 2**20), st.integers(smallest, 9))


def flat(update: Mapping[str, Tensor]) -> np.ndarray:
    """Return a client as one vector, in an order of the test's own."""
    return np.concatenate([update[name].double().numpy().reshape(-1) for name in SHAPES])


def matrix(updates: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    return [flat(update).tolist() for update in updates]


def close(actual: Mapping[str, Tensor], expected: Sequence[float] | np.ndarray, tolerance: float = 1e-12) -> None:
    assert actual.keys() == SHAPES.keys()
    assert all(t.dtype == torch.float64 and tuple(t.shape) == SHAPES[n] for n, t in actual.items())
    np.testing.assert_allclose(flat(actual), np.asarray(expected), rtol=0, atol=tolerance)


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)


def of(*values: float) -> list[Update]:
    """Return clients of one number each."""
    return [{"x": torch.tensor([value], dtype=torch.float64)} for value in values]


def ones(updates: Sequence[object]) -> list[float]:
    return [1.0] * len(updates)


# --- against other code ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(cohorts())
def test_the_median_is_that_of_each_coordinate(cohort: tuple[list[Update], list[float], Update]) -> None:
    updates, rows, _ = cohort
    close(
        coordinate_median(updates, rows), [statistics.median(column) for column in zip(*matrix(updates), strict=True)]
    )


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.49]))
def test_the_trimmed_mean_is_the_mean_of_what_is_left(
    cohort: tuple[list[Update], list[float], Update], trim: float
) -> None:
    updates, rows, _ = cohort
    left_out = round(trim * 100) * len(updates) // 100
    expected = []
    for column in zip(*matrix(updates), strict=True):
        kept = list(column)
        for _ in range(left_out):
            kept.remove(max(kept))
            kept.remove(min(kept))
        expected.append(math.fsum(kept) / len(kept))
    close(trimmed_mean(updates, rows, trim), expected)


def test_the_trimmed_mean_of_ten_numbers() -> None:
    updates = of(1, 2, 3, 4, 5, 6, 7, 8, 9, 1000)
    assert trimmed_mean(updates, ones(updates))["x"].item() == 5.5  # without 1 and 1000
    assert trimmed_mean(updates[:9], ones(updates[:9]))["x"].item() == 5.0  # floor(0.9) = 0: a plain mean
    assert trimmed_mean(updates, ones(updates), 0.35)["x"].item() == 5.5  # 4, 5, 6, 7


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert coordinate_median(of(9, 1, 100, 4), [1, 1, 1, 1])["x"].item() == 6.5


@pytest.mark.parametrize(
    ("trim", "clients", "left_out"),
    [(0.29, 100, 29), (0.1, 30, 3), (0.1, 9, 0), (0.1, 10, 1), (0.499999999999, 4, 1), (0.07, 100, 7), (1e-9, 50, 0)],
)
def test_clients_are_counted_in_decimals_not_in_binary(trim: float, clients: int, left_out: int) -> None:
    assert trimmed_clients(trim, clients) == left_out


def krum_by_hand(updates: Sequence[Mapping[str, Tensor]], f: int) -> list[float]:
    vectors = matrix(updates)
    scores = []
    for k, x in enumerate(vectors):
        distances = sorted(
            math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for j, y in enumerate(vectors) if j != k
        )
        scores.append(math.fsum(distances[: len(vectors) - f - 2]))
    return scores


@settings(max_examples=40, deadline=None)
@given(cohorts(smallest=3), st.integers(0, 3))
def test_krum_returns_the_client_with_the_smallest_score_exactly(
    cohort: tuple[list[Update], list[float], Update], f: int
) -> None:
    updates, rows, _ = cohort
    f = min(f, (len(updates) - 3) // 2)
    expected = krum_by_hand(updates, f)
    np.testing.assert_allclose(krum_scores(updates, f), expected, rtol=1e-12)
    assert same(krum(updates, rows, f), updates[expected.index(min(expected))])


def test_krum_scores_of_five_numbers() -> None:
    updates = of(0, 1, 3, 4, 100)
    # With f = 1 two neighbours count: 0 has 1 and 9, 1 has 1 and 4, 3 has 1 and 4, 4 has 1 and 9, 100 has 96^2 and 97^2
    assert krum_scores(updates, 1) == [10, 5, 5, 10, 96**2 + 97**2]
    assert krum(updates, ones(updates), 1)["x"].item() == 1  # of two equal scores the first
    assert krum(updates[::-1], ones(updates), 1)["x"].item() == 3


def test_krum_sees_all_tensors_of_a_client_as_one_vector() -> None:
    values = [(0.0, 1.0), (0.0, 50.0), (0.0, 90.0), (10.0, 0.0), (11.0, 1.0)]
    updates = [{"x": torch.tensor([x]), "y": torch.tensor([y])} for x, y in values]
    # Together the first scores 101 + 121, the fourth 101 + 2, the fifth 121 + 2.
    chosen = krum(updates, ones(updates), 1)
    assert (chosen["x"].item(), chosen["y"].item()) == (10.0, 0.0)
    for name, first in (("x", 0.0), ("y", 1.0)):  # either tensor alone: 0 + 0, and 0 + 1
        assert krum([{name: u[name]} for u in updates], ones(updates), 1)[name].item() == first


def clip_by_hand(
    updates: Sequence[Update], rows: Sequence[float], start: Update, max_norm: float | None
) -> tuple[np.ndarray, float]:
    origin = flat(start)
    changes = [flat(update) - origin for update in updates]
    norms = [math.sqrt(math.fsum(v * v for v in change)) for change in changes]
    bound = statistics.median(norms) if max_norm is None else max_norm
    result = origin.copy()
    for change, norm, n in zip(changes, norms, rows, strict=True):
        result = result + n / sum(rows) * change * min(1.0, bound / norm)
    return result, bound


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.sampled_from([None, 1e-3, 1.0, 5.0, 1e6]))
def test_norm_clip_is_the_mean_of_shortened_changes(
    cohort: tuple[list[Update], list[float], Update], max_norm: float | None
) -> None:
    updates, rows, start = cohort
    close(norm_clip(updates, rows, start, max_norm), clip_by_hand(updates, rows, start, max_norm)[0])


def test_norm_clip_without_a_bound_takes_the_median_of_the_norms() -> None:
    start = {"x": torch.zeros(2), "y": torch.zeros(1)}
    updates = [
        {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])},  # norm 5: shortened to 4
        {"x": torch.tensor([0.0, 3.0]), "y": torch.tensor([0.0])},  # norm 3: as it is
    ]
    merged = norm_clip(updates, [1, 3], start)
    torch.testing.assert_close(merged["x"], torch.tensor([0.6, 2.25], dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(merged["y"], torch.tensor([0.8], dtype=torch.float64), rtol=0, atol=1e-15)


def test_norm_clip_weights_with_rows_and_the_others_do_not() -> None:
    updates, rows, start = draw(3, 5)
    other = [n + 40.0 * k for k, n in enumerate(rows)]
    for kind in ROBUST:
        alike = same(robust_mean(kind, updates, rows, start), robust_mean(kind, updates, other, start))
        assert alike == (kind != "norm-clip")


def test_norm_clip_does_not_need_the_start_to_hold_only_what_is_trained() -> None:
    updates, rows, start = draw(4, 3)
    close(norm_clip(updates, rows, {**start, "frozen": torch.ones(2)}, 1.0), clip_by_hand(updates, rows, start, 1.0)[0])


# --- invariances ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(cohorts(smallest=5), st.randoms(use_true_random=False))
def test_the_order_of_clients_and_of_names_does_not_matter(
    cohort: tuple[list[Update], list[float], Update], random: Random
) -> None:
    updates, rows, start = cohort
    order = list(range(len(updates)))
    random.shuffle(order)
    moved = [dict(reversed(updates[k].items())) for k in order]
    weights = [rows[k] for k in order]
    for kind in ("median", "trimmed-mean", "krum"):  # to the last bit
        options = Robustness(kind, trim=0.2)
        assert same(robust_mean(kind, moved, weights, start, options), robust_mean(kind, updates, rows, start, options))
    scores = krum_scores(updates, 1)
    assert krum_scores(moved, 1) == [scores[k] for k in order]
    close(norm_clip(moved, weights, start), flat(norm_clip(updates, rows, start)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(5, 23))
def test_equal_clients_come_back_exactly(seed: int, clients: int) -> None:
    (client,), _, start = draw(seed, 1)
    updates, rows = [client] * clients, list(range(1, clients + 1))
    for kind in ("median", "trimmed-mean", "krum"):
        assert same(robust_mean(kind, updates, rows, start, Robustness(kind, trim=0.2)), client)
    close(norm_clip(updates, rows, start), flat(client))


def test_one_client_comes_back_except_from_krum() -> None:
    updates, rows, start = draw(1, 1)
    assert same(coordinate_median(updates, rows), updates[0])
    assert same(trimmed_mean(updates, rows, 0.49), updates[0])
    close(norm_clip(updates, rows, start), flat(updates[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_is_merged_in_float64(dtype: torch.dtype) -> None:
    updates, rows, start = draw(2, 6)
    narrow = [{n: t.to(dtype) for n, t in u.items()} for u in updates]
    wide = [{n: t.to(torch.float64) for n, t in u.items()} for u in narrow]
    for kind in ROBUST:
        merged = robust_mean(kind, narrow, rows, start)
        assert {t.dtype for t in merged.values()} == {torch.float64}
        assert same(merged, robust_mean(kind, wide, rows, start))


def test_results_share_no_memory_with_what_clients_sent() -> None:
    for kind in ROBUST:
        updates, rows, start = draw(5, 5)
        copies = [{n: t.clone() for n, t in u.items()} for u in updates]
        origin = {n: t.clone() for n, t in start.items()}
        for tensor in robust_mean(kind, updates, rows, start).values():
            tensor.fill_(7.0)
        assert all(same(u, c) for u, c in zip(updates, copies, strict=True))
        assert same(start, origin)


# --- clients that lie ----------------------------------------------------------------------------------------------

LIES: dict[str, Callable[[int, Tensor], Tensor]] = {
    "huge": lambda k, t: torch.full_like(t, 1e30),
    "huge of either sign": lambda k, t: torch.full_like(t, 1e30 * (-1) ** k),
    "opposite": lambda k, t: -50 * t,
    "off the scale": lambda k, t: torch.full_like(t, 1e200),
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from(sorted(LIES)), st.sampled_from([(5, 1), (7, 2), (9, 3)]), st.booleans())
def test_liars_do_not_move_the_result_out_of_the_honest_range(
    seed: int, lie: str, sizes: tuple[int, int], first: bool
) -> None:
    clients, f = sizes
    updates, rows, start = draw(seed, clients)
    liars = [{n: LIES[lie](k, t) for n, t in u.items()} for k, u in enumerate(updates[:f])]
    honest = updates[f:]
    cohort = liars + honest if first else honest + liars
    values = np.asarray(matrix(honest))
    low, high = values.min(axis=0), values.max(axis=0)
    weights = [1e9] * f + rows[f:] if first else rows[f:] + [1e9] * f
    for kind in ("median", "trimmed-mean", "krum"):
        merged = flat(robust_mean(kind, cohort, weights, start, Robustness(kind, trim=0.34, byzantine=f)))
        assert (low <= merged).all()
        assert (merged <= high).all()
    assert any(same(krum(cohort, weights, f), client) for client in honest)
    plain = np.average(np.asarray(matrix(cohort)), axis=0, weights=weights)
    assert not ((low <= plain) & (plain <= high)).all()  # what the plain mean would have done


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.sampled_from([1e-6, 0.5, 3.0]), st.sampled_from([1.0, 1e6, 1e30]))
def test_norm_clip_moves_by_the_bound_at_most(
    cohort: tuple[list[Update], list[float], Update], max_norm: float, lie: float
) -> None:
    updates, rows, start = cohort
    origin = {n: torch.zeros_like(t) for n, t in start.items()}
    updates = [{n: lie * t for n, t in updates[0].items()}, *updates[1:]]
    moved = float(np.linalg.norm(flat(norm_clip(updates, [1e9, *rows[1:]], origin, max_norm))))
    assert moved <= max_norm * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([1e-6, 0.5, 3.0]))
def test_norm_clip_moves_by_the_bound_exactly_where_clients_agree_to_go_further(seed: int, max_norm: float) -> None:
    (client,), _, start = draw(seed, 1)
    origin = {n: torch.zeros_like(t) for n, t in start.items()}
    far = {n: 1e3 * t for n, t in client.items()}
    moved = np.linalg.norm(flat(norm_clip([far, far, far], [1, 5, 3], origin, max_norm)))
    assert moved == pytest.approx(max_norm, rel=1e-12)


def test_a_minority_of_liars_does_not_raise_the_median_norm_above_the_honest() -> None:
    updates, rows, start = draw(8, 5)
    liars = [{n: t + 1e12 for n, t in u.items()} for u in updates[:2]]
    longest = max(float(np.linalg.norm(flat(u) - flat(start))) for u in updates[2:])
    moved = flat(norm_clip(liars + updates[2:], rows, start)) - flat(start)
    assert 0 < np.linalg.norm(moved) <= longest


def test_where_most_clients_did_not_move_norm_clip_does_not_either() -> None:
    updates, rows, start = draw(9, 3)
    assert same(norm_clip([start, start, updates[0]], rows, start), start)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ROBUST))
def test_an_empty_cohort_and_one_without_rows_are_refused(kind: str) -> None:
    updates, _, start = draw(0, 5)
    with pytest.raises(TooFewClientsError, match="0 updates with 0 rows"):
        robust_mean(kind, [], [], start)
    with pytest.raises(TooFewClientsError, match="5 updates with 0 rows"):
        robust_mean(kind, updates, [0] * 5, start)


@pytest.mark.parametrize("kind", list(ROBUST))
def test_clients_whose_shapes_or_names_differ_are_refused(kind: str) -> None:
    updates, rows, start = draw(0, 5)
    name = "layer.lora_A.weight"
    wide = [*updates[:3], {**updates[3], name: torch.zeros(4, 3)}, updates[4]]
    with pytest.raises(AdapterError, match=r"update 4 of 5 has layer\.lora_A\.weight with shape \(4, 3\).*\(2, 3\)"):
        robust_mean(kind, wide, rows, start)
    more = [*updates[:4], {**updates[4], "extra": torch.zeros(1)}]
    with pytest.raises(AdapterError, match=r"update 5 of 5 has extra with shape \(1,\) where the first has None"):
        robust_mean(kind, more, rows, start)
    less = [updates[0], {n: t for n, t in updates[1].items() if n != name}, *updates[2:]]
    with pytest.raises(AdapterError, match=r"update 2 of 5 has layer\.lora_A\.weight with shape None"):
        robust_mean(kind, less, rows, start)


def test_a_start_that_does_not_fit_is_refused() -> None:
    updates, rows, start = draw(0, 3)
    with pytest.raises(AdapterError, match=r"classifier\.weight with shape \(4,\) where the round started from None"):
        norm_clip(updates, rows, {n: t for n, t in start.items() if n != "classifier.weight"})
    with pytest.raises(AdapterError, match=r"\(4,\) where the round started from \(1,\)"):
        norm_clip(updates, rows, {**start, "classifier.weight": torch.zeros(1)})  # would broadcast


@pytest.mark.parametrize(
    ("f", "clients", "remedy"), [(1, 4, "lower it to 0"), (3, 8, "lower it to 2"), (0, 2, "kind = 'median'")]
)
def test_krum_says_how_many_clients_it_needs(f: int, clients: int, remedy: str) -> None:
    updates, rows, _ = draw(0, clients)
    with pytest.raises(ConfigError) as refused:
        krum(updates, rows, f)
    text = str(refused.value)
    assert f"byzantine = {f} needs at least 2 * {f} + 3 = {2 * f + 3} updates a round and has {clients}" in text
    assert remedy in text
    enough, weights, _ = draw(0, 2 * f + 3)
    assert any(same(krum(enough, weights, f), client) for client in enough)


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0, math.nan])
def test_a_trim_that_leaves_nothing_is_refused(trim: float) -> None:
    updates, rows, _ = draw(0, 4)
    for attempt in (lambda: trimmed_mean(updates, rows, trim), lambda: Robustness("trimmed-mean", trim=trim)):
        with pytest.raises(ConfigError, match=r"trim = .* 0 <= trim < 0\.5"):
            attempt()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_is_no_positive_number_is_refused(max_norm: float) -> None:
    updates, rows, start = draw(0, 4)
    for attempt in (
        lambda: norm_clip(updates, rows, start, max_norm),
        lambda: Robustness("norm-clip", max_norm=max_norm),
    ):
        with pytest.raises(ConfigError, match=r"max_norm = .* above 0"):
            attempt()


def test_a_negative_number_of_liars_is_refused() -> None:
    updates, rows, _ = draw(0, 4)
    for attempt in (lambda: krum(updates, rows, -1), lambda: Robustness("krum", byzantine=-1)):
        with pytest.raises(ConfigError, match="byzantine = -1"):
            attempt()


def test_weights_that_are_none_are_refused() -> None:
    updates, _, _ = draw(0, 3)
    for weights in ([1, 2], [1, 2, -1], [1, 2, math.nan]):
        with pytest.raises(ValueError, match="3 updates need as many weights"):
            coordinate_median(updates, weights)


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    for attempt in (lambda: robust_mean("medain", of(1), [1], {}), lambda: Robustness("medain")):
        with pytest.raises(ConfigError, match=r"'medain'. Did you mean 'median'\? Allowed: krum, median, norm-clip"):
            attempt()


def test_options_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="'median' was given the options of 'krum'"):
        robust_mean("median", of(1), [1], {}, Robustness("krum"))


def test_the_registry_passes_each_kind_its_own_parameters() -> None:
    updates, rows, start = draw(12, 7)
    updates[0] = {n: t + 3 for n, t in updates[0].items()}
    expected = {
        "median": coordinate_median(updates, rows),
        "trimmed-mean": trimmed_mean(updates, rows, 0.3),
        "krum": krum(updates, rows, 2),
        "norm-clip": norm_clip(updates, rows, start, 0.7),
    }
    assert expected.keys() == ROBUST.keys()
    for kind, merged in expected.items():
        options = Robustness(kind, trim=0.3, byzantine=2, max_norm=0.7)
        assert same(robust_mean(kind, updates, rows, start, options), merged)
        if kind in ("trimmed-mean", "norm-clip"):
            assert not same(robust_mean(kind, updates, rows, start), merged)
    with pytest.raises(ConfigError, match="byzantine = 3"):
        robust_mean("krum", updates, rows, start, Robustness("krum", byzantine=3))


def test_parameters_do_not_change_under_way() -> None:
    options = Robustness("krum")
    with pytest.raises(FrozenInstanceError):
        options.byzantine = 2  # type: ignore[misc]
