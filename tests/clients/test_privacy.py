"""A site's own books, and what it holds a server to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.adapters.state import Role
from fedpeft.clients.app import ClientFailedError, app
from fedpeft.clients.privacy import data_fingerprint
from fedpeft.clients.rows import client_rows
from fedpeft.clients.verdicts import Verdict, simulated
from fedpeft.config import RunConfig
from fedpeft.privacy.ledger import Ledger
from fedpeft.resident import resident
from fedpeft.wire import CONFIG_RECORD, METRICS_RECORD, Identity, ShortAnswer, TrainAnswer, TrainOrder, to_record

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def identity() -> None:
    """Messages ask the process who it is."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


@pytest.fixture
def private(text_config: Make, tmp_path: Path) -> Make:
    """Make a private configuration, and know where its site keeps its ledger."""

    def make(**settings: object) -> RunConfig:
        base = {"privacy__level": "record", "privacy__noise_multiplier": 1.0, "privacy__rng": "secure"}
        return text_config(**base | settings)

    return make


def site(config: RunConfig, tmp_path: Path, run_id: int = 7, **node: Any) -> Context:
    named = {name.replace("_", "-"): value for name, value in node.items()}
    ledger = tmp_path / "ledger.jsonl"
    if not ledger.exists():
        Ledger.create(ledger)
    rows = {"partition-id": 0, "num-partitions": 3, "privacy-ledger": str(ledger)}
    return Context(run_id, 1, {**rows, **named}, RecordDict(), dict(config.to_flat()))


def order(config: RunConfig, server_round: int = 1, shift: float = 0.0) -> Message:
    adapted = resident(config).adapted
    content = TrainOrder(
        to_record({name: adapted.initial[name] + shift for name in adapted.trained}),
        server_round=server_round,
        num_rounds=2,
        scaling=adapted.scaling,
        held_hash=adapted.frozen_hash,
        trained=frozenset({Role.A, Role.B, Role.HEAD}),
    )
    return Message(content.to_record(), 1, MessageType.TRAIN, group_id=str(server_round))


def told(reply: Message) -> set[str]:
    """Return the names of all that a client says beside its tensors."""
    return set(reply.content.metric_records[METRICS_RECORD])


def is_spent(reply: Message) -> bool:
    return ShortAnswer.from_record(reply.content) is ShortAnswer.BUDGET_SPENT


