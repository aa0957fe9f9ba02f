"""Whatever there are many of, by name: ours, and those that other packages add.

A strategy, an adapter kind, a task or an optimiser is one file that its registry names; a package of somebody else
names its own under an entry point group, such as ``fedpeft.strategies``, and it counts as ours do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Generic, Protocol, TypeVar, cast

from fedpeft.errors import ConfigError, nearest


class Named(Protocol):
    """Anything that has a name of its own."""

    @property
    def name(self) -> str:
        """By which users call it."""


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """The things of one sort.

    Parameters
    ----------
    what : str
        The sort, as errors call it, such as ``strategy``.
    group : str
        Entry point group under which other packages add theirs; an entry names the very object.
    ours : iterable
        Those of this package, in the order in which they are shown.
    refused : mapping of str to str, optional
        Names, with ``_`` for ``-``, that users may look for and that there is nothing under, and why; others may take
        them.
    """

    def __init__(self, what: str, group: str, ours: Iterable[T], refused: Mapping[str, str] | None = None) -> None:
        self.what, self.group, self.refused = what, group, refused or {}
        self.ours: dict[str, T] = {each.name: each for each in ours}

    def all(self) -> dict[str, T]:
        """Return all by name, ours first; a name of ours cannot be taken by others."""
        every = dict(self.ours)
        for entry in entry_points(group=self.group):
            if entry.name not in every:
                every[entry.name] = cast(T, entry.load())
        return every

    def find(self, name: str) -> T:
        """Return one by its name.

        Raises
        ------
        ConfigError
            There is none of that name.
        """
        if name in self.ours:
            return self.ours[name]
        every = self.all()
        if name not in every:
            if why := self.refused.get(name.replace("-", "_")):
                raise ConfigError(f"{self.what} = '{name}' cannot be had: {why}.")
            raise ConfigError(f"unknown {self.what} '{name}'. {nearest(name, every)}")
        return every[name]
