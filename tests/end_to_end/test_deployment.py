"""A real SuperLink with real SuperNodes: what `fedpeft deploy init` writes runs as it is, and gives the same bytes."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fedpeft.cli import app as command_line
from fedpeft.config import RunConfig, configure
from fedpeft.runs import read_events
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import with_typed_options

Make = Callable[..., RunConfig]
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def deploy(directory: Path, config: RunConfig, out: Path) -> None:
    words = [f"{name}={value}" for name, value in config.to_flat().items() if name != "partition.scheme"]
    done = CliRunner().invoke(command_line, ["deploy", "init", str(directory), *words, "--out", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert [path.name for path in directory.iterdir()] == ["pyproject.toml"]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def talks(draw: random.Random, count: int) -> str:
    """Return lines of turns, of which the answer goes on where the question ends."""
    lines = []
    for _ in range(count):
        start = draw.randrange(40)
        asked, answer = (" ".join(f"w{n}" for n in range(at, at + 4)) for at in (start, start + 4))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    return "".join(lines)


TEMPLATE = """\
{% for turn in messages %}{% if turn.role == "assistant" %}w1 \
{% generation %}{{ turn.content }} [EOS]{% endgeneration %}\
{% else %}w0 {{ turn.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}w1 {% endif %}"""


def chats(base: Path, folder: Path) -> RunConfig:
    """Make a run of nearly all that a language model's training may ask for, over one file a client."""
    draw = random.Random(3)
    (folder / "rows").mkdir()
    for name in ("ann", "bob", "cid"):
        (folder / "rows" / f"{name}.jsonl").write_text(talks(draw, 12))
    (folder / "test.jsonl").write_text(talks(draw, 12))
    (folder / "own.jinja").write_text(TEMPLATE)
    common = {
        "model.name": str(base),
        "model.quantization": "int8",
        "data.source": str(folder / "rows"),
        "data.test": str(folder / "test.jsonl"),
        "data.template": str(folder / "own.jinja"),
        "data.metric": "exact_match",
        "data.max_new_tokens": 4,
        "partition.by": "file",
        "train.batch_size": 2,
        "train.accumulation": 2,
        "train.local_steps": 3,
        "simulation.workers": 0,
    }
    first = configure({**common, "federation.rounds": 1, "strategy.name": "fedit", "adapter.rank": 2})
    config = configure(
        {
            **common,
            "adapter.start": str(simulate(first, folder / "first").path / "adapter"),
            "strategy.name": "scaffold",
            "train.learning_rate": 0.5,
            "train.lr_schedule": "cosine-by-round",
            "train.min_learning_rate": 0.01,
            "train.warmup": 0.4,
            "train.neftune_alpha": 5.0,
            "federation.rounds": 3,
            "federation.fraction": 0.67,
            "run.seed": 2,
            "run.best": True,
            "run.generate": 2,
        }
    )
    planned = plan(config).total_bytes / 1e6
    return config.model_copy(update={"run": config.run.model_copy(update={"max_megabytes": 0.8 * planned})})


def test_real_nodes_give_the_bytes_of_the_simulation_whatever_a_run_asks_for(
    tiny_llama: Path, tmp_path: Path, loopback: Callable[..., Any]
) -> None:
    """Two have a share of the common rows, the third a file of its own, and neither the template nor the adapter."""
    config = chats(tiny_llama, tmp_path)
    simulated = simulate(config, tmp_path / "simulated").path
    deploy(tmp_path / "app", with_typed_options(config), tmp_path / "deployed")
    (tmp_path / "own.jinja").unlink()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "rows" / "cid.jsonl", tmp_path / "elsewhere" / "cid.jsonl")
    shares = [f"partition-id={index} num-partitions=3" for index in range(2)]
    with loopback([*shares, f'data="{tmp_path}/elsewhere/cid.jsonl"']) as federation:
        run = federation.run(tmp_path / "app")
        assert run.status == "finished:completed", f"{run}\n{federation.logs()}"
    for folder in ("adapter", "adapter-best"):
        name = f"{folder}/adapter_model.safetensors"
        assert (tmp_path / "deployed" / name).read_bytes() == (simulated / name).read_bytes()
    for kind in ("evaluate", "samples"):
        assert events(tmp_path / "deployed", kind) == events(simulated, kind)
    ends = [events(path, "end")[-1] for path in (tmp_path / "deployed", simulated)]
    assert ends[0]["reason"] == ends[1]["reason"]
    assert "round 3 would go over run.max_megabytes" in ends[0]["reason"]
    # one client took part in both rounds, and went on from its own control variate
    asked = [(event["round"], event["id"]) for event in events(tmp_path / "deployed", "client")]
    assert asked == [(1, "bob"), (1, "cid"), (2, "ann"), (2, "cid")]


def test_a_site_with_a_file_of_its_own_keeps_its_rows_and_what_is_wrong_with_them(
    text_config: Make, text_csv: Path, tmp_path: Path, loopback: Callable[..., Any]
) -> None:
    with text_csv.open(newline="") as file:
        header, *rows = csv.reader(file)
    own = [row for row in rows[:90] if row[2] == "site-0"]
    bad = [["w1 w2", "secret-diagnosis", "site-1"]]
    for name, table in {"site-0": own, "rows of ours": bad, "test": rows[90:]}.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *table])
    settings = {"data__test": str(tmp_path / "test.csv"), "data__labels": "no,yes", "federation__rounds": 1}
    whole = text_config(data__source=str(tmp_path / "site-0.csv"), **settings)
    simulated = simulate(whole, tmp_path / "simulated").path
    # the server holds test rows only, and needs a number of clients, since it cannot count their rows' names
    config = text_config(**settings, federation__clients=2)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": None}),
            "partition": RunConfig().partition,
        }
    )
    deploy(tmp_path / "app", config, tmp_path / "deployed")
    # the second site's file has another name than its client
    nodes = [f'data="{tmp_path}/site-0.csv"', f'data="{tmp_path}/rows of ours.csv" client-id="site-1"']
    with loopback(nodes) as federation:
        run = federation.run(tmp_path / "app")
        assert run.status == "finished:completed", f"{run}\n{federation.logs()}"
        node_log = federation.log("node-1")
    assert (tmp_path / "deployed" / ADAPTER).read_bytes() == (simulated / ADAPTER).read_bytes()
    assert events(tmp_path / "deployed", "evaluate") == events(simulated, "evaluate")
    # a client that cannot read a row says so at home, where its text may be seen, and to the server only that
    assert "secret-diagnosis" in node_log
    seen_by_server = run.server_log + run.details
    for path in (tmp_path / "deployed").rglob("*"):
        seen_by_server += path.read_text(errors="replace") if path.is_file() else ""
    assert "DataError" in seen_by_server
    assert "site-1" in seen_by_server
    assert "secret-diagnosis" not in seen_by_server
