"""What `datasets.Dataset.save_to_disk` wrote: one dataset, or several splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.data.formats.record import Format
from fedpeft.errors import DataError
from fedpeft.places import Place, Wanted, in_one_line

if TYPE_CHECKING:
    import datasets

SPLITS, ONE = "dataset_dict.json", "state.json"  # which of them is there tells one from the other


def _splits(name: str, folder: Path) -> dict[str, Place]:
    index = folder / SPLITS
    if not index.is_file():
        return {"": Place(name, SAVED.name, folder)}
    try:
        parts = [str(part) for part in json.loads(index.read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"'{index}' does not list splits. Save the dataset again with save_to_disk.") from None
    if not parts:
        raise DataError(f"'{index}' lists no split. Save the dataset again with save_to_disk.")
    return {part: Place(name, SAVED.name, folder / part, part) for part in parts}


def _read(place: Place, wanted: Wanted) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    try:
        loaded = datasets.load_from_disk(str(place.path))
        names = list(loaded.column_names)
    except IndexError:  # the library's answer where no file holds rows
        raise DataError(f"{place} holds no rows. Give a source with at least one.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, pa.ArrowException) as error:
        raise DataError(
            f"{place} cannot be read as a saved dataset: {in_one_line(error)}. Write it anew by save_to_disk."
        ) from None
    return loaded.select_columns(wanted.present(place, names))


def _first(place: Place, encoding: str, count: int) -> list[dict[str, Any]]:
    import datasets

    rows = datasets.load_from_disk(str(place.path)).with_format("arrow")
    return rows[:count].to_pylist()  # type: ignore[no-any-return]


SAVED = Format("saved", "a folder written by save_to_disk", _read, marks=(SPLITS, ONE), splits=_splits, first=_first)
