"""Every kind and every initialisation of adapters, on a base small enough to do all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from fedpeft.adapters import initial
from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.kinds import INITS, KINDS
from fedpeft.adapters.state import AdapterState, ClientUpdate, Role, role_of
from fedpeft.config import AdapterConfig, RunConfig, nest, resolve
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import AdapterError, ConfigError, FedpeftError
from fedpeft.models import load_base
from fedpeft.resident import Resident
from fedpeft.strategies import STRATEGIES, available, with_typed_options
from fedpeft.strategies.fedit import FedIt
from fedpeft.tasks.encoding import encode_rows
from fedpeft.training.local import Turn, train_locally

Make = Callable[..., RunConfig]
NAMES = sorted(KINDS.ours)
SQUARE = sorted(name for name, kind in KINDS.ours.items() if kind.update == "square")
PRODUCT = {name for name, kind in KINDS.ours.items() if kind.update == "product"}
BEGUN = ("default", "pissa", "olora", "eva", "lora-ga")


def home(make: Make, kind: str, **settings: Any) -> Resident:
    if kind == "lora-sb":
        settings.setdefault("adapter__init_data", make().data.source)
    return Resident(make(adapter__kind=kind, adapter__targets="query,value,intermediate.dense", **settings))


def trained(held: Resident, client: int = 0) -> dict[str, Tensor]:
    """Train what the adapter holds for two steps: with B at zero, the first moves B alone."""
    train_locally(
        held.adapted,
        held.data.train,
        held.partition.indices[client],
        held.config.train.model_copy(update={"local_steps": 2}),
        Turn(0, str(client), 1, 2),
    )
    return held.adapted.tensors(held.adapted.initial)


def is_head(name: str) -> bool:
    return ".classifier." in name or ".pooler." in name


def logits(model: Any, held: Resident) -> Tensor:
    model.eval()
    inputs = held.data.test.batch(np.arange(6))
    inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def original(held: Resident) -> Any:
    """Return the base as it is without any adapter."""
    return load_base(held.config, held.folder, held.labels).model


def same_as_peft_loads(held: Resident, tensors: dict[str, Tensor], folder: Path) -> bool:
    adapted = held.adapted
    adapted.load(tensors, adapted.scaling)
    adapted.save(folder, AdapterState.from_tensors(tensors, adapted.scaling), held.labels)
    other = held.config.model_copy(update={"run": held.config.run.model_copy(update={"seed": 9})})
    loaded = PeftModel.from_pretrained(load_base(other, held.folder, held.labels).model, str(folder))
    return torch.allclose(logits(loaded, held), logits(adapted.model, held), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["server_optimizer=avgm", "robust=median", "robust=norm-clip"])
@pytest.mark.parametrize("kind", ["lora-xs", "lora-sb", "vera", "dora"])
def test_robust_means_and_server_optimizers_take_every_tensor(kind: str, method: str, text_config: Make) -> None:
    held = home(text_config, kind)
    adapted = held.adapted
    tensors = trained(held)
    state = AdapterState.from_tensors(tensors, adapted.scaling)
    dense = {name: tensor for name, tensor in state.dense.items() if name not in adapted.frozen}
    updates = [ClientUpdate(str(client), 5, state.factors, dense) for client in range(3)]
    name, _, value = method.partition("=")
    fedit = FedIt(scaling=adapted.scaling, frozen=adapted.frozen, **{name: value})
    current = AdapterState.from_tensors(adapted.initial, adapted.scaling)
    merged = fedit.aggregate(updates, current).to_tensors()
    for key in tensors:
        torch.testing.assert_close(merged[key], tensors[key])
        assert key in adapted.trained or torch.equal(merged[key], adapted.initial[key])


def public(text_csv: Path, init: str) -> dict[str, Any]:
    return {"adapter__init": init, **({"adapter__init_data": str(text_csv)} if INITS.find(init).from_data else {})}


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("init", BEGUN)
def test_an_initialisation_changes_a_but_no_output(
    init: str, kind: str, text_config: Make, text_csv: Path, tmp_path: Path
) -> None:
    held = home(text_config, kind, **public(text_csv, init))
    adapted = held.adapted
    again = home(text_config, kind, **public(text_csv, init)).adapted
    assert all(torch.equal(tensor, again.initial[name]) for name, tensor in adapted.initial.items())
    assert all(
        torch.equal(tensor, dict(again.model.named_parameters())[name])
        for name, tensor in adapted.model.named_parameters()
    )
    drawn = home(text_config, kind).adapted
    for name in adapted.initial:
        assert role_of(name) is not Role.A or torch.equal(adapted.initial[name], drawn.initial[name]) == (
            init == "default"
        )
    base = logits(original(held), held)
    torch.testing.assert_close(logits(adapted.model, held), base, rtol=1e-4, atol=1e-5)
    assert bool(adapted.offset) == INITS.find(init).of_base

    begun = AdapterState.from_tensors(adapted.initial, adapted.scaling)
    adapted.save(tmp_path / "begun", begun, held.labels)
    loaded = PeftModel.from_pretrained(original(held), str(tmp_path / "begun"))
    for layer in begun.factors:
        assert loaded.get_submodule(layer).get_delta_weight("default").abs().max() < 1e-6
    assert same_as_peft_loads(held, trained(held), tmp_path / "trained")


def test_pissa_takes_the_principal_part_out_of_the_base(text_config: Make) -> None:
    held = home(text_config, "rslora", adapter__init="pissa")
    weights = dict(original(held).named_parameters())
    for layer, f in held.adapted.offset.items():
        W = weights[layer.removeprefix("base_model.model.") + ".weight"].double()
        U, S, Vt = torch.linalg.svd(W)
        r = f.rank
        torch.testing.assert_close(f.product().double(), U[:, :r] * S[:r] @ Vt[:r], rtol=1e-4, atol=1e-5)
        left = held.adapted.model.get_submodule(layer).get_base_layer().weight
        torch.testing.assert_close(left.double(), W - f.product().double(), rtol=1e-4, atol=1e-6)


def test_lora_xs_trains_r_between_singular_vectors_of_the_base(text_config: Make) -> None:
    held = home(text_config, "lora-xs")
    adapted = held.adapted
    state = AdapterState.from_tensors(adapted.initial, adapted.scaling)
    weights = dict(original(held).named_parameters())
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    drawn = []
    for layer, f in state.factors.items():
        W = weights[layer.removeprefix("base_model.model.") + ".weight"].detach().double()
        U, S, Vt = torch.linalg.svd(W)
        r = f.rank
        assert f.R is not None
        assert f.R.shape == (r, r)
        drawn.append(f.R)
        assert_close(f.B.double().T @ f.B.double(), torch.eye(r).double())
        assert_close(f.B.double() @ f.A.double(), U[:, :r] * S[:r] @ Vt[:r])  # whatever the vectors' signs
        assert_close(f.A.double() @ f.A.double().T, torch.diag(S[:r] ** 2))
    assert 0.3e-5 < torch.stack(drawn).std() < 3e-5
    assert not torch.equal(drawn[0], drawn[1])  # each layer draws its own
    assert [role_of(name) for name in adapted.trained if not is_head(name)] == [Role.R] * len(state.factors)


def gradients(held: Resident, rows: EncodedSplit, names: list[str]) -> dict[str, Tensor]:
    """Return the mean gradient of each weight over all rows, one row after the other."""
    model = original(held)
    weights = [model.get_parameter(f"{name}.weight").requires_grad_(True) for name in names]
    for index in range(len(rows)):
        (model(**rows.batch(np.array([index]))).loss / len(rows)).backward()
    return {name: weight.grad.double() for name, weight in zip(names, weights, strict=True)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_lora_sb_begins_at_the_first_step_on_public_rows(optimizer: str, text_config: Make) -> None:
    lr, enough = 0.02, {"train__batch_size": 16}  # for eight batches to hold all public rows
    settings = {"train__optimizer": optimizer, "train__learning_rate": lr, "adapter__alpha": 6.0, **enough}
    held = home(text_config, "lora-sb", **settings)
    adapted = held.adapted
    assert adapted.offset == {}  # the start is part of the update
    state = AdapterState.from_tensors(adapted.initial, adapted.scaling)
    names = [layer.removeprefix("base_model.model.") for layer in state.factors]
    rows = encode_rows(held.config, held.folder, str(held.config.adapter.init_data), held.labels)
    G = gradients(held, rows, names)
    for layer, f in state.factors.items():
        assert f.R is not None
        for gram in (f.B.double().T @ f.B.double(), f.A.double() @ f.A.double().T):
            torch.testing.assert_close(gram, torch.eye(f.rank).double(), rtol=0, atol=1e-6)
        g = G[layer.removeprefix("base_model.model.")]
        if g.abs().median() < 1e-6:  # of this random model's queries: mostly rounding
            continue
        U, S, Vt = torch.linalg.svd(-lr * (g if optimizer == "sgd" else g / (g.abs() + 1e-8)))
        r = f.rank
        close = partial(torch.testing.assert_close, rtol=0, atol=2e-3 * float(S[0]))
        close(f.scaling * f.R.double(), torch.diag(S[:r]))
        close(f.product().double(), U[:, :r] * S[:r] @ Vt[:r])
        names.remove(layer.removeprefix("base_model.model."))
    assert all("query" in name for name in names)


@pytest.mark.parametrize("kind", SQUARE)
def test_the_gradient_of_r_is_that_of_the_weight_between_b_and_a(kind: str, text_config: Make) -> None:
    adapted = home(text_config, kind).adapted
    name = "base_model.model.bert.encoder.layer.0.intermediate.dense"
    layer: Any = adapted.model.get_submodule(name)
    f = AdapterState.from_tensors(adapted.initial, adapted.scaling).factors[name]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, f.A.shape[1], generator=draw)
    up = torch.randn(5, f.B.shape[0], generator=draw)  # the gradient of the outputs
    adapted.begin_training([f"{name}.lora_R.weight"])
    layer(x).backward(up)
    G = up.double().T @ x.double()  # that of W
    expected = f.scaling * f.B.double().T @ G @ f.A.double().T
    grad = adapted.parameter(f"{name}.lora_R.weight").grad
    assert grad is not None
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_lora_sb_is_named_by_its_kind_or_its_start_and_needs_public_rows(text_config: Make) -> None:
    given = {"adapter__init_data": "public.csv"}
    both = {"adapter__kind": "lora-sb", "adapter__init": "lora-sb-gradient"}
    configs = [text_config(**given, **{key: both[key]}) for key in both] + [text_config(**given, **both)]
    assert all(config == configs[0] for config in configs)
    typed = with_typed_options(text_config(strategy__name="fed-sb", adapter__init="lora-sb-gradient", **given))
    assert (typed.adapter.kind, typed.adapter.init) == ("lora-sb", "lora-sb-gradient")
    assert with_typed_options(text_config(strategy__name="fed-sb")).adapter.kind == "lora-xs"
    for init in ({}, {"adapter__init": "default"}):  # as this kind was written when it was LoRA-XS
        with pytest.raises(ConfigError, match=r"'lora-sb' begins at a gradient.*public rows.*adapter.kind = 'lora-xs'"):
            text_config(adapter__kind="lora-sb", **init)


def test_rows_without_a_gradient_cannot_start_lora_sb(text_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weights, **_: [None for _ in weights])
    with pytest.raises(AdapterError, match=r"'lora-sb-gradient': layer '.*' got no finite gradient"):
        _ = home(text_config, "lora-sb").adapted


def test_rslora_scales_by_the_root_of_the_rank(text_config: Make) -> None:
    config = AdapterConfig(kind="rslora", rank=4, alpha=8)
    assert config.scaling == 4.0
    assert config.scaling_of(16) == 2.0
    adapted = home(text_config, "rslora").adapted
    layer = next(iter(AdapterState.from_tensors(adapted.initial, 1.0).factors))
    assert adapted.model.get_submodule(layer).scaling["default"] == pytest.approx(4 / math.sqrt(2)) == adapted.scaling


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "init"), [*((kind, "default") for kind in NAMES), ("lora", "pissa"), ("lora", "olora")]
)
def test_transposed_layers_are_adapted_or_refused(
    kind: str, init: str, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: dict[str, Any]
) -> None:
    settings = {"model.name": str(gpt2), "model.task": "causal-lm"}
    settings |= {name.replace("__", "."): value for name, value in small.get(kind, {}).items()}
    settings |= {} if "rank" in KINDS.find(kind).lacks else {"adapter.rank": 2}
    if kind == "lora-sb":
        init = "lora-sb-gradient"
        rows = tmp_path / "rows.csv"
        rows.write_text("prompt,completion\na,b\n")
        settings["adapter.init_data"] = str(rows)
        batch = torch.arange(2, 14).reshape(2, 6)
        monkeypatch.setattr(initial, "public_batches", lambda *_: [{"input_ids": batch, "labels": batch}])
    config = resolve([nest({**settings, "adapter.kind": kind, "adapter.init": init})])
    if not KINDS.find(kind).conv1d or init == "olora":
        with pytest.raises(AdapterError, match=r"(adapter\.kind|adapter\.init).*c_attn.*Conv1D"):
            AdaptedModel(load_base(config, gpt2, ()), config)
        return
    adapted = AdaptedModel(load_base(config, gpt2, ()), config)
    tokens = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        base = load_base(config, gpt2, ()).model(tokens).logits
        if kind != "lora-sb" and not KINDS.find(kind).moved(adapted.peft_config):  # the first begins one step away
            torch.testing.assert_close(adapted.model(tokens).logits, base, rtol=1e-4, atol=1e-5)
        moved = {n: t + 0.1 if n in adapted.trained else t for n, t in adapted.initial.items()}
        adapted.load(moved, adapted.scaling)
        after = adapted.model.eval()(tokens).logits
        assert not torch.allclose(after, base, atol=1e-4)
        adapted.save(tmp_path, AdapterState.from_tensors(moved, adapted.scaling), ())
        loaded = PeftModel.from_pretrained(load_base(config, gpt2, ()).model, str(tmp_path))
        again = loaded(tokens).logits[:, -tokens.shape[1] :]  # PEFT gives those of virtual tokens too
        torch.testing.assert_close(again, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_method_takes_the_kinds_that_it_declares(name: str, text_config: Make) -> None:
    kinds = available()[name].capabilities.kinds
    everything = set(NAMES)
    assert kinds == {**dict.fromkeys(("fedit", "scaffold", "local"), everything), "fed-sb": set(SQUARE)}.get(
        name, kinds & PRODUCT
    )
    rows = {"lora-sb": {"adapter__init_data": "public.csv"}}
    for kind in everything - kinds:
        with pytest.raises(ConfigError, match=rf"strategy '{name}'.*'{kind}'.*Allowed: .*{min(kinds)}"):
            with_typed_options(text_config(strategy__name=name, adapter__kind=kind, **rows.get(kind, {})))
    if name in ("fedit", "fed-sb"):
        for kind in kinds:
            with_typed_options(text_config(strategy__name=name, adapter__kind=kind, **rows.get(kind, {})))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapter.kind": "vera", "adapter.init": "pissa"}, "adapter.init = 'pissa' is not for adapter.kind = 'vera'"),
        ({"adapter.kind": "ffa-lora", "adapter.init": "olora"}, "Allowed: default, gaussian; .*lora, rslora"),
        ({"adapter.kind": "loha", "adapter.dropout": 0.1}, "adapter.dropout = 0.1 .*'loha'.*leave it at 0"),
        ({"adapter.init": "pissa", "adapter.ranks": "2,4"}, "'pissa' takes ranks out of the base.*adapter.ranks = 2,4"),
        ({"adapter.init": "eva"}, "'eva' needs adapter.init_data.*public"),
        ({"adapter.init": "pissa", "adapter.init_data": "x.csv"}, "'x.csv' belongs to .*'eva' or 'lora-ga'.*drop it"),
        ({"adapter.init": "lora-sb-gradient"}, "'lora-sb' begins at a gradient .*needs adapter.init_data"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        resolve([nest(settings)])
    assert "\n" not in str(caught.value)


def test_every_initialisation_is_for_some_kind_and_every_kind_has_one() -> None:
    assert {init for kind in KINDS.ours.values() for init in kind.inits} == INITS.ours.keys()
    assert all(
        init.kind in {"", *(n for n in NAMES if name in KINDS.find(n).inits)} for name, init in INITS.ours.items()
    )


def test_lora_ga_needs_twice_the_ranks(text_config: Make, text_csv: Path) -> None:
    with pytest.raises(AdapterError, match=r"'lora-ga' takes 2 x adapter\.rank.*at most rank 8"):
        _ = home(text_config, "lora", adapter__rank=9, **public(text_csv, "lora-ga")).adapted


def test_eva_says_when_the_public_rows_are_too_few(text_config: Make, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("text,label,client\nw1 w2,yes,a\nw3,no,a\n")
    few = {"adapter__init": "eva", "adapter__init_data": str(tmp_path / "few.csv"), "adapter__rank": 8}
    with pytest.raises(AdapterError, match=r"'eva' did not settle.*adapter\.init_data; give more rows"):
        _ = home(text_config, "lora", **few).adapted


def test_public_rows_must_exist(text_config: Make) -> None:
    with pytest.raises(FedpeftError, match="nowhere"):
        _ = home(text_config, "lora", adapter__init="eva", adapter__init_data="nowhere.csv").adapted


@pytest.mark.parametrize("init", ["eva", "lora-ga", "lora-sb-gradient"])
def test_images_and_prompts_initialise_too(
    init: str, tiny_vit: Path, image_folder: Path, tiny_llama: Path, pairs_jsonl: Path
) -> None:
    for model, rows in ((tiny_vit, image_folder), (tiny_llama, pairs_jsonl)):
        settings = {"model.name": str(model), "data.source": str(rows), "adapter.rank": 2, "federation.clients": 2}
        columns = ("prompt", "completion") if rows is pairs_jsonl else ("image",)
        settings |= {f"data.{column}": column for column in columns}
        config = resolve([nest({**settings, "adapter.init": init, "adapter.init_data": str(rows)})])
        begun, drawn = (Resident(each).adapted.initial for each in (config, resolve([nest(settings)])))
        assert not any(torch.equal(begun[name], drawn[name]) for name in begun if role_of(name) is Role.A)
