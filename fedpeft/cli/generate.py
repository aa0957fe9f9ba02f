"""Answers of a run's model to what a user types: once, or turn by turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli.options import Json, Verbose, quiet, spread
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from fedpeft.finished import FinishedRun

Run = Annotated[Path, typer.Argument(help="A run directory.")]


@dataclass(frozen=True)
class Asking:
    """Who is asked, and how."""

    client: Annotated[str | None, typer.Option(help="Whose model, where each client has its own.")] = None
    system: Annotated[str | None, typer.Option(help="A system turn that comes first.")] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer; data.max_new_tokens if not given.")
    ] = None


@spread()
def generate(
    run: Run,
    asking: Asking,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to answer; may be repeated. Lines of stdin if not given.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A text file with one prompt a line.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="base", help="Show what the base alone answers, too.", show_default=False)
    ] = None,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Answer prompts by a run's model, each token the most likely one."""
    if compare not in (None, "base"):
        raise ConfigError(f"--compare '{compare}' is not known; give base.")
    quiet(verbose)
    from fedpeft.generation import Limits, prompt_tokens, shortened
    from fedpeft.generation import generate as answers_of

    finished = _open(run, "fedpeft generate")
    prompts = list(_prompts(prompt, file))
    model = finished.model(asking.client)
    limits = Limits(asking.max_new_tokens or finished.config.data.max_new_tokens)
    tokens = [prompt_tokens(finished.tokenizer, _turns(asking.system, text)) for text in prompts]
    if cut := shortened(model, tokens, limits):
        print(
            f"warning: {cut} of {len(tokens)} prompts are longer than the model reads; their end is kept",
            file=sys.stderr,
        )
    settings = (finished.tokenizer, tokens, limits, finished.config.train.precision)
    answers = answers_of(model, *settings)
    of_base: list[str] | None = None
    if compare is not None:
        with model.disable_adapter():
            of_base = answers_of(model, *settings)
    for at, (text, answer) in enumerate(zip(prompts, answers, strict=True)):
        facts = {"prompt": text, "answer": answer} | ({} if of_base is None else {"base": of_base[at]})
        _say(facts, json_lines, alone=len(prompts) == 1)


@spread()
def chat(
    run: Run,
    asking: Asking,
    verbose: Verbose = False,
) -> None:
    """Talk with a run's model, turn by turn.

    /reset forgets what was said, /quit or Ctrl-D ends. Lines that do not come from a terminal are answered one by one.
    """
    quiet(verbose)
    from fedpeft.generation import Limits, prompt_tokens
    from fedpeft.generation import generate as answers_of

    finished = _open(run, "fedpeft chat")
    model = finished.model(asking.client)
    limits = Limits(asking.max_new_tokens or finished.config.data.max_new_tokens)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        print("/reset forgets what was said, /quit ends.")
        if finished.tokenizer.chat_template is None:
            print("The model has no chat template: each line is answered by itself.")
    history = _turns(asking.system, None)
    for line in _lines("> " if at_terminal else ""):
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            history = _turns(asking.system, None)
            continue
        if not line:
            continue
        history.append({"role": "user", "content": line})
        tokens = prompt_tokens(finished.tokenizer, history)
        (answer,) = answers_of(model, finished.tokenizer, [tokens], limits, finished.config.train.precision)
        history.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def _open(run: Path, what: str) -> FinishedRun:
    from fedpeft.finished import open_run

    finished = open_run(run)
    finished.check_writes(what)
    return finished


def _turns(system: str | None, prompt: str | None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system else []
    return turns + ([{"role": "user", "content": prompt}] if prompt is not None else [])


def _prompts(given: list[str] | None, file: Path | None) -> Iterator[str]:
    """Yield what is to be answered: of options, of a file's lines, or of stdin's."""
    yield from given or ()
    if file is not None:
        try:
            yield from (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file '{file}' cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    elif not given:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("nothing to answer: give --prompt TEXT, --file FILE, or lines on stdin.")
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return


def _say(facts: dict[str, Any], json_lines: bool, *, alone: bool) -> None:
    if json_lines:
        from fedpeft.jsons import to_json

        print(to_json(facts, ensure_ascii=False))
        return
    if alone and "base" not in facts:
        print(facts["answer"])
        return
    names = {"prompt": "prompt", "base": "base", "answer": "answer"}
    for name, title in names.items():
        if name in facts:
            print(f"{title + ':':<8} {facts[name]}")
    print()
