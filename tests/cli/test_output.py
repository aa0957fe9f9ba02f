"""Standard streams that end no command, and files whose encoding hangs on no locale."""

from __future__ import annotations

import ast
import locale
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedpeft.config import RunConfig
from fedpeft.rescoring import rescore
from fedpeft.runs import folder_name, read_config, read_events
from fedpeft.simulations.simulate import simulate

Make = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]
# what a command does, whatever becomes of what it prints: it writes a file at its end
COMMAND = """
import os, sys
from pathlib import Path
import fedpeft.cli
from fedpeft.cli.output import saved
@fedpeft.cli.app.command()
def probe(many: int) -> None:
    saved(Path("a run"))
    for number in range(many):
        print("größe 日本", number)
        print("warning: größe", file=sys.stderr)
    Path(os.environ["DONE"]).touch()
sys.argv = ["fedpeft", *sys.argv[1:]]
fedpeft.cli.main()
"""
LOST = "error: cannot write to stdout: No space left on device; what was printed is lost. 'a run' is complete."


def shell(words: str, tmp_path: Path, **environment: str) -> tuple[int, str, str]:
    """Run the probe by a shell, which replaces COMMAND; return exit code, stdout and stderr."""
    program = tmp_path / "probe.py"
    program.write_text(COMMAND, encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words.replace('COMMAND', f'{sys.executable} {program}')}"],
        env=os.environ | {"DONE": str(tmp_path / "done"), "PYTHONIOENCODING": "utf-8"} | environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "stdout", "stderr"),
    [
        ("COMMAND probe 1 2>/dev/null >/dev/full", 1, "", ""),
        ("COMMAND probe 1 >/dev/full", 1, "", f"warning: größe\n{LOST}\n"),
        ("COMMAND probe 1 2>/dev/full", 0, "größe 日本 0\n", ""),
        ("COMMAND probe 1 2>&- >&- <&-", 0, "", ""),
        ("COMMAND probe 9999 2>/dev/null | head -1", 141, "größe 日本 0\n", ""),
        ("COMMAND probe 9999 2>&1 >/dev/null | head -1", 0, "warning: größe\n", ""),
    ],
)
def test_a_command_does_what_it_was_asked_for_whatever_its_output_meets(
    words: str, code: int, stdout: str, stderr: str, tmp_path: Path
) -> None:
    assert shell(words, tmp_path) == (code, stdout, stderr)
    assert (tmp_path / "done").exists()


def test_letters_that_the_encoding_lacks_are_replaced(tmp_path: Path) -> None:
    code, stdout, stderr = shell("COMMAND probe 1", tmp_path, PYTHONIOENCODING="ascii:strict")
    assert (code, stdout, stderr) == (0, "gr\\xf6\\xdfe \\u65e5\\u672c 0\n", "warning: gr\\xf6\\xdfe\n")


def test_a_table_on_a_full_disk_is_one_line_and_a_word_of_no_encoding_another(tmp_path: Path) -> None:
    code, _, stderr = shell("COMMAND presets >/dev/full", tmp_path, COLUMNS="0", TERM="dumb")
    assert (code, stderr) == (1, LOST.partition(" 'a run'")[0] + "\n")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, stdout, stderr = shell("COMMAND simulate data.source=größe.csv", tmp_path, **plain)
    assert (code, stdout, len(stderr.splitlines())) == (2, "", 1)
    assert "set PYTHONUTF8=1" in stderr


@pytest.mark.parametrize("columns", ["0", "20"])
def test_a_narrow_terminal_loses_nothing_of_a_table(columns: str, tmp_path: Path) -> None:
    _, stdout, _ = shell("COMMAND presets", tmp_path, COLUMNS=columns)
    assert {"digits", "docstrings", "chat", "image-classification"} <= set(stdout.split())


def text_files(tree: ast.AST) -> Iterator[ast.Call]:
    """Find calls that open a file, or a process's pipes, as text."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [*call.args[:2], *(word.value for word in call.keywords)]
        words = [each.value for each in given if isinstance(each, ast.Constant)]
        options = {word.arg for word in call.keywords}
        modes = [word for word in words if isinstance(word, str) and set(word) <= set("rwaxbt+")]
        opens = name == "open" and (modes or isinstance(call.func, ast.Name)) and not any("b" in mode for mode in modes)
        piped = name in ("run", "Popen", "check_output") and options & {"text", "universal_newlines"}
        if opens or piped or name in ("read_text", "write_text"):
            yield call


def test_every_file_that_the_product_opens_as_text_names_its_encoding() -> None:
    found, without = 0, []
    for folder in ("fedpeft", "strategies", "clients", "simulations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in text_files(ast.parse(path.read_text(encoding="utf-8"))):
                found += 1
                if "encoding" not in {word.arg for word in call.keywords}:
                    without.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found > 20
    assert without == []


def test_labels_and_clients_whose_letters_the_locale_lacks_train_and_are_saved(
    text_config: Make, tmp_path: Path
) -> None:
    rows = [f"w{index} w{index + 1},{'größe' if index % 2 else '日本'},Zürich-{index % 2}" for index in range(40)]
    source = tmp_path / "rows.csv"
    source.write_text("\n".join(["text,label,client", *rows]) + "\n", encoding="utf-8")
    config = text_config(data__source=str(source), federation__rounds=1, data__labels="größe,日本")
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        run = simulate(config, tmp_path / "run").path
        assert read_config(run).data.label_names == ("größe", "日本")
        assert rescore(run, {})["examples"] > 0
        assert {event.get("id") for event in read_events(run) if event["event"] == "client"} == {
            "Zürich-0",
            "Zürich-1",
        }
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (run / "adapter" / "labels.json").read_text(encoding="utf-8") == '["größe", "日本"]\n'


def test_a_folder_of_a_client_is_one_that_the_file_system_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_name("Zürich") == "Zürich"
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii"))
    assert folder_name("Zürich") == "Z%C3%BCrich"
