"""A run as it is seen in a terminal while it goes on.

Rounds and the summary are results and go to stdout; the live bar, faults and warnings go to stderr.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedpeft import tasks
from fedpeft.config import RunConfig, cohort_size
from fedpeft.formats import duration, finite, number, one_line, size
from fedpeft.report.console import RunConsole, open_console
from fedpeft.report.privacy import epsilon
from fedpeft.report.summary import say_summary
from fedpeft.runs import Event
from fedpeft.runs.history import History

BAR_WIDTH = 36
ETA_ROUNDS = 10  # the pace of this many recent rounds gives the ETA
NEXT_COMMANDS = ("fedpeft evaluate {run}", "fedpeft runs")
PRIVATE_COMMANDS = ("fedpeft evaluate {run}", "fedpeft privacy ledger {run}", "fedpeft runs")
OUT_OF_BUDGET = "its privacy budget"  # how the reason of a fault begins that is none


@dataclass(frozen=True)
class _Moment:
    """What the bar shows; replaced as a whole, since another thread draws it."""

    label: str = "preparing"
    done: int = 0
    facts: tuple[str, ...] = ()
    eta: float | None = None
    since: float = 0.0


class TerminalListener:
    """Shows a run's events to people.

    On a terminal a bar moves and each evaluated round leaves a line; elsewhere every round leaves exactly one line. A
    round that is evaluated is shown when its scores are known. Use it as a context manager, so that the terminal is
    whole again however the run ends, and call `finish` for the summary.

    Parameters
    ----------
    config : RunConfig
        The run's.
    out : RunConsole, optional
        Receives rounds and the summary; stdout if not given.
    progress : RunConsole, optional
        Receives the bar, faults and warnings; stderr if not given. Decides whether a bar is shown.
    clock : callable
        Seconds that only grow.
    next_commands : sequence of str, optional
        Suggested at the end; ``{run}`` stands for the run directory. What suits the run if not given.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        out: RunConsole | None = None,
        progress: RunConsole | None = None,
        clock: Callable[[], float] = time.monotonic,
        next_commands: Sequence[str] | None = None,
    ) -> None:
        self.config = config
        self.private = config.privacy.is_private
        if next_commands is None:
            next_commands = PRIVATE_COMMANDS if self.private else NEXT_COMMANDS
        self.next_commands = tuple(next_commands)
        self.history = History()
        self.metric = tasks.of(config).main_metric
        self._progress = progress if progress is not None else open_console(stderr=True)
        self._out = out if out is not None else open_console()
        self._clock = clock
        self._started = clock()
        self._marks: deque[tuple[int, float]] = deque([(0, self._started)], maxlen=ETA_ROUNDS + 1)
        self._unscored: Event | None = None
        self._answered: set[str] = set()
        self._explained: set[tuple[str, str]] = set()
        self._finished = False
        self._spinner = Spinner("dots")
        self._status = _Moment()
        self._live: Live | None = None
        # one terminal for both: short lines, printed above the bar, which its own console alone can do
        self._shared = self._progress.is_interactive and self._out.is_interactive
        if self._shared:
            self._out = self._progress
        if self._progress.is_interactive:
            self._live = Live(
                console=self._progress,
                get_renderable=self._draw,
                refresh_per_second=5,
                transient=True,
                redirect_stdout=self._shared,
            )

    @property
    def total(self) -> int:
        """Rounds planned."""
        return self.config.federation.rounds

    def __enter__(self) -> Self:
        self._started = self._clock()
        self._marks[0] = (0, self._started)
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop()
        if not self._finished and (self.history.rounds or self.history.evaluations):
            self._finish(None)

    def recall(self, events: Iterable[Event]) -> None:
        """Know what happened before a run goes on, without showing it again."""
        for event in events:
            self.history.add(event)
        self._marks.clear()
        self._marks.append((self.history.done, self._clock()))
        self._status = self._new_status()

    def finish(self, run: Path) -> None:
        """Take the bar away and print the summary.

        Parameters
        ----------
        run : Path
            The run directory.
        """
        self._stop()
        self._finish(run)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self.history.add(event)
        kind = event.get("event")
        lines: list[tuple[Event | None, Event | None]] = []
        if kind in ("round", "end") and self._unscored is not None:
            lines.append((self._unscored, None))  # its evaluation never came
            self._unscored = None
        if kind in ("client", "fault"):
            self._answered.add(str(event.get("id", event.get("client"))))
        elif kind == "round":
            self._answered.clear()
            if self._due(event["round"]):
                self._unscored = event
            else:
                self._mark(event["round"])
                lines.append((event, None))
        elif kind == "evaluate" and event.get("split", "test") == "test":
            self._mark(event["round"])
            lines.append((self._unscored, event))
            self._unscored = None
        self._status = self._new_status()
        if self._live is not None and self._live.is_started and kind != "client":
            self._live.refresh()  # prints below draw the bar again as it was last; of clients there may be thousands
        if kind == "fault":
            who, why = one_line(event.get("client"), 80), one_line(event.get("reason"))
            what, style = ("did not train", "yellow") if why.startswith(OUT_OF_BUDGET) else ("failed", "red")
            said = one_line(event.get("why", ""), 600)
            # once of each kind: a fault of the settings is every client's
            if said and (kind_of := (why, re.sub(r"'[^']*'|\d+|\(traceback: .*", "", said))) not in self._explained:
                self._explained.add(kind_of)
                why = f"{why}: {said}"
            self._progress.say(Text(f"round {event.get('round')}: client {who} {what}: {why}", style))
        elif kind == "note":
            self._progress.say(Text(f"note: {one_line(event.get('message'), 300)}", "dim"))
        elif kind == "warning":
            self._progress.say(Text(f"warning: {one_line(event.get('message'))}", "yellow"))
        for round_event, evaluation in lines:
            self._show_round(round_event, evaluation)

    # --- lines ---------------------------------------------------------------------------------------------------

    def _due(self, server_round: int) -> bool:
        return server_round % self.config.run.evaluate_every == 0 or server_round == self.total

    def _mark(self, server_round: int) -> None:
        if server_round == 0:
            self._marks.clear()  # preparation and the first evaluation tell nothing about a round's pace
        self._marks.append((server_round, self._clock()))

    def _eta(self) -> float | None:
        (first, since), (last, until) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        return (until - since) / (last - first) * (self.total - last)

    def _show_round(self, round_event: Event | None, evaluation: Event | None) -> None:
        event = round_event or evaluation
        assert event is not None
        at = event["round"]
        if self._shared and evaluation is None:
            return  # the bar has it
        width = len(str(self.total))
        line = Text.assemble((f"round {at:>{width}}/{self.total}", "bold"))
        fields: list[tuple[str, str]] = []
        if round_event is not None and (loss := self._train_loss(round_event)):
            fields.append((loss, ""))
        if evaluation is not None:
            if not self._shared or round_event is None:
                fields.append((f"test loss {number(evaluation.get('loss'))}", ""))
            fields.append((f"{self.metric} {number(evaluation.get(self.metric))}", "bold green"))
            judged = [name for name in self.config.data.metric_names if name in evaluation]
            fields += [(f"{name} {number(evaluation[name])}", "green") for name in judged]
        if round_event is not None:
            if (error := round_event.get("aggregation_error")) is not None:
                name = "error" if self._shared else "aggregation error"
                fields.append((f"{name} {number(error)}", ""))
            if spent := self._epsilon(round_event):
                fields.append((spent, ""))
            exhausted = round_event.get("exhausted") or 0  # clients that are counted among the failed
            if failed := (round_event.get("failed") or 0) - exhausted:
                fields.append((f"{failed} failed", "red"))
            if exhausted:
                fields.append((f"{exhausted} out of budget", "yellow"))
            moved = (finite(round_event.get("bytes_up")) or 0) + (finite(round_event.get("bytes_down")) or 0)
            if round_event.get("bytes_up") is not None:
                fields += [(size(moved), ""), (duration(round_event.get("seconds")), "")]
            if not self._shared and at < self.total and (eta := self._eta()) is not None:
                fields.append((f"ETA {duration(eta)}", "dim"))
        for text, style in fields:
            line.append("  ").append(text, style)
        self._out.say(line)

    def _train_loss(self, round_event: Event) -> str:
        """Return the training loss in words; nothing where clients keep it to themselves."""
        loss = round_event.get("train_loss")
        return "" if loss is None and self.private else f"train loss {number(loss)}"

    def _epsilon(self, round_event: Event) -> str:
        """Return what was spent so far in words; nothing where none can be stated."""
        spent = finite(round_event.get("epsilon_max"))
        return "" if spent is None else f"epsilon {epsilon(spent)}"

    # --- the bar -------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def _cohort(self) -> int | None:
        federation = self.config.federation
        if federation.clients is None:
            return None
        return cohort_size(federation.clients, federation.fraction, federation.min_clients)

    def _new_status(self) -> _Moment:
        history = self.history
        done = history.done
        if history.end is not None:
            label = "writing the report"
        elif not history.rounds and not history.evaluations:
            label = "preparing"
        elif self._unscored is not None:
            label = f"evaluating round {done}/{self.total}"
        else:
            label = f"round {min(done + 1, self.total)}/{self.total}"
        facts = []
        if history.last is not None:
            facts.append(f"{self.metric} {number(history.last.get(self.metric))}")
        if history.rounds:
            last = history.rounds[done]
            facts += [words for words in (self._train_loss(last), self._epsilon(last)) if words]
        if self._answered:
            facts.append(f"clients {len(self._answered)}" + (f"/{cohort}" if (cohort := self._cohort()) else ""))
        if history.is_counted:
            facts.append(f"{size(history.bytes_up + history.bytes_down)} moved")
        return _Moment(
            label,
            done,
            tuple(facts),
            self._eta() if done < self.total and history.end is None else None,
            self._marks[-1][1],
        )

    def _draw(self) -> RenderableType:
        status, now = self._status, self._clock()
        times = f"{duration(now - self._started)} elapsed"
        if status.eta is not None:
            times += f", ETA {duration(max(0.0, status.eta - (now - status.since)))}"
        bar = ProgressBar(self.total, status.done, BAR_WIDTH, complete_style="cyan", finished_style="green")
        top = Table.grid(padding=(0, 1))
        top.add_row(self._spinner, Text(status.label, "bold"), bar, Text(times, "dim"))
        return Group(top, Text("  " + "  ".join(status.facts), no_wrap=True, overflow="ellipsis"))

    def _finish(self, run: Path | None) -> None:
        self._finished = True
        seconds = self._clock() - self._started
        say_summary(self._out, self.history, self.config, seconds, run, self.next_commands)
