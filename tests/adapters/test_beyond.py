"""LoRA on experts and on embeddings: what every method makes of them is what PEFT computes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.base_change import dense
from fedpeft.adapters.embeddings import is_embedding
from fedpeft.adapters.experts import bare
from fedpeft.adapters.kinds import KINDS
from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import AdapterError, ConfigError, FedpeftError
from fedpeft.models import load_base
from fedpeft.privacy.independence import row_engine
from fedpeft.resident import resident
from fedpeft.runs import read_events
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import available, with_typed_options
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.training.neftune import EmbeddingNoise
from tests.conftest import WORDS, _tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 63, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS, TOKENS = "experts.gate_up_proj,experts.down_proj", "embed_tokens"
# the module of PEFT's that holds a parameter's factors, when both are adapted
PARAMETERS = {"mlp.experts.base_layer": "gate_up_proj", "mlp.experts": "down_proj"}


class Mixture:
    """A tiny base with three experts, and rows of two clients."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        torch.manual_seed(0)
        config = transformers.MixtralConfig(num_local_experts=3, **SHAPE)
        transformers.MixtralForCausalLM(config).save_pretrained(self.base)
        _tokenizer(self.base)
        self.rows, draw = folder / "rows.jsonl", random.Random(0)
        with self.rows.open("w") as file:
            for number in range(16):
                prompt, answer = (" ".join(draw.choices(WORDS, k=3)) for _ in range(2))
                file.write(json.dumps({"prompt": prompt, "completion": answer, "client": f"c{number % 2}"}) + "\n")

    def config(self, targets: str | None, **settings: object) -> RunConfig:
        words: dict[str, object] = {
            "model.name": str(self.base),
            "model.task": "causal-lm",
            "data.source": str(self.rows),
            "data.prompt": "prompt",
            "data.completion": "completion",
            "data.max_length": 16,
            "partition.by": "client",
            "strategy.name": "fedit",
            "adapter.targets": targets,
            "adapter.rank": 2,
            "train.local_steps": 1,
            "train.batch_size": 4,
            "train.learning_rate": 0.05,
            "federation.rounds": 2,
            "simulation.workers": 0,
        }
        words |= {name.replace("__", "."): value for name, value in settings.items()}
        return with_typed_options(resolve([nest({name: v for name, v in words.items() if v is not None})]))

    def adapted(self, targets: str, **settings: object) -> AdaptedModel:
        config = self.config(targets, **settings)
        return AdaptedModel(load_base(config, self.base, ()), config)

    def plain(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.base)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp("mixture"))


def updates_in_peft(mixture: Mixture, adapter: Path) -> dict[str, Tensor]:
    """Return what PEFT's own merge adds to every parameter of the base, in float64."""
    before = {name: tensor.double().clone() for name, tensor in mixture.plain().named_parameters()}
    merged: Any = PeftModel.from_pretrained(mixture.plain().double(), str(adapter)).merge_and_unload()
    return {name: tensor.detach() - before[name] for name, tensor in merged.named_parameters()}


def found(updates: Mapping[str, Tensor], layer: str) -> Tensor:
    """Return the update of one expert or embedding, ``(d_out, d_in)``, by the name that the layer has in a run."""
    name = bare(layer).removeprefix("base_model.model.")
    if is_embedding(layer):
        return updates[f"{name}.weight"].T
    module = next(module for module in PARAMETERS if name.endswith(module))
    whole = updates[f"{name.removesuffix('.base_layer')}.{PARAMETERS[module]}"]
    return whole[int(layer.partition("#")[2])]


def whole(state: AdapterState, layer: str) -> Tensor:
    """Return the update that a method has made of a layer, the change of the base included, as one dense matrix."""
    f = state.factors[layer]
    update = f.scaling * (f.B.double() @ f.A.double())
    return update + dense(state.base[layer]) if layer in state.base else update


def able(method: type[AdapterStrategy]) -> bool:
    return method.capabilities.takes(KINDS.find("lora"))


REFUSED = {
    "frlora": "adapter.init = 'pissa' is for linear layers alone",
    "fedsvd": "trains B alone, and of an embedding, such as 'model.embed_tokens'",
}


