"""A run as a Flower app: the one file that ``flwr run`` hands to a SuperLink.

The app holds no code. Its components are fedpeft's own, which every site has installed: a site that is handed this app
runs what its people chose. (Flower installs whatever app a SuperLink hands out: see docs/deployment.md.)
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from fedpeft.config import DataConfig, RunConfig, Scalar, from_flat, nest
from fedpeft.errors import ConfigError, DeploymentError

SERVER_APP = "fedpeft.server:app"
CLIENT_APP = "fedpeft.clients.app:app"
# beside the sections of RunConfig in Flower's run config: where the server writes the run directory
OUT = "deployment.out"
APP_FILE = "pyproject.toml"
PATHS = (("data", "source"), ("data", "test"), ("model", "name"), ("adapter", "start"), ("adapter", "init_data"))
HEADER = """\
# A Flower app written by `fedpeft deploy init`. It holds settings only: the code is the installed fedpeft.
# Start it with `flwr run FOLDER CONNECTION`; --run-config "section.key=value" changes a key that stands below.
"""


def write_app(directory: Path, config: RunConfig, out: Path, labels: tuple[str, ...] | None) -> Path:
    """Write a folder that ``flwr run`` takes as it is.

    Local paths (`data.source`, `data.test`, `model.name`, `adapter.start`, `adapter.init_data`, and `out`) are written
    as absolute ones, because server and clients run in the working directories of their SuperLink and SuperNodes. Each
    must exist on every machine that reads it.

    Parameters
    ----------
    directory : Path
        Made if it does not exist; must be empty.
    config : RunConfig
        The run.
    out : Path
        The run directory, on the machine of the SuperLink.
    labels : tuple of str, optional
        All label names in the order of their ids; written as `data.labels`, so that no site has to know the others'
        rows. None leaves that key as it is in `config`.

    Returns
    -------
    Path
        The file written, ``directory / "pyproject.toml"``.

    Raises
    ------
    DeploymentError
        The folder is not empty or cannot be written, or a value cannot travel in Flower's run config.
    """
    if labels is not None:
        config = _update(config, "data", labels=_joined(labels))
    for section, key in PATHS:
        value = getattr(getattr(config, section), key)
        if value is not None:
            config = _update(config, section, **{key: _absolute(value)})
    app = _app(config, out)
    path = directory / APP_FILE
    try:
        check_empty(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + "\n" + tomli_w.dumps(app), encoding="utf-8")
    except OSError as error:
        raise DeploymentError(f"cannot write '{path}': {error.strerror}; name a folder that can be made.") from None
    return path


def _app(config: RunConfig, out: Path) -> dict[str, Any]:
    """Return what the folder's one file holds; raises DeploymentError where a value cannot travel."""
    flat = config.to_flat()
    for name, value in flat.items():
        _check(name, value)
    return {
        "project": {
            "name": "fedpeft-app",
            "version": version("fedpeft"),
            "description": f"{config.strategy.name} on {config.model.name}, {config.federation.rounds} rounds",
            "license": "Apache-2.0",
            "requires-python": ">=3.11",
            # installed already; what Flower would install at run time would come before it on the path
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedpeft",
                    # nothing else that comes to lie in the folder is to leave this machine
                    "fab-include": [f"/{APP_FILE}"],
                    "components": {"serverapp": SERVER_APP, "clientapp": CLIENT_APP},
                    "config": nest({OUT: os.path.abspath(out.expanduser())}) | nest(flat),
                }
            }
        },
    }


def split_run_config(flat: Mapping[str, Scalar]) -> tuple[RunConfig, Path]:
    """Read the run config that Flower brings to the server: the run, and its directory.

    Raises
    ------
    DeploymentError
        It names no run directory, or asks for canaries.
    ConfigError
        A key or value that does not exist, such as one given to ``flwr run --run-config``.
    """
    out = flat.get(OUT)
    if not isinstance(out, str) or not out:
        raise DeploymentError(f"{OUT} = {out!r} is no run directory; write the app with `fedpeft deploy init`.")
    config = run_config(flat)
    refuse_canaries(config)
    return config, Path(out)


def run_config(flat: Mapping[str, Scalar]) -> RunConfig:
    """Read the run config that Flower brings to a client, in a deployment or a simulation: the run alone.

    Raises
    ------
    ConfigError
        A key or value that does not exist, or one that every machine would read as it likes.
    """
    if flat.get("train.precision") == "auto":
        raise ConfigError(
            "train.precision = 'auto': nodes would each choose their own. Give 'fp32' or 'bf16', or write the app with "
            "`fedpeft deploy init`, which fixes it."
        )
    return from_flat({name: value for name, value in flat.items() if name != OUT})


def refuse_canaries(config: RunConfig) -> None:
    """Raise DeploymentError where false rows are to be planted, which sites must not train on."""
    if config.privacy.canaries:
        raise DeploymentError(
            f"privacy.canaries = {config.privacy.canaries} plants false rows and works in simulations only; audit a "
            "simulated run, and deploy without canaries."
        )


def check_empty(directory: Path) -> None:
    """Raise DeploymentError if a folder holds anything."""
    if directory.is_dir() and any(directory.iterdir()):
        raise DeploymentError(f"'{directory}' is not empty, and nothing is overwritten; name a new folder.")


def _update(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _absolute(name: str) -> str:
    """Make absolute what is a path on this machine, or is written as one; leave ids of hubs and presets alone."""
    path = Path(name).expanduser()
    is_path = path.exists() or path.is_absolute() or name.startswith((f".{os.sep}", f"..{os.sep}"))
    return os.path.abspath(path) if is_path else name


def _joined(labels: tuple[str, ...]) -> str:
    """Write label names as `DataConfig.label_names` reads them."""
    line = io.StringIO()
    csv.writer(line).writerow(labels)  # with its default end of line, else it does not quote line breaks in names
    text = line.getvalue().removesuffix("\r\n")
    try:
        read = DataConfig(labels=text).label_names
    except (ValueError, csv.Error):
        read = None
    if read != labels:
        raise DeploymentError(
            f"the labels {', '.join(map(repr, labels))} cannot be written into data.labels: they must be two or more "
            "different names without spaces around them; rename them in the rows."
        )
    return text


def _check(name: str, value: object) -> None:
    if not isinstance(value, str | int | float) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        raise DeploymentError(
            f"{name} = {value!r} cannot be sent through Flower, whose run config holds strings, true or false, floats "
            "and 64-bit integers only; give it such a value."
        )
