"""The layouts that rows for language models come in, one file each, and which of them some rows are of.

Nothing heavy is imported: a command may ask what rows are before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpeft.data.layouts.alpaca import ALPACA
from fedpeft.data.layouts.completion import COMPLETION
from fedpeft.data.layouts.messages import MESSAGES
from fedpeft.data.layouts.record import FILL as FILL
from fedpeft.data.layouts.record import Conversation as Conversation
from fedpeft.data.layouts.record import Layout as Layout
from fedpeft.data.layouts.record import UnfitRowError as UnfitRowError
from fedpeft.data.layouts.sharegpt import SHAREGPT
from fedpeft.data.layouts.text import TEXT
from fedpeft.errors import ConfigError
from fedpeft.registry import Registry

# in the order in which they are tried: rows of the first ones often have the columns of the last ones too
LAYOUTS: Registry[Layout] = Registry("data.layout", "fedpeft.layouts", (MESSAGES, SHAREGPT, ALPACA, COMPLETION, TEXT))
LOOKED_AT = 64  # first rows, by which a layout is chosen: a few of others among them change nothing
KEYS = ("messages", "prompt", "completion", "text")  # of the section `data`, which name columns of layouts
CLASSIFIED = ({"text", "label"}, {"image", "label"})  # rows with all of these may be for classifiers


@dataclass(frozen=True)
class Chosen:
    """A layout, and what its columns are called in the rows at hand.

    Parameters
    ----------
    layout : Layout
        Which it is.
    columns : mapping of str to str
        Names by key.
    """

    layout: Layout
    columns: Mapping[str, str]


def names_of(data: object) -> dict[str, str]:
    """Return which columns of layouts a section `data` names, by key."""
    named = {key: getattr(data, key) for key in KEYS}
    return {key: name for key, name in named.items() if name is not None}


def candidates(names: Mapping[str, str], forced: str | None) -> list[Layout]:
    """Return the layouts that rows may be of, by what the configuration says of them.

    Parameters
    ----------
    names : mapping of str to str
        Columns that are named, by those of `KEYS`.
    forced : str, optional
        The layout that is named.

    Raises
    ------
    ConfigError
        There is none of that name, or none that has all of the named columns.
    """
    if forced is not None:
        layout = LAYOUTS.find(forced)
        for key in names:
            if key not in layout.columns:
                raise ConfigError(
                    f"data.{key} = '{names[key]}' is of no use to data.layout = '{forced}', of which the columns are "
                    f"{', '.join(f'data.{each}' for each in layout.columns if each in KEYS)}; drop one"
                )
        return [layout]
    fitting = [each for each in LAYOUTS.all().values() if set(names) <= set(each.keys)]
    if not fitting:
        said = " and ".join(f"data.{key} = '{name}'" for key, name in names.items())
        raise ConfigError(f"{said} name columns of different layouts; drop what does not belong to the rows")
    return fitting


def detect(rows: Sequence[Mapping[str, object]], names: Mapping[str, str], among: Sequence[Layout]) -> Layout | None:
    """Return the layout that most of a few rows are of, of equals the first; None where no row is of any."""
    votes = {each.name: sum(each.fits(names, row) for row in rows) for each in among}
    best = max(among, key=lambda each: votes[each.name])
    return best if votes[best.name] else None


def implied(rows: Sequence[Mapping[str, object]]) -> str | None:
    """Return the layout of rows that can be for language models only; None where they may be for something else."""
    if any(needed <= set(row) for row in rows for needed in CLASSIFIED):
        return None
    found = detect(rows, {}, [each for each in LAYOUTS.all().values() if each.implied])
    return None if found is None else found.name


def described() -> str:
    """Say in one line what the layouts are."""
    return "; ".join(f"{each.name} ({each.description.replace('`', '')})" for each in LAYOUTS.all().values())
