"""Clipped updates and noise on their sum, against sums that anyone can read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.adapters.state import ClientUpdate, TrainMetrics, fingerprint
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.runs import read_events
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import STRATEGIES, FedIt
from fedpeft.strategies.averaging.private_mean import (
    CLIP,
    AdaptiveClipping,
    ClientPrivacy,
    PrivateMean,
    client_privacy,
    require_sums,
    update_norm,
)
from fedpeft.strategies.averaging.server_optimizers import ServerOptimizer
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import TrainOrder, to_record, to_tensors
from tests.strategies.oracles import assert_close
from tests.strategies.test_base import (
    A,
    Client,
    FunctionGrid,
    Reports,
    adding,
    broken,
    ids,
    initial,
    raising,
    reply_with,
)

Make = Callable[..., RunConfig]

ABLE = ["fedit", "rolora", "fedsa-lora", "fedsvd", "fed-sb", "frlora"]
SILENT = ClientPrivacy(0.0, clip=1.0)  # clips, and adds no noise


def start() -> dict[str, Tensor]:
    """Return an adapter of layers that are not square, in float64."""
    return {name: tensor.double() for name, tensor in initial().items()}


def change(node: int, length: float) -> dict[str, Tensor]:
    """Return what a client of this number changes, of some length over all tensors."""
    draw = torch.Generator().manual_seed(node)
    drawn = {name: torch.randn(t.shape, generator=draw, dtype=torch.float64) for name, t in start().items()}
    return {name: t * (length / update_norm(drawn)) for name, t in drawn.items()}


def moving(node: int, length: float, examples: int = 1) -> Client:
    """Make a client that adds its change to whatever it is sent."""

    def client(message: Message) -> Message:
        sent = to_tensors(TrainOrder.from_record(message.content).arrays)
        moved = {name: tensor + change(node, length)[name].to(tensor) for name, tensor in sent.items()}
        return reply_with(message, moved, examples)

    return client


def run(
    clients: dict[int, Client],
    privacy: ClientPrivacy | None = SILENT,
    rounds: int = 1,
    method: type[AdapterStrategy] = FedIt,
    begin: Mapping[str, Tensor] | None = None,
    reverse: bool = False,
    watchers: Iterable[Watcher] = (),
    **options: Any,
) -> tuple[dict[str, Tensor], list[RoundReport], AdapterStrategy]:
    reports: list[RoundReport] = []
    strategy = method(client_privacy=privacy, client_ids=ids(len(clients)), **options)
    result = strategy.start(
        FunctionGrid(clients, reverse),
        to_record(start() if begin is None else begin),
        rounds,
        watchers=[Reports(reports), *watchers],
    )
    return to_tensors(result.arrays), reports, strategy


def clipped_mean(
    lengths: Mapping[int, float], divisor: float, bound: float, frozen: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return x_0 + sum_k clip(u_k) / m, client by client and number by number."""
    after = start()
    trained = [name for name in after if name not in frozen]
    for node, length in lengths.items():
        sent = {name: tensor for name, tensor in change(node, length).items() if name in trained}
        norm = math.sqrt(sum(float(number) ** 2 for tensor in sent.values() for number in tensor.flatten()))
        for name, tensor in sent.items():
            after[name] = after[name] + tensor * min(1.0, bound / norm) / divisor
    return after


LENGTHS = {1: 0.1, 2: 3.0, 3: 0.9, 4: 50.0}


@pytest.mark.parametrize("frozen", [[], [A]], ids=["lora", "ffa-lora"])
@pytest.mark.parametrize("cohort", ["poisson", "fixed"])
def test_without_noise_a_round_is_the_sum_of_clipped_updates_whatever_their_rows(
    cohort: Any, frozen: list[str]
) -> None:
    clients = {node: moving(node, length, examples=7**node) for node, length in LENGTHS.items()}
    final, _, _ = run(clients, replace(SILENT, cohort=cohort), frozen=frozen)
    assert_close(final, clipped_mean(LENGTHS, 4, 1.0, frozen))


