"""What travels: by plan, and as measured on clients that hold no more than they may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedpeft.adapters.draws import draw_a
from fedpeft.adapters.state import A_SUFFIX, AdapterState, fingerprint, role_of
from fedpeft.strategies import STRATEGIES
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.rolora import RoLora
from fedpeft.strategies.rounds.exchange import Deliveries, sent_down
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.wire import ShortAnswer, TrainOrder, to_record, to_tensors
from tests.strategies.test_base import HEAD, A, B, Client, FunctionGrid, Reports, initial, reply_with

R = "layer.lora_R.weight"
ROUNDS = 4
RANK_OF_A = len(initial()[A])
SIZES = {name: tensor.numel() * 4 for name, tensor in initial().items()}


def with_r() -> dict[str, Tensor]:
    """Make LoRA-SB's adapter of the same layer."""
    return {**initial(), R: torch.zeros(RANK_OF_A, RANK_OF_A)}


def drawn(draw: int, begin: Callable[[], dict[str, Tensor]] = initial) -> dict[str, Tensor]:
    """Return the adapter as it is drawn, as `fedpeft.adapters.adapted.AdaptedModel.drawn` does."""
    tensors = begin()
    if draw:
        tensors[A] = draw_a(0, draw, A.removesuffix(A_SUFFIX), *tensors[A].shape)
        tensors[B] = torch.zeros_like(tensors[B])
    return tensors


def honest(amount: float, forgets: bool = False, begin: Callable[[], dict[str, Tensor]] = initial) -> Client:
    """Make a client that holds what it drew and what it was told to keep, and trains what it is told to train."""
    own: dict[str, Tensor] = {}

    def client(message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        sent = to_tensors(order.arrays)
        personal = {n for n in begin() if role_of(n) in order.personal}
        begun = drawn(order.draw, begin)
        held = {n: own.get(n, t) for n, t in begun.items() if n not in sent and n not in personal}
        if (fingerprint(held) if held else "") != order.held_hash:
            return Message(ShortAnswer.NEEDS_ARRAYS.to_record(), reply_to=message)
        start = {**held, **sent, **{n: own.get(n, begin()[n]) for n in personal}}
        if not forgets:
            own.update({n: t for n, t in start.items() if role_of(n) in order.kept})
        trained = {n: t + amount for n, t in start.items() if role_of(n) in order.trained}
        if amount > 0.2 and A in trained:  # clients that all move alike have covariance zero
            trained[A] = trained[A] * 2
        own.update({n: t for n, t in trained.items() if n in personal})
        return reply_with(message, {n: t for n, t in trained.items() if n not in personal})

    return client


def run(
    method: type[AdapterStrategy], clients: dict[int, Client], begin: Callable[[], dict[str, Tensor]] = initial
) -> tuple[dict[str, Tensor], list[RoundReport]]:
    strategy = method(client_ids={node: str(node) for node in clients}, scaling=2.0)
    reports: list[RoundReport] = []
    result = strategy.start(FunctionGrid(clients), to_record(begin()), ROUNDS, watchers=[Reports(reports)])
    return to_tensors(result.arrays), reports


@pytest.mark.parametrize("method", [method for name, method in STRATEGIES.items() if name != "florist"])
def test_measured_bytes_are_the_planned_ones(method: type[AdapterStrategy]) -> None:
    _, reports = run(method, {1: honest(0.1), 2: honest(0.3)})
    for report in reports:
        number = report.server_round
        assert report.bytes_up == 2 * sum(SIZES[n] for n in method.exchange(number).sent_up(list(SIZES), ()))
        step = (
            0 if number == 1 else 4 * method.step_size(*initial()[A].shape[1:], initial()[B].shape[0], [RANK_OF_A] * 2)
        )
        down = step + sum(SIZES[n] for n in sent_down(method.exchange, list(SIZES), (), number))
        down += report.bytes_up // 2 if method.capabilities.controls else 0
        assert report.bytes_down - report.bytes_catch_up == 2 * down


def closed_form(method: str, server_round: int) -> tuple[int, int]:
    """Return the values that a client of rank r sends and receives of one layer, as the papers count them."""
    (r, d_in), (d_out, _) = initial()[A].shape, initial()[B].shape
    a, b = r * d_in, r * d_out
    return {
        "fedit": (a + b, a + b),
        "lora-fair": (a + b, a + b),
        "lora-lego": (a + b, a + b),
        "flexlora": (a + b, a + b),
        "raflora": (a + b, a + b),
        "fedrot-lora": (a + b, a + b),
        "fedsa-lora": (a, a),
        "fedsvd": (b, b if server_round == 1 else a + b),  # the first A is drawn from the seed
        "flora": (a + b, a + b if server_round == 1 else min(a + b, d_in * d_out)),  # of one client's stack
        "fedex-lora": (a + b, a + b),  # a single client leaves no residual
        "frlora": (a + b, a + b if server_round == 1 else min(2 * (a + b), d_in * d_out)),
        "hetlora": (a + b, a + b),
        "fed-sb": (r * r, r * r),
        "scaffold": (a + b, 2 * (a + b)),
        "rolora": (b if server_round % 2 else a, b if server_round == 1 or server_round % 2 == 0 else a),
    }[method]


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("florist", "local")])
def test_measured_bytes_are_the_closed_form_counts(name: str) -> None:
    begin = with_r if name == "fed-sb" else initial
    _, reports = run(STRATEGIES[name], {1: honest(0.1, begin=begin)}, begin)
    for report in reports:
        up, down = closed_form(name, report.server_round)
        assert report.bytes_up == 4 * up + SIZES[HEAD]
        assert report.bytes_down - report.bytes_catch_up == 4 * down + SIZES[HEAD] * (2 if name == "scaffold" else 1)


