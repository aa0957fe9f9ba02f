"""What the commands share: their options, the configuration that words make, and how facts show."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fedpeft.cli.completion import complete_preset, complete_strategy, complete_word
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedpeft.config import Layer, RunConfig
    from fedpeft.simulations.running import Compared

INTERRUPTED = 130
DEFAULT_PRESET = "digits"

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.toml] [section.key=value ...]",
        help="A configuration file, and settings that override it, such as train.learning_rate=1e-3.",
        show_default=False,
        autocompletion=complete_word,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines for machines.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Let the libraries below speak.")]


@dataclass(frozen=True)
class Asked:
    """What the commands are told of the run: words, and options that are words with names of their own."""

    words: Words = None
    strategy: Annotated[
        str | None,
        typer.Option(help="The server's method; see `fedpeft strategies`.", autocompletion=complete_strategy),
    ] = None
    adapter: Annotated[
        str | None, typer.Option(help="Kind of adapter, such as lora, ffa-lora or dora; see `fedpeft config`.")
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(help="Embedded model and data; see `fedpeft presets`.", autocompletion=complete_preset),
    ] = None
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER", help="Ray workers; what the machine bears if not given; 0 trains in this process."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it.")] = None

    def layers(self, words: Sequence[str] | None = None) -> list[Layer]:
        """Return the file's layer, if one is named, and that of the command line.

        Parameters
        ----------
        words : sequence of str, optional
            In place of those given.
        """
        from fedpeft.config import parse_overrides, read_toml

        words = words if words is not None else self.words or ()
        files = [word for word in words if word.endswith(".toml") and "=" not in word]
        if len(files) > 1:
            raise ConfigError(f"two configuration files, '{files[0]}' and '{files[1]}'; one is allowed.")
        options = {
            "strategy.name": self.strategy,
            "adapter.kind": self.adapter,
            "federation.clients": self.clients,
            "federation.rounds": self.rounds,
            "simulation.workers": self.workers,
            "run.seed": self.seed,
        }
        # options are words with names of their own: both are one layer, so that neither takes back the other
        typed = [word for word in words if word not in files]
        typed += [f"{name}={value}" for name, value in options.items() if value is not None]
        return [*(read_toml(Path(file)) for file in files), parse_overrides(typed)]

    def config(self, words: Sequence[str] | None = None, *, default: str | None = DEFAULT_PRESET) -> RunConfig:
        """Lay command line over file over preset over defaults.

        Parameters
        ----------
        words : sequence of str, optional
            In place of those given.
        default : str, optional
            The preset where neither model nor data is named.
        """
        from fedpeft.config import merge, resolve, with_absolute_paths
        from fedpeft.presets import layer

        layers = self.layers(words)
        named = merge(layers)
        preset = self.preset
        if preset is None and "name" not in named.get("model", {}) and "source" not in named.get("data", {}):
            preset = default
        return with_absolute_paths(resolve([*([layer(preset)] if preset else []), *layers]))


@dataclass(frozen=True)
class Voice:
    """How a command speaks."""

    json_lines: Json = False
    verbose: Verbose = False


PLAIN = Voice()


def spread(*, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make each field of a command's dataclass parameters an argument or option of the command line.

    Parameters
    ----------
    without : collection of str
        Fields that the command does not take: they keep their defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        taken: list[inspect.Parameter] = []
        groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kind = parameter.annotation
            if isinstance(kind, type) and is_dataclass(kind):
                hints = _hints(kind)
                parts = [field for field in fields(kind) if field.name not in without]
                groups[parameter.name] = kind, [field.name for field in parts]
                taken += [_parameter(field.name, field.default, hints[field.name]) for field in parts]
            else:
                taken.append(_parameter(parameter.name, parameter.default, kind))

        @functools.wraps(command)
        def run(**given: Any) -> None:
            grouped = {
                name: kind(**{part: given.pop(part) for part in parts}) for name, (kind, parts) in groups.items()
            }
            command(**grouped, **given)

        del run.__wrapped__  # typer would look at that one's parameters
        run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
        return run

    return decorate


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    nothing = default is MISSING or default is inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if nothing else default,
        annotation=annotation,
    )


def quiet(verbose: bool) -> None:
    """Silence the libraries below, unless they are to speak."""
    from fedpeft.chatter import silence

    if not verbose:
        silence()


def prepare_workers(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Begin to start Ray, and fork what workers on this machine are to be; call it before anything else is imported.

    Parameters
    ----------
    sections : mapping
        What is known of the configuration. A guess that is wrong costs time and nothing else.
    """
    simulation = sections.get("simulation", {})
    if simulation.get("workers") in (0, "0") or simulation.get("address") or os.environ.get("RAY_ADDRESS"):
        return
    if {"ray", "torch"} & sys.modules.keys():
        return  # a program that calls the command line within, which has begun long ago
    from fedpeft.simulations.grids import host

    host.begin()
    from fedpeft.deferred import need
    from fedpeft.quantization import QUANTIZATIONS
    from fedpeft.simulations.grids import nursery
    from fedpeft.training.optimizers import OPTIMIZERS

    method = QUANTIZATIONS.all().get(str(sections.get("model", {}).get("quantization")))
    optimizer = OPTIMIZERS.all().get(str(sections.get("train", {}).get("optimizer")))
    # forks have at once what is imported before them
    need({method.library if method else "", str(optimizer.needs) if optimizer else ""})

    nursery.hatch()


def show(facts: Any, table: Callable[[Any], RenderableType], json_lines: bool) -> None:
    """Print facts for machines, or the table that shows them."""
    if json_lines:
        from fedpeft.jsons import to_json

        print(to_json(facts))
        return
    from rich.console import Console

    Console().print(table(facts))


def tell(line: str) -> None:
    """Print a line of progress beside the results."""
    print(line, file=sys.stderr, flush=True)


def end_of_runs(compared: Compared, total: int, folder: Path, out: Path | None) -> None:
    """Exit as several runs ended: with the words to go on with, where they were interrupted.

    Parameters
    ----------
    compared : Compared
        How they ended.
    total : int
        How many there were to be.
    folder : Path
        Where they are.
    out : Path, optional
        The folder that the user named, if any.
    """
    if compared.interrupted:
        again = sys.argv[1:] if out is not None else [*sys.argv[1:], "--out", str(folder)]
        line = f"{len(compared.runs)} of {total} runs are done; go on with: fedpeft {shlex.join(again)}"
        print(f"interrupted: {line}", file=sys.stderr)
        raise typer.Exit(compared.interrupted)
    if compared.failed:
        raise typer.Exit(1)  # each was told of when it failed
