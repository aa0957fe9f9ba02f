"""Training and test rows as they are before anything is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from fedpeft.config import DataConfig
from fedpeft.data.sources import CLIENT, hold_out, places, read_rows


@dataclass(frozen=True)
class SourceRows:
    train: datasets.Dataset
    test: datasets.Dataset
    labels: tuple[str, ...]


def load_rows(data: DataConfig, task: Any, *, client_column: str | None, seed: int) -> SourceRows:
    """Read the configured rows and divide them as encoding does."""
    place, test_rows = places(data)
    train = read_rows(place, data, task, labels=data.label_names, client_column=client_column)
    if test_rows is not None:
        test = read_rows(
            test_rows, data, task, labels=train.labels or None, client_column=client_column, optional=CLIENT
        )
        return SourceRows(train.rows, test.rows, train.labels)
    labels = np.asarray(train.rows.with_format("numpy")["label"][:]) if train.labels else None
    kept, held = hold_out(labels, len(train.rows), data.test_fraction, seed)
    return SourceRows(train.rows.select(kept), train.rows.select(held), train.labels)
