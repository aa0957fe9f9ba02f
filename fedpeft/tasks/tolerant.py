"""Rows of which some cannot be encoded, where a failure must not be seen from outside."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets

from fedpeft import tasks
from fedpeft.cache import cache_dir, locked
from fedpeft.config import RunConfig
from fedpeft.data.readers import Place
from fedpeft.data.sources import DOMAIN, Table, digest, locate, raw_rows, read_rows
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import DataError, ModelError
from fedpeft.tasks.encoding import (
    LIBRARIES,
    chat_terms,
    encode_rows,
    encode_table,
    entry_key,
    make_entry,
    model_digest,
    open_entry,
)

_LEFT_OUT = "left_out.json"
_TRIED_AT_ONCE = 64  # rows; where one of them fails, each is tried alone


def encode_what_can_be(
    config: RunConfig, model_dir: Path, source: str | Path, labels: Sequence[str] = ()
) -> tuple[EncodedSplit, dict[int, str]]:
    """Encode the rows of a source that can be encoded, where a failure must not be seen from outside.

    Parameters
    ----------
    config, model_dir, source, labels
        As for `encode_rows`.

    Returns
    -------
    EncodedSplit
        The rows that can be encoded.
    dict of int to str
        By number, from 1, what is wrong with each of the others.

    Raises
    ------
    DataError, ModelError
        As `encode_rows`, where not a single row can be encoded or the source cannot be read at all.
    """
    try:
        split = encode_rows(config, model_dir, source, labels)
        return split, _skipped(split)
    except (DataError, ModelError) as error:
        place, whole = locate(source).train, error
    names, task = tuple(labels) or config.data.label_names, tasks.of(config)
    raw: datasets.Dataset | None = None

    def table(only: Sequence[int]) -> Table:
        return read_rows(place, config.data, task.columns, labels=names, optional=DOMAIN, only=only, raw=raw)

    key = entry_key(
        tolerant=True,
        task=task.name,
        rows=digest(place, config.data, task.columns),
        data=config.data.model_dump(mode="json"),
        **chat_terms(config),
        labels=names,
        model=model_digest(model_dir),
        versions=[importlib.metadata.version(name) for name in LIBRARIES],
    )
    folder = cache_dir() / "encoded" / key
    with locked(folder):
        found, noted = open_entry(folder, task.name), folder / _LEFT_OUT
        if found is None or not noted.is_file():
            raw = raw_rows(place, config.data, task.columns, DOMAIN)
            encode = partial(encode_table, config, model_dir, labels=names or ())
            left_out = _problems(place, len(raw), lambda only: encode(rows=table(only).rows))
            # a damaged row is read as an empty one, which may be among those to skip: then none is a problem alone
            if len(left_out) == len(raw) or not (left_out or config.data.empty == "skip"):
                raise whole
            good = [row for row in range(len(raw)) if row + 1 not in left_out]
            make_entry(config, model_dir, replace(table(good), labels=names or ()), folder)
            noted.write_text(json.dumps(left_out), encoding="utf-8")
            found = open_entry(folder, task.name)
        assert found is not None, "just written"
        told = json.loads(noted.read_text(encoding="utf-8"))
    return found[0], {int(row): what for row, what in told.items()} | _skipped(found[0])


def _skipped(split: EncodedSplit) -> dict[int, str]:
    """Return what is wrong with rows that `data.empty` leaves out: which these are may not be seen either."""
    return dict.fromkeys(split.origin.skipped, "it has no token that the loss counts")


def _problems(place: Place, count: int, try_: Callable[[Sequence[int]], object]) -> dict[int, str]:
    """Return what is wrong with each row that is wrong, by its number from 1."""

    def problem(only: Sequence[int]) -> str | None:
        try:
            try_(only)
        except (DataError, ModelError) as error:
            return str(error).replace(f"row 1 of {place}", f"row {only[0] + 1} of {place}")  # counted among `only`
        return None

    problems: dict[int, str] = {}
    for start in range(0, count, _TRIED_AT_ONCE):
        some = range(start, min(count, start + _TRIED_AT_ONCE))
        if problem(some) is not None:
            tried = {row: problem([row]) for row in some}
            problems |= {row + 1: what for row, what in tried.items() if what is not None}
    return problems
