"""The levels of protection, one a file.

There is no entry point for levels of others: what a run says of its privacy rests on each of them, so that each is
for this project's experts to sign.
"""

from __future__ import annotations

from fedpeft.config.privacy import PrivacyConfig
from fedpeft.errors import PrivacyError, nearest
from fedpeft.privacy.levels.client import ClientLevel
from fedpeft.privacy.levels.level import Level, Words
from fedpeft.privacy.levels.none import NoLevel
from fedpeft.privacy.levels.record import RecordLevel

__all__ = ["LEVELS", "Level", "Words", "find_level", "level_of"]

LEVELS: dict[str, Level] = {level.name: level for level in (NoLevel(), RecordLevel(), ClientLevel())}


def level_of(privacy: PrivacyConfig) -> Level:
    """Return the level that a configuration asks for."""
    return LEVELS[privacy.level]


def find_level(name: str) -> Level:
    """Return a level by its name, as a statement has it.

    Raises
    ------
    PrivacyError
        There is none of that name.
    """
    if name not in LEVELS:
        raise PrivacyError(f"unknown privacy.level '{name}'. {nearest(name, LEVELS)}")
    return LEVELS[name]
