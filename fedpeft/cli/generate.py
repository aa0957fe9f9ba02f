"""Answers of a run's model to what a user types: once, or turn by turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli.options import Json, Verbose, quiet, spread, tell
from fedpeft.errors import ConfigError
from fedpeft.formats import printable

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
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with each prompt as it stands, in no turn, as after training on text.")
    ] = False,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Answer prompts by a run's model, each token the most likely one."""
    if compare not in (None, "base"):
        raise ConfigError(f"--compare '{compare}' is not known; give base.")
    if raw and asking.system is not None:
        raise ConfigError("--system writes a turn, and --raw writes none; drop one of both.")
    quiet(verbose)
    from fedpeft.generation import Limits, prompt_tokens, shortened, text_tokens
    from fedpeft.generation import generate as answers_of

    finished = _open(run, "fedpeft generate")
    prompts = _prompts(prompt, file)
    model = finished.model(asking.client)
    limits = Limits(asking.max_new_tokens or finished.config.data.max_new_tokens)
    turns = [_turns(asking.system, text) for text in prompts]
    tokenizer = finished.tokenizer
    tokens = [text_tokens(tokenizer, text) for text in prompts] if raw else [prompt_tokens(tokenizer, t) for t in turns]
    if cut := shortened(model, tokens, limits):
        tell(f"warning: {cut} of {len(tokens)} prompts are longer than the model reads; their end is kept")
    settings = (tokenizer, tokens, limits, finished.config.train.precision)
    told = {"prompt": prompts, "answer": answers_of(model, *settings)}
    if compare is not None:
        with model.disable_adapter():
            told["base"] = answers_of(model, *settings)
    for values in zip(*told.values(), strict=True):
        _say(dict(zip(told, values, strict=True)), json_lines, alone=len(prompts) == 1)


@spread()
def chat(
    run: Run,
    asking: Asking,
    verbose: Verbose = False,
) -> None:
    """Talk with a run's model, turn by turn.

    /reset forgets what was said, /quit or Ctrl-D ends. What was said first is forgotten where the model does not read
    so much. Lines that do not come from a terminal are answered one by one.
    """
    quiet(verbose)
    from fedpeft.generation import Limits, prompt_tokens, shortened
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
        while shortened(model, [tokens], limits) and _forgets(history):
            tokens = prompt_tokens(finished.tokenizer, history)
        (answer,) = answers_of(model, finished.tokenizer, [tokens], limits, finished.config.train.precision)
        history.append({"role": "assistant", "content": answer})
        print(printable(answer), flush=True)


def _open(run: Path, what: str) -> FinishedRun:
    from fedpeft.finished import open_run

    finished = open_run(run)
    finished.check_writes(what)
    return finished


def _turns(system: str | None, prompt: str | None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system else []
    return turns + ([{"role": "user", "content": prompt}] if prompt is not None else [])


def _forgets(history: list[dict[str, str]]) -> bool:
    """Drop the oldest exchange of a talk, from a user's turn to the next; False where there is but one."""
    users = [at for at, turn in enumerate(history) if turn["role"] == "user"]
    if len(users) < 2:
        return False
    del history[users[0] : users[1]]
    return True


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """Return what is to be answered: of options, of a file's lines, or of stdin's."""
    prompts, nothing = list(given or ()), "nothing to answer: give --prompt TEXT, --file FILE, or lines on stdin."
    if file is not None:
        try:
            with file.open(encoding="utf-8-sig") as lines:
                prompts += [line.rstrip("\n") for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file '{file}' cannot be read: {getattr(error, 'strerror', None) or error}.") from None
        nothing = f"nothing to answer: --file '{file}' has no line with a prompt."
    elif not given and sys.stdin is not None and not sys.stdin.isatty():
        try:
            prompts += [line.rstrip("\n") for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise _unreadable(error) from None
    if not prompts:
        raise ConfigError(nothing)
    return prompts


def _unreadable(error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(f"what comes on stdin is no text in {error.encoding}; give UTF-8, or --file FILE.")


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            line = input(prompt)
        except UnicodeDecodeError as error:
            raise _unreadable(error) from None
        except (EOFError, RuntimeError):  # of a stdin that is closed
            if prompt:
                print()
            return
        yield line.strip()


def _say(facts: dict[str, Any], json_lines: bool, *, alone: bool) -> None:
    if json_lines:
        from fedpeft.jsons import to_json

        print(to_json(facts))
        return
    if alone and "base" not in facts:
        print(printable(facts["answer"]))
        return
    for name in ("prompt", "base", "answer"):
        if name in facts:
            print(f"{name + ':':<8} {printable(facts[name])}")
    print()
