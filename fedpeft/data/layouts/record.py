"""What is known of a layout of rows: which columns it has, and what becomes of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SKIPPED = "remove the row, or set data.empty = 'skip' to leave such rows out"
FILL = f"Fill it in, {SKIPPED}."


class UnfitRowError(Exception):
    """A row of which nothing can be made.

    Parameters
    ----------
    key : str
        Which of the layout's columns shows it.
    what : str
        What is wrong with it, to stand after "row N of X".
    advice : str
        What to do.
    empty : bool
        Whether there is nothing in it to learn, so that it may be left out where the configuration says so.
    """

    def __init__(self, key: str, what: str, advice: str = "Correct or remove the row.", *, empty: bool = False) -> None:
        super().__init__(what)
        self.key, self.what, self.advice, self.empty = key, what, advice, empty


@dataclass(frozen=True)
class Conversation:
    """A row as turns.

    Parameters
    ----------
    messages : list of dict
        Turns with ``role`` (``system``, ``user``, ``assistant`` or ``tool``) and ``content``, a text; what else the row
        says of a turn is kept as it is.
    completion : int
        How many of the last turns are the row's own completion; 0 where it names none.
    dropped : int
        Turns behind the assistant's last, of which nothing can be learned; they are not among `messages`.
    """

    messages: list[dict[str, object]]
    completion: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Layout:
    """A layout of rows.

    Parameters
    ----------
    name : str
        What ``data.layout`` takes.
    description : str
        What a row has, for tables and messages.
    columns : mapping of str to tuple of str
        By key, what a column is called where ``data.KEY`` does not say; of several names the first that rows have.
    keys : tuple of str
        Those of the keys which, where they are set, say that rows are of this layout.
    optional : frozenset of str
        Keys whose column may be missing, or empty in a row.
    nested : frozenset of str
        Keys whose cells may be lists or objects; those of others are texts.
    taught : frozenset of str
        Keys whose cells hold what is learned: where one is empty, a row teaches nothing.
    looks : callable
        Of a row's cells by key, of which none that must be there is empty: whether they are as this layout has them.
    conversation : callable, optional
        Makes turns of a row's cells by key, or raises `UnfitRowError`; None where a row is one text without turns.
    implied : bool
        Whether such rows are for language models, and for nothing else.
    """

    name: str
    description: str
    columns: Mapping[str, tuple[str, ...]]
    keys: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    nested: frozenset[str] = frozenset()
    taught: frozenset[str] = frozenset()
    looks: Callable[[Mapping[str, object]], bool] = field(default=lambda cells: True)
    conversation: Callable[[Mapping[str, object]], Conversation] | None = None
    implied: bool = True

    @property
    def required(self) -> tuple[str, ...]:
        """Keys whose column must be there."""
        return tuple(key for key in self.columns if key not in self.optional)

    def called(self, names: Mapping[str, str], there: Sequence[str]) -> dict[str, str]:
        """Return what the columns are called in rows that have those of `there`, by key."""
        return {
            key: names.get(key) or next((name for name in usual if name in there), usual[0])
            for key, usual in self.columns.items()
        }

    def fits(self, names: Mapping[str, str], row: Mapping[str, object]) -> bool:
        """Say whether a row is of this layout."""
        columns = self.called(names, list(row))
        cells = {key: row.get(column) for key, column in columns.items()}
        return all(cells[key] not in (None, "", []) for key in self.required) and self.looks(cells)
