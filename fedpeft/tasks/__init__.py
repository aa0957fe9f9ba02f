"""What models are trained for: one file a task, and the registry that finds them by name.

This loads neither torch nor transformers: the command line asks it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpeft.data.layouts import candidates, names_of
from fedpeft.errors import ConfigError
from fedpeft.registry import Registry
from fedpeft.tasks import causal_lm, image_classification, sequence_classification
from fedpeft.tasks.task import Task

if TYPE_CHECKING:
    from fedpeft.config import RunConfig

__all__ = ["TASKS", "Task", "find", "named", "of"]

DEFAULT = sequence_classification.TASK  # where the data's columns say nothing
TASKS = Registry("task", "fedpeft.tasks", (DEFAULT, image_classification.TASK, causal_lm.TASK))
find = TASKS.find


def named(config: RunConfig) -> str:
    """Return the name of a run's task, known here or not: the one given, or that of which the data's columns speak."""
    if config.model.task is not None:
        return config.model.task
    for task in TASKS.ours.values():
        if any(getattr(config.data, key) is not None for key in task.spoken_by):
            return task.name
    return DEFAULT.name


def of(config: RunConfig) -> Task:
    """Return a run's task.

    Raises
    ------
    ConfigError
        There is none of that name, or a setting is of no use to it.
    """
    task = find(named(config))
    for key in ("template", "train_on", "empty"):
        if (value := getattr(config.data, key)) is not None and not task.continues:
            raise _for_others(config, f"data.{key} = '{value}'", task)
    if task.reads_conversations:
        candidates(names_of(config.data), config.data.layout)  # which refuses what contradicts itself
        return task
    for key, value in (("layout", config.data.layout), ("messages", config.data.messages)):
        if value is not None:
            raise _for_others(config, f"data.{key} = '{value}'", task)
    if config.data.truncate is not None:
        raise ConfigError(
            f"data.truncate = '{config.data.truncate}' is for prompts and completions, but the task is "
            f"'{task.name}'; drop it"
        )
    return task


def _for_others(config: RunConfig, what: str, task: Task) -> ConfigError:
    """Return the error for a setting that is of use to language models alone."""
    said = f"{what} is for language models, but the task is '{task.name}'"
    if config.model.task is not None:
        return ConfigError(f"{said}; drop it")
    other = next(each.name for each in TASKS.ours.values() if each.continues)
    return ConfigError(f"{said}, since nothing in the columns says otherwise; drop it, or set model.task={other}")
