"""What is known of a format of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.places import Place, Wanted

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Format:
    """A format that rows are read from: a kind of file, a kind of folder, or names of somewhere else.

    Parameters
    ----------
    name : str
        The ``kind`` of its places.
    description : str
        What users are told of: that of a file stands before the word "file".
    read : callable
        Reads the wanted columns of a place, or raises `DataError`. Cells may be text, whatever they stand for.
    suffixes : tuple of str
        Of its files, in small letters.
    packed : bool
        Whether its files may be packed by gzip, with ``.gz`` behind the suffix.
    marks : tuple of str
        Files of which one tells that a folder is of this format, whatever else it holds.
    splits : callable, optional
        Of a folder's name and path: its splits by name, one without a name where it has none. Where there are no marks
        it is asked last, and returns nothing for a folder that is of another format.
    named : callable, optional
        Of a name that is no path, and a configuration or None: the splits that it names elsewhere; None where it is no
        name of that sort.
    implies : mapping of str to str
        Keys of the section `data`, and which columns they name where the user names none.
    may_link : callable
        Of a place and a column: whether its cells may be paths of images, without looking at all rows.
    notes, cautions : callable
        What whoever holds the rows of a place should know of them, in one line each: what they are, and what is amiss.
    first : callable, optional
        Of a place, an encoding and a number: so many of its first rows or fewer, as objects with all their columns and
        cells as they are, which need not be all well; by them the layout of rows is found.
    files : callable, optional
        Of a place that is a folder: the files that its rows lie in; all below it, if not given.
    begun : callable, optional
        Of a place whose rows come from several files, and its rows as read: `Place.files`.
    fingerprint : callable, optional
        What changes whenever the rows of a place do, if they are in no file here.
    """

    name: str
    description: str
    read: Callable[[Place, Wanted], datasets.Dataset]
    suffixes: tuple[str, ...] = ()
    packed: bool = False
    marks: tuple[str, ...] = ()
    splits: Callable[[str, Path], dict[str, Place]] | None = None
    named: Callable[[str, str | None], dict[str, Place] | None] | None = None
    implies: Mapping[str, str] = field(default_factory=dict)
    may_link: Callable[[Place, str], bool] = lambda place, column: True
    notes: Callable[[Place], tuple[str, ...]] = lambda place: ()
    cautions: Callable[[Place], tuple[str, ...]] = lambda place: ()
    first: Callable[[Place, str, int], list[dict[str, Any]]] | None = None
    files: Callable[[Place], list[Path]] | None = None
    begun: Callable[[Place, datasets.Dataset], tuple[tuple[int, str], ...]] | None = None
    fingerprint: Callable[[Place], str] | None = None
