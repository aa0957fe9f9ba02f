from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.common.config import flatten_dict, validate_config
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.cli.app_folder import init_app
from fedpeft.config import Layer, RunConfig, resolve
from fedpeft.deployment import CLIENT_APP, OUT, SERVER_APP, run_config, split_run_config, write_app
from fedpeft.errors import ConfigError, DeploymentError

# what a TOML file and a run config in Flower's messages can hold
TEXT = st.text(st.characters(codec="utf-8"))


def flat_config(path: Path) -> dict[str, str | int | float | bool]:
    """Read an app file as Flower does it."""
    app = tomllib.loads(path.read_text(encoding="utf-8"))
    return flatten_dict(app["tool"]["flwr"]["app"]["config"])


def test_the_server_reads_back_the_run_and_its_directory(tmp_path: Path) -> None:
    config = resolve(
        [
            {
                "model": {"name": "owner/model"},
                "data": {"source": "preset:digits"},
                "adapter": {"targets": "query,value"},
                "train": {"learning_rate": 1e-5, "local_steps": 3},
                "strategy": {"name": "lora-lego", "rank_cap": 4, "flag": True},
                "run": {"seed": 2**63 - 1},
            }
        ]
    )
    path = write_app(tmp_path / "app", config, Path("/runs/one"), None)
    read, out = split_run_config(flat_config(path))
    assert read == config
    assert out == Path("/runs/one")


def test_a_client_reads_the_same_run_with_or_without_a_run_directory() -> None:
    flat = RunConfig().to_flat()
    assert run_config(flat) == run_config({**flat, OUT: "/runs/one"}) == RunConfig()


@given(option=TEXT, domain=TEXT, rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_text_and_number_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, option: str, domain: str, rate: float
) -> None:
    config = resolve([{"data": {"domain": domain}, "train": {"learning_rate": rate}, "strategy": {"note": option}}])
    path = write_app(tmp_path_factory.mktemp("app"), config, Path("/runs/one"), None)
    assert split_run_config(flat_config(path))[0] == config


@given(labels=st.lists(TEXT.map(str.strip), min_size=2, unique=True).map(tuple))
def test_labels_reach_every_site_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, labels: tuple[str, ...]
) -> None:
    path = write_app(tmp_path_factory.mktemp("app"), RunConfig(), Path("/runs/one"), labels)
    assert split_run_config(flat_config(path))[0].data.label_names == labels


@pytest.mark.parametrize("labels", [("one",), ("a", "a"), (" a", "b"), ()])
def test_labels_that_a_site_would_read_differently_are_refused(tmp_path: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(DeploymentError, match=r"data\.labels"):
        write_app(tmp_path / "app", RunConfig(), Path("/runs/one"), labels)
    assert not (tmp_path / "app").exists()


def test_flower_accepts_the_folder_and_bundles_that_one_file_only(tmp_path: Path) -> None:
    path = write_app(tmp_path / "app", RunConfig(), Path("/runs/one"), None)
    app = tomllib.loads(path.read_text(encoding="utf-8"))
    assert validate_config(app, check_module=False) == (True, [], [])
    assert app["tool"]["flwr"]["app"]["components"] == {"serverapp": SERVER_APP, "clientapp": CLIENT_APP}
    alone, _ = build_fab_from_files({"pyproject.toml": path})
    beside, _ = build_fab_from_files(
        {"pyproject.toml": path, "rows.jsonl": b"{}", "fedpeft/__init__.py": b"", "notes.md": b"-"}
    )
    assert alone == beside


def test_flower_installs_nothing_for_the_app(tmp_path: Path) -> None:
    path = write_app(tmp_path / "app", RunConfig(), Path("/runs/one"), None)
    assert tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"] == []


def test_the_components_are_found_by_flowers_own_check(tmp_path: Path) -> None:
    path = write_app(tmp_path / "app", RunConfig(), Path("/runs/one"), None)
    app = tomllib.loads(path.read_text(encoding="utf-8"))
    assert validate_config(app, check_module=True, project_dir=path.parent) == (True, [], [])


def test_local_paths_become_absolute_and_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "rows.csv").touch()
    config = resolve([{"model": {"name": "owner/model"}, "data": {"source": "rows.csv", "test": "../later.csv"}}])
    read, out = split_run_config(flat_config(write_app(Path("app"), config, Path("runs/../out"), None)))
    assert read.model.name == "owner/model"
    assert read.data.source == str(tmp_path / "rows.csv")
    assert read.data.test == str(tmp_path.parent / "later.csv")
    assert out == tmp_path / "out"
    config = resolve([{"model": {"name": "~/model"}, "data": {"source": "preset:digits"}}])
    read, _ = split_run_config(flat_config(write_app(Path("other"), config, Path("out"), None)))
    assert read.model.name == str(tmp_path / "home" / "model")
    assert read.data.source == "preset:digits"
    started = resolve([{"adapter": {"start": "./run/adapter"}}])
    read, _ = split_run_config(flat_config(write_app(Path("warm"), started, Path("out"), None)))
    assert read.adapter.start == str(tmp_path / "run" / "adapter")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DeploymentError, match="not empty"):
        write_app(tmp_path, RunConfig(), Path("/runs/one"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeploymentError, match="cannot write"):
        write_app(tmp_path / "file" / "app", RunConfig(), Path("/runs/one"), None)
    with pytest.raises(DeploymentError, match="cannot write"):
        write_app(tmp_path / "file", RunConfig(), Path("/runs/one"), None)


@pytest.mark.parametrize("value", [2**63, {"nested": 1}])
def test_a_value_that_flower_cannot_carry_is_named(tmp_path: Path, value: object) -> None:
    config = resolve([{"strategy": {"option": value}}])
    with pytest.raises(DeploymentError, match=r"strategy\.option"):
        write_app(tmp_path / "app", config, Path("/runs/one"), None)
    assert not (tmp_path / "app").exists()


def test_a_run_config_without_a_run_directory_or_with_strange_keys_is_refused() -> None:
    with pytest.raises(DeploymentError, match=r"deployment\.out"):
        split_run_config(RunConfig().to_flat())
    with pytest.raises(ConfigError, match="deployment"):
        split_run_config({OUT: "/runs/one", "deployment.other": 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter": {"head": "local"}}, "adapter.head = 'local'"),
        ({"adapter": {"init": "lora-ga", "init_data": "public.csv"}}, "adapter.init = 'lora-ga'"),
        ({"strategy": {"name": "fedsa-lora"}}, "leaves B with the clients"),
    ],
)
def test_what_a_site_cannot_hold_is_refused(settings: Layer, words: str, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=f"{re.escape(words)}.*simulations only"):
        init_app(tmp_path / "app", resolve([settings]), None)
    assert not (tmp_path / "app").exists()
