"""Every method in a whole run: what is saved is what was scored, and PEFT loads it into the untouched base."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.rescoring import rescore
from fedpeft.runs import read_config, read_events
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import STRATEGIES

Make = Callable[..., RunConfig]
HEAD_A_B = (".classifier.weight", ".lora_A.weight", ".lora_B.weight")


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_saved_adapter_is_what_was_scored(name: str, text_config: Make, tmp_path: Path) -> None:
    config = text_config(strategy__name=name, federation__rounds=3, run__checkpoint_every=1)
    run = simulate(config, tmp_path / "run").path
    events = [event for event in read_events(run) if event["event"] == "evaluate"]
    again = rescore(run, {})
    # an exact sum of many factors is another one than the sum of their products, in its last digits
    assert again["loss"] == pytest.approx(events[-1]["loss"], rel=1e-5)
    assert again["accuracy"] == events[-1]["accuracy"]
    assert events[-1]["loss"] < events[0]["loss"]
    assert load_file(next((run / "checkpoints").glob("*-0003/state.safetensors")))


@pytest.mark.parametrize("name", [name for name, method in STRATEGIES.items() if method.capabilities.mixed_ranks])
def test_clients_of_different_ranks_make_one_adapter(name: str, text_config: Make, tmp_path: Path) -> None:
    run = simulate(text_config(strategy__name=name, adapter__ranks="1,4,2"), tmp_path / "run").path
    events = [event for event in read_events(run) if event["event"] == "evaluate"]
    assert rescore(run, {})["loss"] == pytest.approx(events[-1]["loss"], rel=1e-5)
    assert events[-1]["loss"] < events[0]["loss"]


def test_a_local_head_goes_with_the_exact_sum(text_config: Make, tmp_path: Path) -> None:
    """The sum has a scaling of its own, which the head's owner must not multiply once more."""
    config = text_config(strategy__name="flora", adapter__head="local", federation__rounds=2)
    run = simulate(config, tmp_path / "run").path
    last = [event for event in read_events(run) if event["event"] == "evaluate"][-1]
    assert rescore(run, {})["loss"] == pytest.approx(last["loss"], rel=1e-5)
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    own = load_file(next(run.glob("clients/*/adapter/adapter_model.safetensors")))
    assert all((whole[name] == own[name]).all() for name in whole if ".lora_" in name)


def test_fedsa_keeps_the_head_with_its_client_unless_told_otherwise(text_config: Make, tmp_path: Path) -> None:
    config = text_config(strategy__name="fedsa-lora", federation__rounds=1, run__evaluate_clients=True)
    planned = plan(config)
    assert planned.personal == ("B", "head")
    assert planned.to_dict()["head"] == "local"
    run = simulate(config, tmp_path / "run").path
    assert read_config(run).adapter.head == "local"  # spelled out, so that the run can be repeated
    own = [load_file(path) for path in sorted(run.glob("clients/*/adapter/adapter_model.safetensors"))]
    head, A, B = (next(name for name in own[0] if name.endswith(end)) for end in HEAD_A_B)
    assert len(own) == 3
    assert not torch.equal(own[0][head], own[1][head])
    assert not torch.equal(own[0][B], own[1][B])
    assert torch.equal(own[0][A], own[1][A])
    (moved,) = [event["bytes_up"] for event in read_events(run) if event["event"] == "round"]
    assert moved == 3 * sum(4 * tensor.numel() for name, tensor in own[0].items() if name.endswith(".lora_A.weight"))
    last = [event for event in read_events(run) if event["event"] == "evaluate"][-1]
    assert last["clients"]["accuracy"]["mean"] == pytest.approx(
        sum(scores["accuracy"] for scores in last["clients"]["scores"].values()) / 3
    )
    assert rescore(run, {})["loss"] == pytest.approx(last["loss"], rel=1e-5)
    shared = plan(text_config(strategy__name="fedsa-lora", adapter__head="shared"))
    assert shared.personal == ("B",)
    assert shared.to_dict()["head"] == "shared"


@pytest.mark.parametrize("kind", ["lora-sb", "lora-xs"])
def test_fed_sb_sends_r_alone_and_its_start_stays_in_the_update(
    kind: str, text_config: Make, text_csv: Path, tmp_path: Path
) -> None:
    rows = {"adapter__init_data": str(text_csv)} if kind == "lora-sb" else {}
    config = text_config(strategy__name="fed-sb", adapter__kind=kind, train__learning_rate=0.05, **rows)
    run = simulate(config, tmp_path / "run").path
    first, *_, last = [event for event in read_events(run) if event["event"] == "evaluate"]
    rounds = [event for event in read_events(run) if event["event"] == "round"]
    assert all(event["aggregation_error"] < 1e-6 for event in rounds)
    layers, r, clients = 4, config.adapter.rank, 3
    head = sum(
        t.numel() for n, t in load_file(run / "adapter" / "adapter_model.safetensors").items() if ".lora" not in n
    )
    assert all(event["bytes_up"] == clients * 4 * (layers * r * r + head) for event in rounds)
    assert rescore(run, {})["loss"] == pytest.approx(last["loss"], rel=1e-5)
    plain = simulate(text_config(federation__rounds=1), tmp_path / "plain").path
    base = next(event for event in read_events(plain) if event["event"] == "evaluate")
    assert (first["loss"] == pytest.approx(base["loss"], abs=1e-5)) == (kind == "lora-xs")
    if kind == "lora-sb":
        assert first["loss"] < base["loss"]  # the first step goes down


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy__name": "fed-sb", "adapter__init": "pissa"}, "'pissa' is not for adapter.kind = 'lora-xs'"),
        ({"strategy__name": "florist", "adapter__init": "pissa"}, "threshold = 0.9"),
        ({"strategy__name": "hetlora", "adapter__kind": "ffa-lora"}, "'ffa-lora'"),
        ({"strategy__name": "flora", "federation__min_clients": 99}, "min_clients = 99"),
        ({"strategy__name": "fedit", "strategy__robust": "krum", "strategy__byzantine": 9}, "byzantine = 9"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(settings: dict[str, Any], words: str, text_config: Make) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan(text_config(**settings))
