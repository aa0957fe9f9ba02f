from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import ConfigError
from fedpeft.runs.machine import Footprint, Gpu, Machine
from fedpeft.simulations import sizing
from fedpeft.simulations.grids.cluster import Fixed, Node, Sizing
from fedpeft.simulations.predicted import LOGITS
from fedpeft.simulations.sizing import Automatic, at_work, estimate, planned, sizer_of

GB = 10**9
NEED = Footprint(GB, gpu=GB)
Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "cache"))


def node(cores: int = 8, free: int = 64 * GB, gpus: tuple[int, ...] = (), drives: bool = True) -> Node:
    """Return a node; of each GPU the bytes that are free."""
    cards = tuple(Gpu("card", 80 * GB, left) for left in gpus)
    return Node("name", Machine(cores, free, free, cards), cores, len(gpus), drives)


def automatic(make: Make, need: Footprint = NEED, **settings: Any) -> Automatic:
    """Return who decides about a run that leaves all to the machine, but for `settings`."""
    defaults = {"simulation__workers": "auto", "federation__clients": 100, "partition__scheme": "iid"}
    sizer = Automatic(make(**(defaults | {"partition__by": None} | settings)))
    sizer.need = need
    return sizer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"simulation__workers": 0}, None),
        ({"simulation__workers": 3, "simulation__gpus_per_worker": 0.5}, Fixed(3, 0.5)),
    ],
)
def test_who_says_all_himself_is_obeyed(text_config: Make, settings: dict[str, Any], expected: Fixed | None) -> None:
    assert sizer_of(text_config(**settings)) == expected


@pytest.mark.parametrize("given", ["auto", None])
def test_auto_is_what_nobody_has_set(given: str | None) -> None:
    config = resolve([nest({"simulation.workers": given, "simulation.gpus_per_worker": given})])
    assert config == resolve([])
    assert "simulation.workers" not in config.to_flat()
    with pytest.raises(ConfigError, match=r"simulation\.workers = 'many' is neither a number nor auto"):
        resolve([nest({"simulation.workers": "many"})])


def test_there_is_one_worker_a_core_and_no_more_than_clients_are_at_work(text_config: Make) -> None:
    assert automatic(text_config).fit([node(cores=6)]).workers == 6
    assert automatic(text_config, simulation__threads_per_worker=2).fit([node(cores=6)]).workers == 3
    assert automatic(text_config, federation__clients=4).fit([node(cores=6)]).workers == 4
    assert automatic(text_config, federation__fraction=0.03).fit([node(cores=6)]).workers == 3
    assert automatic(text_config).fit([node(cores=6)], most=2).workers == 2


def test_there_are_never_more_workers_than_memory_bears(text_config: Make) -> None:
    # 10 GB free: 9 that may be used, 2 for the driver's own model, 1 that all share: 6 are 2 of 2 GB and a fifth
    found = automatic(text_config, Footprint(2 * GB, GB)).fit([node(free=10 * GB)])
    assert found.workers == 2
    assert found.why.startswith("memory bears no more")
    # a node without the driver bears one more
    there = node(free=10 * GB, drives=False)
    assert automatic(text_config, Footprint(2 * GB, GB)).fit([node(free=10 * GB), there]).workers == 5
    tight = automatic(text_config, Footprint(20 * GB)).fit([node(free=10 * GB)])
    assert tight.workers == 1
    assert "memory may not bear it" in tight.why


def test_a_number_that_memory_may_not_bear_is_obeyed_and_said(text_config: Make) -> None:
    found = automatic(text_config, Footprint(2 * GB), simulation__workers=7).fit([node(free=10 * GB)])
    assert found.workers == 7
    assert found.why.startswith("as asked, and memory may bear 2")


@pytest.mark.parametrize(
    ("free", "need", "cores", "clients", "workers", "share"),
    [
        ((80 * GB,), 10 * GB, 32, 100, 4, 0.25),  # more than four would wait for one another
        ((30 * GB,), 10 * GB, 32, 100, 1, 1.0),  # 30 less the driver's 10 are one of 10 and a fifth
        ((40 * GB,), 10 * GB, 32, 100, 2, 0.5),
        ((80 * GB, 80 * GB), 30 * GB, 32, 100, 2, 1.0),  # 80 - 30 on the first: one of 36
        ((80 * GB, 80 * GB), 10 * GB, 4, 100, 4, 0.5),  # two cores a GPU feed two clients
        ((80 * GB, 80 * GB), 10 * GB, 32, 3, 3, 0.5),  # three clients are spread over both
        ((80 * GB, 80 * GB), 10 * GB, 32, 2, 2, 1.0),
        ((80 * GB,), 9 * GB, 32, 3, 3, 0.3333),
    ],
)
def test_clients_share_gpus_as_memory_bears_and_cores_feed(
    text_config: Make, free: tuple[int, ...], need: int, cores: int, clients: int, workers: int, share: float
) -> None:
    sizer = automatic(text_config, Footprint(GB, gpu=need), federation__clients=clients)
    found = sizer.fit([node(cores=cores, free=500 * GB, gpus=free)])
    assert (found.workers, found.gpus_per_worker) == (workers, share)


