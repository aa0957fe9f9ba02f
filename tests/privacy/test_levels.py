"""What every level of protection says and does, and that nobody else knows a level by its name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file

from fedpeft.adapters.state import fingerprint
from fedpeft.config import RunConfig
from fedpeft.config.privacy import LEVELS as SETTINGS
from fedpeft.config.privacy import PRIVATE_LEVELS, PrivacyConfig
from fedpeft.config.privacy import Level as LevelName
from fedpeft.errors import ConfigError, PrivacyError
from fedpeft.privacy.accounting import Charge
from fedpeft.privacy.levels import LEVELS, Level, Words, find_level, level_of
from fedpeft.privacy.levels.client import ClientLevel
from fedpeft.privacy.levels.record import RecordLevel
from fedpeft.privacy.statement import read_statement
from fedpeft.runs import read_events
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import with_typed_options

Make = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]
CODE = [
    path for folder in ("fedpeft", "strategies", "clients", "simulations") for path in (ROOT / folder).rglob("*.py")
]
# who may: the levels themselves, and their settings
HOME = (ROOT / "fedpeft" / "privacy" / "levels", ROOT / "fedpeft" / "config" / "privacy.py")
MAY = {"none": {}, "record": {"privacy__noise_multiplier": 1.0}, "client": {"privacy__noise_multiplier": 1.0}}


def configured(make: Make, level: str, **settings: Any) -> RunConfig:
    return make(privacy__level=level, strategy__name="fedit", **MAY[level], **settings)


def test_settings_names_and_levels_are_the_same_few() -> None:
    assert list(LEVELS) == list(SETTINGS) == list(get_args(LevelName))
    assert [name for name, level in LEVELS.items() if level.unit] == list(PRIVATE_LEVELS)
    assert {key for settings in SETTINGS.values() for key in settings.keys} < set(PrivacyConfig.model_fields)


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_says_its_unit_its_adversary_and_its_neighbours(name: str, text_config: Make) -> None:
    level, config = LEVELS[name], configured(text_config, name)
    assert level_of(config.privacy) is find_level(name) is level
    words = level.words(config)
    assert level.unit in words.adjacency
    assert len(level.adversary) > 20
    for said in (words.adjacency, words.mechanism, words.sampling, words.drawn, words.whose):
        assert said
    assert "3 " in words.sums.format(steps="3", chance="0.1")


@pytest.mark.parametrize("name", LEVELS)
def test_noise_is_added_once_and_by_whoever_says_so(name: str, text_config: Make) -> None:
    level, config = LEVELS[name], configured(text_config, name)
    assert level.clients_add_noise + level.server_adds_noise == bool(level.unit)
    assert (level.server_mechanism(config) is not None) == level.server_adds_noise
    if not level.clients_add_noise:
        with pytest.raises(PrivacyError, match="no noise at clients"):
            level.gradients(*[None] * 5)  # type: ignore[arg-type]
        with pytest.raises(PrivacyError, match="no noise at clients"):
            level.client_mechanism(config, 10)


def test_a_round_costs_what_the_level_says(text_config: Make) -> None:
    steps = text_config().train.local_steps
    none = level_of(text_config().privacy).charge(text_config(), 40)
    assert none == Charge(0.0, 1.0, none.steps)
    record = configured(text_config, "record", train__batch_size=8, train__local_steps=5)
    assert level_of(record.privacy).charge(record, 40) == Charge(1.0, 0.2, 5)
    client = configured(text_config, "client", federation__fraction=0.3)
    assert (
        level_of(client.privacy).charge(client, 40) == level_of(client.privacy).charge(client, 7) == Charge(1, 0.3, 1)
    )
    assert steps is None or none.steps == steps


@pytest.mark.parametrize("name", LEVELS)
def test_nothing_of_single_clients_is_told_under_protection_unless_asked_for(name: str, text_config: Make) -> None:
    level, privacy = LEVELS[name], configured(text_config, name).privacy
    assert level.tells_metrics(privacy) == (not level.unit)
    if level.unit:
        assert level.tells_metrics(configured(text_config, name, privacy__release_metrics=True).privacy)
    assert level.hides_cohort <= (not level.weighs_rows(privacy))


def test_an_unknown_level_of_a_statement_is_named() -> None:
    with pytest.raises(PrivacyError, match=r"unknown privacy\.level 'clients'.*client"):
        find_level("clients")


# --- whoever asks a level does as it says ----------------------------------------------------------------------------


class Weightless(RecordLevel):
    """Rows, as ever, but clients that weigh alike and a statement in other words."""

    adversary = "whoever was made up for a test"

    def weighs_rows(self, privacy: PrivacyConfig) -> bool:
        return False

    def tells_metrics(self, privacy: PrivacyConfig) -> bool:
        return True

    def words(self, config: RunConfig) -> Words:
        words = super().words(config)
        return Words(**{**vars(words), "adjacency": "none in particular"})


class Refusing(RecordLevel):
    def check(self, config: RunConfig) -> None:
        raise ConfigError("refused by the level")


class Quiet(ClientLevel):
    """Clients, as ever, whose server is told to leave all as it is."""

    def server_mechanism(self, config: RunConfig) -> None:  # type: ignore[override]
        return None

    def charge(self, config: RunConfig, num_examples: int) -> Charge:
        return Charge(1.0, 1.0, 1)


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Level], None]:
    """Return how to put a level in the place of the one of its name."""
    return lambda level: monkeypatch.setitem(LEVELS, level.name, level)


def test_clients_server_and_statement_follow_the_level(
    text_config: Make, put: Callable[[Level], None], tmp_path: Path
) -> None:
    config = configured(text_config, "record", simulation__workers=0, federation__rounds=1)
    plain = simulate(config, tmp_path / "plain").path
    assert {event["loss"] for event in read_events(plain) if event["event"] == "client"} <= {None}
    put(Weightless())
    path = simulate(config, tmp_path / "other").path
    clients = [event for event in read_events(path) if event["event"] == "client"]
    assert clients
    assert {event["num_examples"] for event in clients} == {1}
    assert all(event["loss"] is not None for event in clients)
    statement = read_statement(path)
    assert statement is not None
    assert statement["adversary"] == Weightless.adversary
    assert "Neighbours: none in particular." in statement["statement"]
    put(Refusing())
    with pytest.raises(ConfigError, match="refused by the level"):
        with_typed_options(config)


def test_the_server_does_to_updates_what_the_level_gives_it(
    text_config: Make, put: Callable[[Level], None], tmp_path: Path
) -> None:
    even = {"partition__scheme": "iid", "federation__clients": 4, "federation__rounds": 1, "simulation__workers": 0}
    config = configured(text_config, "client", **even)
    put(Quiet())
    quiet = simulate(config, tmp_path / "quiet").path
    open_run = simulate(configured(text_config, "none", **even), tmp_path / "open").path
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (quiet, open_run))
    assert fingerprint(one) == fingerprint(two)


# --- nobody else knows a level by its name ---------------------------------------------------------------------------


def compared(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield comparisons of something called level with a literal."""

    def is_level(node: ast.expr) -> bool:
        names = {"level", "--level"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            return any(isinstance(each, ast.Constant) and each.value in names for each in node.args)
        return (
            (isinstance(node, ast.Attribute) and node.attr == "level")
            or (isinstance(node, ast.Name) and node.id == "level")
            or (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in names)
        )

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            literal = any(
                isinstance(part, ast.Constant) and part.value in LEVELS for s in sides for part in ast.walk(s)
            )
            if literal and any(map(is_level, sides)):
                yield node
        if isinstance(node, ast.Match) and is_level(node.subject):
            yield node.subject


def test_no_other_code_asks_for_a_level_by_its_name() -> None:
    for path in CODE:
        if path.is_relative_to(HOME[0]) or path == HOME[1]:
            continue
        found = [node.lineno for node in compared(ast.parse(path.read_text(encoding="utf-8")))]
        assert not found, f"{path.relative_to(ROOT)}, lines {found}: ask the level, see fedpeft.privacy.levels"


@pytest.mark.parametrize(
    "code",
    [
        "config.privacy.level == 'record'",
        "level in ('record', 'client')",
        "'none' != facts['level']",
        "facts.get('level') == 'client'",
    ],
)
def test_such_questions_are_seen(code: str) -> None:
    assert list(compared(ast.parse(code)))
