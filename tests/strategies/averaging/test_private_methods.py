"""What methods make of a noised sum, which of them can, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedpeft.adapters.state import ClientUpdate, TrainMetrics, fingerprint
from fedpeft.errors import ConfigError
from fedpeft.privacy.client_mechanism import AdaptiveClipping, ClientPrivacy
from fedpeft.strategies import STRATEGIES, FedIt, available
from fedpeft.strategies.averaging.private_mean import (
    CLIP,
    require_sums,
)
from fedpeft.strategies.averaging.server_optimizers import ServerOptimizer
from fedpeft.strategies.rounds.memory import MEAN
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import to_record
from tests.strategies.averaging.private_clients import ABLE, SILENT, moving, run, start
from tests.strategies.oracles import assert_close
from tests.strategies.test_base import A, FunctionGrid, ids, initial


@pytest.mark.parametrize("name", STRATEGIES)
def test_methods_that_need_more_than_sums_are_refused_and_say_why(name: str) -> None:
    if name in ABLE:
        STRATEGIES[name](client_privacy=SILENT)
        return
    why = {"local": "send nothing", "scaffold": "a second sum"}.get(name, "each client's factors")
    with pytest.raises(ConfigError, match=f"strategy '{name}' is not for privacy.level = 'client'.*{why}") as error:
        require_sums(STRATEGIES[name], STRATEGIES[name].Options(), able=STRATEGIES.values())
    with pytest.raises(ConfigError, match=why):
        STRATEGIES[name](client_privacy=SILENT)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=f"Use one of {', '.join(ABLE)}, or another privacy.level"):
        require_sums(STRATEGIES[name], None, able=available().values())


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "krum", "norm-clip"])
def test_robust_means_are_refused(robust: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy.robust = '{robust}'.*max_update_norm"):
        FedIt(client_privacy=SILENT, robust=robust)


def test_clients_of_different_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter.ranks = 2,4.*no sum"):
        FedIt(client_privacy=SILENT, ranks=(2, 4))


def test_a_method_sees_one_client() -> None:
    seen: list[ClientUpdate] = []

    class Seeing(FedIt):
        def aggregate(self, updates, current, server_round=1):  # type: ignore[no-untyped-def]
            seen.extend(updates)
            return super().aggregate(seen[-1:], current, server_round)

    final, _, _ = run(
        {node: moving(node, 1.0, 9) for node in (1, 2, 3)}, ClientPrivacy(1.0), method=Seeing, scaling=2.0
    )
    (update,) = seen
    assert update.num_examples == 1
    assert update.factors["layer"].scaling == 2.0
    assert torch.equal(update.factors["layer"].A, final[A])


def test_a_server_optimizer_steps_on_the_private_mean() -> None:
    clients = {node: moving(node, 1.0) for node in (1, 2, 3)}
    mean, _, _ = run(clients, ClientPrivacy(1.0))
    final, _, strategy = run(clients, ClientPrivacy(1.0), server_optimizer="adam")
    assert_close(final, ServerOptimizer("adam").step(start(), mean))
    assert {f"{MEAN}:{CLIP}"} < strategy.loop.memory().tensors.keys()  # type: ignore[union-attr]


def test_a_seeded_run_gives_the_same_bytes_in_whatever_order_answers_come() -> None:
    clients = {node: moving(node, 0.3 * node) for node in range(1, 10)}
    noisy = ClientPrivacy(0.8, adaptive=AdaptiveClipping())
    options: dict[str, Any] = {"rounds": 4, "fraction_train": 0.5, "begin": initial()}
    one, _, strategy = run(clients, noisy, **options)
    two, _, other = run(clients, noisy, reverse=True, **options)
    assert fingerprint(one) == fingerprint(two)
    one_memory, other_memory = strategy.loop.memory(), other.loop.memory()  # type: ignore[union-attr]
    assert fingerprint(one_memory.tensors) == fingerprint(other_memory.tensors)
    assert one_memory.facts == other_memory.facts
    assert fingerprint(one) != fingerprint(run(clients, noisy, seed=1, **options)[0])


def test_what_single_clients_report_is_told_to_nobody() -> None:
    heard: list[object] = []

    class Hearing(Watcher):
        def update_arrived(self, server_round: int, update: ClientUpdate) -> None:
            heard.append(update)

    clients = {node: moving(node, 1.0) for node in (1, 2, 3)}
    _, (report,), _ = run(clients, ClientPrivacy(1.0), watchers=[Hearing()])
    assert heard == []
    assert report.train_loss is None
    assert report.aggregation_error is None
    assert all(update.metrics == TrainMetrics() for update in report.updates)
    assert report.bytes_up == report.bytes_down > 0
    run(clients, None, watchers=[Hearing()])
    assert len(heard) == 3


def test_a_round_is_announced_before_anybody_is_asked() -> None:
    grid, rounds = FunctionGrid({1: moving(1, 1.0)}), []

    class Charging(Watcher):
        def round_begins(self, server_round: int) -> None:
            rounds.append((server_round, len(grid.log)))
            if server_round == 3:
                raise KeyboardInterrupt

    strategy = FedIt(client_privacy=SILENT, client_ids=ids(1))
    with pytest.raises(KeyboardInterrupt):
        strategy.start(grid, to_record(start()), 5, watchers=[Charging()])
    assert rounds == [(1, 0), (2, 1), (3, 2)]
    assert len(grid.log) == 2
