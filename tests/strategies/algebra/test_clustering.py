"""Weighted k-means on axes against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.strategies.algebra import clustering
from fedpeft.strategies.algebra.clustering import axial_kmeans


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cluster(points: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return axial_kmeans(points @ points.mT, weights, k)


def cost(points: Tensor, weights: Tensor, labels: Tensor, signs: Tensor) -> float:
    total = 0.0
    for label in set(labels.tolist()):
        chosen = labels == label
        aligned = points[chosen] * signs[chosen, None]
        centroid = (aligned * weights[chosen, None]).sum(dim=0) / weights[chosen].sum()
        total += float(((aligned - centroid).square().sum(dim=1) * weights[chosen]).sum())
    return total


def best_cost(points: Tensor, weights: Tensor, k: int) -> float:
    """The least cost over all labels and signs of a few points."""
    count = len(points)
    return min(
        cost(points, weights, torch.tensor(labels), torch.tensor([1.0, *signs], dtype=torch.float64))
        for labels in itertools.product(range(k), repeat=count)
        for signs in itertools.product([1.0, -1.0], repeat=count - 1)
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_few_points_are_clustered_nearly_as_well_as_can_be(seed: int) -> None:
    points, weights = normal(6, 3, seed=seed), normal(6, seed=seed + 50).abs()
    labels, signs = cluster(points[None], weights[None], 2)
    best = best_cost(points, weights, 2)
    assert best * (1 - 1e-12) <= cost(points, weights, labels[0], signs[0]) <= 1.3 * best


def test_planted_axes_are_found_whatever_the_points_signs() -> None:
    centres = 3 * normal(2, 5, 9, seed=0)  # (L, k, D)
    owner = torch.arange(40) % 5
    sign = torch.where(normal(2, 40, 1, seed=1) > 0, 1.0, -1.0)
    points = sign * (centres[:, owner] + 0.1 * normal(2, 40, 9, seed=2))
    labels, signs = cluster(points, torch.ones(2, 40, dtype=torch.float64), 5)
    for layer in range(2):
        assert len({(int(a), int(b)) for a, b in zip(labels[layer], owner, strict=True)}) == 5
        for label in range(5):
            chosen = labels[layer] == label
            assert abs(int((signs[layer, chosen] * sign[layer, chosen, 0]).sum())) == int(chosen.sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(6, 20))
def test_no_cluster_stays_empty_and_each_point_is_with_its_nearest_centroid(seed: int, k: int, count: int) -> None:
    points, weights = normal(1, count, 3, seed=seed), normal(1, count, seed=seed + 1).abs() + 0.1
    labels, signs = cluster(points, weights, k)
    assert len(set(labels.flatten().tolist())) == k
    aligned = points[0] * signs[0, :, None]
    centroids = torch.stack([
        (aligned[chosen] * weights[0, chosen, None]).sum(dim=0) / weights[0, chosen].sum()
        for chosen in (labels[0] == label for label in range(k))
    ])  # fmt: skip
    distance = torch.minimum(torch.cdist(points[0], centroids), torch.cdist(-points[0], centroids))
    own = distance.gather(1, labels[0][:, None])[:, 0]
    assert bool((own <= distance.amin(dim=1) + 1e-9).all())
    assert bool((torch.linalg.vecdot(aligned, centroids[labels[0]]) >= 0).all())


@pytest.mark.parametrize("seed", range(5))
def test_noisy_copies_of_many_axes_are_all_told_apart(seed: int) -> None:
    owner = torch.arange(320) % 16
    points = normal(1, 16, 60, seed=seed)[:, owner] + 0.5 * normal(1, 320, 60, seed=seed + 100)
    labels, _ = cluster(points, torch.ones(1, 320, dtype=torch.float64), 16)
    assert len(set(zip(labels[0].tolist(), owner.tolist(), strict=True))) == 16


def test_equal_points_share_a_cluster_and_leave_what_is_too_many_empty() -> None:
    owner = torch.arange(40) % 3
    points = 1e3 * normal(1, 3, 50, seed=0)[:, owner] * torch.logspace(0, -6, 3, dtype=torch.float64)[owner, None]
    points = points * (1 + 1e-14 * normal(1, 40, 50, seed=2))  # equal up to rounding
    labels, _ = cluster(points, normal(1, 40, seed=1).abs(), 8)
    assert len(set(zip(labels[0].tolist(), owner.tolist(), strict=True))) == 3


def test_inner_products_in_float32_give_the_same_clusters_and_equal_points_stay_together() -> None:
    points = normal(2, 16, 60, seed=0)[:, torch.arange(320) % 16] + 0.5 * normal(2, 320, 60, seed=1)
    weights = normal(2, 320, seed=2).abs()
    gram = points.to(torch.float32) @ points.to(torch.float32).mT
    for one, other in zip(axial_kmeans(gram, weights, 16), cluster(points, weights, 16), strict=True):
        assert torch.equal(one, other.to(one.dtype))
    few = points[:, torch.arange(40) % 3].to(torch.float32)
    labels, _ = axial_kmeans(few @ few.mT, weights[:, :40], 8)
    assert all(len(set(each.tolist())) == 3 for each in labels)


def test_a_cluster_that_lost_its_points_takes_the_one_that_fits_its_own_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_seeds", lambda *_: torch.zeros(1, 4, dtype=torch.int64))  # one point, four times
    points = normal(1, 9, 3, seed=3)
    labels, _ = cluster(points, torch.ones(1, 9, dtype=torch.float64), 4)
    assert len(set(labels.flatten().tolist())) == 4


def test_of_equally_good_seeds_the_first_is_taken_whatever_rounding_says() -> None:
    # the middle is the first seed, either end the second
    points = torch.tensor([[[-1.0, 10.0], [0.0, 10.0], [1.0, 10.0]]], dtype=torch.float64)
    for seed in range(8):
        rounded = points @ points.mT * (1 + 1e-15 * normal(1, 3, 3, seed=seed))
        labels, _ = axial_kmeans(rounded, torch.ones(1, 3, dtype=torch.float64), 2)
        assert labels[0, 1] == labels[0, 2] != labels[0, 0]


def test_the_heavier_points_pull_more() -> None:
    points = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [9.0, 1.0], [9.2, 1.0]]], dtype=torch.float64)
    weights = torch.tensor([[100.0, 100.0, 1e-3, 1e-3]], dtype=torch.float64)
    labels, _ = cluster(points, weights, 2)
    # unweighted, the near pair and the far pair would cluster; the heavy pair is worth splitting
    assert labels[0, 0] != labels[0, 1]


def test_layers_are_clustered_as_if_alone_and_padding_does_not_count() -> None:
    points, weights = normal(3, 12, 40, seed=4), normal(3, 12, seed=5).abs()
    padded = torch.cat([points, torch.zeros(3, 7, 40, dtype=torch.float64)], dim=1)
    padded_weights = torch.cat([weights, torch.zeros(3, 7, dtype=torch.float64)], dim=1)
    labels, signs = cluster(padded, padded_weights, 4)
    for layer in range(3):
        alone, alone_signs = cluster(points[layer : layer + 1], weights[layer : layer + 1], 4)
        assert torch.equal(labels[layer, :12], alone[0])
        assert torch.equal(signs[layer, :12], alone_signs[0])
