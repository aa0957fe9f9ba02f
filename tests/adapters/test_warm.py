"""Runs that begin with an adapter from a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.kinds import KINDS
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.models import load_base
from fedpeft.runs import read_config, read_events
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import available, with_typed_options
from fedpeft.strategies.base import AdapterStrategy

Make = Callable[..., RunConfig]
TASK = "sequence-classification"


@pytest.fixture(scope="module")
def first(text_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another rank and other targets than those of the runs that go on from it."""
    settings = {"adapter__targets": "value", "adapter__rank": 3, "adapter__alpha": 5.0, "adapter__layers": "last:1"}
    return simulate(text_config(federation__rounds=1, **settings), tmp_path_factory.mktemp("first") / "run").path


@pytest.fixture(scope="module")
def going_on(text_config: Make, first: Path) -> Make:
    """Make a configuration that begins with the first run's adapter; what is unset follows from it."""

    def make(**settings: object) -> RunConfig:
        config = text_config(adapter__start=str(first / "adapter"), **{"federation__rounds": 1, **settings})
        given = {name: value for name, value in settings.items() if name.startswith("adapter__")}
        adapter = type(config.adapter)(
            start=str(first / "adapter"), **{name.partition("__")[2]: value for name, value in given.items()}
        )
        return config.model_copy(update={"adapter": adapter})

    return make


def losses(run: Path) -> list[float]:
    return [float(event["loss"]) for event in read_events(run) if event["event"] == "evaluate"]


def test_a_run_scores_at_first_as_the_one_it_goes_on_from_did_at_last(
    first: Path, going_on: Make, tmp_path: Path
) -> None:
    run = simulate(going_on(), tmp_path / "run").path
    assert losses(run)[0] == pytest.approx(losses(first)[-1], rel=1e-6)
    adapter = read_config(run).adapter
    assert (adapter.rank, adapter.alpha) == (3, 5.0)
    assert adapter.targets is not None
    assert [name.rpartition(".")[2] for name in adapter.targets] == ["value"]
    assert adapter.start_sha256 is not None
    saved, before = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, first))
    assert saved.keys() == before.keys()
    again = simulate(read_config(run), tmp_path / "again").path
    both = [(each / "adapter" / "adapter_model.safetensors").read_bytes() for each in (run, again)]
    assert both[0] == both[1]


def able(method: type[AdapterStrategy]) -> bool:
    """Tell whether a method takes LoRA, and has no initialisation of its own."""
    return method.capabilities.takes(KINDS.find("lora")) and not method.capabilities.init


def test_a_method_with_an_initialisation_of_its_own_refuses(going_on: Make) -> None:
    with pytest.raises(ConfigError, match=r"strategy 'frlora': adapter.start and adapter.init = 'pissa' exclude"):
        with_typed_options(going_on(strategy__name="frlora"))


@pytest.mark.parametrize("method", sorted(name for name, each in available().items() if able(each)))
def test_every_method_keeps_what_it_began_with_where_nobody_learns(
    method: str, first: Path, going_on: Make, tmp_path: Path
) -> None:
    settings = {"strategy__name": method, "train__learning_rate": 1e-12, "train__local_steps": 1}
    run = simulate(going_on(**settings), tmp_path / "run").path
    assert losses(run) == pytest.approx([losses(first)[-1]] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": "2"}, "adapter.rank = 2: .* has rank 3"),
        ({"alpha": "7"}, "adapter.alpha = 7: .* has alpha 5"),
        ({"ranks": "2,3"}, "adapter.start and adapter.ranks exclude each other"),
        ({"init": "pissa"}, "adapter.start and adapter.init = 'pissa' exclude each other"),
        ({"kind": "dora"}, "adapter.start is not for adapter.kind = 'dora'"),
        ({"targets": "query"}, "leave adapter.targets and adapter.layers unset"),
        ({"start": "nowhere"}, "'nowhere' is no adapter"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: dict[str, str], says: str, first: Path, tiny_bert: Path) -> None:
    words = {"model.name": str(tiny_bert), "adapter.start": str(first / "adapter"), "model.task": TASK}
    words |= {f"adapter.{name}": value for name, value in settings.items()}

    def make() -> AdaptedModel:
        config = with_typed_options(resolve([nest(words)]))
        return AdaptedModel(load_base(config, tiny_bert, ("no", "yes")), config)

    with pytest.raises((AdapterError, ConfigError), match=says):
        make()


def test_a_folder_that_has_changed_since_is_refused(first: Path, going_on: Make, tmp_path: Path) -> None:
    shutil.copytree(first / "adapter", tmp_path / "start")
    config = with_typed_options(going_on())
    other = config.adapter.model_copy(update={"start": str(tmp_path / "start"), "start_sha256": "0" * 64})
    with pytest.raises(AdapterError, match="is not the adapter that this run was made with"):
        with_typed_options(config.model_copy(update={"adapter": other}))


def test_pefts_own_adapter_of_mixed_ranks_computes_the_same_with_labels_in_another_order(
    tiny_bert: Path, text_config: Make, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["query", "value"],
        rank_pattern={"layer.0.attention.self.query": 3},
        init_lora_weights=False,
    )
    peft = get_peft_model(plain, settings).eval()
    peft.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "labels.json").write_text(json.dumps(["yes", "no"]))
    config = text_config()
    config = with_typed_options(
        config.model_copy(
            update={"adapter": type(config.adapter)(start=str(tmp_path / "start"), targets="query,value")}
        )
    )
    assert (config.adapter.kind, config.adapter.rank) == ("rslora", 3)
    live = AdaptedModel(load_base(config, tiny_bert, ("no", "yes")), config)
    assert any("labels in another order" in note for note in live.notes)
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        ours, theirs = live.model(input_ids=tokens).logits, peft(input_ids=tokens).logits
    # the pooler is trained with the head here, and drawn by PEFT's user as the checkpoint has it
    assert torch.allclose(ours, theirs.flip(1), atol=1e-5)
