"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedpeft.data.formats.record import Format
from fedpeft.errors import DataError
from fedpeft.places import Place, Wanted

if TYPE_CHECKING:
    import datasets

HUB_TIMEOUT_S = 5.0
HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
FILE_SUFFIX = r"\.[A-Za-z]+$"  # not .v2, which ids end with


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's progress bars off inside the block."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@lru_cache(maxsize=2)
def hub_dataset(name: str, configuration: str | None = None) -> datasets.DatasetDict:
    """Load a dataset of the Hugging Face hub, from the library's own cache where the hub cannot be reached.

    Parameters
    ----------
    name : str
        Its id.
    configuration : str, optional
        Which of its configurations; the only one, or that called default, if not given.

    Raises
    ------
    DataError
        The hub has none of that name, or it cannot be reached and nothing is cached.
    """
    import datasets
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    unknown = f"'{name}' is neither a file or folder here"
    advice = "Check the spelling, or give the path of a file or folder."
    before = offline = datasets.config.HF_HUB_OFFLINE
    try:
        if not offline:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError):
        raise DataError(f"{unknown} nor a public dataset on the hub. {advice}") from None
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError):
        offline = True
    try:
        datasets.config.HF_HUB_OFFLINE = offline  # else the library retries for half a minute
        with quiet():
            loaded = datasets.load_dataset(name, *([] if configuration is None else [configuration]))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise DataError(f"{unknown}, nor can the hub be reached. {advice}") from None
        what = " ".join(str(error).split())
        if "onfig name is missing" in what or "BuilderConfig" in what:
            raise DataError(
                f"the hub's dataset '{name}' comes in several configurations: {what}. "
                f"Give one of them and a split, such as {name}:CONFIGURATION:train."
            ) from None
        raise DataError(
            f"the hub's dataset '{name}' cannot be read: {what.rstrip('.')}. Write what you need of it with "
            "save_to_disk."
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return loaded


def _rows(place: Place) -> datasets.Dataset:
    """Return all columns of a split."""
    if place.configuration is None:
        return hub_dataset(place.name)[place.part]
    return hub_dataset(place.name, place.configuration)[place.part]


def _read(place: Place, wanted: Wanted) -> datasets.Dataset:
    loaded = _rows(place)
    return loaded.select_columns(wanted.present(place, loaded.column_names))


def _named(name: str, configuration: str | None) -> dict[str, Place] | None:
    """Only a plain ``name`` or ``owner/name`` without a file suffix can be an id, so that no path is asked for."""
    if not re.fullmatch(HUB_ID, name) or re.search(FILE_SUFFIX, name):
        return None
    parts = hub_dataset(name) if configuration is None else hub_dataset(name, configuration)
    return {part: Place(name, HUB.name, None, part, configuration) for part in parts}


def _first(place: Place, encoding: str, count: int) -> list[dict[str, Any]]:
    return _rows(place).with_format("arrow")[:count].to_pylist()  # type: ignore[no-any-return]


HUB = Format(
    "hub",
    "a dataset of the hub",
    _read,
    named=_named,
    may_link=lambda place, column: False,
    first=_first,
    fingerprint=lambda place: str(_rows(place)._fingerprint),
)
