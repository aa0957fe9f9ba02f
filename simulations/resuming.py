"""Going on with a run: what may be changed in it, and which of its checkpoints is whole."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.config import Layer, RunConfig, read_toml, resolve
from fedpeft.errors import CheckpointError, ConfigError, PrivacyError, RunDirectoryError
from fedpeft.jsons import strict_json
from fedpeft.privacy.anchors import anchor_of_run
from fedpeft.privacy.ledger import LEDGER
from fedpeft.privacy.statement import PRIVACY
from fedpeft.rounding import as_given
from fedpeft.runs import (
    ADAPTER,
    ADAPTER_BEST,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVENTS,
    EVENTS_FILE,
    PAGE,
    SIMULATED,
    Checkpoint,
    Event,
    Listener,
    RunDirectory,
    RunLock,
    checkpoint_rounds,
    read_checkpoint,
    read_config,
    read_events,
    read_facts,
    read_object,
    remove_checkpoint,
)
from fedpeft.runs.checkpoints import CHECKPOINTS
from fedpeft.runs.directory import CANARIES, RESERVED
from fedpeft.runs.directory import CLIENTS as STATES
from fedpeft.runs.files import refuse_links
from fedpeft.runs.history import History
from fedpeft.runs.lock import LOCK_FILE
from fedpeft.runs.machine import versions
from fedpeft.simulations.contexts import Contexts
from fedpeft.strategies.rounds.checkpoints import CLIENTS, CONFIG, FREE, Resumed, lasting
from fedpeft.training.optimizers import SCHEDULES

ROUNDS = "federation.rounds"
OWN_FILES = (
    *(CONFIG_FILE, ENVIRONMENT_FILE, EVENTS_FILE, LOCK_FILE, RESERVED, CANARIES, PAGE),
    *(LEDGER, PRIVACY, anchor_of_run(Path(LEDGER)).name),
)
OWN_FOLDERS = (CHECKPOINTS, ADAPTER, ADAPTER_BEST, STATES, "faults", "plots")
COUNT = ("fedpeft", "torch", "transformers", "peft", "opacus", "numpy")  # whose versions bytes may depend on
STATED = (
    PRIVACY,
    f"{ADAPTER}/{PRIVACY}",
    f"{ADAPTER_BEST}/{PRIVACY}",
    PAGE,
)  # what a run says at its end that it spent
ALLOWED = f"{ROUNDS} (as many or more), {', '.join(FREE[1:-1])} and {FREE[-1]}"


def _forget(events: Iterable[Event]) -> None:
    """Show nothing of what was before."""


@dataclass
class Resumption:
    """A run that is to go on, held against other processes.

    Parameters
    ----------
    path : Path
        The run directory.
    config : RunConfig
        With which it goes on.
    lock : RunLock
        Of the run directory.
    recall : callable
        Is given the events that stay, before there are new ones.
    """

    path: Path
    config: RunConfig
    lock: RunLock
    recall: Callable[[Iterable[Event]], None] = _forget

    @property
    def ledger_is_begun(self) -> bool:
        """Whether the run may have charged anything: what it charged is never begun anew.

        A run that was killed before its first event had not come to it; an empty file was then to become one.
        """
        ledger, events = self.path / LEDGER, self.path / EVENTS_FILE
        if anchor_of_run(ledger).exists() and not ledger.exists():  # which comes first
            return True
        if any(file.is_file() and file.stat().st_size for file in (ledger, events)) or checkpoint_rounds(self.path):
            return True
        ledger.unlink(missing_ok=True)
        return False

    def begin(self, directory: RunDirectory, contexts: Contexts, listener: Listener) -> Resumed | None:
        """Find the newest checkpoint that is whole, and take folder and clients back to it; None for the beginning.

        Raises
        ------
        RunDirectoryError
            The run directory cannot be written.
        """
        checkpoint = self._newest(contexts, listener)
        done, events = (0, 0) if checkpoint is None else (checkpoint.round, checkpoint.facts[EVENTS])
        if checkpoint is not None:
            self._require_config(checkpoint)
        self._compare_versions(done, listener)
        directory.go_on(self.config, done, events, STATED)
        earlier = {}
        for number in checkpoint_rounds(self.path):
            if number < done:
                try:
                    earlier[number] = read_facts(self.path, number)[CLIENTS]
                except (CheckpointError, KeyError):  # of no use to anybody
                    remove_checkpoint(self.path, number)
        contexts.forget([*earlier.values(), *([] if checkpoint is None else [checkpoint.facts[CLIENTS]])])
        self.recall(read_events(self.path))
        whence = f"goes on after round {done}" if done else "begins at round 1: there is no checkpoint to go on from"
        listener({"event": "note", "round": done, "message": f"the run {whence}"})
        return None if checkpoint is None else Resumed(checkpoint, earlier)

    def _newest(self, contexts: Contexts, listener: Listener) -> Checkpoint | None:
        for number in reversed(checkpoint_rounds(self.path)):
            try:
                checkpoint = read_checkpoint(self.path, number)
                try:
                    self._require_events(checkpoint)
                    contexts.restore(checkpoint.facts[CLIENTS])
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    what = f"the checkpoint of round {number} is none of this version's: {type(error).__name__} {error}"
                    raise CheckpointError(what) from None
            except RunDirectoryError as error:
                message = f"{error}; the one before it is taken, and what came after it is computed again"
                listener({"event": "warning", "round": number, "message": message})
            else:
                return checkpoint
        contexts.restore({})
        return None

    def _require_config(self, checkpoint: Checkpoint) -> None:
        """Refuse a configuration that was edited by hand; one of an earlier version's checkpoints is not known."""
        own, now = checkpoint.facts.get(CONFIG), strict_json(lasting(self.config))
        if not isinstance(own, dict):
            return
        for key in sorted(own.keys() | now.keys()):
            if own.get(key) != now.get(key):
                anew = f"fedpeft simulate {shlex.quote(str(self.path / CONFIG_FILE))}"
                raise ConfigError(
                    f"{key} = {now.get(key)} in '{self.path / CONFIG_FILE}', but round {checkpoint.round} was done "
                    f"with {own.get(key)}: a run that goes on keeps its settings. Put that back, or begin a run of "
                    f"its own, with --out: {anew}"
                )

    def _compare_versions(self, done: int, listener: Listener) -> None:
        """Warn where libraries that results depend on are of other versions than the run was begun with."""
        before, now = read_object(self.path / ENVIRONMENT_FILE).get("packages"), versions()
        if not isinstance(before, dict):
            return
        others = [
            f"{name} {before[name]} then, {now[name]} now" for name in COUNT if before.get(name, now[name]) != now[name]
        ]
        if others:
            message = f"{'; '.join(others)}: the run may not come to the bytes that it would have come to"
            listener({"event": "warning", "round": done, "message": message})

    def _require_events(self, checkpoint: Checkpoint) -> None:
        file = self.path / EVENTS_FILE
        if not file.is_file() or file.stat().st_size < checkpoint.facts[EVENTS]:
            raise CheckpointError(
                f"the checkpoint of round {checkpoint.round} belongs to a longer {EVENTS_FILE} than is there"
            )