def test_all_steps_are_charged_before_the_first(private: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedpeft.clients.app as module

    config = private()
    seen: list[int] = []

    def dies(*arguments: object, **settings: object) -> None:
        seen.extend(entry.steps for entry in Ledger(tmp_path / "ledger.jsonl").entries())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_locally", dies)
    with pytest.raises(KeyboardInterrupt):
        app(order(config), site(config, tmp_path))
    assert seen == [3]
    (entry,) = Ledger(tmp_path / "ledger.jsonl").entries()
    rows = client_rows(resident(config), site(config, tmp_path).node_config)
    assert (entry.run, entry.client, entry.round) == ("7", rows.client_id, 1)
    assert entry.sample_rate == 8 / len(rows.indices)
    assert entry.data == data_fingerprint(resident(config), rows, site(config, tmp_path).node_config)


def test_secure_repeats_are_charged_again_and_seeded_ones_once(private: Make, tmp_path: Path) -> None:
    for rng, expected in (("secure", 3), ("seeded", 1)):
        config = private(privacy__rng=rng)
        folder = tmp_path / rng
        for _ in range(3):
            app(order(config), site(config, folder))
        assert len(Ledger(folder / "ledger.jsonl").entries()) == expected
    config = private(privacy__rng="seeded")
    app(order(config, shift=0.5), site(config, tmp_path / "seeded"))  # other numbers are another release
    app(order(config, server_round=2), site(config, tmp_path / "seeded"))
    app(order(config), site(config, tmp_path / "seeded", run_id=8))
    assert len(Ledger(tmp_path / "seeded" / "ledger.jsonl").entries()) == 4


def test_seeded_training_repeats_to_the_byte_and_secure_training_does_not(private: Make, tmp_path: Path) -> None:
    for rng, alike in (("seeded", True), ("secure", False)):
        config = private(privacy__rng=rng, adapter__dropout=0.1)
        replies = [app(order(config), site(config, tmp_path)) for _ in range(2)]
        one, two = ({n: a.data for n, a in TrainAnswer.from_record(reply.content).arrays.items()} for reply in replies)
        assert (one == two) is alike


def test_a_client_whose_budget_is_spent_says_so_and_does_not_train(private: Make, tmp_path: Path) -> None:
    config = private(privacy__noise_multiplier=None, privacy__epsilon=2.0)
    replies = [app(order(config, number), site(config, tmp_path)) for number in (1, 2, 3)]
    assert [is_spent(reply) for reply in replies] == [False, False, True]  # calibrated to two rounds
    assert not replies[2].content.array_records
    assert len(Ledger(tmp_path / "ledger.jsonl").entries()) == 2


def test_spare_rounds_leave_room_for_repeats(private: Make, tmp_path: Path) -> None:
    config = private(privacy__noise_multiplier=None, privacy__epsilon=2.0, privacy__spare_rounds=1)
    replies = [app(order(config, number), site(config, tmp_path)) for number in (1, 1, 2, 2)]
    assert [is_spent(reply) for reply in replies] == [False, False, False, True]


def test_another_run_on_the_same_rows_goes_on_the_same_account(private: Make, tmp_path: Path) -> None:
    config = private(privacy__noise_multiplier=None, privacy__epsilon=2.0)
    for number in (1, 2):
        app(order(config, number), site(config, tmp_path))
    assert is_spent(app(order(config), site(config, tmp_path, run_id=8)))
    generous = site(config, tmp_path, run_id=8, privacy_epsilon=5.0)  # the site's word, which no server can change
    assert not is_spent(app(order(config), generous))
    assert is_spent(app(order(config), site(config, tmp_path, run_id=9, privacy_epsilon=0.5)))


def test_a_site_without_a_ledger_of_its_own_does_not_train_and_says_how(private: Make, tmp_path: Path) -> None:
    config = private()
    unnamed, gone = site(config, tmp_path), site(config, tmp_path)
    del unnamed.node_config["privacy-ledger"]
    for held in (unnamed, site(config, tmp_path, privacy_ledger="  ")):
        with pytest.raises(ClientFailedError, match=r"SitePolicyError: .*fedpeft privacy ledger --create"):
            app(order(config), held)
    gone.node_config["privacy-ledger"] = str(tmp_path / "gone.jsonl")
    with pytest.raises(ClientFailedError, match=r"^LedgerError$") as found:
        app(order(config), gone)
    assert "--create" in str(found.value.__cause__)
    assert not (tmp_path / "gone.jsonl").exists()


def test_another_seed_or_a_row_more_is_on_the_same_account(private: Make, tmp_path: Path) -> None:
    for seed in (0, 1):
        config = private(run__seed=seed, privacy__noise_multiplier=None, privacy__epsilon=2.0)
        for number in (1, 2):
            spent_now = is_spent(app(order(config, number), site(config, tmp_path, run_id=7 + seed)))
            assert spent_now is (seed == 1)
    assert len(Ledger(tmp_path / "ledger.jsonl").entries()) == 2


def test_neither_loss_nor_time_is_told(private: Make, text_config: Make, tmp_path: Path) -> None:
    config = private()
    reply = app(order(config), site(config, tmp_path))
    assert told(reply) == {"num-examples", "steps", "noise-multiplier", "sample-rate", "spent-steps"}
    spent = TrainAnswer.from_record(app(order(config), site(config, tmp_path)).content).metrics.spent
    assert spent is not None
    assert spent.steps == 6  # of the whole run so far
    config = private(privacy__release_metrics=True)
    assert {"train_loss", "seconds"} <= told(app(order(config), site(config, tmp_path)))
    config = text_config(privacy__level="client", privacy__noise_multiplier=1.0)
    assert told(app(order(config), site(config, tmp_path))) == {"num-examples", "steps"}


def test_without_public_counts_nothing_that_is_told_depends_on_them(private: Make, tmp_path: Path) -> None:
    config = private(privacy__public_counts=False, privacy__sample_rate=0.2)
    for index in (0, 1):
        reply = app(order(config), site(config, tmp_path, partition_id=index))
        assert dict(reply.content.metric_records[METRICS_RECORD]) == {"num-examples": 1, "steps": 3}
    assert {entry.sample_rate for entry in Ledger(tmp_path / "ledger.jsonl").entries()} == {0.2}


@pytest.mark.parametrize(
    "settings",
    [
        {"privacy__level": "none", "privacy__noise_multiplier": None, "privacy__rng": None},
        {"privacy__level": "client"},
        {"privacy__rng": "seeded"},
        {"privacy__sampling": "shuffle"},
        {"privacy__release_metrics": True},
        {"adapter__init": "eva", "adapter__init_data": "rows.csv", "privacy__public_init_data": True},
    ],
)
def test_a_site_with_a_budget_trains_under_its_own_terms_only(
    settings: dict[str, Any], private: Make, tmp_path: Path
) -> None:
    from fedpeft.clients.privacy import check_site
    from fedpeft.errors import DeploymentError

    config = private(**settings)
    check_site(config, {"privacy-ledger": "books.jsonl"})
    with pytest.raises(DeploymentError, match="this site has a privacy budget"):
        check_site(config, {"privacy-epsilon": 3.0, "privacy-ledger": "books.jsonl"})


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"privacy-eps": 3.0}, "Did you mean 'privacy-epsilon'"),
        ({"privacy-delta": 1e-6}, "does nothing without privacy-epsilon"),
        ({"privacy-epsilon": 3.0}, "needs privacy-ledger"),
        ({"privacy-epsilon": "nan", "privacy-ledger": "b"}, "above 0"),
        ({"privacy-epsilon": 3.0, "privacy-delta": 2.0, "privacy-ledger": "b"}, "above 0"),
        ({"privacy-epsilon": 3.0, "privacy-accountant": "gdp", "privacy-ledger": "b"}, "prv, rdp"),
    ],
)
def test_a_sites_own_word_is_checked(node: dict[str, Any], words: str, private: Make) -> None:
    from fedpeft.clients.privacy import SitePolicyError, check_site

    with pytest.raises(SitePolicyError, match=words):
        check_site(private(), node)