@pytest.mark.parametrize("method", sorted(name for name, each in available().items() if able(each)))
def test_what_a_method_makes_of_each_expert_and_embedding_is_what_peft_adds(
    method: str, mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cohorts = [], []
    strategy = available()[method]
    aggregate = strategy.aggregate

    def watched(
        self: AdapterStrategy, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1
    ) -> AdapterState:
        cohorts.append(list(updates))
        made.append(aggregate(self, iter(cohorts[-1]), current, server_round))
        return made[-1]

    monkeypatch.setattr(strategy, "aggregate", watched)
    config = mixture.config(f"{EXPERTS},{TOKENS}", strategy__name=method, run__aggregation_error=False)
    if method in REFUSED:
        with pytest.raises(FedpeftError, match=REFUSED[method]):
            simulate(config, tmp_path / "run")
        return
    run = simulate(config, tmp_path / "run").path
    state = made[-1]
    assert len(state.factors) == 7  # three experts have two matrices each
    updates = updates_in_peft(mixture, run / "adapter")
    if strategy.capabilities.personal:  # whose product the server never has
        return
    for layer in state.factors:
        expected = whole(state, layer)
        assert expected.abs().max() > 0
        torch.testing.assert_close(found(updates, layer), expected, rtol=1e-4, atol=1e-7)
        if strategy.capabilities.exact.startswith("always"):
            mean = sum(each.num_examples * whole(AdapterState(each.factors), layer) for each in cohorts[-1])
            mean = mean / sum(each.num_examples for each in cohorts[-1])
            moved = dense(made[-2].base[layer]) if layer in made[-2].base else 0
            torch.testing.assert_close(expected, mean + moved, rtol=1e-4, atol=1e-6)


def test_fixed_factors_of_experts_stay_as_drawn_and_those_of_embeddings_are_refused(
    mixture: Mixture, tmp_path: Path
) -> None:
    run = simulate(mixture.config(EXPERTS, adapter__kind="ffa-lora"), tmp_path / "run")
    drawn = mixture.adapted(EXPERTS, adapter__kind="ffa-lora")
    assert len(drawn.frozen) == 6
    updates = updates_in_peft(mixture, run.path / "adapter")
    for layer, f in AdapterState.from_tensors(drawn.initial, 1.0).factors.items():
        update = found(updates, layer)
        assert update.abs().max() > 0
        rows = torch.linalg.lstsq(f.A.double().T, update.T).solution  # within what A as drawn can reach
        torch.testing.assert_close(rows.T @ f.A.double(), update, rtol=1e-4, atol=1e-7)
    with pytest.raises(AdapterError, match="keeps A as it is drawn, and of an embedding, such as"):
        mixture.adapted(f"q_proj,{TOKENS}", adapter__kind="ffa-lora")


def test_clients_of_different_ranks_train_experts_and_embeddings(mixture: Mixture, tmp_path: Path) -> None:
    ranks = {"adapter__ranks": "1,3", "adapter__rank": 3}
    run = simulate(mixture.config(f"{EXPERTS},{TOKENS}", strategy__name="flora", **ranks), tmp_path / "run").path
    scores = [event["loss"] for event in read_events(run) if event["event"] == "evaluate"]
    updates = updates_in_peft(mixture, run / "adapter")
    assert sum(bool(update.any()) for update in updates.values()) == 3
    begun = mixture.config(None, adapter__rank=None, adapter__start=str(run / "adapter"), federation__rounds=1)
    again = simulate(begun, tmp_path / "again").path
    began = next(event["loss"] for event in read_events(again) if event["event"] == "evaluate")
    assert began == pytest.approx(scores[-1], rel=1e-5)


def test_a_rows_gradient_is_that_of_the_row_alone_and_a_private_run_trains(mixture: Mixture, tmp_path: Path) -> None:
    private = {"privacy__level": "record", "privacy__noise_multiplier": 0.5, "privacy__physical_batch_size": 3}
    home = resident(mixture.config(f"{EXPERTS},{TOKENS},q_proj", **private, federation__rounds=1))
    engine, adapted = row_engine(home), home.adapted  # which proves that rows are independent
    torch.manual_seed(5)
    parameters = adapted.begin_training(adapted.trained)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)
    for batch in ([4, 0, 9], []):
        engine.reset()
        engine.backward(home.data.train.batch(batch), "fp32")
        engine.check(parameters, len(batch))
        found = [getattr(parameter, "grad_sample", None) for parameter in parameters]
        for place, row in enumerate(batch):
            adapted.model.zero_grad()
            adapted.model(**home.data.train.batch([row])).loss.backward()
            for parameter, sample in zip(parameters, found, strict=True):
                expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(sample[place], expected, rtol=1e-4, atol=1e-7)
    noise, inputs = EmbeddingNoise(adapted.model, 5.0, torch.ones_like), home.data.train.batch([4])
    engine.reset()
    engine.backward(inputs, "fp32", noise)
    noised = [getattr(parameter, "grad_sample", None) for parameter in parameters]
    adapted.model.zero_grad()
    with noise.of(inputs):
        adapted.model(**inputs).loss.backward()
    for parameter, sample in zip(parameters, noised, strict=True):
        torch.testing.assert_close(sample[0], parameter.grad, rtol=1e-4, atol=1e-7)
    adapted.model.zero_grad()
    adapted.model(**inputs).loss.backward()
    assert any(not torch.allclose(sample[0], p.grad, rtol=1e-2) for p, sample in zip(parameters, noised, strict=True))
    run = simulate(home.config, tmp_path / "run").path
    assert all(update.abs().max() > 0 for update in changes(mixture, run / "adapter").values())


