"""A run as one HTML page that needs nothing beside it: no script, no network, images inlined.

It can be written at any time: of a run that goes on, was interrupted, or was never evaluated. Everything foreign in it
(client ids, messages, names) is escaped by jinja2.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedpeft.config import RunConfig
from fedpeft.formats import NONE, duration, finite, number, size
from fedpeft.privacy.statement import PRIVACY
from fedpeft.report.plots import DARK, draw, write_plots
from fedpeft.report.privacy import epsilon, guarantee
from fedpeft.report.tables import environment_rows
from fedpeft.runs import ADAPTER, CONFIG_FILE, ENVIRONMENT_FILE, read_config
from fedpeft.runs.history import ERRORS, HIGHER_IS_BETTER, METRICS, History, domain_scores, worst

PAGE, PLOTS = "report.html", "plots"
TEMPLATE = "page.html.jinja"
UNSTATED = "No statement of this run's privacy is on record."
UNFINISHED = "It is written when the run ends; until then, its ledger holds what was spent: fedpeft privacy ledger RUN."
REPEATS = "This file, config.toml in the run directory, reproduces the run."
REPEATS_SECRETLY = (
    "This file, config.toml in the run directory, repeats the run with other noise: its randomness is secret "
    "(privacy.rng = secure)."
)
CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
}


@dataclass(frozen=True)
class View:
    """A table of the page: a title, names of columns, rows of words, and what is said above them."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text: str = ""  # shown without a table, too


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
    statement = _json(run / PRIVACY)
    views = [
        _evaluations(history), _domains(history), _privacy(config, history, statement), _clients(config, history),
        _faults(history),
    ]  # fmt: skip
    facts = _json(run / ENVIRONMENT_FILE)
    # bytes that are not text must not keep the rest of the page from being seen
    written = (run / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    return environment.get_template(TEMPLATE).render(
        name=run.resolve().name,
        state=history.state,
        reason=(history.end or {}).get("reason", ""),
        strategy=config.strategy.name,
        task=config.task,
        cards=_cards(config, history, statement),
        images=list(images),
        views=[view for view in views if view.rows or view.text],
        has_faults=bool(history.faults),
        snippet=loading_code(run, config),
        saved=(run / ADAPTER / "adapter_config.json").is_file(),
        config=written,
        repeats=REPEATS_SECRETLY if config.privacy.rng == "secure" else REPEATS,
        environment=environment_rows(facts),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def loading_code(run: Path, config: RunConfig) -> str:
    """Return Python code that loads a run's adapter with transformers and PEFT alone.

    Parameters
    ----------
    run : Path
        The run directory; its adapter names the base model, where it is written already.
    config : RunConfig
        The run's.
    """
    described = _json(run / ADAPTER / "adapter_config.json")
    base = str(described.get("base_model_name_or_path") or config.model.name or "BASE_MODEL")
    kind, causal = CLASSES[config.task], config.task == "causal-lm"
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    of_images = config.task == "image-classification"
    reader, inputs = ("AutoImageProcessor", "processor") if of_images else ("AutoTokenizer", "tokenizer")
    lines = [
        *([] if causal else ["import json"]),
        "from pathlib import Path",
        "",
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted([kind, reader]))}",
        "",
        f"base_name = {base!r}",
        f"adapter = Path({str(run.resolve() / ADAPTER)!r})",
        f"{inputs} = {reader}.from_pretrained(base_name{trust})",
    ]
    if causal:
        lines.append(f"base = {kind}.from_pretrained(base_name{trust})")
    else:
        lines += [
            'labels = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))',
            f"base = {kind}.from_pretrained(",
            f"    base_name{trust},",
            "    id2label=dict(enumerate(labels)),",
            "    label2id={name: index for index, name in enumerate(labels)},",
            "    ignore_mismatched_sizes=True,  # the head comes with the adapter",
            ")",
        ]
    if config.task == "sequence-classification":
        lines += [
            "if base.config.pad_token_id is None:",
            "    base.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id",
        ]
    lines.append("model = PeftModel.from_pretrained(base, str(adapter)).eval()")
    return "\n".join(lines) + "\n"


