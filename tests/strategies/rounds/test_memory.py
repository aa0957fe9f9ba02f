"""A run that is broken off after any round and goes on from a checkpoint gives the bytes of one that was not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedpeft.adapters.draws import draw_a
from fedpeft.adapters.pruning import PRUNED_RANK
from fedpeft.adapters.state import A_SUFFIX, AdapterState, Role, fingerprint, role_of
from fedpeft.errors import CheckpointError
from fedpeft.jsons import to_json
from fedpeft.privacy.client_mechanism import AdaptiveClipping, ClientPrivacy
from fedpeft.runs import Checkpoint, read_checkpoint
from fedpeft.runs.checkpoints import write_checkpoint
from fedpeft.seeds import generator
from fedpeft.strategies import STRATEGIES, FedIt, find
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.rounds.loop import Loop
from fedpeft.strategies.rounds.memory import Memory
from fedpeft.strategies.rounds.ranks import cut
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import ShortAnswer, TrainOrder, to_record, to_tensors
from tests.strategies.averaging.private_clients import ABLE
from tests.strategies.test_base import FunctionGrid, reply_with

ROUNDS, CLIENTS, RANK = 5, 6, 4
SHAPES = {"one.q": (5, 3), "two.v": (4, 6)}  # d_in, d_out of each layer


def begin(with_r: bool) -> dict[str, Tensor]:
    """Make an adapter of two layers and a head; with LoRA-SB's R if asked."""
    draw = torch.Generator().manual_seed(0)
    tensors = {"head.weight": torch.randn(2, 3, generator=draw)}
    for layer, (d_in, d_out) in SHAPES.items():
        tensors[f"{layer}{A_SUFFIX}"] = torch.randn(RANK, d_in, generator=draw)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(d_out, RANK, generator=draw) * with_r
        if with_r:
            tensors[f"{layer}.lora_R.weight"] = torch.zeros(RANK, RANK)
    return tensors


