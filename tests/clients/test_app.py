"""The ClientApp by itself: one message in, one message out."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.adapters.state import Role, fingerprint, role_of
from fedpeft.clients.app import ClientFailedError, app
from fedpeft.config import RunConfig
from fedpeft.resident import resident
from fedpeft.wire import Identity, ShortAnswer, TrainAnswer, TrainOrder, to_record, to_tensors

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def identity() -> None:
    """Messages ask the process who it is."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


def context(config: RunConfig, **node_config: str | int | bool) -> Context:
    settings = {name.replace("_", "-"): value for name, value in node_config.items()}
    return Context(1, 1, settings, RecordDict(), dict(config.to_flat()))


def share(config: RunConfig, index: int = 0) -> Context:
    return context(config, partition_id=index, num_partitions=3)


def order(
    config: RunConfig,
    held_hash: str | None = None,
    others: Mapping[str, torch.Tensor] | None = None,
    *,
    trained: Sequence[str] = ("A", "B", "head"),
    personal: Sequence[str] = (),
    kept: Sequence[str] = (),
    without: Sequence[str] = (),
    settings: Mapping[str, float] | None = None,
) -> Message:
    adapted = resident(config).adapted
    shared = {name: adapted.initial[name] for name in adapted.trained if role_of(name) not in (*personal, *without)}
    content = TrainOrder(
        to_record({**shared, **(others or {})}),
        server_round=1,
        num_rounds=2,
        scaling=adapted.scaling,
        held_hash=adapted.frozen_hash if held_hash is None else held_hash,
        trained=frozenset(map(Role, trained)),
        personal=frozenset(map(Role, personal)),
        kept=frozenset(map(Role, kept)),
        settings=settings or {},
    )
    return Message(content.to_record(), 1, MessageType.TRAIN)


def answered(reply: Message) -> TrainAnswer:
    return TrainAnswer.from_record(reply.content)


def tensors_of(reply: Message) -> dict[str, torch.Tensor]:
    return to_tensors(answered(reply).arrays)


def needs_arrays(reply: Message) -> bool:
    return ShortAnswer.from_record(reply.content) is ShortAnswer.NEEDS_ARRAYS


def test_a_client_trains_and_sends_back_what_it_was_sent(text_config: Make) -> None:
    config = text_config()
    message = order(config)
    reply = app(message, share(config))
    sent, back = to_tensors(TrainOrder.from_record(message.content).arrays), tensors_of(reply)
    assert sent.keys() == back.keys()
    assert any(not torch.equal(sent[name], back[name]) for name in sent)
    assert answered(reply).num_examples == len(resident(config).partition.indices[0])


def test_a_client_says_its_name(text_config: Make) -> None:
    config = text_config()
    reply = app(Message(RecordDict(), 1, MessageType.QUERY), share(config, 2))
    assert Identity.from_record(reply.content).client_id == "site-2"


def test_the_same_message_twice_gives_the_same_bytes(text_config: Make) -> None:
    config = text_config(adapter__dropout=0.2)
    replies = [app(order(config), share(config)) for _ in range(2)]
    one, two = (fingerprint(tensors_of(reply)) for reply in replies)
    assert one == two


def test_a_client_with_another_frozen_draw_asks_for_it_and_trains_with_it(text_config: Make) -> None:
    config = text_config(adapter__kind="ffa-lora")
    adapted = resident(config).adapted
    other = {name: adapted.initial[name] + 1 for name in adapted.frozen}
    asked = app(order(config, fingerprint(other)), share(config))
    assert needs_arrays(asked)
    reply = app(order(config, "", other), share(config))
    plain = app(order(config), share(config))
    assert not any("lora_A" in name for name in answered(reply).arrays)
    given, own = (fingerprint(tensors_of(each)) for each in (reply, plain))
    assert given != own


@pytest.mark.parametrize(("trained", "sent"), [(["A"], {Role.A}), (["B", "head"], {Role.B, Role.HEAD})])
def test_a_client_trains_what_the_message_says_and_nothing_else(
    text_config: Make, trained: list[str], sent: set[Role]
) -> None:
    config = text_config()
    reply = app(order(config, trained=trained), share(config))
    assert {role_of(name) for name in answered(reply).arrays} == sent
    initial, adapted = resident(config).adapted.initial, resident(config).adapted
    moved = {role_of(n) for n, tensor in adapted.tensors(initial).items() if not torch.equal(tensor, initial[n])}
    assert moved <= sent  # A has no gradient while B is zero