@contextlib.contextmanager
def resuming(run: Path, settings: Layer | None = None) -> Iterator[Resumption]:
    """Hold a run that is to go on; nothing is written yet.

    Parameters
    ----------
    run : Path
        A run directory that a simulation has made.
    settings : dict, optional
        What is changed, see `resumed_config`.

    Raises
    ------
    ConfigError
        See `resumed_config`.
    RunDirectoryError
        It is no simulation's, or another process writes into it.
    """
    refuse_links(run, OWN_FILES, OWN_FOLDERS)
    config = resumed_config(run, settings)
    with RunLock(run) as lock:
        yield Resumption(run, config, lock)


def is_complete(run: Path, config: RunConfig) -> bool:
    """Tell whether nothing is left to do of a run, were it to go on with this configuration."""
    history = History.read(run)
    return history.state == "completed" and history.done >= config.federation.rounds


def resumed_config(run: Path, settings: Layer | None = None) -> RunConfig:
    """Return the configuration with which a run goes on.

    Parameters
    ----------
    run : Path
        The run directory.
    settings : dict, optional
        Sections and keys, laid over the run's own.

    Raises
    ------
    ConfigError
        A setting on which results depend is another one than the run's, or there are fewer rounds than it has.
    PrivacyError
        More rounds than the noise was calibrated to.
    RunDirectoryError
        It is no simulation's run directory.
    """
    before = read_config(run)
    environment = read_object(run / ENVIRONMENT_FILE)
    anew = f"fedpeft simulate {shlex.quote(str(run / CONFIG_FILE))}"
    if not environment.get(SIMULATED):
        raise RunDirectoryError(
            f"'{run}' cannot be resumed: it was not made by `fedpeft simulate`, or by an earlier version, and its "
            f"clients' states are not here; or its {ENVIRONMENT_FILE} was lost. Begin it anew: {anew}"
        )
    after = resolve([read_toml(run / CONFIG_FILE), settings or {}])
    own, other = before.to_flat(), after.to_flat()
    for key in sorted(own.keys() | other.keys()):
        if own.get(key) != other.get(key) and key not in FREE:
            setting = shlex.quote(f"{key}={other.get(key)}")
            raise ConfigError(
                f"{key} = {other.get(key)} cannot be changed in a run that goes on: it has {own.get(key)}. Allowed "
                f"are {ALLOWED}. For a run of its own: {anew} {setting}"
            )
    planned, wanted = before.federation.rounds, after.federation.rounds
    if wanted < planned:
        raise ConfigError(f"{ROUNDS} = {wanted}, but the run has {planned}; give as many or more.")
    privacy = after.privacy
    if wanted > planned and privacy.epsilon is not None and privacy.noise_multiplier is None:
        raise PrivacyError(
            f"{ROUNDS} = {wanted}: the noise of this run was calibrated so that {planned} rounds cost privacy.epsilon "
            f"= {as_given(privacy.epsilon)}, and cannot pay for more. Begin a run of {wanted} rounds: {anew} "
            f"{ROUNDS}={wanted}"
        )
    return after


def caution(run: Path, config: RunConfig) -> str:
    """Say what is not as if the run had been planned so from its beginning; empty where nothing is."""
    planned, wanted = read_config(run).federation.rounds, config.federation.rounds
    factor = SCHEDULES.find(config.train.lr_schedule).factor
    if wanted == planned or len({factor(share / 8) for share in range(8)}) == 1:
        return ""
    return (
        f"train.lr_schedule = '{config.train.lr_schedule}' went by {planned} rounds so far and goes by {wanted} from "
        f"here on: the run is not the one that {wanted} rounds from the start would have been"
    )
