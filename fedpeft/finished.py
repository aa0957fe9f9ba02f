"""What a run leaves, loaded as any user of PEFT would: from the run directory's adapters, and the base they name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel

from fedpeft import tasks
from fedpeft.adapters.export import LABELS
from fedpeft.config import Layer, RunConfig, resolve
from fedpeft.data.tokens import load_tokenizer
from fedpeft.errors import ConfigError, RunDirectoryError, nearest
from fedpeft.models import BaseModel, device, load_base
from fedpeft.resident import Resident
from fedpeft.runs import ADAPTER, CLIENTS, folder_name, read_config
from fedpeft.tasks.task import Task


@dataclass(frozen=True)
class FinishedRun:
    """A run that has written its adapter, or the clients' own.

    Parameters
    ----------
    path : Path
        The run directory.
    config : RunConfig
        The run's, perhaps with other rows.
    folders : tuple of Path
        Of the clients' own adapters where models are personal, else of the one.
    labels : tuple of str
        Label names in the order of their ids.
    """

    path: Path
    config: RunConfig
    folders: tuple[Path, ...]
    labels: tuple[str, ...]

    @cached_property
    def home(self) -> Resident:
        """The base's folder and the rows."""
        return Resident(self.config)

    @property
    def task(self) -> Task:
        """What the model is for."""
        return tasks.of(self.config)

    @property
    def is_personal(self) -> bool:
        """Whether each client has a model of its own."""
        return self.folders[0].parent != self.path

    def folder(self, client: str | None = None) -> Path:
        """Return the folder of the adapter: the run's, or a client's.

        Raises
        ------
        RunDirectoryError
            A client that has none, or none named where each has its own.
        """
        named = {folder.parent.name: folder for folder in self.folders} if self.is_personal else {}
        if client is None and self.is_personal:
            known = ", ".join(list(named)[:5]) + (", ..." if len(named) > 5 else "")
            raise RunDirectoryError(f"each client of '{self.path}' has its own model; say whose by --client: {known}.")
        if client is None:
            return self.folders[0]
        if folder_name(client) not in named:
            hint = nearest(folder_name(client), named) if named else "Its clients share one model; drop --client."
            raise RunDirectoryError(f"'{self.path}' holds no model of the client '{client}'. {hint}")
        return named[folder_name(client)]

    def base(self) -> BaseModel:
        """Load the base."""
        return load_base(self.home.config, self.home.folder, self.labels)

    def model(self, client: str | None = None) -> PeftModel:
        """Load the base with the adapter in it, ready to be run."""
        folder = self.folder(client)
        return PeftModel.from_pretrained(self.base().model, str(folder)).eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, with the run's chat template."""
        return load_tokenizer(self.home.config, self.home.folder)[0]

    def check_writes(self, what: str) -> None:
        """Raise ConfigError unless its model writes text, which `what` needs."""
        if not self.task.continues:
            raise ConfigError(
                f"{what} needs a model that writes text, and '{self.path}' is of the task '{self.task.name}'."
            )


def open_run(run: Path, overrides: Layer | None = None) -> FinishedRun:
    """Open a run directory whose adapter is written.

    Parameters
    ----------
    run : Path
        The run directory.
    overrides : dict, optional
        What counts in place of its configuration.

    Raises
    ------
    RunDirectoryError
        No run, or one without an adapter yet.
    """
    config = read_config(run)
    if overrides:
        config = resolve([config.model_dump(exclude_none=True), overrides])
    if config.train.precision == "fp16" and device().type == "cpu":  # to be looked at where it could not be trained
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    folders = sorted(run.glob(f"{CLIENTS}/*/{ADAPTER}")) or [run / ADAPTER]
    if not (folders[0] / "adapter_config.json").is_file():
        raise RunDirectoryError(f"'{run}' holds no adapter: the run is still going on, or was killed.")
    labels = json.loads((folders[0] / LABELS).read_text(encoding="utf-8"))
    return FinishedRun(run, config, tuple(folders), tuple(labels))
