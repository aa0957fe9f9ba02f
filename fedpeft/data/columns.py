"""The columns that a task reads, and what their cells are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fedpeft.config import DataConfig

IGNORED = -100  # label of a token that the loss leaves out


@dataclass(frozen=True)
class Column:
    """One column of rows.

    Parameters
    ----------
    name : str
        Its key in the section `data`, by which users say what it is called in their rows, and its name after reading.
    kind : {"text", "image", "label", "number", "conversation"}
        What a cell is: a text, an image, the name of a label, a number to be predicted, or what one of
        `fedpeft.data.layouts` makes of a row: turns or a raw text.
    optional : bool
        Read only where the configuration names it; else it is sought under its key.
    """

    name: str
    kind: Literal["text", "image", "label", "number", "conversation"]
    optional: bool = False

    def named(self, data: DataConfig) -> str | None:
        """Return what it is called in the rows; None where it is not read."""
        given: str | None = getattr(data, self.name)
        return given or (None if self.optional else self.name)