def test_a_server_cannot_name_a_sites_own_rows_as_public_ones(private: Make, tmp_path: Path) -> None:
    from fedpeft.clients.privacy import SitePolicyError, check_site

    (tmp_path / "link.csv").symlink_to(tmp_path / "rows.csv")
    given = {"adapter__init": "eva", "privacy__public_init_data": True}
    node = {"data": str(tmp_path / "rows.csv"), "privacy-ledger": str(tmp_path / "ledger.jsonl")}
    check_site(private(adapter__init_data=str(tmp_path / "other.csv"), **given), node)
    for name in ("rows.csv", "link.csv"):
        with pytest.raises(SitePolicyError, match="is this site's own rows"):
            check_site(private(adapter__init_data=str(tmp_path / name), **given), node)


def test_a_server_cannot_stretch_a_sites_budget(private: Make, tmp_path: Path) -> None:
    """Delta, accountant and cut of the rows are the server's in a run, and not in a site's budget."""
    loose = private(privacy__noise_multiplier=0.3, privacy__delta=0.99, privacy__accountant="rdp")
    assert is_spent(app(order(loose), site(loose, tmp_path, privacy_epsilon=0.5)))
    for number, settings in enumerate([{}, {"run__seed": 1}, {"data__test_fraction": 0.3}], 1):
        config = private(**settings)
        assert not is_spent(app(order(config), site(config, tmp_path, run_id=number, privacy_epsilon=50.0)))
    assert len(Ledger(tmp_path / "ledger.jsonl").entries()) == 3  # one account, whatever is cut
    assert is_spent(app(order(config), site(config, tmp_path, run_id=4, privacy_epsilon=4.0)))


def test_a_runs_own_budget_holds_beside_the_sites(private: Make, tmp_path: Path) -> None:
    config = private(privacy__noise_multiplier=None, privacy__epsilon=2.0)
    replies = [app(order(config, number), site(config, tmp_path, privacy_epsilon=50.0)) for number in (1, 1, 2)]
    assert [is_spent(reply) for reply in replies] == [False, False, True]


