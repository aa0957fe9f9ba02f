"""Whose tensor a name is."""

from __future__ import annotations

import re

import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from fedpeft.adapters.kinds import KINDS
from fedpeft.adapters.kinds.names import ROWS, is_of_a_kind
from fedpeft.adapters.state import Role, role_of
from fedpeft.errors import AdapterError

LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("tuner", sorted(PEFT_TYPE_TO_TUNER_MAPPING, key=str))
def test_every_tensor_of_pefts_tuners_is_a_kinds_or_refused(tuner: object) -> None:
    of_peft = PEFT_TYPE_TO_TUNER_MAPPING[tuner]  # type: ignore[index]
    for part in getattr(getattr(of_peft, "tuner_layer_cls", None), "adapter_layer_names", ()):
        if part.startswith(ROWS):
            continue
        name = f"{LAYER}.{part}.default"
        if any(part.startswith(own) for kind in KINDS.ours.values() for own in kind.parts):
            assert role_of(name) is Role.PARAMETER
        else:
            with pytest.raises(AdapterError, match=re.escape(name)):
                role_of(name)


@pytest.mark.parametrize("name", ["internal_xlora_classifier", f"{LAYER}.lora_embedding_A", f"{LAYER}.poly_lora_A"])
def test_what_no_kind_claims_is_never_taken_for_a_head(name: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(f"'{name}'")):
        role_of(name)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.classifier.weight",
        "classifier.out_proj.bias",
        "base_model.model.score.weight",
        "base_model.model.bert.pooler.dense.weight",
        "base_model.model.explorer_lora_A.weight",  # a part that only ends so
        "base_model.model.embed.trainable_tokens_delta",
    ],
)
def test_the_head_and_rows_of_the_models_embeddings_are_no_adapter(name: str) -> None:
    assert not is_of_a_kind(name)
    assert role_of(name) is Role.HEAD