def test_a_client_that_forgets_what_it_kept_is_sent_everything_and_the_result_is_the_same() -> None:
    kept, _ = run(RoLora, {1: honest(0.1), 2: honest(0.3)})
    forgotten, reports = run(RoLora, {1: honest(0.1), 2: honest(0.3, forgets=True)})
    assert all(torch.equal(kept[name], forgotten[name]) for name in kept)
    assert [len(report.updates) for report in reports] == [2] * ROUNDS


def test_a_client_that_missed_a_round_is_sent_what_changed_in_it() -> None:
    tensors = AdapterState.from_tensors(initial(), 1.0).to_tensors()
    deliveries = Deliveries(tensors, RoLora.exchange(1), ())
    for client in ("there", "away"):
        assert set(deliveries.lacking(client, RoLora.exchange(1))) == {B, HEAD}
    deliveries.delivered("there", [B, HEAD], RoLora.exchange(1))
    for number, moved in ((2, B), (3, A)):
        tensors = {n: t + 1 if n in (moved, HEAD) else t for n, t in tensors.items()}
        deliveries.update(tensors)
        lacking = set(deliveries.lacking("there", RoLora.exchange(number)))
        assert lacking == {moved, HEAD}
        deliveries.delivered("there", lacking, RoLora.exchange(number))
    assert set(deliveries.lacking("away", RoLora.exchange(3))) == {A, B, HEAD}


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "frlora"])
def test_a_moving_base_costs_what_its_paper_counts(name: str) -> None:
    """On a layer where factors are smaller than the matrix, for three clients of rank 2."""
    d_in, d_out, r, clients = 40, 30, 2, 3
    strategy = STRATEGIES[name](client_ids={node: str(node) for node in range(clients)}, scaling=2.0)
    draw = torch.Generator().manual_seed(0)
    start = {A: torch.randn(r, d_in, generator=draw), B: torch.randn(d_out, r, generator=draw)}

    def client(message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        held = dict(start)
        if order.draw:  # FLoRA's
            A_new = draw_a(0, order.draw, A.removesuffix(A_SUFFIX), r, d_in)
            held = {A: A_new, B: torch.zeros(d_out, r)}
        sent = to_tensors(order.arrays)
        lacking = {n: t for n, t in held.items() if n not in sent}
        assert order.held_hash == (fingerprint(lacking) if lacking else "")
        noise = torch.Generator().manual_seed(int(message.metadata.dst_node_id))
        return reply_with(message, {n: sent.get(n, t) + torch.randn(t.shape, generator=noise) for n, t in held.items()})

    reports: list[RoundReport] = []
    strategy.start(
        FunctionGrid(dict.fromkeys(range(clients), client)),
        to_record(start),
        3,
        watchers=[Reports(reports)],
    )
    factors = r * (d_in + d_out)
    down = {"flora": clients * factors, "fedex-lora": clients * factors, "frlora": 2 * factors}[name]
    for report in reports[1:]:
        assert report.bytes_down - report.bytes_catch_up == clients * 4 * down
    assert reports[1].bytes_catch_up == 0 < reports[2].bytes_catch_up
