"""What the listing commands print: plain data for ``--json``, and rich tables that read well at 80 columns.

Foreign text (client ids, paths, messages) becomes `rich.text.Text`, never markup. Everything heavy is imported on use.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedpeft.errors import FedpeftError, RunDirectoryError
from fedpeft.report.formats import NONE, finite, number, one_line, size
from fedpeft.report.history import METRICS, History

if TYPE_CHECKING:
    from fedpeft.config import RunConfig
    from fedpeft.strategies.base import AdapterStrategy

Facts = dict[str, Any]
PRESET_PREFIX = "preset:"
SHOWN_CLIENTS = 40  # more than that is summarised; --json has them all
COUNTS_WIDTH = 60  # characters that columns of labels may take beside clients and rows
ABANDONED_SECONDS = 3600.0  # at least this long without an event, and a run without an end is no longer called running

HEADS = {
    "shared": "averaged over the clients, as the adapter is",
    "local": "stays with each client; scores are the mean over the clients' own models",
    "frozen": "left as drawn from the seed; nobody trains it",
}
NO_HEAD = "none: a causal language model keeps its own"


def _table(*headers: str, right: Iterable[str] = (), whole: Iterable[str] = (), header: bool = True) -> Table:
    """Make an empty table; columns in `whole` are never broken over lines."""
    table = Table(
        box=box.SIMPLE_HEAD if header else None,
        show_header=header,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for name in headers:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(Text(one_line(name)), justify=justify, overflow="fold", no_wrap=name in whole)
    return table


def _cell(value: object, style: str = "") -> Text:
    return Text(NONE if value is None or value == "" else one_line(value, 2000), style)


def _pairs(facts: Iterable[tuple[str, object]]) -> Table:
    table = _table("", "", header=False)
    table.columns[0].no_wrap = True
    for name, value in facts:
        table.add_row(Text(f"{name} ", "bold"), _cell(value))
    return table


# --- fedpeft strategies ------------------------------------------------------------------------------------------


def strategies_dict(methods: Mapping[str, type[AdapterStrategy]] | None = None) -> list[Facts]:
    """Describe methods: name, paper, what they send, when they are exact, and their options.

    Parameters
    ----------
    methods : mapping of str to type, optional
        By name; all that are installed if not given.
    """
    if methods is None:
        from fedpeft.strategies import available

        methods = available()
    return [
        {
            "name": name,
            "paper": method.capabilities.paper,
            "sends": method.capabilities.sends,
            "exact": method.capabilities.exact,
            "needs_single_factors": method.capabilities.needs_single_factors,
            "options": _options(method),
        }
        for name, method in methods.items()
    ]


def _options(method: type[AdapterStrategy]) -> list[Facts]:
    schema = method.Options.model_json_schema()
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "default": facts.get("default"),
            "required": name in required,
            "allowed": _allowed(facts, schema.get("$defs", {})),
            "description": facts.get("description", ""),
        }
        for name, facts in schema.get("properties", {}).items()
    ]


def _allowed(facts: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Say in a few characters what a JSON schema allows."""
    if "$ref" in facts:
        return _allowed(known.get(str(facts["$ref"]).rpartition("/")[2], {}), known)
    if "anyOf" in facts:
        return " or ".join(_allowed(each, known) for each in facts["anyOf"])
    if "enum" in facts:
        return " | ".join(str(value) for value in facts["enum"])
    if "const" in facts:
        return str(facts["const"])
    limits = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {facts[limit]:g}" for limit, sign in limits if limit in facts]
    kinds = {"null": "unset", "integer": "whole number", "string": "text", "boolean": "true or false", "array": "list"}
    kind = str(facts.get("type", "any"))
    return " ".join([kinds.get(kind, kind), ", ".join(bounds)]).strip()


def strategies_table(methods: Sequence[Facts] | None = None) -> RenderableType:
    """Lay out what `strategies_dict` returns: the methods side by side, then what is particular to each."""
    methods = strategies_dict() if methods is None else methods
    table = _table("strategy", "paper", "server sends", "server sees", whole=("strategy",))
    details: list[RenderableType] = []
    for method in methods:
        sees = "each client's factors" if method["needs_single_factors"] else "sums suffice"
        name = _cell(method["name"], "bold cyan")
        table.add_row(name, _cell(method["paper"]), _cell(method["sends"]), _cell(sees))
        facts: list[tuple[str, object]] = [("exact", method["exact"])]
        for option in method["options"]:
            default = "required" if option["required"] else f"default {_shown(option['default'])}"
            facts.append((option["name"], f"{option['allowed']}, {default}. {option['description']}"))
        details += [Text(), name, Padding(_pairs(facts), (0, 0, 0, 2))]
    return Group(
        table, *details, Text(), Text("Choose one with --strategy NAME, an option with strategy.OPTION=VALUE.", "dim")
    )