# --- parts of the page -------------------------------------------------------------------------------------------


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _json(path: Path) -> dict[str, Any]:
    """Read an object; empty where there is none to be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _cards(config: RunConfig, history: History, statement: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the summary: what, how much, and a remark each."""
    cards = []
    metric = history.metric
    first, last = history.first, history.last
    if metric is not None and first is not None and last is not None:
        remark = "before training" if first is last else f"{number(first.get(metric))} before training"
        cards.append((f"test {metric}", number(last.get(metric)), remark))
        domains = domain_scores(last, metric)
        if domains:
            name = worst(domains, metric)
            mean = sum(domains.values()) / len(domains)
            cards.append(("worst domain", number(domains[name]), f"{name}; mean over domains {number(mean)}"))
        spread = last.get("clients")
        if isinstance(spread, Mapping) and isinstance(spread.get(metric), Mapping):
            tenth, mean_client = spread[metric].get("worst_tenth"), spread[metric].get("mean")
            cards.append(("worst tenth of clients", number(tenth), f"mean over clients {number(mean_client)}"))
    if config.privacy.level != "none":
        cards.append(_epsilon_card(config, history, statement))
    cards.append(("rounds", f"{history.done} / {config.federation.rounds}", history.state))
    if history.is_counted:
        up, down = history.bytes_up, history.bytes_down
        cards.append(("moved", size(up + down), f"{size(up)} up, {size(down)} down"))
        cards.append(("time in rounds", duration(history.seconds), "evaluation not counted"))
    if history.rounds:
        error = history.rounds[history.done].get("aggregation_error")
        if error is not None:
            total = history.rounds[history.done].get("aggregation_error_of_total")
            whole = "" if total is None else f"; {number(total)} of total"
            cards.append(("aggregation error", number(error), f"of round {history.done}'s step{whole}"))
    if history.faults:
        clients = len({str(fault.get("client")) for fault in history.faults})
        cards.append(("faults", str(len(history.faults)), f"of {clients} client{'s' if clients > 1 else ''}"))
    return cards


def _epsilon_card(config: RunConfig, history: History, statement: Mapping[str, Any]) -> tuple[str, str, str]:
    of = f"delta {config.privacy.delta:g}, {config.privacy.level} level"
    told = statement or history.privacy
    if told is None:
        return ("epsilon so far, at most", epsilon(history.epsilon), of)
    return ("epsilon", epsilon(told.get("epsilon_max")), f"{of}; {guarantee(told, config.privacy)}")


def _privacy(config: RunConfig, history: History, statement: Mapping[str, Any]) -> View:
    if config.privacy.level == "none":
        return View("Privacy", (), ())
    told = statement or history.privacy or {}
    text = str(told.get("statement") or f"{UNSTATED} {UNFINISHED if history.end is None else ''}".strip())
    clients = told.get("clients")
    rows = []
    for name, facts in clients.items() if isinstance(clients, Mapping) else ():
        if not isinstance(facts, Mapping):
            continue
        noise, rate = (_short(facts.get(key)) for key in ("noise_multiplier", "sample_rate"))
        held = (_whole(facts.get(key)) for key in ("steps", "examples"))
        rows.append((str(name), epsilon(facts.get("epsilon")), noise, rate, *held))
    if config.privacy.level == "client" and len(rows) > 1 and len({row[1:] for row in rows}) == 1:
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
    metrics = [name for name in METRICS if any(name in event for event in history.evaluations.values())]
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
    better = "higher" if metric in HIGHER_IS_BETTER else "lower"
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
            held = NONE if record.num_examples is None else str(record.num_examples)
            cells = [name, held, str(record.rounds), str(record.faults), number(record.loss), duration(record.seconds)]
        for scores in scored:
            of_client = scores.get(name)
            cells.append(number(finite(of_client.get(metric)) if isinstance(of_client, Mapping) else None))
        rows.append(tuple(cells))
    note = "Loss and time are those of the client's latest good round."
    if config.privacy.level != "none" and not config.privacy.release_metrics:
        note = "Loss and time are not sent: the clients' privacy covers them."
    return View("Clients", tuple(headers), tuple(rows), note)


def _faults(history: History) -> View:
    rows = tuple((str(fault["round"]), str(fault.get("client")), str(fault.get("reason"))) for fault in history.faults)
    return View("Faults", ("round", "client", "reason"), rows, "Answers that do not count in their round.")


def _signed(change: float | None) -> str:
    return NONE if change is None else f"{'+' if change >= 0 else '-'}{number(abs(change))}"
