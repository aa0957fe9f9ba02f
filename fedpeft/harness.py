"""A run's model on the tasks of lm-eval (EleutherAI's language model evaluation harness), an extra."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.bases import first_line, positions
from fedpeft.errors import ConfigError, DataError, FedpeftError
from fedpeft.finished import FinishedRun, open_run
from fedpeft.formats import number
from fedpeft.generation.decoding import behind_virtual_tokens, num_virtual_tokens, own_settings_aside
from fedpeft.jsons import to_json
from fedpeft.precision import HALVES, arithmetic, dtype_of
from fedpeft.report.layout import cell, new_table
from fedpeft.runs.files import write_whole

RESULTS = "lm_eval.json"


def evaluate_tasks(
    run: Path, tasks: str, *, limit: int | None = None, client: str | None = None, in_turns: bool = False
) -> dict[str, Any]:
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
    in_turns : bool
        Whether the run's chat template writes each prompt as a user's turn.

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
    if in_turns and finished.tokenizer.chat_template is None:
        raise ConfigError(f"--apply-chat-template: '{run}' has no chat template; drop it.")
    from lm_eval.tasks import TaskManager

    if not (names := [name.strip() for name in tasks.split(",") if name.strip()]):
        raise ConfigError("--lm-eval names no task; give such as hellaswag,mine.yaml.")
    # a list of all of lm-eval's own tasks takes a while to make
    manager = TaskManager(include_defaults=not all(map(_is_file, names)))
    wanted = [_wanted(name, manager) for name in names]
    model = finished.model(client)
    model.config.use_cache = True
    found = _found(_judged(finished, model), wanted, manager, limit=limit, in_turns=in_turns)
    results = {name: _numbers(scores) for name, scores in found.items()}
    facts = {"run": str(run), "tasks": names, "limit": limit, "lm_eval": version("lm-eval"), "results": results}
    facts |= {"chat_template": True} if in_turns else {}
    facts |= {} if client is None else {"client": client}
    write_whole(run / RESULTS, (to_json(facts, indent=2) + "\n").encode())
    return facts


def _found(judged: Any, wanted: Sequence[Any], manager: Any, *, limit: int | None, in_turns: bool) -> dict[str, Any]:
    """Return the scores by task, as lm-eval's own command computes them, whose seeds these are.

    Its ``simple_evaluate`` asks git for the commit of the working folder besides, which complains where there is none.
    """
    from lm_eval import evaluate

    if sys.stderr is None or not sys.stderr.isatty():
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):  # whose bars nobody would see move
            setattr(judged, name, partial(getattr(judged, name), disable_tqdm=True))
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002 - it is what tasks draw from
    torch.manual_seed(1234)
    try:
        loaded = manager.load(list(wanted))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
        with own_settings_aside(judged.model):
            found = evaluate(
                lm=judged,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=in_turns,
            )
    except FedpeftError:
        raise
    except Exception as error:  # of a task's own code and templates, of data sets, and of the network
        raise DataError(f"lm-eval cannot run its tasks: {first_line(error).rstrip('.')}.") from error
    assert found is not None  # it is in this process that it ran
    return dict(found["results"])


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


def _judged(finished: FinishedRun, model: Any) -> Any:
    """Return a model as lm-eval asks it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    config, tokenizer, count = finished.config, finished.tokenizer, num_virtual_tokens(model)
    kind = dtype_of(config.train.precision) if config.train.precision in HALVES else None
    facts = {"tokenizer": tokenizer, "batch_size": config.run.evaluate_batch_size, "mixed_precision_dtype": kind}
    if not count:
        return HFLM(pretrained=model, **facts)

    class BehindVirtualTokens(HFLM):  # type: ignore[misc]  # lm-eval has no types
        """Leaves out what is said at virtual tokens, and generates behind them as no hook of PEFT does."""

        def _model_call(self, inps: Tensor, *masks: Tensor | None, **more: Tensor | None) -> Tensor:
            logits: Tensor = super()._model_call(inps, *masks, **more)  # (b, v + t, vocabulary), of a prefix (b, t)
            return logits[:, -inps.shape[1] :]

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
            # lm-eval cuts answers at its stops itself: here, that would save time alone
            inputs = {"input_ids": context, "attention_mask": settings.pop("attention_mask")}
            if not settings.get("temperature"):
                settings |= {"do_sample": False, "temperature": None}
            held = GenerationConfig(
                **settings,
                max_new_tokens=max_length - context.shape[1],
                eos_token_id=self.eot_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            with torch.no_grad(), arithmetic(context.device, config.train.precision):
                said = behind_virtual_tokens(model, inputs, held)
            return torch.cat([context, torch.tensor(said, device=context.device, dtype=context.dtype)], dim=1)

    told = positions(model.get_base_model().config.get_text_config(), type(model.get_base_model()))
    most = None if told is None else told - count
    return BehindVirtualTokens(pretrained=model, max_length=most, **facts)


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