@pytest.mark.parametrize("cohort", ["poisson", "fixed"])
def test_the_divisor_is_the_expected_cohort_whoever_answers(cohort: Any) -> None:
    clients = {node: moving(node, 2.0) for node in range(1, 9)}
    for seed in range(4):
        final, reports, _ = run(clients, replace(SILENT, cohort=cohort), fraction_train=0.25, seed=seed)
        drawn = {int(update.client_id) + 1: 2.0 for update in reports[0].updates}
        assert_close(final, clipped_mean(drawn, 2, 1.0))


@pytest.mark.parametrize("cohort", ["poisson", "fixed"])
@pytest.mark.parametrize("kind", ["nan", "infinity", "shape", "missing", "count", "raises"])
def test_clients_that_fail_or_are_refused_count_as_zero(kind: str, cohort: Any) -> None:
    clients = {
        1: moving(1, 0.5),
        2: raising if kind == "raises" else broken(kind),
        3: moving(3, 0.5),
        4: moving(4, 9.0),
    }
    final, reports, _ = run(clients, replace(SILENT, cohort=cohort), min_clients=4)
    assert_close(final, clipped_mean({1: 0.5, 3: 0.5, 4: 9.0}, 4, 1.0))
    assert [fault.client_id for fault in reports[0].faults] == ["1"]


def test_a_client_that_changes_nothing_does_no_harm() -> None:
    final, _, _ = run({1: adding(0.0), 2: moving(2, 0.5)})
    assert_close(final, clipped_mean({2: 0.5}, 2, 1.0))


def test_a_change_that_float64_cannot_measure_counts_as_zero() -> None:
    private = PrivateMean(SILENT, 0)
    far = torch.full((2, 3), 1.5e308, dtype=torch.float64)
    merged = private.merge([{"x": -far}, {"x": far / 2}], {"x": far}, 1)
    assert torch.isfinite(merged["x"]).all()
    torch.testing.assert_close(merged["x"], far)


def test_an_empty_cohort_still_takes_the_noise_and_makes_a_round() -> None:
    clients = {node: moving(node, 1.0) for node in (1, 2, 3)}
    noisy = ClientPrivacy(1.0)
    final, reports, _ = run(clients, noisy, fraction_train=0.01, min_clients=3)
    assert reports[0].updates == []
    assert reports[0].bytes_up == reports[0].bytes_down == 0
    alone = PrivateMean(noisy, 0)
    alone.expected = 0.03
    assert_close(final, alone.merge([], start(), 1))
    assert all((final[name] != tensor).all() for name, tensor in start().items())


def test_a_round_in_which_everybody_fails_is_noise() -> None:
    final, reports, _ = run({1: raising, 2: raising}, ClientPrivacy(1.0))
    alone = PrivateMean(ClientPrivacy(1.0), 0)
    alone.expected = 2
    assert_close(final, alone.merge([], start(), 1))
    assert len(reports[0].faults) == 2


@pytest.mark.parametrize(("cohort", "sensitivity"), [("poisson", 1), ("fixed", 2)])
@pytest.mark.parametrize("rng", ["seeded", "secure"])
def test_the_noise_is_as_wide_as_the_sensitivity_asks(cohort: Any, sensitivity: int, rng: Any) -> None:
    z, bound, expected = 1.3, 0.7, 25.0
    zeros = {"factor": torch.zeros(400, 300, dtype=torch.float64), "head": torch.zeros(7, 5000, dtype=torch.float64)}
    private = PrivateMean(ClientPrivacy(z, bound, cohort, rng), 0)
    private.expected = expected
    first, second = private.merge([], zeros, 1), private.merge([], zeros, 2)
    wanted = z * sensitivity * bound / expected
    for name in zeros:
        numbers = first[name].flatten()
        error = 5 / math.sqrt(len(numbers))  # five standard errors
        assert abs(float(numbers.mean())) < error * wanted
        assert float(numbers.std()) == pytest.approx(wanted, rel=error)
        assert float((numbers.abs() < wanted).double().mean()) == pytest.approx(0.6827, abs=error)
        assert abs(float(torch.corrcoef(torch.stack([numbers, second[name].flatten()]))[0, 1])) < error