def test_a_site_with_a_budget_says_nothing_of_what_went_wrong(
    private: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpeft.clients.app as module

    def fails(*arguments: object, **settings: object) -> None:
        raise ValueError("a row")

    monkeypatch.setattr(module, "train_locally", fails)
    config = private()
    with pytest.raises(ClientFailedError, match=r"^Withheld$"):
        app(order(config), site(config, tmp_path, privacy_epsilon=9.0))
    with pytest.raises(ClientFailedError, match=r"^ValueError$"):
        app(order(config), site(config, tmp_path))


def test_a_site_says_who_it_is_without_a_look_at_its_rows(private: Make, tmp_path: Path) -> None:
    config = private(data__labels="no,yes")
    held = site(config, tmp_path, data=str(tmp_path / "north.csv"))  # which is not there
    reply = app(Message(RecordDict(), 1, MessageType.QUERY), held)
    assert Identity.from_record(reply.content).client_id == "north"


def test_training_that_voids_the_guarantee_is_on_the_books_as_unbounded(
    private: Make, text_config: Make, tmp_path: Path
) -> None:
    for config in (private(privacy__sampling="shuffle", privacy__epsilon=1.0), text_config()):
        assert not is_spent(app(order(config), site(config, tmp_path)))
    assert [entry.noise_multiplier for entry in Ledger(tmp_path / "ledger.jsonl").entries()] == [0.0, 0.0]
    config = private()
    assert is_spent(app(order(config), site(config, tmp_path, privacy_epsilon=100.0)))


def test_a_server_cannot_make_a_site_train_without_privacy(private: Make, text_config: Make, tmp_path: Path) -> None:
    config = text_config()
    with pytest.raises(ClientFailedError, match="SitePolicyError"):
        app(order(config), site(config, tmp_path, privacy_epsilon=3.0))
    assert not Ledger(tmp_path / "ledger.jsonl").entries()


def test_a_simulations_driver_keeps_the_books_in_the_clients_place(private: Make, tmp_path: Path) -> None:
    config = private()
    held = site(config, tmp_path)
    del held.node_config["privacy-ledger"]  # a simulation's clients have none
    with simulated(Verdict(allowed=True, noise_multiplier=2.5)):
        reply = app(order(config), held)
    assert reply.content.metric_records[METRICS_RECORD]["noise-multiplier"] == 2.5
    with simulated(Verdict(allowed=False)):
        assert is_spent(app(order(config), held))
    assert not Ledger(tmp_path / "ledger.jsonl").entries()
    with pytest.raises(ClientFailedError, match="SitePolicyError"):  # and nothing of it is left behind
        app(order(config), held)
    with simulated(None), pytest.raises(ClientFailedError, match="SitePolicyError: this site names no ledger"):
        app(order(config), held)  # of a simulation whose driver keeps no books


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy-books", "charged"),
        ("privacy_books", "charged"),
        ("Privacy-Books", "charged"),
        ("noise-multiplier", 0.001),
        ("noise_multiplier", 0.001),
        ("privacy-verdict", "charged"),
        ("privcy-ledger", "ledger.jsonl"),
        ("rivacy-epsilon", 3.0),
    ],
)
def test_no_configuration_of_a_node_says_that_a_training_is_on_the_books(
    key: str, value: object, private: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpeft.clients.app as module

    trained: list[object] = []
    monkeypatch.setattr(module, "train_locally", lambda *given, **settings: trained.append(given))
    config = private()
    held = site(config, tmp_path)
    held.node_config[key] = value  # type: ignore[assignment]
    with pytest.raises(ClientFailedError, match=f"SitePolicyError: '{key}' in the node's configuration"):
        app(order(config), held)
    del held.node_config["privacy-ledger"]
    with pytest.raises(ClientFailedError, match="SitePolicyError"):
        app(order(config), held)
    assert not trained
    assert not Ledger(tmp_path / "ledger.jsonl").entries()


def test_nor_does_a_message_or_a_runs_configuration(private: Make, tmp_path: Path) -> None:
    config = private()
    message = order(config)
    settings = message.content.config_records[CONFIG_RECORD]
    for key, value in {"privacy-books": "charged", "verdict": "charged", "noise-multiplier": 0.001}.items():
        settings[key] = value
    reply = app(message, site(config, tmp_path))
    assert reply.content.metric_records[METRICS_RECORD]["noise-multiplier"] == 1.0
    (entry,) = Ledger(tmp_path / "ledger.jsonl").entries()
    assert entry.noise_multiplier == 1.0
    planted = private(privacy__canaries=60)
    with pytest.raises(ClientFailedError, match=r"SitePolicyError: privacy\.canaries = 60"):
        app(order(config), site(planted, tmp_path))


def test_a_ledger_that_cannot_be_kept_keeps_the_client_from_training(private: Make, tmp_path: Path) -> None:
    config = private()
    held = site(config, tmp_path)
    (tmp_path / "ledger.jsonl").write_text("nonsense\n")
    with pytest.raises(ClientFailedError, match="LedgerError"):
        app(order(config), held)
