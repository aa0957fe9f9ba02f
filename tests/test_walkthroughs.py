"""Recipes and walk-throughs do what they say, with a tiny base and ten rows in place of what the hub has."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fedpeft.config import Layer, RunConfig, merge, nest, parse_overrides, read_toml, resolve
from fedpeft.config.layers import with_absolute_paths
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
# what a laptop lacks, in place of what the recipes name
SMALL = {"model.quantization": None, "train.precision": "fp32", "simulation.workers": 0, "data.test_fraction": 0.2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ten rows as both projects' users have them."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [
        {"instruction": f"w{n} w{n + 1}", "input": "" if n % 2 else f"w{n}", "output": f"w{n + 2} w{n + 3}"}
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def small(layer: Layer, base: Path, rows: Path, **settings: object) -> RunConfig:
    own = {**SMALL, "model.name": str(base), "data.source": str(rows), "data.max_length": 64, "adapter.rank": 4}
    own |= {name.replace("__", "."): value for name, value in settings.items()}
    merged = merge([layer, nest({key: value for key, value in own.items() if value is not None})])
    for key in (key for key, value in own.items() if value is None):
        section, name = key.split(".")
        merged[section].pop(name, None)
    return with_absolute_paths(resolve([merged]))  # as the command line does


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_a_configuration_that_plans(recipe: Path, tiny_llama: Path, rows: Path) -> None:
    layer = read_toml(recipe)
    whole = resolve([layer])
    assert whole.run.max_megabytes == 200_000
    assert (whole.adapter.rank, whole.adapter.alpha, whole.data.max_length) == (32, 64.0, 512)
    assert (whole.federation.rounds, whole.train.local_steps, whole.train.batch_size) == (200, 10, 16)
    clients = {"general": 20, "finance": 50, "medical": 20, "code": 10}[recipe.stem.removeprefix("flowertune-")]
    assert whole.federation.clients == clients
    facts = plan(small(layer, tiny_llama, rows, federation__clients=4, federation__rounds=3)).to_dict()
    assert facts["affordable_rounds"] == 3
    assert facts["task"] == "causal-lm"


def test_there_is_a_recipe_for_each_of_the_four_tasks() -> None:
    tasks = ("code", "finance", "general", "medical")
    assert [path.stem for path in RECIPES] == [f"flowertune-{task}" for task in tasks]


def shown(page: str) -> list[str]:
    """Return the words of the page's first `fedpeft simulate` that names rows of the reader's own."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").replace("\\\n", " ")
    found = next(line for line in re.findall(r"^ +fedpeft simulate (.*)$", text, re.MULTILINE) if "rows.jsonl" in line)
    return shlex.split(found)


def test_a_flowertune_users_rows_train_as_the_page_says(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    recipe, *words = shown("flowertune.md")
    layer = merge([read_toml(ROOT / recipe), parse_overrides(words)])
    assert layer["data"]["source"] == "rows.jsonl"
    outcome = simulate(small(layer, tiny_llama, rows, federation__rounds=1, train__local_steps=2), tmp_path / "run")
    assert outcome.is_complete
    assert (outcome.path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("algorithm", ["fedprox", "scaffold", "fedadam"])
def test_an_openfedllm_users_rows_train_as_the_page_says(
    algorithm: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    *words, option, strategy = shown("openfedllm.md")
    assert option == "--strategy"
    layer = merge([parse_overrides([*words, f"strategy.name={strategy}"])])
    own: dict[str, object] = {"federation__rounds": 2, "train__local_steps": 2}
    if algorithm == "scaffold":
        own |= {"strategy__name": "scaffold", "train__optimizer": "sgd", "train__learning_rate": 0.1}
    elif algorithm == "fedadam":
        own |= {"strategy__server_optimizer": "adam", "train__proximal_mu": 0.0}
    outcome = simulate(small(layer, tiny_llama, rows, **own), tmp_path / "run")
    assert outcome.is_complete
    assert outcome.rounds == 2
