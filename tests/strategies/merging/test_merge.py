"""Merging adapters on disk, against adapters that plain PEFT trained and dense float64 sums of what it would load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fedpeft.adapters.export import read_adapter
from fedpeft.errors import AdapterError, ConfigError, FedpeftError, RunDirectoryError
from fedpeft.strategies.merging.merge import Merged, merge_directories, whole_weights

INPUTS = torch.arange(3, 35).reshape(4, 8)
FIRST_QUERY = "bert.encoder.layer.0.attention.self.query"


def base_model(folder: Path) -> Any:
    torch.manual_seed(0)  # of the head, which the folder does not hold
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


def train(folder: Path, out: Path, seed: int, **settings: Any) -> Path:
    """Train an adapter with PEFT alone, and save it as its users do."""
    base = base_model(folder)
    torch.manual_seed(seed + 1)  # of A
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **settings))
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        batch, labels = torch.randint(3, 63, (6, 7), generator=draw), torch.randint(3, (6,), generator=draw)
        optimizer.zero_grad()
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def adapters(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one model: three of mixed ranks and scalings, two of equal ones, two that share a frozen A."""
    home = tmp_path_factory.mktemp("adapters")
    made: dict[str, dict[str, Any]] = {
        "small": {"r": 4, "lora_alpha": 8},
        "patterned": {"r": 8, "lora_alpha": 4, "rank_pattern": {FIRST_QUERY: 2}, "alpha_pattern": {"value": 12}},
        "stabilised": {"r": 8, "lora_alpha": 6, "use_rslora": True},
        "equal": {"r": 4, "lora_alpha": 8},
    }
    paths = {name: train(tiny_bert, home / name, seed, **facts) for seed, (name, facts) in enumerate(made.items())}
    twin = home / "twin"
    shutil.copytree(paths["small"], twin)
    tensors = {n: t * 2 if ".lora_B." in n else t for n, t in load_file(twin / "adapter_model.safetensors").items()}
    save_file(tensors, twin / "adapter_model.safetensors", metadata={"format": "pt"})
    return {**paths, "twin": twin}