def test_a_client_keeps_what_it_is_asked_to_keep_and_need_not_be_sent_it_again(text_config: Make) -> None:
    config = text_config()
    initial = resident(config).adapted.initial
    moved = {name: tensor + 0.5 for name, tensor in initial.items() if role_of(name) == Role.B}
    held = share(config)
    app(order(config, "", moved, trained=["A"], kept=["A", "B"]), held)
    again = order(config, fingerprint(moved), trained=["A"], kept=["A", "B"], without=["B"])
    assert not needs_arrays(app(again, held))
    asked = app(again, share(config))  # a client that was not there before
    assert needs_arrays(asked)


def test_a_personal_factor_never_leaves_its_client(text_config: Make) -> None:
    config = text_config()
    held = share(config)
    reply = app(order(config, personal=["B"]), held)
    assert {role_of(name) for name in answered(reply).arrays} == {Role.A, Role.HEAD}
    assert {role_of(name) for name in held.state.array_records["personal"]} == {Role.B}


def test_a_personal_head_is_kept_and_not_sent(text_config: Make) -> None:
    config = text_config(adapter__head="local")
    held = share(config)
    reply = app(order(config), held)
    assert not any("classifier" in name for name in answered(reply).arrays)
    first = to_tensors(held.state.array_records["personal"])
    app(order(config), held)
    assert fingerprint(to_tensors(held.state.array_records["personal"])) != fingerprint(first)


def test_only_the_class_of_an_error_leaves_a_client(text_config: Make, tmp_path: Path) -> None:
    config = text_config(data__labels="no,yes")
    path = tmp_path / "secret.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["w1", "a secret diagnosis"], ["w2", "no"]])
    with pytest.raises(ClientFailedError) as caught:
        app(order(config), context(config, data=str(path)))
    assert str(caught.value) == "DataError"
    assert "a secret diagnosis" in str(caught.value.__cause__)


def test_a_site_trains_on_its_own_file_under_its_own_name(text_config: Make, text_csv: Path, tmp_path: Path) -> None:
    config = text_config(data__labels="no,yes")
    path = tmp_path / "north.csv"
    path.write_text("".join(text_csv.read_text().splitlines(keepends=True)[:11]))
    held = context(config, data=str(path))
    assert answered(app(order(config), held)).num_examples == 10
    asked = app(Message(RecordDict(), 1, MessageType.QUERY), held)
    assert Identity.from_record(asked.content).client_id == "north"
    asked = app(Message(RecordDict(), 1, MessageType.QUERY), context(config, data=str(path), client_id="n"))
    assert Identity.from_record(asked.content).client_id == "n"


@pytest.mark.parametrize(
    "node_config",
    [{}, {"partition_id": 0, "num_partitions": 5}, {"partition_id": 3, "num_partitions": 3}, {"partition_id": 0}],
)
def test_a_node_that_does_not_know_its_rows_says_so(node_config: dict[str, int], text_config: Make) -> None:
    config = text_config()
    with pytest.raises(ClientFailedError, match="DeploymentError"):
        app(order(config), context(config, **node_config))


def test_a_server_cannot_make_a_site_run_a_models_code(text_config: Make) -> None:
    config = text_config(model__trust_remote_code=True)
    plain = order(text_config())
    with pytest.raises(ClientFailedError, match="DeploymentError") as caught:
        app(plain, share(config))
    assert "this site has not agreed" in str(caught.value.__cause__)
    agreed = context(config, partition_id=0, num_partitions=3, trust_remote_code=True)
    assert app(plain, agreed).has_content()


@pytest.mark.parametrize("key", ["server-round", "held-hash", "trained"])
def test_a_malformed_order_is_refused_by_the_name_of_its_key(key: str, text_config: Make) -> None:
    config = text_config()
    message = order(config)
    message.content.config_records["config"][key] = 0
    with pytest.raises(ClientFailedError, match=f"^MessageError: {key} = 0, expected"):
        app(message, share(config))


def test_a_client_that_is_asked_to_prune_sends_fewer_ranks_once_they_have_shrunk(text_config: Make) -> None:
    config = text_config(train__local_steps=4, train__learning_rate=0.05)
    moved = {name: tensor + 0.5 for name, tensor in resident(config).adapted.initial.items() if role_of(name) == Role.B}
    for settings, ranks in (({}, 2), ({"pruned-rank": 1, "tail-penalty": 100.0}, 1)):
        reply = app(order(config, others=moved, settings=settings), share(config))
        assert {len(tensor) for name, tensor in tensors_of(reply).items() if role_of(name) == Role.A} == {ranks}
