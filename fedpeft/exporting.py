"""A run's model for others: merged into a transformers folder, or the adapter with a card that says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fedpeft.adapters.beyond import part_shared
from fedpeft.adapters.export import ADAPTER_CONFIG
from fedpeft.bases import describe_base, first_line
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError, ConfigError, FedpeftError, ModelError
from fedpeft.finished import FinishedRun, open_run
from fedpeft.formats import number
from fedpeft.jsons import to_json
from fedpeft.precision import dtype_of
from fedpeft.presets import is_preset
from fedpeft.privacy.overlap import in_the_clear
from fedpeft.privacy.statement import read_statement
from fedpeft.runs import check_vacant
from fedpeft.runs.files import whole_folder
from fedpeft.runs.history import History

CARD = "README.md"
Dtype = Literal["float32", "bfloat16", "float16"]


def export_merged(run: Path, out: Path, *, client: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write a folder of transformers that needs no PEFT: the base with the adapter in its weights.

    Parameters
    ----------
    run : Path
        A run directory with its adapter.
    out : Path
        The folder; must not hold anything.
    client : str, optional
        Whose model, where each client has its own.
    dtype : str, optional
        Of the weights: ``float32``, ``bfloat16`` or ``float16``; the run's precision if not given. The sum is taken in
        float32 and rounded once.

    Returns
    -------
    dict
        What was written, from what.

    Raises
    ------
    AdapterError
        An adapter that is no change of weights, such as a prompt.
    ModelError
        A base that is saved quantised only.
    """
    finished = open_run(run)
    check_vacant(out)
    kind = dtype or str(dtype_of(finished.config.train.precision)).removeprefix("torch.")
    if kind not in get_args(Dtype):
        raise ConfigError(f"--dtype '{kind}' is none of {', '.join(get_args(Dtype))}.")
    finished = _over_whole_weights(finished)
    model = finished.model(client)
    if model.active_peft_config.is_prompt_learning:
        raise AdapterError(
            f"adapter.kind = '{finished.config.adapter.kind}' puts virtual tokens before a prompt and changes no "
            "weights, so that nothing can be merged; use --adapter."
        )
    part_shared(model)
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError, RuntimeError, TypeError) as error:
        raise AdapterError(
            f"PEFT cannot merge adapter.kind = '{finished.config.adapter.kind}': {first_line(error)}; use --adapter."
        ) from None
    merged = merged.to(getattr(torch, kind))
    merged.config.dtype = getattr(torch, kind)
    merged.config.get_text_config().use_cache = True  # which a run that trains has no use for
    with whole_folder(out) as draft:
        if finished.task.continues:
            merged.generation_config = _generation(finished)
        merged.save_pretrained(draft, safe_serialization=True)
        _write_inputs(finished, draft)
        (draft / CARD).write_text(card(finished, client, merged=True), encoding="utf-8")
    return _facts(finished, out, client) | {"merged": True, "dtype": kind}


