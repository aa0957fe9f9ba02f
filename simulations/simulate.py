"""One call from a configuration to a run directory: many clients on this machine, or on a Ray cluster."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.chatter import silence
from fedpeft.config import Layer, RunConfig
from fedpeft.runs import Event, Listener, check_vacant, default_directory
from fedpeft.simulations.grids.ray import RayGrid
from fedpeft.simulations.sizing import sizer_of

if TYPE_CHECKING:
    from fedpeft.simulations.resuming import Resumption
    from fedpeft.strategies.rounds.records import Outcome

CLIENT_APP = "fedpeft.clients.app:app"


def _ignore(event: Event) -> None:
    """Listen to nothing: the run directory holds all events."""


def simulate(
    config: RunConfig,
    out: Path | None = None,
    *,
    listener: Listener = _ignore,
    verbose: bool = False,
    grid: RayGrid | None = None,
    resumption: Resumption | None = None,
) -> Outcome:
    """Simulate a federation.

    Parameters
    ----------
    config : RunConfig
        What to do; see `fedpeft.config`.
    out : Path, optional
        The run directory; ``runs/<name>`` if not given. It must hold nothing.
    listener : callable, optional
        Called with each event.
    verbose : bool
        Let the libraries below speak.
    grid : RayGrid, optional
        Workers that go on after this run, see `ray_grid`; they are started for it alone if not given.
    resumption : Resumption, optional
        Of a run that goes on in `out`, which holds it; see `resume`.

    Returns
    -------
    Outcome
        Where the run directory is, how many rounds were done and the last scores.

    Raises
    ------
    FedpeftError
        Input that cannot work; nothing has been overwritten.
    """
    if not verbose:
        silence()
    out = out or default_directory(config)
    if resumption is None:
        check_vacant(out)
    if grid is not None:
        return _run(config, out, listener, grid, resumption)
    with ray_grid(config, verbose=verbose) or nullcontext() as started:
        return _run(config, out, listener, started, resumption)


def resume(
    run: Path,
    settings: Layer | None = None,
    *,
    listener: Listener = _ignore,
    verbose: bool = False,
    grid: RayGrid | None = None,
) -> Outcome:
    """Go on with a run where it was, whatever ended it; what comes out is what it would have been without the end.

    Parameters
    ----------
    run : Path
        The run directory.
    settings : dict, optional
        More rounds, or another machine: ``{"federation": {"rounds": 20}, "simulation": {"workers": 4}}``.
    listener, verbose, grid
        See `simulate`.

    Raises
    ------
    FedpeftError
        A setting that would make it another run, a run that another process writes, or what `simulate` raises.
    """
    from fedpeft.simulations.resuming import resuming

    with resuming(run, settings) as resumption:
        return simulate(resumption.config, run, listener=listener, verbose=verbose, grid=grid, resumption=resumption)


def ray_grid(config: RunConfig, *, verbose: bool = False) -> RayGrid | None:
    """Return workers that several runs may use one after the other; None where all is done in this process.

    Ray takes seconds to start, and does so at first use. The grid must be closed.
    """
    sizer = sizer_of(config)
    if sizer is None:
        return None
    return RayGrid(
        CLIENT_APP,
        workers=sizer,
        threads_per_worker=config.simulation.threads_per_worker,
        address=config.simulation.address,
        verbose=verbose,
    )


def _run(
    config: RunConfig, out: Path, listener: Listener, grid: RayGrid | None, resumption: Resumption | None
) -> Outcome:
    """Run on Ray, or without it in this process.

    Mistakes come out before Ray starts. Then its workers import the same large libraries as this process, and beside
    it: nothing else takes as long before the first round. A preset's model and rows hold no mistakes, so that with them
    Ray need not wait.
    """
    from fedpeft.strategies import with_typed_options

    config = with_typed_options(config)
    if grid is not None and config.presets:
        grid.start()
    from fedpeft.clients.app import app
    from fedpeft.privacy.rows import check_rows
    from fedpeft.resident import resident
    from fedpeft.simulations.driver import drive
    from fedpeft.simulations.grids.inline import InlineGrid

    if grid is None:
        return drive(config, out, listener, InlineGrid(app, threads=config.simulation.threads_per_worker), resumption)
    if not config.presets:
        check_rows(resident(config))
        grid.start()  # its workers start while this process loads the model
    return drive(config, out, listener, grid, resumption)
