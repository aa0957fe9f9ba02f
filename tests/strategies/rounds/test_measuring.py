from __future__ import annotations

import pytest
import torch

from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.strategies import FedIt
from fedpeft.strategies.algebra.factors import round_errors
from fedpeft.strategies.rounds import measuring
from fedpeft.strategies.rounds.measuring import ErrorMeasure
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import to_record
from tests.strategies.oracles import LAYERS, Cohort, make, make_cohort
from tests.strategies.test_base import FunctionGrid, adding, ids, initial

MANY = 60  # clients whose factors would take more than the matrix of their products


def merged(cohort: Cohort) -> AdapterState:
    return make(FedIt).aggregate(iter(cohort.updates), cohort.current, 1)


def measured(cohort: Cohort) -> ErrorMeasure:
    measure = ErrorMeasure(cohort.current, len(cohort.updates), seed=3)
    for update in cohort.updates:
        measure.add(update)
    return measure


@pytest.mark.parametrize("clients", [3, MANY])
def test_what_is_measured_as_updates_arrive_is_the_error_of_the_cohort(clients: int) -> None:
    cohort = make_cohort(rows=range(1, clients + 1), ranks=[3] * clients, scalings=[2.0] * clients)
    measure = measured(cohort)
    assert not measure.is_sample
    sent = merged(cohort)
    found, exact = measure.errors(sent, {}), round_errors(cohort.updates, cohort.current, sent)
    assert found.of_step == pytest.approx(exact.of_step, rel=1e-12)
    assert found.of_total == pytest.approx(exact.of_total, rel=1e-12)
    assert found == exact or clients == MANY
    assert exact.of_step > 0.1


def test_of_many_clients_no_factors_are_kept() -> None:
    held = []
    for clients in (MANY, 4 * MANY):
        cohort = make_cohort(rows=[1] * clients, ranks=[3] * clients, scalings=[2.0] * clients)
        measure = measured(cohort)
        held.append(sum(tensor.numel() for tensor in vars(measure)["_sums"].values()))
        assert not any(vars(measure)["_factors"].values())
    assert held == [2 * 7 * 11] * 2


def test_layers_that_would_take_too_long_are_left_out_the_same_ones_in_every_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"layer.{index}" for index in range(20)]
    state = AdapterState({name: LoraFactors(torch.zeros(3, 7), torch.zeros(11, 3), 1.0) for name in names}, {})
    monkeypatch.setattr(measuring, "MOST_FLOPS", 2.0 * 10 * 3 * 7 * 11 * 5.5)  # of ten clients, five layers and a half
    chosen = {seed: ErrorMeasure(state, 10, seed).layers for seed in range(9)}
    assert {len(layers) for layers in chosen.values()} == {5}
    assert all(layers == [name for name in names if name in layers] for layers in chosen.values())
    assert len({tuple(layers) for layers in chosen.values()}) > 1
    assert ErrorMeasure(state, 10, 0).layers == chosen[0]
    assert set(ErrorMeasure(state, 20, 0).layers) < set(chosen[0])
    assert len(ErrorMeasure(state, 10**9, 0).layers) == 1  # never none
    assert ErrorMeasure(state, 2, 0).layers == names


def test_a_sampled_error_is_that_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MOST_FLOPS", 1.0)
    cohort = make_cohort()
    measure, sent = measured(cohort), merged(cohort)
    assert measure.is_sample
    (layer,) = measure.layers
    assert layer in LAYERS
    alone = AdapterState({layer: cohort.current.factors[layer]}, {})
    assert measure.errors(sent, {}) == round_errors(cohort.updates, alone, sent)


class Reports(Watcher):
    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        self.reports.append(report)


@pytest.mark.parametrize("most", [measuring.MOST_FLOPS, 1.0])
def test_a_report_says_on_how_many_layers_the_error_was_measured_if_not_on_all(
    most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "MOST_FLOPS", most)
    watcher = Reports()
    grid = FunctionGrid({node: adding(0.5 * node, node) for node in (1, 2)})
    method = FedIt(client_ids=ids(2))
    another = {name.replace("layer", "other"): tensor for name, tensor in initial().items() if "lora" in name}
    method.start(grid=grid, initial_arrays=to_record(initial() | another), num_rounds=1, watchers=[watcher])
    (report,) = watcher.reports
    assert report.aggregation_error is not None
    assert report.aggregation_error_layers == (1 if most == 1.0 else None)
