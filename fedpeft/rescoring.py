"""Scoring a run's adapter again, from what lies in its run directory, the way any user of PEFT would load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from fedpeft.agreement import agree
from fedpeft.config import Layer, RunConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import ConfigError, DataError
from fedpeft.finished import FinishedRun, open_run
from fedpeft.generation import drawn_rows, judge, with_answers
from fedpeft.models import load_base
from fedpeft.privacy.overlap import shared_rows, test_rows_of_clients
from fedpeft.resident import Resident
from fedpeft.runs import Event
from fedpeft.tasks.encoding import encode_rows
from fedpeft.tasks.metrics import Scores, asked
from fedpeft.training.batched.scoring import score_side_by_side, side_by_side
from fedpeft.training.evaluation import mean_metrics, score

AT_ONCE = 32  # adapters that are held, and scored side by side
ALLOWED = {
    "model": {"quantization"},  # what it costs: the same adapter over the base as it is saved
    "data": {
        *("test", "text", "text_pair", "image", "label", "messages", "layout", "prompt", "completion", "domain"),
        *("metric", "max_new_tokens"),
    },
    "run": {"evaluate_batch_size", "evaluate_tokens", "generate_rows", "execute_code"},
}


def rescore(run: Path, overrides: Layer) -> Event:
    """Score a run's adapter on its own test split or, with ``data.test``, on other rows.

    Parameters
    ----------
    run : Path
        A run directory.
    overrides : Layer
        Which rows, and how large the batches are.

    Returns
    -------
    dict
        ``loss`` and the task's metrics, ``examples``, and ``domains`` where rows name theirs.
        Of a private run, ``training_rows``: how many of these the run was to protect, None where that is not known.

    Raises
    ------
    RunDirectoryError
        No run, or one without an adapter yet.
    ConfigError
        An override that would change the model rather than the rows.
    """
    for section, table in overrides.items():
        for key in table:
            if key not in ALLOWED.get(section, ()):
                allowed = ", ".join(f"{name}.{key}" for name in ALLOWED for key in sorted(ALLOWED[name]))
                raise ConfigError(f"'{section}.{key}' cannot be changed for a finished run. Allowed: {allowed}.")
    finished = open_run(run, overrides)
    config, folders, labels = finished.config, finished.folders, finished.labels
    asked(config, finished.task)
    chosen = overrides.get("data", {})
    if "test" in chosen and "domain" not in chosen:  # other rows need not name their domain
        config = config.model_copy(update={"data": config.data.model_copy(update={"domain": None})})
    home = Resident(config)
    split = encode_rows(home.config, home.folder, chosen["test"], labels, test=True) if "test" in chosen else home.test
    base = load_base(home.config, home.folder, labels)
    agree(base, home.config, split.image_shape)
    every: list[Scores] = []
    for start in range(0, len(folders), AT_ONCE):
        every += _scores(base.model, folders[start : start + AT_ONCE], split, config)
    if asked(config, finished.task):
        every = _answered(base.model, finished, split, every)
    result: Event = {"run": str(run), "examples": len(split), **mean_metrics([scores.metrics() for scores in every])}
    if config.privacy.is_private:
        result["training_rows"] = _protected_rows(home, split, own="test" not in chosen)
    if split.domains is not None:
        groups = [scores.by_group(split.domains) for scores in every]
        result["domains"] = {name: mean_metrics([each[name] for each in groups]) for name in groups[0]}
    return result


def _scores(base: nn.Module, folders: Sequence[Path], split: EncodedSplit, config: RunConfig) -> list[Scores]:
    """Score the adapters in some folders: side by side in one pass where they differ in plain linear layers alone."""
    names = [f"model-{index}" for index in range(len(folders))]
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=names[0])
    if len(folders) > 1 and side_by_side(model, names[:1]) is not None:
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        layers = side_by_side(model, names)
        if layers is not None:
            scores = score_side_by_side(model, layers, len(names), split, config)
            _take_out(model)
            return scores
    scores = [score(model, split, config)]
    _take_out(model)
    for folder in folders[1:]:
        model = PeftModel.from_pretrained(base, str(folder))
        scores.append(score(model, split, config))
        _take_out(model)
    return scores


def _take_out(model: PeftModel) -> None:
    """Take an adapter out of its base, which is then as it was before."""
    if not model.active_peft_config.is_prompt_learning:
        model.unload()
        return
    # virtual tokens stand beside the base, where PEFT puts nothing but heads that are trained with them
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)


def _answered(base: nn.Module, finished: FinishedRun, split: EncodedSplit, every: Sequence[Scores]) -> list[Scores]:
    """Return models' scores with what each one's answers are worth."""
    config, judged = finished.config, []
    rows = drawn_rows(config, split, config.run.generate_rows)
    for folder, scores in zip(finished.folders, every, strict=True):
        model = PeftModel.from_pretrained(base, str(folder))
        judged.append(with_answers(scores, [judge(model, finished.tokenizer, split, rows, config)]))
        _take_out(model)
    return judged


def _protected_rows(home: Resident, split: EncodedSplit, *, own: bool) -> int | None:
    """Return how many rows are of the clients' source, whose scores no noise covers."""
    if home.config.data.source is None:
        return None
    if own and home.holds_out_test_rows:
        return len(split)
    try:
        if own and (owned := test_rows_of_clients(home)):
            return owned
        return shared_rows(home.data.train, split)
    except DataError:  # the clients' rows need not be where the run is looked at
        return None


def caution(scores: Event) -> str | None:
    """Say what is to be thought of the scores of a private run; None where there is nothing to say."""
    found = scores.get("training_rows")
    if not found:
        return None
    return (
        f"{found} of {scores['examples']} rows are of the source that this private run was to protect: their scores "
        "come without noise, and no epsilon covers them. Show them to nobody, or give data.test with rows that may be "
        "public."
    )
