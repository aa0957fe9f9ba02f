"""The parts of a run's page: the cards of its summary, and its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.formats import NONE, duration, finite, number, size
from fedpeft.privacy.levels import level_of
from fedpeft.report.privacy import epsilon, guarantee
from fedpeft.runs.history import ERRORS, History, domain_scores, worst
from fedpeft.tasks.metrics import find

UNSTATED = "No statement of this run's privacy is on record."
UNFINISHED = "It is written when the run ends; until then, its ledger holds what was spent: fedpeft privacy ledger RUN."


@dataclass(frozen=True)
class View:
    """A table of the page: a title, names of columns, rows of words, and what is said above them."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text: str = ""  # shown without a table, too
    words: str = ""  # how cells are laid out that are sentences rather than numbers


def views(config: RunConfig, history: History, statement: Mapping[str, Any]) -> list[View]:
    """Return the tables of the page, those that have something to show."""
    every = (
        _evaluations(history),
        _domains(history),
        _privacy(config, history, statement),
        _clients(config, history),
        _samples(history),
        _faults(history),
    )
    return [view for view in every if view.rows or view.text]


def cards(config: RunConfig, history: History, statement: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the summary: what, how much, and a remark each."""
    shown = []
    metric = history.metric
    first, last = history.first, history.last
    if metric is not None and first is not None and last is not None:
        remark = "before training" if first is last else f"{number(first.get(metric))} before training"
        shown.append((f"test {metric}", number(last.get(metric)), remark))
        for name in config.data.metric_names:
            if (ends := history.ends_of(name)) is not None:
                before = "before training" if ends[0] is ends[1] else f"{number(ends[0][name])} before training"
                shown.append((f"test {name}", number(ends[1][name]), before))
        domains = domain_scores(last, metric)
        if domains:
            name = worst(domains, metric)
            mean = sum(domains.values()) / len(domains)
            shown.append(("worst domain", number(domains[name]), f"{name}; mean over domains {number(mean)}"))
        clients = last.get("clients")
        if isinstance(clients, Mapping) and isinstance(clients.get(metric), Mapping):
            tenth, mean_client = clients[metric].get("worst_tenth"), clients[metric].get("mean")
            shown.append(("worst tenth of clients", number(tenth), f"mean over clients {number(mean_client)}"))
    if config.privacy.is_private:
        shown.append(_epsilon_card(config, history, statement))
    shown.append(("rounds", f"{history.done} / {config.federation.rounds}", history.state))
    if history.is_counted:
        up, down = history.bytes_up, history.bytes_down
        shown.append(("moved", size(up + down), f"{size(up)} up, {size(down)} down"))
        shown.append(("time in rounds", duration(history.seconds), "evaluation not counted"))
    if history.rounds:
        error = history.rounds[history.done].get("aggregation_error")
        if error is not None:
            total = history.rounds[history.done].get("aggregation_error_of_total")
            whole = "" if total is None else f"; {number(total)} of total"
            shown.append(("aggregation error", number(error), f"of round {history.done}'s step{whole}"))
    if history.faults:
        failing = len({str(fault.get("client")) for fault in history.faults})
        shown.append(("faults", str(len(history.faults)), f"of {failing} client{'s' if failing > 1 else ''}"))
    return shown


def _epsilon_card(config: RunConfig, history: History, statement: Mapping[str, Any]) -> tuple[str, str, str]:
    of = f"delta {config.privacy.delta:g}, {config.privacy.level} level"
    claim = statement or history.privacy
    if claim is None:
        return ("epsilon so far, at most", epsilon(history.epsilon), of)
    return ("epsilon", epsilon(claim.get("epsilon_max")), f"{of}; {guarantee(claim, config.privacy)}")


def _privacy(config: RunConfig, history: History, statement: Mapping[str, Any]) -> View:
    if not config.privacy.is_private:
        return View("Privacy", (), ())
    claim = statement or history.privacy or {}
    text = str(claim.get("statement") or f"{UNSTATED} {UNFINISHED if history.end is None else ''}".strip())
    clients = claim.get("clients")
    rows = []
    for name, facts in clients.items() if isinstance(clients, Mapping) else ():
        if not isinstance(facts, Mapping):
            continue
        noise, rate = (_short(facts.get(key)) for key in ("noise_multiplier", "sample_rate"))
        counts = (_whole(facts.get(key)) for key in ("steps", "examples"))
        rows.append((str(name), epsilon(facts.get("epsilon")), noise, rate, *counts))
    if level_of(config.privacy).hides_cohort and len(rows) > 1 and len({row[1:] for row in rows}) == 1:
        rows = [(f"all {len(rows)} clients", *rows[0][1:])]
    headers = ("client", "epsilon", "noise multiplier", "sample rate", "steps", "rows")
    return View("Privacy", headers, tuple(rows), text=text)


def _short(value: object) -> str:
    known = finite(value)
    return NONE if known is None else f"{known:.4g}"


def _whole(value: object) -> str:
    known = finite(value)
    return NONE if known is None else f"{known:.0f}"


def _evaluations(history: History) -> View:
    metrics = history.metrics
    errors, totals = (any(key in event for event in history.rounds.values()) for key in ERRORS)
    private = history.is_private
    trained = not private or any(event.get("train_loss") is not None for event in history.rounds.values())
    optional = {"train loss": trained, "aggregation error": errors, "of total": totals, "epsilon": private}
    headers = ("round", *(f"test {name}" for name in metrics), *(name for name, shown in optional.items() if shown))
    counted = history.is_counted or not history.rounds
    rows = []
    for at, event in sorted(history.evaluations.items()):
        done = history.rounds.get(at, {})
        cells = [str(at), *(number(event.get(name)) for name in metrics)]
        cells += [number(done.get("train_loss"))] if trained else []
        cells += [number(done.get(key)) for key, shown in zip(ERRORS, (errors, totals), strict=True) if shown]
        cells += [epsilon(done.get("epsilon_max"))] if private else []
        cells += [size(history.bytes_until(at)), duration(done.get("seconds"))] if counted else []
        rows.append(tuple(cells))
    more = ("moved so far", "round took") if counted else ()
    return View("Scores", (*headers, *more), tuple(rows))


def _domains(history: History) -> View:
    metric = history.metric or "loss"
    before, after = domain_scores(history.first, metric), domain_scores(history.last, metric)
    rows = []
    for name, value in after.items():
        change = value - before[name] if name in before else None
        rows.append((name, number(before.get(name)), number(value), _signed(change)))
    first, last = (event["round"] if event else 0 for event in (history.first, history.last))
    better = find(metric).better
    return View(
        "Domains",
        ("domain", f"{metric}, round {first}", f"round {last}", "change"),
        tuple(rows),
        f"Test rows of each domain; {better} is better.",
    )


def _clients(config: RunConfig, history: History) -> View:
    metric = history.metric or "loss"
    scored = history.client_scores
    names = list(history.clients) + [name for name in (scored[-1] if scored else {}) if name not in history.clients]
    headers = ["client", "rows", "rounds", "faults", "train loss", "round took"]
    if scored:
        headers += [f"test {metric} at first", "at last"] if len(scored) > 1 else [f"test {metric}"]
    rows = []
    for name in names:
        record = history.clients.get(name)
        if record is None:
            cells = [name, *[NONE] * 5]
        else:
            count = NONE if record.num_examples is None else str(record.num_examples)
            cells = [name, count, str(record.rounds), str(record.faults), number(record.loss), duration(record.seconds)]
        for scores in scored:
            of_client = scores.get(name)
            cells.append(number(finite(of_client.get(metric)) if isinstance(of_client, Mapping) else None))
        rows.append(tuple(cells))
    note = "Loss and time are those of the client's latest good round."
    if config.privacy.is_private and not config.privacy.release_metrics:
        note = "Loss and time are not sent: the clients' privacy covers them."
    return View("Clients", tuple(headers), tuple(rows), note)


def _faults(history: History) -> View:
    rows = tuple((str(fault["round"]), str(fault.get("client")), str(fault.get("reason"))) for fault in history.faults)
    return View(
        "Faults", ("round", "client", "reason"), rows, "Answers that do not count in their round.", words="words"
    )


def _samples(history: History) -> View:
    event = history.samples or {}
    titles = {"domain": "domain", "client": "client", "prompt": "prompt", "reference": "reference"}
    titles |= {"before": "before training", "after": f"after round {event.get('round', 0)}"}
    samples = [sample for sample in event.get("samples", ()) if isinstance(sample, Mapping)]
    held = {name: title for name, title in titles.items() if any(name in sample for sample in samples)}
    rows = tuple(tuple(str(sample.get(name, NONE)) for name in held) for sample in samples)
    note = "What the model wrote to test rows, each token the most likely one."
    withheld = event.get("withheld")
    return View(
        "Samples", tuple(held.values()), rows, note, text=f"Withheld: {withheld}." if withheld else "", words="samples"
    )


def _signed(change: float | None) -> str:
    return NONE if change is None else f"{'+' if change >= 0 else '-'}{number(abs(change))}"