def test_gpus_of_which_nothing_is_known_have_a_client_each(text_config: Make) -> None:
    blind = Node("name", Machine(32, 64 * GB, 64 * GB), 32, 3, drives=False)
    found = automatic(text_config, Footprint(GB, gpu=GB)).fit([blind])
    assert (found.workers, found.gpus_per_worker) == (3, 1.0)


def test_a_share_that_is_asked_for_decides_how_many_find_room(text_config: Make) -> None:
    machine = node(cores=32, free=500 * GB, gpus=(80 * GB, 80 * GB))
    for share, workers in ((0.5, 4), (1.0, 2), (2.0, 1), (0.0, 32)):
        found = automatic(text_config, simulation__gpus_per_worker=share).fit([machine])
        assert (found.workers, found.gpus_per_worker) == (workers, share)


def test_a_number_of_workers_that_is_asked_for_is_spread_over_the_gpus(text_config: Make) -> None:
    found = automatic(text_config, simulation__workers=3).fit([node(cores=32, free=500 * GB, gpus=(80 * GB, 80 * GB))])
    assert (found.workers, found.gpus_per_worker) == (3, 0.5)


def test_what_a_worker_needed_is_kept_for_the_next_run_of_such_a_model(text_config: Make) -> None:
    first = Automatic(text_config(simulation__workers="auto"))
    assert not first.need.measured
    first.learn(Footprint(3 * GB, GB, 0))
    assert first.need == Footprint(3 * GB, GB, 0)
    first.learn(Footprint(3 * GB + 1, GB, 0))  # as good as nothing
    assert first.need.own == 3 * GB
    first.learn(Footprint(4 * GB, 0, 0))
    again = Automatic(text_config(simulation__workers="auto", train__learning_rate=0.5, run__seed=9))
    assert again.need == Footprint(4 * GB, GB, 0)
    assert not Automatic(text_config(simulation__workers="auto", train__batch_size=9)).need.measured


def test_of_a_private_run_nothing_is_measured(text_config: Make, tmp_path: Path) -> None:
    private = text_config(simulation__workers="auto", privacy__level="record", privacy__noise_multiplier=1.0)
    sizer = Automatic(private)
    before = sizer.need
    sizer.learn(Footprint(9 * GB))
    assert sizer.need == before
    assert not (tmp_path / "cache" / sizing.KEPT).exists()


def test_a_damaged_note_is_an_estimate(text_config: Make, tmp_path: Path) -> None:
    config = text_config(simulation__workers="auto")
    Automatic(config).learn(Footprint(3 * GB))
    (note,) = (tmp_path / "cache" / sizing.KEPT).iterdir()
    for text in ("", "[]", json.dumps({"own": -1, "shared": 0, "gpu": 0})):
        note.write_text(text)
        assert not Automatic(config).need.measured


def test_estimates_grow_with_batch_length_and_precision(text_config: Make) -> None:
    def own(**settings: Any) -> int:
        return estimate(text_config(run__evaluate_batch_size=1, **settings)).own - sizing.LIBRARIES

    plain = own(train__batch_size=8, data__max_length=64)
    assert own(train__batch_size=16, data__max_length=64) > 1.5 * plain
    assert own(train__batch_size=8, data__max_length=128) > 1.5 * plain
    assert own(train__batch_size=8, data__max_length=64, train__gradient_checkpointing=True) < plain
    assert own(train__batch_size=8, data__max_length=64, train__precision="bf16") < plain
    assert estimate(text_config(model__name="/no/such/folder")) == sizing.UNKNOWN


def test_an_estimate_counts_a_block_of_scores_over_a_vocabulary_and_patches_of_images(
    text_config: Make, tiny_llama: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    facts = json.loads((tiny_llama / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(facts | {"vocab_size": 10**6}))
    (wide / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    small, large = (estimate(text_config(model__name=str(each))).own for each in (tiny_llama, wide))
    assert LOGITS < large - small < 3 * LOGITS
    assert estimate(text_config(model__name=str(tiny_vit), data__max_length=2**20)).own < 2 * sizing.LIBRARIES


def test_a_dry_run_says_what_would_be_chosen(text_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "this_node", lambda: node(cores=2))
    found = planned(text_config(simulation__workers="auto"), 3)
    assert found.workers == 2
    assert str(found).startswith("2 on Ray: one a core (2 cores, 64 GB free, a worker takes ")
    assert planned(text_config(simulation__workers=0), 3).workers == 0
    cluster = planned(text_config(simulation__workers="auto", simulation__address="10.0.0.1:6379"), 3)
    assert "the cluster at simulation.address = '10.0.0.1:6379'" in str(cluster)


def test_with_cohorts_that_nobody_may_know_all_clients_may_be_at_work(text_config: Make) -> None:
    config = text_config(federation__fraction=0.5)
    assert at_work(config, 10) == 5
    secret = text_config(
        federation__fraction=0.5, privacy__level="client", privacy__noise_multiplier=1.0, strategy__name="fedit"
    )
    assert at_work(secret, 10) == 10


def test_a_sizing_is_plain_data_and_one_line() -> None:
    found = Sizing(4, 0.5, "2 on a GPU", Footprint(GB, 0, 2 * GB))
    assert str(found) == "4 on Ray with 0.5 GPU each: 2 on a GPU"
    assert json.loads(json.dumps(found.to_dict()))["footprint"]["gpu"] == 2 * GB
