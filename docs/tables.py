"""Write the tables of what there is, from the registries and from what the files say of themselves.

    python docs/tables.py

They stand in the pages between two marks; a test holds the pages against them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from fedpeft.adapters import kinds
from fedpeft.adapters.kinds import INITS, KINDS
from fedpeft.config import AdapterConfig
from fedpeft.data import formats
from fedpeft.data.formats import FORMATS
from fedpeft.errors import ConfigError
from fedpeft.strategies import available
from fedpeft.tasks import TASKS
from fedpeft.tasks.metrics import METRICS, measures_of
from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES

DOCS = Path(__file__).parent
PAPER = re.compile(r"arXiv\s+(?P<arxiv>\d{4}\.\d{5})|(?P<venue>\b[A-Z]{4,} \d{4})")
# where a clause ends: at its paper, at what the columns say anyway, or at a full stop
ENDS = re.compile(r"\s*\((?:[^()]*arXiv|[^()]*[A-Z]{4,} \d{4}|PEFT's)|; (?:not |neither )?linear |\.(?: |$)")
UPDATES = {"product": "s B A", "square": "s B R A", "linear": "linear", "neither": "neither"}


def rows(header: str, cells: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown, of the header's columns."""
    lines = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)
    return "\n".join((header, re.sub(r"[^|]+", "---", header), *lines))


def code(names: Iterable[object]) -> str:
    """Return names as code, with commas between them."""
    return ", ".join(f"`{name}`" for name in names)


def yes(value: object) -> str:
    """Return yes or no."""
    return "yes" if value else "no"


def named_in(package: ModuleType) -> dict[int, ModuleType]:
    """Return, by the identity of what a registry's file imports, the file that it imports it from."""
    found = {}
    for node in ast.parse(inspect.getsource(package)).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package.__name__}."):
            module = importlib.import_module(node.module or "")
            found |= {id(getattr(module, alias.name)): module for alias in node.names}
    return found


