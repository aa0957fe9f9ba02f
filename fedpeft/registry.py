"""Whatever there are many of, by name: ours, and those that other packages add.

A strategy, an adapter kind, a task or an optimiser is one file that its registry names; a package of somebody else
names its own under an entry point group, such as ``fedpeft.strategies``, and it counts as ours do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar, cast

from fedpeft.deferred import need
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
    base : type, optional
        Where classes are registered, what each derives from.
    """

    def __init__(
        self,
        what: str,
        group: str,
        ours: Iterable[T],
        refused: Mapping[str, str] | None = None,
        base: type | None = None,
    ) -> None:
        self.what, self.group, self.refused, self.base = what, group, refused or {}, base
        self.ours: dict[str, T] = {each.name: each for each in ours}

    def all(self) -> dict[str, T]:
        """Return all by name, ours first; a name of ours cannot be taken by others.

        Those of other packages that cannot be loaded are left out: they are nobody's concern who does not name them.
        """
        every = dict(self.ours)
        for entry in entry_points(group=self.group):
            if entry.name not in every:
                with suppress(ConfigError):
                    every[entry.name] = self._loaded(entry)
        return every

    def find(self, name: str) -> T:
        """Return one by its name.

        Raises
        ------
        ConfigError
            There is none of that name, or it is another package's and cannot be loaded.
        """
        if name in self.ours:
            return self.ours[name]
        for entry in entry_points(group=self.group, name=name):
            return self._loaded(entry)
        if why := self.refused.get(name.replace("-", "_")):
            raise ConfigError(f"{self.what} = '{name}' cannot be had: {why}.")
        raise ConfigError(f"unknown {self.what} '{name}'. {nearest(name, self.all())}")

    def _loaded(self, entry: EntryPoint) -> T:
        wrong = ""
        need()  # whatever others import is to be there
        try:
            thing = entry.load()
        except Exception as error:  # whatever the code of others raises as it is imported
            wrong = f"cannot be loaded ({type(error).__name__}: {error})"
        else:
            if not self._fits(thing):
                wrong = f"is no {self.what}"
            elif thing.name != entry.name:
                wrong = f"calls itself '{thing.name}'"
        if wrong:
            package = entry.dist.name if entry.dist is not None else "a package"
            raise ConfigError(
                f"{self.what} = '{entry.name}' cannot be had: {entry.value}, which {package} adds under that name, "
                f"{wrong}; mend or uninstall {package}."
            )
        return cast(T, thing)

    def _fits(self, thing: object) -> bool:
        if self.base is not None:
            return isinstance(thing, type) and issubclass(thing, self.base)
        return isinstance(thing, type(next(iter(self.ours.values()))))
