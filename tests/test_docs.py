"""What the pages say exists: links, settings, commands, files, names; and tables are those of the registries."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest

from fedpeft.adapters.kinds import KINDS
from fedpeft.cli import main
from fedpeft.config import RunConfig
from fedpeft.config.template import keys
from fedpeft.strategies import available

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
)
EXTEND = ROOT / "docs" / "extend.md"
GROUPS = (
    *("strategies", "adapters", "inits", "tasks", "optimizers", "schedules", "metrics", "formats", "layouts"),
    *("templates", "quantizations"),
)
TABLES = runpy.run_path(str(ROOT / "docs" / "tables.py"))
SUFFIXES = ("md", "json", "jsonl", "toml", "csv", "py", "png")  # of files whose names begin as a setting does

CODE = re.compile(r"```\w*\n(.*?)```|(?:^|(?<=\n\n))((?:    [^\n]*\n|\n)+)|`([^`\n]+)`", re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(RunConfig.model_fields)})\.([a-z_]+)\b(?!\()")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """Return the code of a page: blocks, fenced and indented, and spans."""
    return [next(part for part in found.groups() if part is not None) for found in CODE.finditer(text_of(page))]


def lines_of(page: Path) -> Iterator[str]:
    """Return the lines of a page's code, of which those that end in a backslash are one with the next."""
    for code in code_of(page):
        for line in code.replace("\\\n", " ").splitlines():
            yield line.strip().removeprefix("$ ")


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as both GitHub and the site make them."""
    plain = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for pair in LINK.findall(text_of(page)):
        link = pair[0] or pair[1]
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}, and {target.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    options = {key for method in available().values() for key in method.Options.model_fields}
    configs = {getattr(peft, kind.config) for kind in KINDS.ours.values()}
    peft_options = {option.name for config in configs for option in dataclasses.fields(config)}
    of_names = {"strategy": options, "adapter": peft_options}  # what depends on the method and on the kind
    for code in code_of(page):
        for section, key in SETTING.findall(code):
            known = f"{section}.{key}" in keys() or key in of_names.get(section, set())
            assert known or key in SUFFIXES, f"{section}.{key}"


@functools.cache
def helped(*command: str) -> str:
    """Return what a command says of itself."""
    import contextlib
    import io

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["fedpeft", *command, "--help"])
        patch.setenv("COLUMNS", "250")
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, f"there is no command `fedpeft {' '.join(command)}`"
    return out.getvalue()


def commands(page: Path) -> Iterator[list[str]]:
    """Return the words of each fedpeft command that a page shows."""
    for line in lines_of(page):
        for part in line.split("&&"):
            words = shlex.split(part, comments=True) if part.strip().startswith("fedpeft ") else []
            if words and "..." not in words:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    for words in commands(page):
        command = [] if words[0].startswith("-") else words[:1]
        if len(words) > 1 and "COMMAND" in helped(*command) and not words[1].startswith("-"):
            command = words[:2]
        shown = helped(*command)
        for option in (word.partition("=")[0] for word in words[len(command) :] if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), f"`fedpeft {' '.join(words)}`: no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_extra_that_a_command_names_exists(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in lines_of(page):
        for name in re.findall(r"\b(?:benchmarks|examples|tests|docs|strategies|fedpeft)/[\w/.-]+", line):
            if line.startswith(("python ", "pytest ")):
                assert (ROOT / name).exists(), line
        for extra in re.findall(r"pip install .*\[(\w+)\]", line):
            assert extra in extras, line


def blocks(page: Path) -> list[str]:
    """Return a page's Python code."""
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if page != EXTEND], ids=lambda page: page.name)
def test_what_python_code_imports_from_fedpeft_is_there(page: Path) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedpeft"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("block", blocks(EXTEND), ids=lambda block: block.splitlines()[0].strip('".'))
def test_each_worked_example_makes_a_record_that_has_a_name(block: str) -> None:
    namespace: dict[str, object] = {"__name__": "extension"}
    exec(block, namespace)
    made = list(namespace.values())[-1]
    assert isinstance(getattr(made, "name", None), str)


@pytest.mark.parametrize("name", TABLES["TABLES"])
def test_the_tables_of_what_there_is_are_those_of_the_registries(name: str) -> None:
    text = text_of(ROOT / "docs" / name)
    assert text == TABLES["with_tables"](name, text), "run: python docs/tables.py"


def test_a_kind_that_is_added_has_a_row_with_what_its_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS.ours, "added", replace(KINDS.find("miss"), name="added", config="ShiraConfig"))
    assert "| `added` |  | PEFT's `ShiraConfig` | linear | yes | yes |" in TABLES["kinds_table"]()
    miss = next(row for row in TABLES["kinds_table"]().splitlines() if row.startswith("| `miss` |"))
    assert "| one matrix of rows that repeat over the inputs | [2409.15371](https://arxiv.org/abs/2409.15371) |" in miss


def resolves(name: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: object = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_with_dots_and_every_file_of_ours_is_there(page: Path) -> None:
    groups = {f"fedpeft.{group}" for group in GROUPS}
    for code in code_of(page):
        for name in re.findall(r"(?<![\w./-])fedpeft(?:\.[a-zA-Z_]\w*)+", code):
            assert name in groups or name.rpartition(".")[2] in SUFFIXES or resolves(name), f"{page.name}: {name}"
        for name in re.findall(r"(?<![\w./-])(?:fedpeft|strategies|clients|simulations|tests)/[\w/.-]*\w", code):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_what_the_changelog_says_that_names_became_is_there() -> None:
    moved = re.findall(r"^\| `([^`]+)` \| `(fedpeft[\w.]*)` \|$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert len(moved) > 10
    for before, now in moved:
        assert resolves(now), f"{before} is not now {now}"
        assert not resolves(before), f"{before} is there still"


@pytest.mark.parametrize("name", ["docs/extend.md", "CONTRIBUTING.md"])
def test_who_extends_is_told_each_entry_point_group(name: str) -> None:
    assert set(re.findall(r"`fedpeft\.(\w+)`", text_of(ROOT / name))) >= set(GROUPS)


def test_a_newcomer_reads_the_readme_in_five_minutes_and_copies_two_commands() -> None:
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) < 160
    first, second = [line.strip() for line in text.splitlines() if line.startswith("    ")][:2]
    assert first == "pip install -e . && fedpeft simulate --strategy lora-fair"
    assert second == 'pip install -e ".[test]" && pytest'


def test_package_citation_and_changelog_name_one_release() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)[0]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert released[0] == version
    assert f"version: {version}\n" in cited
    assert f"date-released: {released[1]}\n" in cited
