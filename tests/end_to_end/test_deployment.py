"""A real SuperLink with real SuperNodes: what `fedpeft deploy init` writes runs as it is, and gives the same bytes."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fedpeft.cli import app as command_line
from fedpeft.config import RunConfig
from fedpeft.runs import read_config, read_events
from fedpeft.simulations.simulate import simulate

Make = Callable[..., RunConfig]
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def deploy(directory: Path, config: RunConfig, out: Path) -> None:
    words = [f"{name}={value}" for name, value in config.to_flat().items() if name != "partition.scheme"]
    done = CliRunner().invoke(command_line, ["deploy", "init", str(directory), *words, "--out", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert [path.name for path in directory.iterdir()] == ["pyproject.toml"]


def scores(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == "evaluate"]


def test_three_real_nodes_give_the_bytes_of_the_simulation(
    text_config: Make, tmp_path: Path, loopback: Callable[..., Any]
) -> None:
    config = text_config()
    simulated = simulate(config, tmp_path / "simulated").path
    deploy(tmp_path / "app", config, tmp_path / "deployed")
    with loopback([f"partition-id={index} num-partitions=3" for index in range(3)]) as federation:
        run = federation.run(tmp_path / "app")
        assert run.status == "finished:completed", f"{run}\n{federation.logs()}"
    assert (tmp_path / "deployed" / ADAPTER).read_bytes() == (simulated / ADAPTER).read_bytes()
    assert scores(tmp_path / "deployed") == scores(simulated)
    assert read_config(tmp_path / "deployed").data.label_names == ("no", "yes")


def test_sites_with_files_of_their_own_learn_together_and_keep_their_rows(
    text_config: Make, text_csv: Path, tmp_path: Path, loopback: Callable[..., Any]
) -> None:
    with text_csv.open(newline="") as file:
        header, *rows = csv.reader(file)
    sites = {name: [row for row in rows[:90] if row[2] == name] for name in ("site-0", "site-1")}
    files = {**sites, "train": sites["site-0"] + sites["site-1"], "test": rows[90:]}
    for name, table in files.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *table])
    whole = {"data__source": str(tmp_path / "train.csv"), "data__test": str(tmp_path / "test.csv")}
    settings = {"data__labels": "no,yes", "federation__rounds": 1}
    simulated = simulate(text_config(**whole, **settings), tmp_path / "simulated").path
    (tmp_path / "train.csv").unlink()
    # the server holds test rows only, and needs a number of clients, since it cannot count their rows' names
    config = text_config(**(whole | settings), federation__clients=2)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": None}),
            "partition": RunConfig().partition,
        }
    )
    deploy(tmp_path / "app", config, tmp_path / "deployed")
    # the second site's file has another name than its client
    shutil.move(tmp_path / "site-1.csv", tmp_path / "rows of ours.csv")
    nodes = [f'data="{tmp_path}/site-0.csv"', f'data="{tmp_path}/rows of ours.csv" client-id="site-1"']
    with loopback(nodes) as federation:
        run = federation.run(tmp_path / "app")
        assert run.status == "finished:completed", f"{run}\n{federation.logs()}"
        # a client that cannot read a row says so at home, where its text may be seen, and to the server only that
        with (tmp_path / "rows of ours.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, ["w1 w2", "secret-diagnosis", "site-1"]])
        failed = federation.run(tmp_path / "app", f"deployment.out='{tmp_path}/failed'")
        node_log = federation.log("node-1")
    assert (tmp_path / "deployed" / ADAPTER).read_bytes() == (simulated / ADAPTER).read_bytes()
    assert scores(tmp_path / "deployed") == scores(simulated)
    assert "secret-diagnosis" in node_log
    seen_by_server = failed.server_log + failed.details
    for path in (tmp_path / "failed").rglob("*"):
        seen_by_server += path.read_text(errors="replace") if path.is_file() else ""
    assert "DataError" in seen_by_server
    assert "secret-diagnosis" not in seen_by_server
