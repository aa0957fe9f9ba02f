"""JSON is strict: what has no form in it is an error, and never text by a guess."""

from __future__ import annotations

import ast
import json
from enum import StrEnum
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from fedpeft.jsons import strict_json, to_json

ROOT = Path(__file__).parents[1]


class Colour(StrEnum):
    RED = "red"


def test_values_of_all_kinds_become_what_json_knows() -> None:
    given = {
        "set": {"b", "a"},
        "frozen": frozenset({2, 1}),
        "path": PurePosixPath("a/b"),
        "enum": Colour.RED,
        Colour.RED: True,
        "numbers": [np.float32(0.5), np.int64(3), np.bool_(True), float("nan"), np.float64("inf"), np.float32("nan")],
        "array": np.arange(4).reshape(2, 2),
        "tuple": (None, "ä"),
        7: {np.int64(8): "whole numbers are keys"},
    }
    assert json.loads(to_json(given)) == {
        "set": ["a", "b"],
        "frozen": [1, 2],
        "path": "a/b",
        "enum": "red",
        "red": True,
        "numbers": [0.5, 3, True, None, None, None],
        "array": [[0, 1], [2, 3]],
        "tuple": [None, "ä"],
        "7": {"8": "whole numbers are keys"},
    }
    assert to_json({"b": 1, "a": "ä"}, sort_keys=True, ensure_ascii=False) == '{"a": "ä", "b": 1}'


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": {"b": [0, object()]}}, r"'a\.b\[1\]' is of type object"),
        ({"a": torch.zeros(2)}, "'a' is of type Tensor"),
        ({"a": b"bytes"}, "'a' is of type bytes"),
        ({"a": {1.5: 0}}, "'a' has the key 1.5, of type float"),
        ({"a": {None: 0}}, "has the key None"),
        ({1: 0, "1": 0}, "two keys that JSON writes as '1'"),
        ({"a": {1, "b"}}, "'a' is a set whose members have no order"),
        (object(), "what is to be written is of type object"),
    ],
)
def test_what_has_no_form_is_an_error_that_names_its_key(value: object, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        strict_json(value)


def test_nothing_in_the_tree_turns_values_into_text_by_default() -> None:
    found, calls = [], 0
    for folder in ("fedpeft", "strategies", "clients", "simulations", "benchmarks", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                name = node.func if isinstance(node, ast.Call) else None
                if isinstance(node, ast.Call) and getattr(name, "attr", getattr(name, "id", "")) in ("dump", "dumps"):
                    calls += 1
                    if any(keyword.arg in ("default", "cls", "skipkeys") for keyword in node.keywords):
                        found.append(f"{file}:{node.lineno}")
    assert found == []
    assert calls  # or nothing would have been looked at
