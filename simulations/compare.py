"""Several methods on the same clients, rows and seeds: what words ask for, and the files that hold what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.config import nest
from fedpeft.errors import ConfigError, RunDirectoryError, nearest
from fedpeft.jsons import strict_json, to_json
from fedpeft.report.comparison import comparison_markdown
from fedpeft.simulations.jobs import CENTRALIZED, Job, Row
from fedpeft.simulations.judging import comparison
from fedpeft.simulations.running import Compared
from fedpeft.strategies import available

Facts = dict[str, Any]


def split_words(words: Iterable[str]) -> tuple[list[Row], list[str]]:
    """Tell methods from configuration.

    A word that ends in ``.toml``, or holds ``=`` and no ``:`` before it, is configuration; every other word is a
    method, or ``NAME:option=value[,option=value]``, where an option with a dot is any setting, as in
    ``fedit:adapter.kind=ffa-lora``.

    Raises
    ------
    ConfigError
        No method, one that does not exist, or one that is named twice.
    """
    rows: list[Row] = []
    rest: list[str] = []
    for word in words:
        if word.endswith(".toml") or ("=" in word and ":" not in word.partition("=")[0]):
            rest.append(word)
        else:
            rows.append(read_row(word))
    refuse_options(rest)
    if not rows:
        raise ConfigError("no method to compare; name some, as in: fedpeft compare centralized local fedit lora-fair")
    labels = [row.label for row in rows]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"'{twice[0]}' is to be compared twice; name it once.")
    return rows, rest


def refuse_options(words: Iterable[str]) -> None:
    """Raise ConfigError if a word of what all rows share is an option of one method."""
    if options := [word for word in words if word.startswith("strategy.")]:
        key, _, value = options[0].removeprefix("strategy.").partition("=")
        raise ConfigError(f"'{options[0]}': options belong to one method; write NAME:{key}={value} for it.")


def read_row(word: str) -> Row:
    """Read ``NAME`` or ``NAME:option=value[,option=value]``; see `split_words`."""
    name, _, given = word.partition(":")
    known = [*available(), CENTRALIZED]
    if name not in known:
        raise ConfigError(f"unknown method '{name}'. {nearest(name, known)}")
    settings: dict[str, str] = {}
    for part in given.split(",") if given else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"'{part}' in '{word}' is not of the form option=value; write NAME:option=value,...")
        setting = key.strip() if "." in key else f"strategy.{key.strip()}"
        if setting.startswith("simulation.") or setting in ("run.seed", "federation.rounds"):
            raise ConfigError(f"'{setting}' in '{word}' is the same for all rows of a comparison; give it once, apart.")
        settings[setting] = value.strip()
    return Row(word, name, nest(settings))


def default_folder(what: str = "compare") -> Path:
    """Return ``runs/compare-TIME``, or another word than compare."""
    return Path("runs") / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_comparison(jobs: Sequence[Job], compared: Compared, out: Path) -> Facts:
    """Summarise what is complete, and write it as comparison.json and comparison.md.

    Raises
    ------
    RunDirectoryError
        The files cannot be written.
    """
    labels, seeds = (list(dict.fromkeys(getattr(job, key) for job in jobs)) for key in ("label", "seed"))
    facts = comparison(labels, seeds, jobs[0].config.federation.rounds, compared.runs)
    facts = dict(strict_json(facts | {"failed": compared.failed}))
    write_files(
        out,
        {
            "comparison.json": (to_json(facts, indent=2) + "\n").encode(),
            "comparison.md": comparison_markdown(facts).encode(),
        },
    )
    return facts


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the summaries of several runs beside their directories.

    Raises
    ------
    RunDirectoryError
        The files cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / name).write_bytes(data)
    except OSError as error:
        names = ", ".join(files)
        raise RunDirectoryError(f"cannot write {names} into '{out}': {error.strerror or error}") from None
