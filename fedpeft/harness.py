"""A run's model on the tasks of lm-eval (EleutherAI's language model evaluation harness), an extra."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedpeft.bases import first_line
from fedpeft.errors import ConfigError, DataError
from fedpeft.finished import open_run
from fedpeft.formats import number
from fedpeft.generation.decoding import own_settings_aside
from fedpeft.jsons import to_json
from fedpeft.report.layout import cell, new_table
from fedpeft.runs.files import write_whole

RESULTS = "lm_eval.json"


def evaluate_tasks(run: Path, tasks: str, *, limit: int | None = None, client: str | None = None) -> dict[str, Any]:
    """Score the base with the run's adapter by lm-eval, and write what came out to ``lm_eval.json`` of the run.

    Parameters
    ----------
    run : Path
        A run directory.
    tasks : str
        Names of lm-eval's tasks and groups, and paths of task files (``.yaml``), comma-separated.
    limit : int, optional
        Rows of each task; all if not given.
    client : str, optional
        Whose model, where each client has its own.

    Returns
    -------
    dict
        ``results`` by task and metric, as lm-eval names them, with its version and the limit.

    Raises
    ------
    ConfigError
        The package is missing, or a task is not known.
    DataError
        Its rows cannot be had, as where a hub's are not here and there is no network.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval needs the package lm-eval: pip install 'fedpeft[lm-eval]'")
    finished = open_run(run)
    finished.check_writes("--lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    # a list of all of lm-eval's own tasks takes a while to make
    manager = TaskManager(include_defaults=not all(map(_is_file, names)))
    wanted = [_wanted(name, manager) for name in names]
    model = finished.model(client)
    model.config.use_cache = True
    size = finished.config.run.evaluate_batch_size
    judged = HFLM(pretrained=model, tokenizer=finished.tokenizer, batch_size=size)
    try:
        with own_settings_aside(model):
            found = simple_evaluate(
                judged, tasks=wanted, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(f"lm-eval cannot run '{tasks}': {first_line(error)}.") from None
    assert found is not None  # it is in this process that it ran
    results = {name: _numbers(scores) for name, scores in found["results"].items()}
    facts = {"run": str(run), "tasks": names, "limit": limit, "lm_eval": version("lm-eval"), "results": results}
    facts |= {} if client is None else {"client": client}
    write_whole(run / RESULTS, (to_json(facts, indent=2) + "\n").encode())
    return facts


def _wanted(name: str, manager: Any) -> Any:
    """Return what lm-eval takes for a task: its name, or what a file says, whose own paths count from its folder."""
    if not _is_file(name):
        if not manager.match_tasks([name]):
            raise ConfigError(f"lm-eval has no task '{name}'; `lm-eval ls tasks` lists them, or give a file.yaml.")
        return name
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--lm-eval: no task file '{name}'.")
    try:
        return load_yaml(path, resolve_func=True)
    except Exception as error:  # of YAML, and whatever functions it names
        raise ConfigError(f"--lm-eval: '{name}' is no task file of lm-eval: {first_line(error)}.") from None


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a task, without the filter's name where there is but the usual one."""
    held = {name: value for name, value in scores.items() if isinstance(value, int | float) and "_stderr" not in name}
    return {name.removesuffix(",none"): float(value) for name, value in held.items() if name != "sample_len"}


def results_table(facts: dict[str, Any]) -> Any:
    """Lay out the scores of tasks."""
    table = new_table("task", "metric", "score", right=("score",))
    for task, scores in facts["results"].items():
        for name, value in scores.items():
            table.add_row(cell(task, "bold"), cell(name), cell(number(value)))
    return table