def _shown(value: object) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# --- fedpeft presets ---------------------------------------------------------------------------------------------


def presets_table(presets: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Lay out presets.

    Parameters
    ----------
    presets : sequence of mapping
        Each with ``name``, ``task``, ``description`` and ``needs``, a command or None.
    """
    table = _table("preset", "task", "description", whole=("preset", "task"))
    for preset in presets:
        described = _cell(preset.get("description"))
        if needs := preset.get("needs"):
            described.append(f"\nneeds: {one_line(needs)}", "yellow")
        table.add_row(_cell(preset.get("name"), "bold cyan"), _cell(preset.get("task")), described)
    return Group(table, Text(), Text("Run one with fedpeft simulate --preset NAME.", "dim"))


# --- fedpeft env -------------------------------------------------------------------------------------------------


def environment_table(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.runs.environment` returns."""
    return _pairs(environment_rows(facts))


def environment_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flatten an environment into names and words; packages last, each a row of its own."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name == "packages":
            continue
        if isinstance(value, list | tuple):
            shown = ", ".join(map(str, value)) or "none"
        elif isinstance(value, Mapping):
            shown = json.dumps(value, ensure_ascii=False)
        else:
            shown = NONE if value is None else str(value)
        rows.append((str(name).replace("_", " "), shown))
    packages = facts.get("packages")
    if isinstance(packages, Mapping):
        rows += [(str(package), str(version)) for package, version in packages.items()]
    return rows


# --- fedpeft runs ------------------------------------------------------------------------------------------------


def runs_list(folder: Path, *, clock: Callable[[], float] = time.time) -> list[Facts]:
    """Describe the run directories in a folder, the oldest first.

    What holds no config.toml is no run and is passed over; a run that cannot be read is listed with the reason.

    Parameters
    ----------
    folder : Path
        Such as ``runs``; or one run directory.
    clock : callable
        Seconds since 1970, to tell a running run from one that was killed.

    Raises
    ------
    RunDirectoryError
        No such folder; a missing ``runs`` is an empty list.
    """
    from fedpeft.runs import CONFIG

    if not folder.is_dir():
        if folder == Path("runs"):
            return []
        raise RunDirectoryError(f"no folder '{folder}'. `fedpeft runs DIR` takes a folder that holds run directories.")
    try:
        candidates = [folder] if (folder / CONFIG).is_file() else sorted(folder.iterdir())
        found = [_run_facts(path, clock()) for path in candidates if (path / CONFIG).is_file()]
    except OSError as error:
        raise RunDirectoryError(f"cannot read '{folder}': {error.strerror or error}") from None
    return sorted(found, key=lambda facts: (facts["started"] or "", facts["name"]))


def _run_facts(path: Path, now: float) -> Facts:
    from fedpeft.runs import CONFIG, METRICS, read_config

    facts: Facts = {"name": path.resolve().name, "path": str(path), "state": "unreadable"}
    facts |= dict.fromkeys(("strategy", "task", "preset", "rounds", "planned", "metric", "first", "last", "started"))
    facts |= {"problem": None}
    try:
        facts["started"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / CONFIG).stat().st_mtime))
        config = read_config(path)
        history = History.read(path)
        written = (path / METRICS).stat().st_mtime if (path / METRICS).exists() else (path / CONFIG).stat().st_mtime
    except (FedpeftError, OSError, ValueError) as error:
        return facts | {"problem": one_line(error)}
    longest = max((finite(event.get("seconds")) or 0.0 for event in history.rounds.values()), default=0.0)
    state = history.state
    if state == "running" and now - written > max(ABANDONED_SECONDS, 5 * longest):
        state = "abandoned"
    metric = history.metric
    first, last = history.first or {}, history.last or {}
    return facts | {
        "state": state,
        "strategy": config.strategy.name,
        "task": config.task,
        "preset": _preset(config),
        "rounds": history.done,
        "planned": config.federation.rounds,
        "metric": metric,
        "first": finite(first.get(metric or "")),
        "last": finite(last.get(metric or "")),
    }


def _preset(config: RunConfig) -> str | None:
    for value in (config.data.source, config.model.name):
        if value is not None and value.startswith(PRESET_PREFIX):
            return value.removeprefix(PRESET_PREFIX)
    return None


STATE_STYLES = {"completed": "green", "running": "cyan", "interrupted": "yellow"}