class Trainer:
    """A client that holds and keeps what it should, and moves what it trains by draws of its own."""

    def __init__(self, name: int, initial: Mapping[str, Tensor]) -> None:
        self.name, self.initial, self.own = name, dict(initial), dict[str, Tensor]()

    def __call__(self, message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        sent = {name: tensor.clone() for name, tensor in to_tensors(order.arrays).items()}
        drawn = self.drawn(order.draw, order.rank)
        personal = {name for name in drawn if role_of(name) in order.personal}
        held = {n: self.own.get(n, t) for n, t in drawn.items() if n not in sent and n not in personal}
        if (fingerprint(held) if held else "") != order.held_hash:
            return Message(ShortAnswer.NEEDS_ARRAYS.to_record(), reply_to=message)
        start = {**held, **sent, **{n: self.own.get(n, drawn[n]) for n in personal}}
        self.own |= {n: t.clone() for n, t in start.items() if role_of(n) in order.kept}
        rng = generator(7, "training", order.server_round, self.name)
        trained = {}
        for name in sorted(n for n in start if role_of(n) in order.trained):
            tensor = start[name]
            trained[name] = tensor + 0.1 * torch.from_numpy(rng.standard_normal(tuple(tensor.shape))).to(tensor)
        self.own |= {n: t for n, t in trained.items() if n in personal}
        kept = int(order.settings.get(PRUNED_RANK, 0))
        if kept and self.name % 2:
            state = AdapterState.from_tensors(trained, order.scaling)
            trained = cut(state, kept, order.scaling).to_tensors()
        return reply_with(message, {n: t for n, t in trained.items() if n not in personal}, self.name + 1)

    def drawn(self, draw: int, rank: int) -> dict[str, Tensor]:
        tensors = dict(self.initial)
        for name in tensors if draw else ():
            if role_of(name) is Role.A:
                tensors[name] = draw_a(0, draw, name.removesuffix(A_SUFFIX), *tensors[name].shape)
            elif role_of(name) is Role.B:
                tensors[name] = torch.zeros_like(tensors[name])
        if rank:
            tensors = cut(AdapterState.from_tensors(tensors, 1.0), rank, 1.0).to_tensors()
        return tensors


class Saves(Watcher):
    """Writes a checkpoint after every round, and copies what the clients own."""

    def __init__(self, loop: Loop, folder: Path, clients: Mapping[int, Trainer]) -> None:
        self.loop, self.folder, self.clients = loop, folder, clients
        self.own: dict[int, dict[int, dict[str, Tensor]]] = {}
        self.reports: list[dict[str, Any]] = []

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        told = asdict(report) | {"train_loss": report.train_loss}
        self.reports.append({key: value for key, value in told.items() if key != "seconds"})

    def round_closed(self, server_round: int) -> None:
        memory = self.loop.memory()
        write_checkpoint(self.folder, Checkpoint(server_round, memory.tensors, memory.facts))
        self.own[server_round] = {node: copy.deepcopy(client.own) for node, client in self.clients.items()}


def prepare(
    make: Callable[[], AdapterStrategy], folder: Path, with_r: bool, own: Mapping[int, dict[str, Tensor]]
) -> tuple[Loop, Saves]:
    initial = begin(with_r)
    clients = {node: Trainer(node - 1, initial) for node in range(1, CLIENTS + 1)}
    for node, tensors in own.items():
        clients[node].own = copy.deepcopy(tensors)
    loop = Loop(make(), FunctionGrid({**clients}), to_record(initial))
    saves = Saves(loop, folder, clients)
    loop.watchers.append(saves)
    return loop, saves


def contents(folder: Path, server_round: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoints" / f"round-{server_round:04d}").iterdir()}


OPTIMIZERS = ("avgm", "adagrad", "adam", "yogi")
MIXED = [name for name, method in STRATEGIES.items() if method.capabilities.mixed_ranks]
PRIVATE = ClientPrivacy(0.7, 0.5, adaptive=AdaptiveClipping())
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in STRATEGIES},
    **{f"{name} of mixed ranks": (name, {"ranks": (2, 4, 3)}) for name in MIXED},
    **{f"fedit with {kind}": ("fedit", {"server_optimizer": kind}) for kind in OPTIMIZERS},
    "rolora with adam": ("rolora", {"server_optimizer": "adam"}),
    "fed-sb with yogi": ("fed-sb", {"server_optimizer": "yogi"}),
    "median": ("fedit", {"robust": "median"}),
    "trimmed mean": ("fedit", {"robust": "trimmed-mean", "trim": 0.3}),
    "krum": ("fedit", {"robust": "krum", "byzantine": 0}),
    "clipped norms": ("fedsa-lora", {"robust": "norm-clip", "server_optimizer": "avgm"}),
    "pruned ranks": ("hetlora", {"ranks": (4, 2), "prune": 0.5}),
    "padded florist": ("florist", {"padding": True, "threshold": 0.7}),
    **{f"private {name}": (name, {"client_privacy": PRIVATE}) for name in ABLE},
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_method_a_run_that_goes_on_is_the_run_that_never_stopped(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    method = find(name)
    with_r = Role.R in method.exchange(1).trained and name == "fed-sb"
    terms = {"client_ids": {n: str(n - 1) for n in range(1, CLIENTS + 1)}, "fraction_train": 0.67, "scaling": 2.0}

    def make() -> AdapterStrategy:
        return method(**terms, **options)

    loop, whole = prepare(make, tmp_path / "whole", with_r, {})
    final = to_tensors(loop.run(ROUNDS).arrays)
    for broken in (1, 2, 4):
        loop, again = prepare(make, tmp_path / f"again-{broken}", with_r, whole.own[broken])
        checkpoint = read_checkpoint(tmp_path / "whole", broken)
        loop.recall(broken, Memory(checkpoint.tensors, checkpoint.facts))
        assert fingerprint(to_tensors(loop.run(ROUNDS).arrays)) == fingerprint(final)
        assert again.reports == whole.reports[broken:]
        for later in range(broken + 1, ROUNDS + 1):
            assert contents(again.folder, later) == contents(whole.folder, later)


def test_what_a_method_remembers_it_can_recall() -> None:
    for method in STRATEGIES.values():
        remembers, recalls = method.memory is not AdapterStrategy.memory, method.recall is not AdapterStrategy.recall
        assert remembers == recalls, method.name


def test_a_memory_that_a_method_has_no_use_for_is_refused_by_name() -> None:
    class Forgetful(FedIt):
        recall = AdapterStrategy.recall

    with pytest.raises(CheckpointError, match=r"strategy 'fedit' has no recall\(\) .*momentum"):
        Forgetful().recall({"momentum": torch.ones(1)})


def test_who_holds_the_same_is_named_together() -> None:
    loop, _ = prepare(
        lambda: find("rolora")(fraction_train=1.0, client_ids={n: str(n) for n in range(1, 7)}), Path(), False, {}
    )
    loop.watchers.clear()
    loop.run(3)
    held = loop.memory().facts["outgoing"]["0"]
    assert [len(alike["clients"]) for alike in held["known"]] == [CLIENTS]
    assert len(to_json(held)) < 1000