def export_adapter(run: Path, out: Path, *, client: str | None = None) -> dict[str, Any]:
    """Write the adapter as PEFT loads it, with a model card and what makes its inputs.

    Parameters
    ----------
    run, out, client
        As for `export_merged`.
    """
    finished = open_run(run)
    check_vacant(out)
    folder = finished.folder(client)
    with whole_folder(out) as draft:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                shutil.copyfile(path, draft / path.name)
        if hub_id(finished.config) is not None:  # else it stays a path of this machine
            described = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            described |= {
                "base_model_name_or_path": hub_id(finished.config),
                "revision": finished.config.model.revision,
            }
            (draft / ADAPTER_CONFIG).write_text(to_json(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_inputs(finished, draft)
        (draft / CARD).write_text(card(finished, client, merged=False), encoding="utf-8")
    return _facts(finished, out, client) | {"merged": False}


def hub_id(config: RunConfig) -> str | None:
    """Return the hub's name of the base; None where it is a folder or a preset."""
    name = config.model.name
    return None if name is None or is_preset(name) or Path(name).expanduser().is_dir() or name[0] in "/~." else name


def _over_whole_weights(finished: FinishedRun) -> FinishedRun:
    """Return the run with its base as it lies in its folder, which an adapter of a base quantised in memory fits."""
    from dataclasses import replace

    config = finished.config
    held = describe_base(config, finished.home.folder)
    if getattr(held, "quantization_config", None) is not None:
        raise ModelError(
            f"'{config.model.name}' is saved quantised, and an adapter cannot be added to such weights without loss; "
            "use --adapter, or give the run the base before it was quantised."
        )
    whole = {name: None for name in ("quantization",) if getattr(config.model, name, None) is not None}
    train = config.train.model_copy(update={"precision": "fp32"})
    model = config.model.model_copy(update=whole)
    return replace(finished, config=config.model_copy(update={"model": model, "train": train}))


def _generation(finished: FinishedRun) -> Any:
    """Return the base's own settings of generation, with the tokens that end a turn."""
    from transformers import GenerationConfig

    from fedpeft.data.tokens import end_tokens

    try:
        held = GenerationConfig.from_pretrained(finished.home.folder)
        held.validate()
    except (OSError, ValueError):
        held = GenerationConfig()
    held.eos_token_id = list(end_tokens(finished.tokenizer)) or None
    held.use_cache = True
    if held.pad_token_id is None:
        held.pad_token_id = finished.tokenizer.pad_token_id
    return held


def _write_inputs(finished: FinishedRun, folder: Path) -> None:
    """Write what makes a model's inputs: the tokenizer with its chat template, or the processor of images."""
    if finished.task.reads_images:
        for path in sorted(finished.home.folder.glob("*processor_config.json")):
            shutil.copyfile(path, folder / path.name)
        return
    finished.tokenizer.save_pretrained(folder)


def _facts(finished: FinishedRun, out: Path, client: str | None) -> dict[str, Any]:
    facts = {"run": str(finished.path), "out": str(out), "base": finished.config.model.name}
    return facts | ({} if client is None else {"client": client})


def card(finished: FinishedRun, client: str | None, *, merged: bool) -> str:
    """Return a model card: what is known of the model and may be told, and nothing of any row.

    Parameters
    ----------
    finished : FinishedRun
        The run.
    client : str, optional
        Whose model it is.
    merged : bool
        Whether the adapter is in the weights.
    """
    config, history = finished.config, History.read(finished.path)
    base, private = hub_id(config), config.privacy.is_private
    head = {"library_name": "transformers" if merged else "peft"}
    head |= {} if base is None else {"base_model": base}
    lines = ["---", *(f"{name}: {to_json(value)}" for name, value in head.items()), "tags:", "- federated-learning"]
    what = "A model" if merged else "An adapter"
    lines += ["- fedpeft", "---", "", f"# {what} trained by federated learning", ""]
    called = base or (config.model.name if is_preset(config.model.name) else Path(config.model.name or "?").name)
    facts = [
        ("Base model", called),
        ("Task", finished.task.name),
        ("Method", config.strategy.name),
        ("Adapter", f"{config.adapter.kind}, {'merged into the weights' if merged else 'beside the base'}"),
        ("Rounds", str(history.done)),
        ("Clients", str(config.federation.clients or len(history.clients) or "")),
        ("Model of", None if client is None else f"the client {client}"),
        ("Seed", str(config.run.seed)),
    ]
    lines += [f"- {name}: {value}" for name, value in facts if value]
    lines += ["", "## Scores", "", *_scores(finished, history)]
    lines += ["", "## Privacy", ""]
    statement = (read_statement(finished.path) or {}).get("statement")
    none = "Trained without differential privacy: its weights may tell of single rows."
    lines += [str(statement or "No statement of its privacy is on record.") if private else none]
    return "\n".join(lines) + "\n"


def _tells_of_rows(finished: FinishedRun) -> bool:
    """Tell whether scores of a private run may be of rows that it protects; as they may where the rows are gone."""
    try:
        return in_the_clear(finished.home).in_scores
    except FedpeftError:
        return True


def _scores(finished: FinishedRun, history: History) -> list[str]:
    if finished.config.privacy.is_private:
        told = (read_statement(finished.path) or {}).get("scores_tell_of_rows")  # of which earlier versions say nothing
        if told or (told is None and _tells_of_rows(finished)):
            return ["Its scores may be of rows that training was to protect, and are not told."]
    last: Mapping[str, Any] = history.last or {}
    names = [name for name in history.metrics if last.get(name) is not None]
    if not names:
        return ["None are on record."]
    first: Mapping[str, Any] = history.first or {}
    table = ["| test rows | before | after |", "|---|---|---|"]
    return table + [f"| {name} | {number(first.get(name))} | {number(last[name])} |" for name in names]