def test_secure_noise_and_cohorts_do_not_repeat() -> None:
    clients = {node: adding(0.0) for node in range(1, 65)}
    secure = ClientPrivacy(1.0, rng="secure")
    (one, first, _), (two, second, _) = (run(clients, secure, fraction_train=0.5) for _ in range(2))
    assert fingerprint(one) != fingerprint(two)
    assert [u.client_id for u in first[0].updates] != [u.client_id for u in second[0].updates]


def test_each_client_joins_a_poisson_cohort_by_its_own_coin() -> None:
    private, names = PrivateMean(SILENT, 5), [str(index) for index in range(40)]
    cohorts = [private.draw(names, 0.3, number) for number in range(1, 501)]
    assert private.expected == 12
    assert cohorts == [PrivateMean(SILENT, 5).draw(names, 0.3, number) for number in range(1, 501)]
    assert all(cohort == sorted(cohort, key=int) for cohort in cohorts)
    sizes = torch.tensor([len(cohort) for cohort in cohorts], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(12, abs=0.65)  # five standard errors
    assert float(sizes.var()) == pytest.approx(40 * 0.3 * 0.7, rel=0.32)  # as many coins as clients, not one
    shares = [sum(name in cohort for cohort in cohorts) / 500 for name in names]
    assert all(share == pytest.approx(0.3, abs=0.1) for share in shares)
    assert private.draw(names, 1.0, 1) == names


def test_min_clients_must_exist_and_need_not_be_drawn() -> None:
    clients = {node: moving(node, 1.0) for node in range(1, 11)}
    sizes = [len(report.updates) for report in run(clients, rounds=8, fraction_train=0.2, min_clients=9)[1]]
    assert max(sizes) < 9
    assert len(set(sizes)) > 1
    with pytest.raises(ConfigError, match=r"min_clients = 11.*10 clients"):
        run(clients, fraction_train=0.2, min_clients=11)


@given(
    st.integers(0, 2**20),
    st.lists(st.floats(0, 1e8), min_size=1, max_size=5),
    st.floats(1e-4, 1e4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_one_client_moves_the_sum_by_no_more_than_the_bound(
    seed: int, lengths: list[float], bound: float, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = {"a": torch.randn(2, 5, generator=draw), "head": torch.randn(4, 3, generator=draw)}
    before = {name: tensor.to(dtype) for name, tensor in before.items()}
    clients = [
        {name: t + length * torch.randn(t.shape, generator=draw) for name, t in before.items()} for length in lengths
    ]
    wide = {name: tensor.double() for name, tensor in before.items()}
    sums = []
    for cohort in (clients, clients[1:]):
        private = PrivateMean(replace(SILENT, clip=bound), 0)
        private.expected = 1.0  # so that what is returned is the sum
        merged = private.merge(cohort, wide, 1)
        sums.append({name: merged[name] - wide[name] for name in wide})
    # what rounding leaves of sums, and of adding x_0 and taking it away
    slack = 1e-12 * (1 + bound * len(lengths))
    assert update_norm({name: sums[0][name] - sums[1][name] for name in wide}) <= bound + slack


# --- adaptive clipping ----------------------------------------------------------------------------------------------


@given(
    st.floats(0.05, 20),
    st.floats(1.01, 50),
    st.sampled_from(["poisson", "fixed"]),
    st.floats(0.1, 1e4),
    st.booleans(),
)
def test_count_and_sum_together_cost_one_gaussian_step(
    z: float, factor: float, cohort: Any, expected: float, given_noise: bool
) -> None:
    privacy = ClientPrivacy(
        z, cohort=cohort, adaptive=AdaptiveClipping(count_noise=factor * z / 2 if given_noise else None)
    )
    z_delta, sigma_b = privacy.update_noise(expected), privacy.count_noise(expected)
    assert 1 / z_delta**2 + 1 / (2 * sigma_b) ** 2 == pytest.approx(1 / z**2)
    assert privacy.charge(0.1).noise_multiplier == z


def test_without_adaptive_clipping_nothing_is_spent_on_a_count() -> None:
    assert ClientPrivacy(1.3).update_noise(10.0) == 1.3
    assert ClientPrivacy(0.0, adaptive=AdaptiveClipping()).update_noise(10.0) == 0.0


def test_the_count_is_as_noisy_as_it_is_said_to_be() -> None:
    for cohort, sensitivity in (("poisson", 1), ("fixed", 2)):
        adaptive = AdaptiveClipping(0.5, 1.0, count_noise=3.0)
        moves = []
        for seed in range(1500):
            private = PrivateMean(ClientPrivacy(1.0, cohort=cohort, adaptive=adaptive), seed)  # type: ignore[arg-type]
            private.expected = 60.0
            private.merge([], {"x": torch.zeros(1, 2)}, 1)
            moves.append(-math.log(private.clip))  # eta (b - g), where nobody answered: the noise alone
        assert float(torch.tensor(moves).std()) == pytest.approx(sensitivity * 3.0 / 60, rel=0.1)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("begin", [0.05, 300.0])
def test_adaptive_clipping_finds_the_quantile_of_the_norms(quantile: float, begin: float) -> None:
    zero = {"x": torch.zeros(3, 2, dtype=torch.float64)}
    clients = [{"x": torch.full((3, 2), norm / math.sqrt(6), dtype=torch.float64)} for norm in range(1, 101)]
    private = PrivateMean(ClientPrivacy(0.5, begin, adaptive=AdaptiveClipping(quantile, 0.5, 2.0)), 0)
    private.expected = 100
    bounds = []
    for number in range(1, 161):
        private.merge(clients, zero, number)
        bounds.append(private.clip)
    assert sum(bounds[-40:]) / 40 == pytest.approx(100 * quantile, rel=0.1)


def test_the_bound_stays_within_a_millionfold_whatever_the_noise() -> None:
    for quantile, reach in ((1e-9, 1e-6), (1 - 1e-9, 1e6)):
        private = PrivateMean(ClientPrivacy(1.0, 2.0, adaptive=AdaptiveClipping(quantile, 1e3, 1.0)), 0)
        private.expected = 1e-3
        for number in range(1, 5):
            private.merge([], {"x": torch.zeros(2, 3)}, number)
            assert 2e-6 * (1 - 1e-9) <= private.clip <= 2e6 * (1 + 1e-9)
        private.expected = 100
        everybody = [{"x": torch.zeros(2, 3) if reach < 1 else torch.full((2, 3), 1e30)}] * 100
        private.merge(everybody, {"x": torch.zeros(2, 3)}, 9)
        assert private.clip == pytest.approx(2 * reach)


def test_the_bound_of_a_round_is_the_one_before_its_count() -> None:
    private = PrivateMean(ClientPrivacy(0.0, 1.0, adaptive=AdaptiveClipping(0.5, 0.2, 1e-9)), 0)
    zero, far = {"x": torch.zeros(1, 2, dtype=torch.float64)}, {"x": torch.tensor([[30.0, 40.0]], dtype=torch.float64)}
    torch.testing.assert_close(private.merge([far], zero, 1)["x"], far["x"] / 50)
    assert private.clip == pytest.approx(math.exp(0.1))
    torch.testing.assert_close(private.merge([far], zero, 2)["x"], far["x"] * (math.exp(0.1) / 50))
    assert private.memory()[CLIP].item() == private.clip


def test_a_count_that_would_spend_the_whole_round_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip_count_noise = 0\.5.*above 0\.5"):
        ClientPrivacy(1.0, adaptive=AdaptiveClipping(count_noise=0.5))
    ClientPrivacy(1.0, adaptive=AdaptiveClipping(count_noise=0.51))


# --- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_methods_that_need_more_than_sums_are_refused_and_say_why(name: str) -> None:
    if name in ABLE:
        STRATEGIES[name](client_privacy=SILENT)
        return
    why = "send nothing" if name == "local" else "each client's factors"
    with pytest.raises(ConfigError, match=f"strategy '{name}' is not for privacy.level = 'client'.*{why}") as error:
        require_sums(STRATEGIES[name], STRATEGIES[name].Options(), able=STRATEGIES.values())
    with pytest.raises(ConfigError, match=why):
        STRATEGIES[name](client_privacy=SILENT)
    assert all(able in str(error.value) for able in ABLE)
    assert "\n" not in str(error.value)


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
    assert {CLIP} < strategy.loop.memory().keys()  # type: ignore[union-attr]


def test_a_seeded_run_gives_the_same_bytes_in_whatever_order_answers_come() -> None:
    clients = {node: moving(node, 0.3 * node) for node in range(1, 10)}
    noisy = ClientPrivacy(0.8, adaptive=AdaptiveClipping())
    options: dict[str, Any] = {"rounds": 4, "fraction_train": 0.5, "begin": initial()}
    one, _, strategy = run(clients, noisy, **options)
    two, _, other = run(clients, noisy, reverse=True, **options)
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(strategy.loop.memory()) == fingerprint(other.loop.memory())  # type: ignore[union-attr]
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


# --- whole runs -----------------------------------------------------------------------------------------------------


EVEN = {"partition__scheme": "iid", "federation__clients": 4}  # 24 rows each


def private(make: Make, **settings: Any) -> RunConfig:
    return make(**{**EVEN, "privacy__level": "client", "privacy__noise_multiplier": 0.0, **settings})


@pytest.mark.parametrize("name", ABLE)
def test_without_noise_or_clipping_equal_clients_give_the_plain_method(
    name: str, text_config: Make, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy__name": name, "federation__rounds": 3}
    plain = simulate(text_config(**EVEN, **settings), tmp_path / "plain").path
    same = simulate(private(text_config, privacy__max_update_norm=1e6, **settings), tmp_path / "private").path
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (plain, same))
    assert_close(two, one, 2e-5)
    assert {CLIP} <= load_file(next((same / "checkpoints").glob("*/state.safetensors"))).keys()


def test_a_run_tells_no_client_from_another_and_repeats_to_the_byte(text_config: Make, tmp_path: Path) -> None:
    config = private(text_config, privacy__noise_multiplier=0.5, strategy__name="fedit", federation__fraction=0.6)
    paths = [simulate(config, tmp_path / name).path for name in ("one", "two")]
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in paths)
    assert fingerprint(one) == fingerprint(two)
    events = list(read_events(paths[0]))
    assert not [event for event in events if event["event"] == "client"]
    for event in events:
        if event["event"] == "round":
            assert event["train_loss"] is None
            assert "aggregation_error" not in event


def test_the_configuration_names_the_mechanism(text_config: Make) -> None:
    assert client_privacy(text_config()) is None
    config = private(
        text_config,
        privacy__noise_multiplier=1.5,
        privacy__max_update_norm=0.2,
        privacy__cohort="fixed",
        privacy__rng="seeded",
        privacy__adaptive_clipping=True,
        privacy__clip_quantile=0.7,
        privacy__clip_count_noise=4.0,
    )
    made = client_privacy(config)
    assert made == ClientPrivacy(1.5, 0.2, "fixed", "seeded", AdaptiveClipping(0.7, 0.2, 4.0))
    assert made.sample_rate(0.1) == 1.0
    unsaid = client_privacy(private(text_config, privacy__noise_multiplier=1.5))
    assert unsaid == ClientPrivacy(1.5, 1.0, "poisson", "secure")
    assert unsaid.charge(0.1).sample_rate == 0.1


@pytest.mark.parametrize(("cohort", "rate"), [("poisson", 0.1), ("fixed", 1.0)])
def test_noise_is_calibrated_to_the_budget_over_all_rounds_and_repeats(
    cohort: Any, rate: float, text_config: Make
) -> None:
    config = private(
        text_config,
        privacy__noise_multiplier=None,
        privacy__epsilon=4.0,
        privacy__cohort=cohort,
        privacy__spare_rounds=5,
        federation__rounds=20,
        federation__fraction=0.1,
    )
    made = client_privacy(config)
    assert made is not None
    assert 3.9 < spent([Charge(made.noise_multiplier, rate, 25)], 1e-5).epsilon <= 4.0
    assert replace(made.charge(0.1), steps=25) == Charge(made.noise_multiplier, rate, 25)


def test_a_dry_run_counts_and_refuses_what_a_run_would(text_config: Make) -> None:
    planned = plan(private(text_config, strategy__name="fedit", federation__fraction=0.5))
    assert planned.cohort == 2
    with pytest.raises(ConfigError, match="lora-fair"):
        plan(private(text_config, strategy__name="lora-fair"))
