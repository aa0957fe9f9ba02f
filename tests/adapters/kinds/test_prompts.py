"""Virtual tokens: what they are put before, and what of them is averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedpeft.adapters.kinds import KINDS
from fedpeft.adapters.state import AdapterState
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.resident import Resident

Make = Callable[..., RunConfig]
PROMPTS = [name for name, kind in KINDS.ours.items() if kind.prompts]
SHORT = {"data__max_length": 40}


def causal(llama: Path, pairs: Path, kind: str, **own: Any) -> Resident:
    settings = {"model.name": str(llama), "model.task": "causal-lm", "data.source": str(pairs)}
    settings |= {"federation.clients": 2, "adapter.kind": kind, "adapter.num_virtual_tokens": 3, **own}
    return Resident(resolve([nest(settings)]))


@pytest.mark.parametrize("kind", PROMPTS)
def test_logits_of_a_causal_model_are_those_of_the_texts_tokens(kind: str, tiny_llama: Path, pairs_jsonl: Path) -> None:
    home = causal(tiny_llama, pairs_jsonl, kind, **{"data.max_length": 40})
    inputs = home.data.test.batch(np.arange(4))
    model: Any = home.adapted.model.eval()
    with torch.no_grad():
        output = model(**inputs)
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    labels = inputs["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, output.loss)


@pytest.mark.parametrize("kind", PROMPTS)
def test_more_tokens_than_the_model_has_positions_are_one_clear_error(
    kind: str, tiny_llama: Path, pairs_jsonl: Path
) -> None:
    with pytest.raises(AdapterError, match=r"= 3 and data.max_length = 128 are more than the 128 .*125 or"):
        _ = causal(tiny_llama, pairs_jsonl, kind, **{"data.max_length": 128}).adapted
    with pytest.raises(AdapterError, match=r"adapter.num_virtual_tokens = -1: .*at least 1"):
        _ = causal(tiny_llama, pairs_jsonl, kind, **{"data.max_length": 40, "adapter.num_virtual_tokens": -1}).adapted


@pytest.mark.parametrize("kind", PROMPTS)
def test_images_have_no_tokens_to_stand_before(kind: str, tiny_vit: Path, image_folder: Path) -> None:
    settings = {"model.name": str(tiny_vit), "data.source": str(image_folder), "data.image": "image"}
    config = resolve([nest({**settings, "federation.clients": 2, "adapter.kind": kind})])
    with pytest.raises(AdapterError, match=rf"'{kind}'.*'image-classification' has no texts; use another"):
        _ = Resident(config).adapted


def test_a_prefix_goes_before_causal_models_alone(text_config: Make) -> None:
    with pytest.raises(AdapterError, match=r"PrefixTuningConfig.*BertForSequenceClassification.*Take another"):
        _ = Resident(text_config(adapter__kind="prefix-tuning", **SHORT)).adapted


@pytest.mark.parametrize("kind", ["prompt-tuning", "p-tuning"])
def test_a_classifier_that_would_answer_from_the_padding_is_refused(
    kind: str, text_config: Make, tiny_llama: Path
) -> None:
    with pytest.raises(AdapterError, match=r"LlamaForSequenceClassification\): .* reads its answer from the padding"):
        _ = Resident(text_config(adapter__kind=kind, model__name=str(tiny_llama), **SHORT)).adapted


@pytest.mark.parametrize("kind", PROMPTS)
def test_no_modules_can_be_targets_of_virtual_tokens(kind: str, text_config: Make) -> None:
    with pytest.raises(AdapterError, match=r"adapter.targets = query: .*drop it"):
        _ = Resident(text_config(adapter__kind=kind, adapter__targets="query", **SHORT)).adapted


def test_networks_of_p_tuning_are_averaged_and_what_they_make_is_exported(text_config: Make, tmp_path: Path) -> None:
    home = Resident(text_config(adapter__kind="p-tuning", adapter__num_virtual_tokens=3, **SHORT))
    adapted = home.adapted
    assert {name for name in adapted.trained if "mlp_head" in name}
    adapted.save(tmp_path, AdapterState.from_tensors(adapted.initial, adapted.scaling), home.labels)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    model: Any = adapted.model
    torch.testing.assert_close(saved["prompt_embeddings"], model.get_prompt_embedding_to_save("default"))
    assert not any("prompt_encoder" in name for name in saved)


@pytest.mark.parametrize("key", ["rank", "alpha", "dropout", "token_dim"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_what_prompts_have_not_or_the_model_decides_cannot_be_given(kind: str, key: str, text_config: Make) -> None:
    with pytest.raises(ConfigError, match=f"adapter.{key}"):
        text_config(adapter__kind=kind, **{f"adapter__{key}": 0.5 if key == "dropout" else 4})
