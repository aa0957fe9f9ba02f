"""The registry of tasks, and which one a configuration speaks of."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from peft import TaskType

from fedpeft import tasks
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import ConfigError
from fedpeft.strategies import with_typed_options
from fedpeft.tasks import TASKS, metrics


def configure(**keys: Any) -> RunConfig:
    return resolve([nest({key.replace("__", "."): value for key, value in keys.items()})])


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "sequence-classification"),
        ({"data__text": "body"}, "sequence-classification"),
        ({"data__image": "photo"}, "image-classification"),
        ({"data__completion": "answer"}, "causal-lm"),
        ({"data__image": "photo", "data__completion": "answer"}, "image-classification"),
        ({"data__image": "photo", "model__task": "causal-lm"}, "causal-lm"),
    ],
)
def test_the_task_is_the_one_named_or_that_of_which_the_columns_speak(keys: dict[str, Any], name: str) -> None:
    config = configure(**keys)
    assert tasks.of(config).name == tasks.named(config) == name


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    config = configure(model__task="causal-ml")
    for check in (tasks.of, with_typed_options):
        with pytest.raises(ConfigError, match=r"unknown task 'causal-ml'\. Did you mean 'causal-lm'\?"):
            check(config)
    assert tasks.named(config) == "causal-ml"  # by which a run is listed wherever it was made


def test_what_is_cut_of_prompts_is_said_of_tasks_that_read_them_only() -> None:
    assert tasks.of(configure(data__truncate="prompt", data__completion="answer")).reads_conversations
    with pytest.raises(ConfigError, match=r"data\.truncate = 'prompt' is for prompts and completions, but the task is"):
        with_typed_options(configure(data__truncate="prompt"))


@pytest.mark.parametrize("task", TASKS.ours.values(), ids=TASKS.ours)
def test_what_a_task_names_exists(task: tasks.Task) -> None:
    assert hasattr(transformers, task.auto)
    assert task.peft is None or task.peft in TaskType.__members__
    assert {metric.name for metric in metrics.measures_of(task)} == {"loss", *task.metrics}
    assert metrics.find(task.main_metric).better == ("lower" if task.main_metric == "perplexity" else "higher")


def test_asking_for_tasks_loads_no_library_of_models() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'sklearn', 'peft', 'numpy', 'pydantic'}"
    code = f"import sys, fedpeft.tasks, fedpeft.tasks.metrics as m; m.shown(()); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_label_of_the_largest_score_is_what_a_classifier_says() -> None:
    predict = tasks.find("image-classification").predict
    assert predict is not None
    assert predict(torch.tensor([[0.1, 0.7, 0.2], [3.0, -1.0, 2.0]])).tolist() == [1, 0]
