"""A run as one HTML page that needs nothing beside it: no script, no network, images inlined.

It can be written at any time: of a run that goes on, was interrupted, or was never evaluated. Everything foreign in it
(client ids, messages, names) is escaped by jinja2.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.privacy.statement import PRIVACY
from fedpeft.report.loading import loading_code
from fedpeft.report.plots import DARK, draw, write_plots
from fedpeft.report.tables import environment_rows
from fedpeft.report.views import cards, views
from fedpeft.runs import ADAPTER, CONFIG_FILE, ENVIRONMENT_FILE, PAGE, read_config, read_object
from fedpeft.runs.history import History

PLOTS = "plots"
TEMPLATE = "page.html.jinja"
REPEATS = "This file, config.toml in the run directory, reproduces the run."
REPEATS_SECRETLY = (
    "This file, config.toml in the run directory, repeats the run with other noise: its randomness is secret "
    "(privacy.rng = secure)."
)


@dataclass(frozen=True)
class Image:
    """A plot of the page, for light and for dark screens, as base64."""

    title: str
    light: str
    dark: str


def write_report(run: Path) -> Path:
    """Write ``plots/*.png`` and ``report.html`` into a run directory.

    Parameters
    ----------
    run : Path
        A run directory, of a run that is finished or not.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    RunDirectoryError
        No run directory.
    ConfigError
        Its configuration cannot be read.
    OSError
        The files cannot be written, for instance because the disk is full; the page of before, if any, stays.
    """
    config, history = read_config(run), History.read(run)
    light = write_plots(history, run / PLOTS)
    images = [
        Image(plot.title, _base64(plot.png), _base64(dark.png))
        for plot, dark in zip(light, draw(history, DARK), strict=True)
    ]
    page, partial = run / PAGE, run / f".{PAGE}"
    try:
        partial.write_text(render(run, config, history, images), encoding="utf-8")
        partial.replace(page)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return page


def render(run: Path, config: RunConfig, history: History, images: Iterable[Image] = ()) -> str:
    """Return the page as text.

    Parameters
    ----------
    run : Path
        The run directory, from which environment, configuration and the adapter's own description are read.
    config : RunConfig
        The run's.
    history : History
        Its events.
    images : iterable of Image
        Its plots.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    statement = read_object(run / PRIVACY)
    facts = read_object(run / ENVIRONMENT_FILE)
    # bytes that are not text must not keep the rest of the page from being seen
    written = (run / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    return environment.get_template(TEMPLATE).render(
        name=run.resolve().name,
        state=history.state,
        reason=(history.end or {}).get("reason", ""),
        strategy=config.strategy.name,
        task=tasks.named(config),
        cards=cards(config, history, statement),
        images=list(images),
        views=views(config, history, statement),
        has_faults=bool(history.faults),
        snippet=loading_code(run, config),
        saved=(run / ADAPTER / "adapter_config.json").is_file(),
        config=written,
        repeats=REPEATS_SECRETLY if config.privacy.rng == "secure" else REPEATS,
        environment=environment_rows(facts),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