def runs_table(found: Sequence[Facts], folder: Path) -> RenderableType:
    """Lay out what `runs_list` returns."""
    if not found:
        return Text(f"no runs in '{one_line(folder)}'; `fedpeft simulate` makes one.")
    table = _table("run", "method and data", "rounds", "score", right=("rounds",))
    for facts in found:
        run = Text.assemble((one_line(facts["name"]), "bold cyan"), "\n", (str(facts["started"] or NONE)[:16], "dim"))
        style = STATE_STYLES.get(facts["state"], "red")
        if facts["problem"]:
            table.add_row(run, Text(facts["problem"], "dim"), Text(facts["state"], style), _cell(None))
            continue
        method = Text.assemble(one_line(facts["strategy"]), "\n", (one_line(facts["preset"] or facts["task"]), "dim"))
        rounds = Text.assemble(f"{facts['rounds']}/{facts['planned']}", "\n", (facts["state"], style))
        score = Text(NONE)
        if facts["metric"]:
            change = f"{number(facts['first'])} -> {number(facts['last'])}"
            score = Text.assemble(change, "\n", (facts["metric"], "dim"))
        table.add_row(run, method, rounds, score)
    return table


# --- fedpeft evaluate --------------------------------------------------------------------------------------------


def scores_table(scores: Mapping[str, Any]) -> RenderableType:
    """Lay out scores.

    Parameters
    ----------
    scores : mapping
        Metrics by name, and ``domains``, ``run`` and ``examples`` where known.
    """
    metrics = [name for name in METRICS if name in scores]
    table = _table("", *metrics, right=metrics)
    table.add_row(_cell("all test rows", "bold"), *(_cell(number(scores[name]), "bold green") for name in metrics))
    domains = scores.get("domains")
    if isinstance(domains, Mapping):
        for domain, values in domains.items():
            table.add_row(_cell(domain), *(_cell(number(values.get(name))) for name in metrics))
    facts = [(name, scores[name]) for name in ("run", "examples") if name in scores]
    return Group(_pairs(facts), Text(), table) if facts else table


# --- fedpeft partition -------------------------------------------------------------------------------------------