def loaded_deltas(folder: Path, adapter: Path) -> dict[str, Tensor]:
    """Return what PEFT itself adds to each layer's weight, which knows nothing of how we read files."""
    model = PeftModel.from_pretrained(base_model(folder), str(adapter))
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def oracle(folder: Path, paths: list[Path], weights: list[float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weighted mean of updates and of heads, dense."""
    deltas = [loaded_deltas(folder, path) for path in paths]
    heads = [
        {n: t.double() for n, t in load_file(path / "adapter_model.safetensors").items() if "lora" not in n}
        for path in paths
    ]
    mean: Callable[[list[Tensor]], Tensor] = lambda each: sum(  # noqa: E731
        (w / sum(weights) * t for w, t in zip(weights, each, strict=True)), torch.zeros_like(each[0])
    )
    return (
        {name: mean([each[name] for each in deltas]) for name in deltas[0]},
        {name: mean([each[name] for each in heads]) for name in heads[0]},
    )


def logits_of_oracle(folder: Path, delta: dict[str, Tensor], head: dict[str, Tensor]) -> Tensor:
    model = base_model(folder).double()
    with torch.no_grad():
        for name, change in delta.items():
            model.get_submodule(name.removeprefix("base_model.model.")).weight += change
        for name, tensor in head.items():
            model.get_parameter(name.removeprefix("base_model.model.")).copy_(tensor)
        found: Tensor = model(input_ids=INPUTS).logits
    return found


def merge(method: str, paths: list[Path], out: Path, **settings: Any) -> Merged:
    return merge_directories(method, paths, out, **settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("flexlora", {"rank": 16}),
        ("lora-lego", {"options": {"rank": 20}}),
        ("florist", {"options": {"threshold": "1.0"}}),
        ("flora", {}),
    ],
)
def test_mixed_ranks_and_scalings_merge_into_what_peft_would_have_to_sum(
    method: str, settings: dict[str, Any], adapters: dict[str, Path], tiny_bert: Path, tmp_path: Path
) -> None:
    paths = [adapters[name] for name in ("small", "patterned", "stabilised")]
    merged = merge(method, paths, tmp_path / "out", weights=["1", "0.5", "3"], **settings)
    assert merged.exact
    assert merged.error < 1e-5
    assert [each["ranks"] for each in merged.inputs] == [[4], [2, 8], [8]]
    expected, head = oracle(tiny_bert, paths, [1, 0.5, 3])
    actual = loaded_deltas(tiny_bert, tmp_path / "out")
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max()))
    model = PeftModel.from_pretrained(base_model(tiny_bert), str(tmp_path / "out")).eval()
    with torch.no_grad():
        logits = model(input_ids=INPUTS).logits
    truth = logits_of_oracle(tiny_bert, expected, head)
    torch.testing.assert_close(logits.double(), truth, rtol=0, atol=1e-5)
    plain = base_model(tiny_bert)(input_ids=INPUTS).logits.detach().double()
    assert float((truth - plain).abs().max()) > 1e-2  # or nothing would have been tested


def test_a_base_changing_method_at_a_rank_is_the_best_of_that_rank(
    adapters: dict[str, Path], tiny_bert: Path, tmp_path: Path
) -> None:
    paths = [adapters["small"], adapters["equal"]]
    whole = merge("fedex-lora", paths, tmp_path / "whole")
    assert whole.exact
    assert "exact sum" in whole.note
    assert whole.ranks == [8]
    best = merge("fedex-lora", paths, tmp_path / "best", rank=3)
    assert best.ranks == [3]
    assert "best of rank 3" in best.note
    assert best.error == pytest.approx(merge("flexlora", paths, tmp_path / "flex", rank=3).error, rel=1e-5)
    expected, _ = oracle(tiny_bert, paths, [1, 1])
    residual = sum(float(torch.linalg.svdvals(delta)[3:].square().sum()) for delta in expected.values())
    total = sum(float(delta.square().sum()) for delta in expected.values())
    assert best.error == pytest.approx((residual / total) ** 0.5, rel=1e-4)


def test_means_of_factors_are_that_and_say_how_wrong_they_are(adapters: dict[str, Path], tmp_path: Path) -> None:
    paths = [adapters["small"], adapters["equal"]]
    merged = merge("fedit", paths, tmp_path / "out", weights=["1", "3"])
    assert not merged.exact
    assert merged.error > 0.1
    one, other, found = (load_file(path / "adapter_model.safetensors") for path in (*paths, tmp_path / "out"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, one[name] / 4 + other[name] * 3 / 4)


@pytest.mark.parametrize("method", ["fedit", "fedsvd", "lora-fair", "flexlora", "lora-lego"])
def test_adapters_that_share_a_merge_exactly(method: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    merged = merge(method, [adapters["small"], adapters["twin"]], tmp_path / "out", weights=["1", "2"])
    assert merged.exact
    assert merged.ranks == [4]


def test_one_adapter_alone_comes_back(adapters: dict[str, Path], tiny_bert: Path, tmp_path: Path) -> None:
    for method in ("fedit", "flexlora", "lora-lego", "flora", "hetlora", "lora-fair", "fedrot-lora"):
        assert merge(method, [adapters["patterned"]], tmp_path / method).error < 1e-5
    expected, _ = oracle(tiny_bert, [adapters["patterned"]], [1])
    for name, delta in loaded_deltas(tiny_bert, tmp_path / "hetlora").items():
        torch.testing.assert_close(delta, expected[name], rtol=0, atol=1e-5)


def test_weights_are_kept_exactly_and_only_their_proportion_counts(adapters: dict[str, Path], tmp_path: Path) -> None:
    assert whole_weights(["0.1", "1/3", "2"], 3) == [3, 10, 60]
    assert whole_weights(["1e-3", "2e-3"], 2) == [1, 2]
    assert whole_weights(None, 3) == [1, 1, 1]
    assert Fraction(*whole_weights(["0.333333333333333333", "1"], 2)) == Fraction("0.333333333333333333")
    written = []
    for number, weights in enumerate((["1", "3"], ["0.25", "0.75"], ["1/30", "1/10"], ["100", "300"])):
        out = tmp_path / str(number)
        merge("flexlora", [adapters["small"], adapters["stabilised"]], out, weights=weights)
        written.append((out / "adapter_model.safetensors").read_bytes())
    assert set(written) == {written[0]}


def test_configuration_types_and_labels_are_carried_over(adapters: dict[str, Path], tmp_path: Path) -> None:
    halves = []
    for name in ("small", "equal"):
        halves.append(tmp_path / name)
        shutil.copytree(adapters[name], halves[-1])
        tensors = {n: t.bfloat16() for n, t in load_file(halves[-1] / "adapter_model.safetensors").items()}
        save_file(tensors, halves[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
        (halves[-1] / "labels.json").write_text('["a", "b", "c"]\n')
    merged = merge("flora", halves, tmp_path / "out")
    assert merged.exact
    saved = read_adapter(tmp_path / "out")
    assert saved.labels == ["a", "b", "c"]
    assert saved.config["task_type"] == "SEQ_CLS"
    assert {f.A.dtype for f in saved.state.factors.values()} == {torch.bfloat16}
    assert merged.dtype == "bfloat16"
    (halves[1] / "labels.json").write_text('["c", "b", "a"]\n')
    with pytest.raises(AdapterError, match=r"labels\.json: .*small' has a, b, c, .*equal' has c, b, a"):
        merge("flora", halves, tmp_path / "other")
    (halves[1] / "labels.json").unlink()
    merge("flora", halves, tmp_path / "other")
    assert not (tmp_path / "other" / "labels.json").exists()


def changed(source: Path, out: Path, **config: Any) -> Path:
    shutil.copytree(source, out)
    file = out / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return out


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"base_model_name_or_path": "other"}, r"base_model_name_or_path: '.*small' has .*, '.*odd' has other"),
        ({"task_type": "CAUSAL_LM"}, "task_type"),
        ({"modules_to_save": ["classifier", "pooler"]}, r"modules_to_save: .*odd' has classifier, pooler"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
    ],
)
def test_adapters_of_other_kinds_or_models_are_refused(
    config: dict[str, Any], says: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    odd = changed(adapters["small"], tmp_path / "odd", **config)
    with pytest.raises(AdapterError, match=says):
        merge("flexlora", [adapters["small"], odd], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_and_shapes_that_differ_are_listed(adapters: dict[str, Path], tiny_bert: Path, tmp_path: Path) -> None:
    small = adapters["small"]
    key = train(tiny_bert, tmp_path / "key", 9, r=4)
    file = key / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.replace("query", "key"): t for n, t in tensors.items()}, file)
    with pytest.raises(AdapterError, match=r"key' alone of .* has .*self\.key and 1 more"):
        merge("flexlora", [small, key], tmp_path / "out")
    name = next(name for name in tensors if name.endswith("classifier.weight"))
    save_file({**tensors, name: torch.zeros(5, 16)}, file)
    with pytest.raises(AdapterError, match=r"classifier\.weight: .* has \(3, 16\), .* has \(5, 16\)"):
        merge("flexlora", [small, key], tmp_path / "out")
    save_file({**tensors, name: torch.full((3, 16), torch.nan)}, file)
    with pytest.raises(AdapterError, match="NaN"):
        merge("flexlora", [small, key], tmp_path / "out")
    file.rename(key / "adapter_model.bin")
    with pytest.raises(AdapterError, match="can run code"):
        merge("flexlora", [small, key], tmp_path / "out")
    file.write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match="cannot read"):
        merge("flexlora", [small, key], tmp_path / "out")
    (tmp_path / "run").mkdir()
    small.rename(tmp_path / "run" / "adapter")
    try:
        with pytest.raises(AdapterError, match=r"do you mean .*run/adapter"):
            merge("flexlora", [tmp_path / "run"], tmp_path / "out")
    finally:
        (tmp_path / "run" / "adapter").rename(small)


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("fedit", {}, r"equal ranks in each layer: '.*small' has 4, '.*stabilised' has 8\. These take any: lora-lego"),
        ("lora-fair", {}, "These take any"),
        ("fedex-lora", {}, "These take any"),
        (
            "hetlora",
            {"rank": 6},
            "keeps the adapters' rank, 8. These can write any: lora-lego, flora, fedex-lora, flexlora",
        ),
        ("florist", {"rank": 6}, "threshold=T"),
        ("flexlora", {"rank": 17}, "16 is the most"),
        ("flexlora", {"rank": 0}, "at least 1"),
        ("flexlora", {"weights": ["1"]}, "1 numbers for 2 adapters"),
        ("flexlora", {"weights": ["1", "-1"]}, "'-1' is no positive number"),
        ("flexlora", {"weights": ["1", "much"]}, "'much' is no positive number"),
        ("flexlora", {"weights": ["1e-30", "1"]}, "18 digits"),
        ("flexlora", {"options": {"sovler": "exact"}}, "Did you mean 'solver'"),
        ("flexlore", {}, "Did you mean 'flexlora'"),
        ("fedsa-lora", {}, "its own B"),
        ("local", {}, "merges nothing"),
        ("rolora", {}, "by turns"),
        ("frlora", {}, "principal part"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    method: str, settings: dict[str, Any], says: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(FedpeftError, match=says) as caught:
        merge(method, [adapters["small"], adapters["stabilised"]], tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_needs_a_common_start_or_is_there_already_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    paths = [adapters["small"], adapters["equal"]]
    for options in ({"server_optimizer": "adam"}, {"robust": "norm-clip"}):
        with pytest.raises(ConfigError, match="common start"):
            merge("fedit", paths, tmp_path / "out", options=options)
    assert merge("fedit", paths, tmp_path / "out", options={"robust": "median"}).options == {"robust": "median"}
    with pytest.raises(RunDirectoryError, match="not an empty folder"):
        merge("fedit", paths, tmp_path / "out")
    with pytest.raises(AdapterError, match="share A"):
        merge("fedsvd", paths, tmp_path / "other")
