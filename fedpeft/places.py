"""Where rows lie: sources by name, which files count, and which columns are asked of them.

Nothing heavy is imported, so that a command may ask what a path is before anything is loaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHOWN = 30  # columns that a message lists
LONGEST = 60  # characters of a name that it shows
TEST_PARTS = ("test", "validation")
NOT_OURS = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # what systems leave in folders, beside hidden files


@dataclass(frozen=True)
class Place:
    """Where one table of rows lies.

    Parameters
    ----------
    name : str
        What the user called the source.
    kind : str
        Name of its format.
    path : Path, optional
        File or folder; None for a hub id.
    part : str, optional
        Split of a source that has several.
    configuration : str, optional
        That of a hub id which has several.
    parts : tuple of str
        All splits of the source.
    files : tuple of tuple
        Of a place whose rows come from several files: how many rows stand before each, and its path in the folder.
    """

    name: str
    kind: str
    path: Path | None
    part: str | None = None
    configuration: str | None = None
    parts: tuple[str, ...] = ()
    files: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        return f"'{self.name}'" if self.part is None else f"split '{self.part}' of '{self.name}'"

    def row(self, number: int) -> str:
        """Return what messages call a row, by its number from 1: of several files, that of its own."""
        within, file = in_file(self.files, number)
        place = str(self) if file is None else f"'{os.path.join(self.name, file)}'"
        return f"row {within} of {place}"

    @property
    def others(self) -> tuple[str, ...]:
        """What names the source's other splits, in words that `data.test` understands."""
        between = f":{self.configuration}" if self.configuration else ""
        return tuple(f"{self.name}{between}:{part}" for part in self.parts if part not in ("train", self.part))


@dataclass(frozen=True)
class Wanted:
    """The columns to read.

    Parameters
    ----------
    columns : mapping of str to str
        Configuration key to the column that it names.
    optional : frozenset of str
        Keys whose column may be missing.
    encoding : str
        Of CSV and JSON files.
    tolerant : bool
        Whether a row that cannot be read is one of empty cells, rather than an error of the whole file.
    nested : frozenset of str
        Keys whose cells may be lists or objects: text formats keep them as JSON.
    """

    columns: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    encoding: str = "utf-8"
    tolerant: bool = False
    nested: frozenset[str] = frozenset()

    @property
    def nested_columns(self) -> frozenset[str]:
        """The columns whose cells may be lists or objects."""
        return frozenset(column for key, column in self.columns.items() if key in self.nested)

    def fit(self, names: Sequence[str]) -> bool:
        """Say whether a source with these columns has all that must be there."""
        return all(column in names for key, column in self.columns.items() if key not in self.optional)

    def present(self, place: Place, names: Sequence[str]) -> list[str]:
        """Return those that a source has.

        Raises
        ------
        DataError
            One that must be there is not, or is there twice.
        """
        for key, column in self.columns.items():
            if column not in names and key not in self.optional:
                near = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, column, name).ratio())
                if not any(names):
                    raise DataError(f"{place} has no column '{column}' ({key}), nor any other with a name.")
                raise DataError(
                    f"{place} has no column '{column}' ({key}). It has: {named(near)}. "
                    f"{self._advice(place, key, names)}"
                )
        present = [name for name in dict.fromkeys(self.columns.values()) if name in names]
        for name in present:
            if names.count(name) > 1:
                raise DataError(f"{place} has {names.count(name)} columns named '{name}'. Rename all but one.")
        return present

    def _advice(self, place: Place, key: str, names: Sequence[str]) -> str:
        """Say which setting finds the columns; another task's, where its columns are there."""
        if key in ("data.text", "data.prompt", "data.completion") and "image" in names:
            only = "" if set(names) == {"image", "label"} else f", or {key} to one of them"
            return f"To classify images set data.image=image{only}."
        if key in ("data.text", "data.image") and {"prompt", "completion"} <= set(names):
            return "To train on completions set data.prompt=prompt and data.completion=completion."
        return f"Set {key} to one of them."


def in_file(files: Sequence[tuple[int, str]], number: int) -> tuple[int, str | None]:
    """Return a row's number within its file, and that file's name; None where there are no several.

    Parameters
    ----------
    files : sequence of tuple
        As `Place.files`.
    number : int
        The row, from 1, of all.
    """
    before, name = next(((start, name) for start, name in reversed(files) if start < number), (0, None))
    return number - before, name


def named(columns: Sequence[str]) -> str:
    """Name the first few columns, as far as a line has room."""
    short = [name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..." for name in columns[:SHOWN]]
    return ", ".join(short) + (", ..." if len(columns) > SHOWN else "")


def refuse_missing(
    place: Place,
    column: str,
    missing: NDArray[np.bool_],
    what: str,
    advice: str = "Fill it in or remove the row.",
) -> None:
    """Raise for the first row that a mask marks, if any.

    Raises
    ------
    DataError
        Naming row, column and what is missing.
    """
    if missing.any():
        row = int(missing.argmax()) + 1
        more = f" (and {int(missing.sum()) - 1} more)" if missing.sum() > 1 else ""
        raise DataError(f"{place.row(row)}{more} has {what} in column '{column}'. {advice}")


def unreadable(what: object, error: OSError) -> DataError:
    """Return the error for a file that exists but cannot be opened."""
    return DataError(f"cannot read {what}: {error.strerror or error}. Check the path and its permissions.")


def in_one_line(error: Exception) -> str:
    """Return the first line of what a library says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def at(name: str) -> Path:
    """Return a name as a path, a user's home folder spelled out where there is one."""
    return Path(os.path.expanduser(name))


def divided_name(name: str) -> tuple[str, tuple[str, ...]]:
    """Divide ``source:split`` and ``source:configuration:split``; what exists as a path is whole."""
    if os.path.exists(at(name)):
        return name, ()
    source, *parts = [name] if "://" in name else name.split(":")
    if parts and os.path.exists(at(name.rpartition(":")[0])):  # whose own name may hold colons
        source, _, part = name.rpartition(":")
        return source, (part,)
    return (source, tuple(parts)) if source and all(parts) and 0 < len(parts) < 3 else (name, ())


def files_in(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the files anywhere below a folder, links followed, without those hidden or in hidden folders."""
    here = folder.resolve()
    if here in above:
        return  # a link to a folder that holds it
    for path in folder.iterdir():
        if not counts(path):
            continue
        if path.is_dir():
            yield from files_in(path, above | {here})
        else:
            yield path


def counts(path: Path) -> bool:
    """Say whether a file or folder is neither hidden nor what systems leave behind."""
    return not path.name.startswith(".") and path.name.lower() not in NOT_OURS
