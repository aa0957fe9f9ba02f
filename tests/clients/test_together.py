"""Messages of several clients answered at once: as they are answered one by one, but for the rounding of sums."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.adapters.pruning import PRUNED_RANK, TAIL_PENALTY
from fedpeft.adapters.state import Role, role_of
from fedpeft.clients import together
from fedpeft.clients.app import OWN_KEPT, OWN_PERSONAL, app
from fedpeft.clients.together import Job, answer_together
from fedpeft.clients.verdicts import Verdict, simulated
from fedpeft.config import RunConfig
from fedpeft.resident import resident
from fedpeft.wire import ShortAnswer, TrainAnswer, TrainOrder, to_record, to_tensors

Make = Callable[..., RunConfig]
PRIVATE = {"privacy__level": "record", "privacy__noise_multiplier": 0.7, "privacy__rng": "seeded"}
CHARGED = Verdict(allowed=True, noise_multiplier=0.7)


@pytest.fixture(autouse=True)
def identity() -> None:
    """Messages ask the process who it is."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


def still(config: RunConfig) -> RunConfig:
    for module in resident(config).adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return config


def job(config: RunConfig, index: int, verdict: Verdict | None = None, **fields: object) -> Job:
    adapted = resident(config).adapted
    personal = fields.get("personal", ())
    assert isinstance(personal, Sequence)
    shared = {name: adapted.initial[name] for name in adapted.trained if role_of(name) not in personal}
    content = TrainOrder(
        to_record(shared),
        server_round=1,
        num_rounds=2,
        scaling=adapted.scaling,
        held_hash=str(fields.get("held_hash", adapted.frozen_hash)),
        trained=frozenset({Role.A, Role.B, Role.HEAD}),
        personal=frozenset(map(Role, personal)),
        kept=frozenset({Role.A}) if fields.get("kept") else frozenset(),
        settings=fields.get("settings", {}),  # type: ignore[arg-type]
    )
    node = {"partition-id": index, "num-partitions": 3}
    context = Context(1, index + 1, node, RecordDict(), dict(config.to_flat()))
    return Message(content.to_record(), index + 1, MessageType.TRAIN), context, verdict


def compare(jobs: Sequence[Job]) -> list[RecordDict | None]:
    """Answer together and one by one, and hold the two against each other."""
    alone = copy.deepcopy([context for _, context, _ in jobs])
    contents = answer_together(jobs)
    for (message, context, verdict), own, content in zip(jobs, alone, contents, strict=True):
        assert content is not None
        with simulated(verdict):
            reply = app(message, own)
        one, other = TrainAnswer.from_record(reply.content), TrainAnswer.from_record(content)
        assert one.num_examples == other.num_examples
        assert (one.metrics.steps, one.metrics.spent) == (other.metrics.steps, other.metrics.spent)
        assert context.state.keys() == own.state.keys()
        pairs = [(one.arrays, other.arrays)]
        pairs += [(own.state.array_records[name], context.state.array_records[name]) for name in own.state]
        for first, second in pairs:
            assert list(first) == list(second)
            for name, tensor in to_tensors(first).items():
                assert torch.allclose(tensor, to_tensors(second)[name], rtol=1e-3, atol=1e-4), name
    return contents


def test_clients_answered_together_send_and_keep_what_each_would_by_itself(text_config: Make) -> None:
    config = still(text_config(adapter__head="local"))
    jobs = [job(config, index, kept=True) for index in range(3)]
    compare(jobs)
    assert {OWN_KEPT, OWN_PERSONAL} == set(jobs[0][1].state)


def test_private_clients_answered_together_send_what_each_would_by_itself(text_config: Make) -> None:
    config = still(text_config(**PRIVATE, train__batch_size=4))
    compare([job(config, index, CHARGED) for index in range(3)])


def test_who_is_not_charged_by_a_driver_or_may_leave_ranks_out_is_answered_alone(text_config: Make) -> None:
    config = still(text_config(**PRIVATE))
    assert answer_together([job(config, index) for index in range(2)]) == [None, None]
    config = still(text_config())
    pruning = {PRUNED_RANK: 1, TAIL_PENALTY: 0.1}
    found = answer_together([job(config, 0, settings=pruning), job(config, 1), job(config, 2)])
    assert [content is None for content in found] == [True, False, False]


def test_a_client_that_holds_something_else_or_is_out_of_budget_says_so_and_the_others_train(text_config: Make) -> None:
    config = still(text_config())
    found = answer_together([job(config, 0), job(config, 1, held_hash="0" * 64), job(config, 2)])
    assert found[1] is not None
    assert ShortAnswer.from_record(found[1]) is ShortAnswer.NEEDS_ARRAYS
    assert all(content is not None and "metrics" in content for content in (found[0], found[2]))
    config = still(text_config(**PRIVATE))
    found = answer_together([job(config, 0, Verdict(allowed=False)), job(config, 1, CHARGED), job(config, 2, CHARGED)])
    assert found[0] is not None
    assert ShortAnswer.from_record(found[0]) is ShortAnswer.BUDGET_SPENT
    assert found[1] is not None


def test_a_bad_message_or_a_training_that_fails_leaves_clients_to_be_answered_alone(
    text_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = still(text_config())
    bad = job(config, 0)
    bad[0].content.config_records["config"]["scaling"] = "much"
    found = answer_together([bad, job(config, 1), job(config, 2)])
    assert [content is None for content in found] == [True, False, False]

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(together, "train_together", fails)
    jobs = [job(config, index, kept=True) for index in range(2)]
    assert answer_together(jobs) == [None, None]
    assert not any(context.state for _, context, _ in jobs)  # nothing is kept of it


def test_clients_whose_rows_are_too_many_for_one_pass_are_trained_in_several(
    text_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sizes = still(text_config()), []
    train = together.train_together

    def noted(adapted: object, settings: object, parts: list[object], *rest: object) -> object:
        sizes.append(len(parts))
        return train(adapted, settings, parts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(together, "train_together", noted)
    monkeypatch.setattr(together, "MOST_TOKENS", 2 * 8 * 12)
    found = answer_together([job(config, index) for index in range(3)])
    assert sizes == [2]
    assert found[2] is None  # who is left over is answered alone


def test_of_a_training_that_fails_no_more_is_logged_than_the_errors_class(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(members: object) -> None:
        raise ValueError("a row says: I am ill")

    monkeypatch.setattr(together, "_train", fails)
    answers: list[RecordDict | None] = [None, None]
    together._answer_group([object(), object()], answers)  # type: ignore[list-item]
    assert answers == [None, None]
    assert "ValueError" in caplog.text
    assert "ill" not in caplog.text
