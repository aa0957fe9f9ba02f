"""What became of a run, as its last lines in a terminal."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.formats import duration, number, one_line, size
from fedpeft.report.console import RunConsole
from fedpeft.report.privacy import claim
from fedpeft.runs import Event
from fedpeft.runs.history import History, domain_scores, worst

PARAGRAPH_WIDTH = 100  # at most, of a statement


def say_summary(
    out: RunConsole, history: History, config: RunConfig, seconds: float, run: Path | None, commands: Sequence[str]
) -> None:
    """Print how a run ended, its scores and costs, its statement, and what to type next.

    Parameters
    ----------
    out : RunConsole
        Where to.
    history : History
        The run's, as far as it came.
    config : RunConfig
        The run's.
    seconds : float
        How long it took in all.
    run : Path, optional
        The run directory, if it is whole.
    commands : sequence of str
        What to type next; ``{run}`` stands for the run directory.
    """
    out.say(_ending(history, f"{history.done} of {config.federation.rounds} rounds in {duration(seconds)}"))
    facts = [*_facts(history, config), *([("run directory", str(run))] if run is not None else [])]
    width = max(13, *(len(name) for name, _ in facts))
    for name, value in facts:
        out.say(Text(f"  {name:<{width}} {value}"))
    for words in _samples(history):
        out.say(words)
    if statement := _statement(history, out.width):
        out.say(Text("statement (privacy.json):"))
    for line in statement:
        out.say(Text(f"  {line}"))
    if run is not None:
        out.say(Text("next:"))
        for command in commands:
            out.say(Text(f"  {command.replace('{run}', shlex.quote(str(run)))}"))


def _ending(history: History, spent: str) -> Text:
    if history.state == "completed":
        why = f": {one_line((history.end or {}).get('reason'), 1000)}" if history.is_early else ""
        return Text(f"{'ended early,' if why else 'completed'} {spent}{why}", "bold green")
    if history.state == "interrupted":
        return Text(f"interrupted after {spent}", "bold yellow")
    # without a last record, the error that is on its way says why
    reason = f": {one_line(history.end.get('why', history.end.get('reason')), 1000)}" if history.end else ""
    return Text(f"stopped after {spent}{reason}", "bold red")


def _facts(history: History, config: RunConfig) -> list[tuple[str, str]]:
    """Return the summary's lines: scores before and after, what was moved, what was saved."""
    facts = _scores(history, tasks.of(config).main_metric, config.data.metric_names)
    if history.is_counted:
        facts.append(("moved", f"{size(history.bytes_up)} up, {size(history.bytes_down)} down"))
        facts.append(("rounds took", duration(history.seconds)))
    if history.privacy is not None:
        facts.append(("privacy", claim(history.privacy, config.privacy)))
    if history.faults:
        clients = len({str(fault.get("client")) for fault in history.faults})
        facts.append(("faults", f"{len(history.faults)}, of {clients} client{'s' * (clients > 1)}"))
    return [*facts, ("saved", _saved(history))]


def _scores(history: History, metric: str, judged: Sequence[str]) -> list[tuple[str, str]]:
    """Return the scores before and after: of all rows, by domain, and by client."""
    first, last = history.first, history.last
    if first is None or last is None:
        return []
    facts = [(metric, _change(first, last, first.get(metric), last.get(metric)))]
    for name in judged:
        if (ends := history.ends_of(name)) is not None:
            facts.append((name, _change(*ends, ends[0][name], ends[1][name])))
    before, after = domain_scores(first, metric), domain_scores(last, metric)
    if after:
        means = [sum(scores.values()) / len(scores) if scores else None for scores in (before, after)]
        facts.append(("domain mean", _change(first, last, *means)))
        name = worst(after, metric)
        facts.append(("worst domain", f"{_change(first, last, before.get(name), after[name])}, {one_line(name, 40)}"))
    clients = last.get("clients", {}).get(metric)
    if isinstance(clients, dict):
        mean, tenth = number(clients.get("mean")), number(clients.get("worst_tenth"))
        facts.append(("clients", f"mean {mean}, worst tenth {tenth}"))
    return facts


def _saved(history: History) -> str:
    if history.state == "completed":
        best = (history.end or {}).get("best_round")
        return "adapter and records" + ("" if best is None else f", and adapter-best, that of round {best}")
    if history.end is None:
        return "all records"
    if history.done:
        return f"the adapter of round {history.done}, and all records"
    return "the untrained adapter, and all records: no round was completed"


def _samples(history: History) -> list[Text]:
    """Return the lines of what the model answered before training and answers now."""
    event = history.samples
    if event is None:
        return []
    if why := event.get("withheld"):
        return [Text(f"no sample answers: {one_line(why, 300)}", "dim")]
    lines = [Text("sample answers:")]
    for sample in event.get("samples", ()):
        of = ", ".join(one_line(sample[name], 40) for name in ("domain", "client") if name in sample)
        lines.append(Text(f"  {f'[{of}] ' if of else ''}{one_line(sample.get('prompt'), 300, ending=True)}", "bold"))
        for name in ("reference", "before", "after"):
            lines.append(Text(f"    {name:<9} {one_line(sample.get(name), 300)}"))
    return lines


def _statement(history: History, width: int) -> list[str]:
    """Return the lines of what may be said of the run's privacy."""
    words = (history.privacy or {}).get("statement")
    if not words:
        return []
    width = max(20, min(width - 2, PARAGRAPH_WIDTH))
    return textwrap.wrap(one_line(words, 10_000), width, break_long_words=False, break_on_hyphens=False)


def _change(first: Event, last: Event, before: object, after: object) -> str:
    if first is last:
        return f"{number(after)} (round {last['round']})"
    return f"{number(before)} -> {number(after)} (round {first['round']} -> {last['round']})"