def changes(mixture: Mixture, adapter: Path) -> dict[str, Tensor]:
    """Return those of PEFT's updates that are of experts or embeddings."""
    named = {"embed_tokens.weight", "experts.gate_up_proj", "experts.down_proj"}
    updates = updates_in_peft(mixture, adapter)
    return {name: update for name, update in updates.items() if ".".join(name.split(".")[-2:]) in named}


FAMILIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gpt-oss": (transformers.GptOssConfig, {"num_local_experts": 3, "head_dim": 8}, EXPERTS),  # (E, d_in, d_out)
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 3, "moe_intermediate_size": 8, "head_dim": 8},
        f"all-linear,{EXPERTS}",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_compute_in_peft_as_here_however_a_family_holds_them(family: str, tmp_path: Path) -> None:
    kind, own, targets = FAMILIES[family]
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(kind(**{**SHAPE, **own})).save_pretrained(tmp_path / "base")
    words = {"model.name": str(tmp_path / "base"), "model.task": "causal-lm", "adapter.rank": 2}
    config = resolve([nest({**words, "adapter.targets": targets})])
    live = AdaptedModel(load_base(config, tmp_path / "base", ()), config)
    assert len(live.stacks) == 2
    moved = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in live.initial.items()}
    live.load(moved, live.scaling)
    live.save(tmp_path / "adapter", AdapterState.from_tensors(moved, live.scaling), ())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(input_ids=tokens).logits
        here = live.model(input_ids=tokens).logits
    assert not torch.allclose(here, before, atol=1e-4)
    torch.testing.assert_close(here, theirs)


@pytest.mark.parametrize(
    ("targets", "settings", "says"),
    [
        ("gate_up_proj", {}, "experts go by their module, so name it: adapter.targets=experts.gate_up_proj"),
        ("re:.*experts.*", {}, "an expression reaches linear layers alone, so name it"),
        ("experts.up_proj", {}, "matches no linear module"),
        (EXPERTS, {"adapter__kind": "dora"}, "'dora' adapts linear layers alone, and .* is a stack of experts"),
        (TOKENS, {"adapter__kind": "lora-xs"}, "'lora-xs' adapts linear layers alone, and .* is an embedding"),
        (EXPERTS, {"adapter__init": "olora"}, "'olora' is for linear layers alone"),
        (EXPERTS, {"adapter__dropout": 0.1}, "drops inputs of linear layers, and .*; leave it at 0"),
        (EXPERTS, {"adapter__rank": 17}, "rank = 17 is larger than layer 'model.layers.0.mlp.experts"),
    ],
)
def test_what_cannot_be_done_with_experts_and_embeddings_is_named(
    targets: str, settings: dict[str, object], says: str, mixture: Mixture
) -> None:
    with pytest.raises((AdapterError, ConfigError), match=says):
        mixture.adapted(targets, **settings)


def test_an_adapter_of_pefts_own_on_experts_and_embeddings_is_begun_with(mixture: Mixture, tmp_path: Path) -> None:
    """PEFT saves the base's embeddings beside their factors, and knows experts by a part of their names."""
    torch.manual_seed(3)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", TOKENS],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"embed_tokens": 3},
        init_lora_weights=False,
    )
    theirs = get_peft_model(mixture.plain(), settings).eval()
    theirs.save_pretrained(tmp_path)
    words = {"model.name": str(mixture.base), "model.task": "causal-lm", "adapter.start": str(tmp_path)}
    config = with_typed_options(resolve([nest(words)]))
    assert config.adapter.rank == 3
    assert [name.rpartition(".")[2] for name in config.adapter.targets or ()] == [
        *("embed_tokens", "down_proj", "gate_up_proj", "q_proj"),
    ]
    live = AdaptedModel(load_base(config, mixture.base, ()), config)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(live.model(input_ids=tokens).logits, theirs(input_ids=tokens).logits)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (name,) = (name for name in tensors if name.endswith("base_layer.weight"))
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "adapter_model.safetensors")
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"start_sha256": None})})
    with pytest.raises(AdapterError, match="embeddings that were resized or trained"):
        AdaptedModel(load_base(config, mixture.base, ()), config)