def said_of(name: str, module: ModuleType | None, whole: str) -> tuple[str, str]:
    """Return what a file says of something, in a few words, and the paper that it names.

    Parameters
    ----------
    name : str
        By which a file of several has an item for each.
    module : module, optional
        The file.
    whole : str
        What stands for the paper where the file names none.
    """
    text = inspect.cleandoc(module.__doc__ or "") if module else ""
    item = re.search(rf"^\* ``{re.escape(name)}``:?(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    paper = PAPER.search(item[1] if item else text)
    title = ENDS.split(" ".join(text.split()))[0]
    clause = title.partition(": ")[2] or title
    if item:
        clause += f": {ENDS.split(' '.join(item[1].split()))[0]}"
    return clause.replace("``", "`"), cited(paper["arxiv"], paper["venue"]) if paper else whole


def cited(arxiv: str | None, venue: str | None) -> str:
    """Return a paper with its link, where it has one."""
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else venue or "-"


def takes(method: type[Any], kind: str) -> bool:
    """Tell whether a method takes a kind, with the options that it has by default."""
    try:
        method.check(method.Options(), AdapterConfig.model_construct(kind=kind))
    except ConfigError:
        return False
    return kind in method.capabilities.kinds


def merged_by(kind: str) -> str:
    """Name the methods that take a kind, or those few that do not."""
    methods = available()
    able = [name for name, method in methods.items() if takes(method, kind)]
    others = [name for name in methods if name not in able]
    if len(others) < len(able) / 3:
        return "all methods" + (f" but {code(others)}" if others else "")
    return code(able)


def kinds_table() -> str:
    """Return a row for each adapter kind."""
    files, every = named_in(kinds), []
    for kind in KINDS.ours.values():
        clause, paper = said_of(kind.name, files.get(id(kind)), f"PEFT's `{kind.config}`")
        update = UPDATES[kind.update] + (f", {' and '.join(sorted(kind.fixed))} fixed" if kind.fixed else "")
        facts = (update, yes(kind.linear), yes(kind.rank), code(kind.inits), merged_by(kind.name))
        every.append((f"`{kind.name}`", clause, paper, *facts))
    return rows(
        "| `adapter.kind` | what it is | paper | update | mean exact | has a rank | begins as | merged by |", every
    )


def inits_table() -> str:
    """Return a row for each initialisation."""
    every = []
    for init in INITS.ours.values():
        able = [kind.name for kind in KINDS.ours.values() if init.name in kind.inits]
        others = [name for name in KINDS.ours if name not in able]
        goes = code(able) if len(able) <= len(others) else f"all but {code(others)}"
        every.append((f"`{init.name}`", goes, yes(init.from_data), yes(init.of_base)))
    return rows("| `adapter.init` | goes with | needs `adapter.init_data` | taken out of the base |", every)


def methods_table() -> str:
    """Return a row for each method."""
    every = []
    for name, method in available().items():
        able = method.capabilities
        arxiv = re.fullmatch(r"arXiv (\S+)", able.paper)
        sees = "clients" if able.needs_single_factors else "nothing" if able.sends == "nothing" else "sums"
        paper = cited(arxiv and arxiv[1], able.paper)
        every.append((f"`{name}`", paper, able.trains, able.sends, able.exact, yes(able.mixed_ranks), sees))
    return rows(
        "| method | paper | clients train | the server sends | exact | mixed ranks | server sees |",
        every,
    )


def tasks_table() -> str:
    """Return a row for each task."""
    every = (
        (
            f"`{task.name}`",
            code(f"data.{each.name}" for each in task.columns if not each.optional)
            + "".join(f"; `data.{each.name}` if given" for each in task.columns if each.optional),
            code(metric.name for metric in sorted(measures_of(task), key=lambda each: each.name != task.main_metric)),
            f"`{task.auto}`",
        )
        for task in TASKS.ours.values()
    )
    return rows("| `model.task` | reads | scores, of which the first one judges a run | bases are loaded by |", every)


def metrics_table() -> str:
    """Return a row for each metric."""
    every = (
        (
            f"`{metric.name}`",
            metric.better,
            f"{metric.bounds[0]:g} to {metric.bounds[1]:g}",
            code(task.name for task in TASKS.ours.values() if metric in measures_of(task)),
        )
        for metric in METRICS.ours.values()
    )
    return rows("| metric | better | from | of |", every)


def optimizers_table() -> str:
    """Return a row for each optimiser."""
    every = (
        (
            f"`{each.name}`",
            each.description,
            code(f"train.{key}" for key in each.options.model_fields) or "-",
            f"{each.state_floats:g}",
            "no" if each.not_private else "yes",
        )
        for each in OPTIMIZERS.ours.values()
    )
    return rows("| `train.optimizer` | what | its keys | floats kept of each trained one | at record level |", every)


def schedules_table() -> str:
    """Return a row for each schedule."""
    return rows(
        "| `train.lr_schedule` | the learning rate |",
        ((f"`{each.name}`", each.description) for each in SCHEDULES.ours.values()),
    )


def formats_table() -> str:
    """Return a row for each format of rows."""
    files, every = named_in(formats), []
    for each in FORMATS.ours.values():
        known = code(each.suffixes) or f"a folder that holds {code(each.marks).replace(', ', ' or ')}"
        if not each.suffixes and not each.marks:
            known = each.description
        read = inspect.cleandoc(files[id(each)].__doc__ or "").splitlines()[0].rstrip(".")
        every.append((f"`{each.name}`", known, yes(each.packed), read))
    return rows("| format | known by | also `.gz` | what is read |", every)


# by page and mark
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "adapters.md": {"adapter kinds": kinds_table, "initialisations": inits_table},
    "data.md": {"formats": formats_table},
    "methods.md": {"methods": methods_table},
    "tasks.md": {
        "tasks": tasks_table,
        "metrics": metrics_table,
        "optimisers": optimizers_table,
        "schedules": schedules_table,
    },
}


def with_tables(page: str, text: str) -> str:
    """Return a page with its tables as they must be.

    Parameters
    ----------
    page : str
        Name of its file.
    text : str
        What stands in it.
    """
    for mark, table in TABLES[page].items():
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"docs/{page} lacks the marks {begin} and {end}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{table()}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Write them all."""
    for page in TABLES:
        path = DOCS / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
