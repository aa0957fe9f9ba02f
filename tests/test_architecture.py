"""The plan of the house, as rules over the source: who may import whom, how long a function is, who knows which name.

Nothing here is imported but the registries, so that a rule is told of every import there is: at the head of a module,
inside a function, and for type checkers alone. The few exceptions stand beside their rules, each with its reason.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"fedpeft": "", "strategies": "strategies", "clients": "clients", "simulations": "simulations"}

# From low to high. A unit is a module or a package with all in it, the longest name counts, and `x.*` is what lies in x
# but not x itself. An import goes to a lower row, or stays within its unit.
UNITS: tuple[tuple[str, ...], ...] = (
    ("errors", "seeds", "jsons", "rounding", "formats", "chatter", "deferred"),
    ("places", "registry"),
    ("quantization",),
    ("adapters.kinds", "training.optimizers", "data.layouts"),  # what is known of each, before any configuration
    ("cache", "precision"),
    ("presets", "data.formats"),
    ("config",),
    ("bases", "mapped", "dropout", "attention", "allocation"),
    ("quantised",),
    ("data",),
    ("tasks",),
    ("models", "runs"),
    ("agreement",),
    ("adapters",),
    ("generation",),
    ("training", "wire"),
    ("resident",),
    ("privacy",),  # its levels included
    ("deployment",),
    ("report",),
    ("clients", "strategies.algebra", "strategies.capabilities"),
    ("strategies.averaging",),
    ("strategies.rounds",),
    ("strategies.*",),  # the methods
    ("strategies",),  # their registry
    ("strategies.merging",),
    ("simulations.grids",),
    ("simulations",),
    ("finished",),
    ("server", "rescoring", "exporting", "harness"),
    ("cli",),
    ("__main__",),
)
STRANGERS = {("strategies", "clients"), ("clients", "strategies")}  # a server knows no client's code, nor the reverse
# what is imported when it is asked for, so that `from fedpeft import simulate` works: no part of the order
LAZY = "fedpeft"
# a level brings mechanism and accountant together, and statement, books and audit ask the level: one unit, two folders
ONE_UNIT = {"privacy.levels": "privacy"}

LONGEST_FUNCTION, MOST_PARAMETERS = 60, 8


# --- the source ----------------------------------------------------------------------------------------------------


@cache
def sources() -> Mapping[str, Path]:
    """Return the file of every module, by its name without ``fedpeft.``; the package itself is ``fedpeft``."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(([prefix] if prefix else []) + parts) or LAZY] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def shown(module: str) -> str:
    return str(sources()[module].relative_to(ROOT))


