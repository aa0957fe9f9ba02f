"""All commands, and how the command line begins and ends."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from fedpeft.cli.compare import compare
from fedpeft.cli.configuration import config
from fedpeft.cli.deploy import deploy_app
from fedpeft.cli.doctor import doctor
from fedpeft.cli.export import export
from fedpeft.cli.generate import chat, generate
from fedpeft.cli.merge import merge
from fedpeft.cli.options import INTERRUPTED
from fedpeft.cli.output import secure
from fedpeft.cli.presets import presets_app
from fedpeft.cli.privacy import privacy_app
from fedpeft.cli.rows import rows
from fedpeft.cli.show import env, partition, runs, strategies
from fedpeft.cli.simulate import evaluate, simulate
from fedpeft.deferred import defer
from fedpeft.errors import ConfigError, FedpeftError

app = typer.Typer(
    name="fedpeft",
    help="Fine-tune transformers with LoRA adapters on data that stays with its owners.",
    epilog="Start with: fedpeft simulate --strategy lora-fair",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    simulate,
    evaluate,
    generate,
    chat,
    export,
    merge,
    compare,
    config,
    partition,
    rows,
    strategies,
    env,
    doctor,
    runs,
):
    app.command()(command)
app.add_typer(presets_app, name="presets")
app.add_typer(deploy_app, name="deploy")
app.add_typer(privacy_app, name="privacy")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"fedpeft {version('fedpeft')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take what stands before a command."""


# what has to stand before libraries are imported, lest they make threads: those would not be in the forks that workers
# are (`fedpeft.simulations.grids.nursery`)
THREADLESS = {"OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


def main() -> None:
    """Run the command line; an error of the user's becomes one line and exit code 2."""
    defer()
    output = secure()
    for name, value in THREADLESS.items():
        os.environ.setdefault(name, value)
    try:
        sys.exit(output.exit_code(_run()))
    finally:
        # Python would look through all objects of torch and its company once more, for over a second, before it leaves
        gc.freeze()


def _run() -> int:
    """Run the command that sys.argv names, and return its exit code."""
    try:
        _check_words(sys.argv[1:])
        app()
    except SystemExit as end:  # as every command ends
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except FedpeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check_words(words: list[str]) -> None:
    """Refuse words with bytes that the locale's encoding has no letters for: no file could keep them."""
    for word in words:
        if any("\udc80" <= letter <= "\udcff" for letter in word):
            raise ConfigError(
                f"'{ascii(word)[1:-1]}' is no text in this locale's encoding, {sys.getfilesystemencoding()}; set "
                "PYTHONUTF8=1 or a UTF-8 locale, or give a name in plain letters."
            )
