"""Which of PEFT's tuners a run can train."""

from __future__ import annotations

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from fedpeft.adapters.kinds import KINDS
from fedpeft.adapters.kinds.refused import REFUSED
from fedpeft.config import nest, resolve
from fedpeft.errors import ConfigError

TAKEN = {getattr(peft, kind.config) for kind in KINDS.ours.values()}


@pytest.mark.parametrize("tuner", sorted(PeftType))
def test_every_tuner_of_the_installed_peft_is_a_kind_or_refused_with_a_reason(tuner: PeftType) -> None:
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(tuner) in TAKEN
    assert known != (tuner.value.lower() in REFUSED), "a new tuner of PEFT: make it a kind, or say why it cannot be one"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_kind_says_why_in_one_line(name: str) -> None:
    for spelt in {name, name.replace("_", "-")}:
        with pytest.raises(ConfigError) as caught:
            resolve([nest({"adapter.kind": spelt})])
        assert f"adapter.kind = '{spelt}' cannot be had: {REFUSED[name]}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_refused_names_are_of_peft_and_no_kinds() -> None:
    assert REFUSED.keys().isdisjoint(kind.replace("-", "_") for kind in KINDS.ours)
    assert {tuner.value.lower() for tuner in PeftType} | {"mixed"} >= REFUSED.keys()