def imported(code: ast.Module) -> Iterator[str]:
    """Yield what code imports of ours, wherever the import stands."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno} imports relatively: write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, inner = name.partition(".")
            if first == LAZY:
                yield inner if inner in sources() else inner.rpartition(".")[0] or LAZY


@cache
def edges() -> frozenset[tuple[str, str]]:
    return frozenset(
        (module, target)
        for module in sources()
        for target in imported(tree(module))
        if module != LAZY and target != module
    )


def third_party(module: str) -> Iterator[tuple[str, bool]]:
    """Yield the full names of what a module imports of others, and whether at its head."""
    top = set(tree(module).body)
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("fedpeft"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in top


def in_circles(graph: frozenset[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the edges that lie on a circle."""
    onward: dict[str, set[str]] = {}
    for start, end in graph:
        onward.setdefault(start, set()).add(end)

    @cache
    def reached(start: str) -> frozenset[str]:
        seen, waiting = set(), [start]
        while waiting:
            for node in onward.get(waiting.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
        return frozenset(seen)

    return sorted((start, end) for start, end in graph if start in reached(end))


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function with the names of the classes and functions around it."""

    def within(node: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}{child.name}", child
                yield from within(child, f"{path}{child.name}.")
            else:
                yield from within(child, f"{path}{child.name}." if isinstance(child, ast.ClassDef) else path)

    return within(tree(module), "")


# --- the rules -----------------------------------------------------------------------------------------------------


def unit_of(module: str) -> tuple[int, str] | None:
    """Return the row and the name of a module's unit; None where the plan has no place for it."""
    fitting = [
        (len(unit), row, unit)
        for row, units in enumerate(UNITS)
        for unit in units
        if (module.startswith(unit[:-1]) if unit.endswith(".*") else f"{module}.".startswith(f"{unit}."))
    ]
    return max(fitting)[1:] if fitting else None


def unplaced() -> list[str]:
    """Name the modules that no unit holds, and the units that hold no module."""
    units = {unit_of(module) for module in sources() if module != LAZY}
    empty = [f"no module in unit {unit}" for row, each in enumerate(UNITS) for unit in each if (row, unit) not in units]
    return [module for module in sources() if module != LAZY and unit_of(module) is None] + empty


def upward() -> list[str]:
    """Name the imports that do not go down."""
    found = []
    for module, target in sorted(edges()):
        here, there = unit_of(module), unit_of(target)
        if here is None or there is None or here == there:
            continue
        strange = (module.partition(".")[0], target.partition(".")[0]) in STRANGERS
        if there[0] >= here[0] or strange:
            found.append(f"{module} -> {target}")
    return found


def circles_of_modules() -> list[str]:
    return [f"{module} -> {target}" for module, target in in_circles(edges())]


def folder_of(module: str) -> str:
    """Return a module's folder; what lies at the top of `fedpeft` is a folder each."""
    is_package = sources()[module].name == "__init__.py"
    return module if is_package or "." not in module else module.rpartition(".")[0]


def circles_of_folders() -> list[str]:
    folders = ((folder_of(one), folder_of(other)) for one, other in edges())
    graph = frozenset((ONE_UNIT.get(one, one), ONE_UNIT.get(other, other)) for one, other in folders)
    return [f"{one} -> {other}" for one, other in in_circles(frozenset(pair for pair in graph if pair[0] != pair[1]))]


def long_functions() -> list[str]:
    return [
        f"{shown(module)}: {name}"
        for module in sources()
        for name, node in functions(module)
        if (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    ]


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell a command of the command line, whose parameters are its options."""
    called = [each.func for each in node.decorator_list if isinstance(each, ast.Call)]
    return any(isinstance(each, ast.Attribute) and each.attr in ("command", "callback") for each in called)


def wide_functions() -> list[str]:
    found = []
    for module in sources():
        for name, node in functions(module):
            each = node.args
            names = [one.arg for one in (*each.posonlyargs, *each.args, *each.kwonlyargs)]
            if len([one for one in names if one not in ("self", "cls")]) > MOST_PARAMETERS and not is_command(node):
                found.append(f"{shown(module)}: {name}")
    return found


def strange_libraries() -> list[str]:
    """Name the imports of libraries that a folder is to know nothing of."""
    found = set()
    for module in sources():
        high = module.startswith(("simulations", "server", "cli"))
        leaf = module.startswith(("adapters.kinds", "training.optimizers"))
        for name, at_head in third_party(module):
            library = name.partition(".")[0]
            if library == "ray" and not module.startswith("simulations"):
                found.add(f"{shown(module)}: {name}")
            if name.startswith("flwr.serverapp") and not (high or module.startswith("strategies")):
                found.add(f"{shown(module)}: {name}")
            if leaf and at_head and library in ("torch", "peft", "transformers"):
                found.add(f"{shown(module)}: {name}")
    return sorted(found)


# --- names that one file alone may know ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sort:
    """Things that there are many of.

    Parameters
    ----------
    registry : str
        ``module:NAME`` of what has them by their names.
    homes : tuple of str
        Patterns of the files that may be one's own; such a file must define the name to use it.
    fields : frozenset of str
        The attributes, keys and variables that hold such a name.
    words : frozenset of str
        Names that are words with other uses too: these count where they are compared with one of `fields` only.
    named_by : tuple of str
        Patterns of files whose records name one as a configuration does: a preset its task, a task its metrics.
    """

    registry: str
    homes: tuple[str, ...]
    fields: frozenset[str]
    words: frozenset[str] = frozenset()
    named_by: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """What they are called."""
        return _registered(self.registry)


@cache
def _registered(registry: str) -> frozenset[str]:
    where, _, attribute = registry.partition(":")
    entries = getattr(importlib.import_module(f"fedpeft.{where}"), attribute)
    return frozenset(getattr(entries, "ours", entries))


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


SORTS: dict[str, Sort] = {
    "strategy": Sort(
        "strategies:STRATEGIES",
        ("strategies/*.py",),
        _set("name strategy method"),
        _set("local"),  # a head, a folder
    ),
    "adapter kind": Sort(
        "adapters.kinds:KINDS",
        ("fedpeft/adapters/kinds/*.py",),
        _set("kind kinds peft_type"),
        _set("lora miss"),  # part of PEFT's names; a verb
    ),
    "task": Sort("tasks:TASKS", ("fedpeft/tasks/*.py",), _set("task"), named_by=("fedpeft/presets/__init__.py",)),
    "optimiser": Sort("training.optimizers:OPTIMIZERS", ("fedpeft/training/optimizers/*.py",), _set("optimizer")),
    "schedule": Sort(
        "training.optimizers:SCHEDULES",
        ("fedpeft/training/optimizers/*.py",),
        _set("lr_schedule schedule"),
        _set("constant linear cosine"),  # solvers and sketches have the same
    ),
    "metric": Sort(
        "tasks.metrics:METRICS",
        ("fedpeft/tasks/*.py",),
        _set("metric metrics"),
        _set("loss pass"),  # the key of what a client reports; a verb
        named_by=("fedpeft/tasks/*.py",),
    ),
    "privacy level": Sort(
        "privacy.levels:LEVELS",
        ("fedpeft/privacy/levels/*.py",),
        _set("level levels"),
        _set("none record client"),
    ),
    "preset": Sort("presets:PRESETS", ("fedpeft/presets/*.py",), _set("preset name"), _set("chat digits")),
}

# a user who is told what to type must be told a name
EXAMPLES = frozenset(
    {
        ("fedpeft/cli/app.py", "strategy", "lora-fair"),
        ("simulations/compare.py", "strategy", "fedit"),
        ("simulations/compare.py", "strategy", "lora-fair"),
        ("fedpeft/adapters/kinds/lora_sb.py", "adapter kind", "lora-xs"),  # what to use in a deployment instead
        # what to use in place of what PEFT has and a run cannot train
        *(
            ("fedpeft/adapters/kinds/refused.py", "adapter kind", n)
            for n in ("vblora", "psoft", "prompt-tuning", "prefix-tuning")
        ),
    }
)


def literals(module: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield a module's strings, each with the fields that it is compared with; prose is left out.

    Prose are docstrings and ``description``. The default of a key of the configuration is no knowledge of the name, and
    neither is the kind that a method's record sets for a run which names none.
    """
    prose: set[int] = set()
    compared: dict[int, set[str]] = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(id(node.value))
        elif isinstance(node, ast.Call):
            prose |= {id(each.value) for each in node.keywords if each.arg in ("description", "help")}
            if _name(node.func) == "Field" and module.startswith("config."):
                prose |= {id(each) for each in node.args[:1]}
            if _name(node.func) == "Capabilities":
                prose |= {id(each.value) for each in node.keywords if each.arg == "kind"}
        elif isinstance(node, ast.AnnAssign) and module.startswith("config.") and node.value is not None:
            prose.add(id(node.value))
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {_name(each) for each in sides} - {""}
            for side in sides:
                for each in ast.walk(side):
                    compared.setdefault(id(each), set()).update(names)
        elif isinstance(node, ast.Match):
            for case in node.cases:
                for each in ast.walk(case.pattern):
                    compared.setdefault(id(each), set()).add(_name(node.subject))
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value, frozenset(compared.get(id(node), ()))


def _name(node: ast.expr) -> str:
    """Return what an attribute, a variable or a key is called."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return ""


@cache
def defined(module: str) -> frozenset[str]:
    """Return the names that a module gives to something: ``name = "x"``, ``name="x"``, or the first of a call."""
    found = set()
    for node in ast.walk(tree(module)):
        given: list[ast.expr | None] = []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            given = [node.value] if any(_name(each) == "name" for each in targets) else []
        elif isinstance(node, ast.Call):
            given = [*node.args[:1], *(each.value for each in node.keywords if each.arg == "name")]
        found |= {each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return frozenset(found)


@cache
def named_in(text: str, what: str) -> frozenset[str]:
    """Return the names of a sort that stand in a text as words of their own; those that are words must be all of it."""
    sort = SORTS[what]
    words = frozenset(re.findall(r"[\w-]+", text))
    return (words & sort.names - sort.words) | ({text} & sort.names & sort.words)


@cache
def names_said() -> frozenset[tuple[str, str, str]]:
    """Return the file, the sort and the name of each that is named in a file that is not its own."""
    said = set()
    for module in sources():
        path = shown(module)
        for text, fields in literals(module):
            for what, sort in SORTS.items():
                for name in named_in(text, what):
                    at_home, named_by = (
                        any(PurePosixPath(path).match(pattern) for pattern in patterns)
                        for patterns in (sort.homes, sort.named_by)
                    )
                    own = at_home and (name in defined(module) or name.replace("-", "_") == PurePosixPath(path).stem)
                    if not (own or named_by or (name in sort.words and not fields & sort.fields)):
                        said.add((path, what, name))
    return frozenset(said)


def names_elsewhere() -> list[str]:
    return sorted(f"{path}: {what} '{name}'" for path, what, name in names_said() - EXAMPLES)


# --- the tests -----------------------------------------------------------------------------------------------------

RULES: dict[str, Callable[[], list[str]]] = {
    "every module has its place in the order of units": unplaced,
    "each import goes down in the order of units": upward,
    "no modules import each other in a circle": circles_of_modules,
    "no folders import each other in a circle": circles_of_folders,
    f"no function has over {LONGEST_FUNCTION} lines": long_functions,
    f"no function has more than {MOST_PARAMETERS} parameters": wide_functions,
    "no folder imports a library that it is to know nothing of": strange_libraries,
    "no file knows the name of another one's strategy, kind, task, optimiser, metric or level": names_elsewhere,
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_of_the_house_holds(rule):
    assert RULES[rule]() == []


def test_no_exception_outlives_its_reason():
    assert names_said() >= EXAMPLES
    assert set(ONE_UNIT) <= {folder_of(module) for module in sources()}


def test_every_package_is_named_for_the_wheel():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {module for module, path in sources().items() if path.name == "__init__.py"}
    assert sorted(named) == sorted(each if each == LAZY else f"fedpeft.{each}" for each in there)


def test_an_import_counts_inside_a_function_and_for_types_alone():
    code = """
import torch
from fedpeft.config import RunConfig
if TYPE_CHECKING:
    from fedpeft.resident import Resident
def lazy():
    import fedpeft.strategies.fedit
    from fedpeft import simulate
"""
    assert list(imported(ast.parse(code))) == ["config", "resident", "strategies.fedit", LAZY]


def test_a_circle_is_found_and_a_line_is_not():
    assert in_circles(frozenset({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")})) == [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),
    ]
    assert in_circles(frozenset({("a", "b"), ("b", "c")})) == []
