"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import datasets

from fedpeft.errors import DataError

HUB_TIMEOUT_S = 5.0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's progress bars off inside the block."""
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