def partition_view(clients: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Lay out who holds what.

    Parameters
    ----------
    clients : sequence of mapping
        What `fedpeft.data.partition.partition_table` returns: ``client``, ``rows``, and ``labels`` and ``domains``
        (name to number of rows) where there are any.
    """
    kinds = [kind for kind in ("labels", "domains") if any(held.get(kind) for held in clients)]
    parts: list[RenderableType] = []
    for kind in kinds or ["rows"]:
        parts += [_holdings(clients, kind), Text()]
    if len(clients) > SHOWN_CLIENTS:
        parts.append(Text(f"{len(clients) - SHOWN_CLIENTS // 2} clients are not shown; --json has them all.", "dim"))
    return Group(*parts, Text(rows_summary([held["rows"] for held in clients])))


def _holdings(clients: Sequence[Mapping[str, Any]], kind: str) -> Table:
    """Lay out rows by label or domain: a column each where they fit, else the most frequent in words."""
    counted: list[Mapping[str, int]] = [(held.get(kind) or {}) if kind != "rows" else {} for held in clients]
    names = list(dict.fromkeys(name for counts in counted for name in counts))
    digits = max((len(str(count)) for counts in counted for count in counts.values()), default=1)
    fits = sum(max(cell_len(one_line(name)), digits) + 2 for name in names) <= COUNTS_WIDTH
    columns = names if fits else []
    table = _table("client", "rows", *columns, right=("rows", *columns), whole=("rows", *columns))
    if not fits:
        table.add_column(f"rows of each of {len(names)} {kind}", overflow="fold")
    shown = len(clients) if len(clients) <= SHOWN_CLIENTS else SHOWN_CLIENTS // 2
    for held, counts in list(zip(clients, counted, strict=True))[:shown]:
        cells = [_count(counts.get(name, 0)) for name in columns] if fits else [_most(counts, kind)]
        table.add_row(_cell(held["client"], "bold cyan"), str(held["rows"]), *cells)
    return table


def _count(rows: int) -> Text:
    return Text(str(rows)) if rows else Text(".", "dim")


def _most(counts: Mapping[str, int], kind: str, limit: int = 6) -> Text:
    held = sorted(((count, name) for name, count in counts.items() if count), key=lambda pair: (-pair[0], pair[1]))
    words = [f"{one_line(name, 24)}: {count}" for count, name in held[:limit]]
    if len(held) > limit:
        words.append(f"and {len(held) - limit} more {kind}")
    return Text(", ".join(words) or NONE)


def rows_summary(rows: Sequence[int]) -> str:
    """Say in one line how rows are spread over clients."""
    if not rows:
        return "no clients"
    if len(rows) == 1:
        return f"1 client, {rows[0]} rows"
    spread = f"{min(rows)} to {max(rows)} each, median {statistics.median(rows):g}"
    return f"{len(rows)} clients, {sum(rows)} rows: {spread}"


# --- fedpeft simulate --dry-run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Parameters
    ----------
    config : RunConfig
        Resolved, the strategy's options spelled out.
    parameters : int
        Of the frozen base, its head included.
    trainable : int
        What a client trains: factors, and the head unless it is frozen.
    layers : int
        Adapted layers.
    bytes_up, bytes_down : int
        Array values that one client sends and receives in one round.
    client_rows : mapping of str to int
        Training rows of each client.
    test_rows : int
        Rows of the test split.
    paper, exact : str
        The method's, see `fedpeft.strategies.base.Capabilities`.
    needs_single_factors : bool
        Whether the server must see single clients' factors.
    head_parameters : int
        Of the classifier head; 0 where there is none.
    device : str
        Where models would run.
    """

    config: RunConfig
    parameters: int
    trainable: int
    layers: int
    bytes_up: int
    bytes_down: int
    client_rows: Mapping[str, int]
    test_rows: int
    paper: str
    exact: str
    needs_single_factors: bool
    head_parameters: int = 0
    device: str = "cpu"

    @property
    def cohort(self) -> int:
        """Clients drawn each round."""
        federation, clients = self.config.federation, len(self.client_rows)
        return min(clients, max(1, federation.min_clients, round(federation.fraction * clients)))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run, both ways, if no client has to be asked twice."""
        return (self.bytes_up + self.bytes_down) * self.cohort * self.config.federation.rounds

    @property
    def head(self) -> str:
        """What happens to the classifier head, in words."""
        return HEADS[self.config.adapter.head] if self.head_parameters else NO_HEAD

    def to_dict(self) -> Facts:
        """Return plain data, for ``--json``."""
        return {
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "task": self.config.task,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "layers": self.layers,
            "bytes_up_per_client": self.bytes_up,
            "bytes_down_per_client": self.bytes_down,
            "total_bytes": self.total_bytes,
            "cohort": self.cohort,
            "client_rows": dict(self.client_rows),
            "test_rows": self.test_rows,
            "paper": self.paper,
            "exact": self.exact,
            "needs_single_factors": self.needs_single_factors,
            "head": self.config.adapter.head if self.head_parameters else None,
            "head_parameters": self.head_parameters,
            "device": self.device,
        }


def dry_run_table(planned: DryRun) -> RenderableType:
    """Lay out what a run would do."""
    config = planned.config
    adapter, train, federation = config.adapter, config.train, config.federation
    options = "".join(f", {name} {_shown(value)}" for name, value in config.strategy.options.items())
    targets = ", ".join(adapter.targets) if adapter.targets else "query and value"
    length = _several(train.local_steps, "step") if train.local_steps else _several(train.local_epochs or 1, "epoch")
    sees = "must see each client's factors" if planned.needs_single_factors else "needs sums over clients only"
    share = 100 * planned.trainable / max(1, planned.parameters)
    rows = list(planned.client_rows.values())
    facts: list[tuple[str, object]] = [
        (
            "model",
            f"{config.model.name or NONE} ({config.task}, {planned.parameters:,} parameters, on {planned.device})",
        ),
        ("data", f"{config.data.source or NONE} ({sum(rows):,} training rows, {planned.test_rows:,} test rows)"),
        ("strategy", f"{config.strategy.name}{options}"),
        ("", f"{planned.paper}; exact: {planned.exact}"),
        ("server", sees),
        (
            "adapter",
            f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha:g}, {planned.layers} layers ({targets})",
        ),
        ("trainable", f"{planned.trainable:,} parameters a client ({share:.2g} % of the base)"),
        ("head", f"{planned.head}" + (f" ({planned.head_parameters:,} parameters)" if planned.head_parameters else "")),
        (
            "a round trains",
            f"{length} with batches of {train.batch_size}, {train.optimizer}, learning rate {train.learning_rate:g}",
        ),
        ("partition", f"{config.partition.scheme}{_partition_options(config)}"),
        ("clients", rows_summary(rows)),
        ("rounds", f"{federation.rounds}, with {planned.cohort} of {len(rows)} clients each"),
        ("a client moves", f"{size(planned.bytes_up)} up and {size(planned.bytes_down)} down a round"),
        ("in all", f"{size(planned.total_bytes)} for {federation.rounds} rounds"),
        ("seed", config.run.seed),
    ]
    parts: list[RenderableType] = [_pairs(facts)]
    if 1 < len(rows) <= 12:
        table = _table("client", "rows", right=("rows",))
        for client, count in planned.client_rows.items():
            table.add_row(_cell(client, "bold cyan"), str(count))
        parts += [Text(), table]
    return Group(*parts, Text(), Text("Nothing was trained and nothing was written.", "dim"))


def _several(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count > 1 else "")


def _partition_options(config: RunConfig) -> str:
    held = config.partition
    words = {
        "dirichlet": f", alpha {held.concentration:g}",
        "pathological": f", {held.classes_per_client} labels a client",
        "shard": f", {held.shards_per_client} shards a client",
        "natural": f", by {held.by}",
    }
    return words.get(held.scheme, "")
