"""What a run would do, as ``fedpeft simulate --dry-run`` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.jsons import strict_json
from fedpeft.report.formats import NONE, size
from fedpeft.report.holdings import rows_summary
from fedpeft.report.layout import as_typed, cell, new_table, pairs
from fedpeft.report.privacy import planned_rows

if TYPE_CHECKING:
    from fedpeft.config import AdapterConfig, RunConfig

HEADS = {
    "shared": "averaged over the clients, as the adapter is",
    "local": "stays with each client; scores are the mean over the clients' own models",
    "frozen": "left as drawn from the seed; nobody trains it",
}
CATCH_UP = "besides, each round, what became of the base before the last one: at most the size of the adapted layers"
NO_HEAD = "none: a causal language model keeps its own"


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
        Array values that one client sends and receives in the whole run, if it is drawn every round and once each.
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
    changes_rank : bool
        Whether the method may send another rank than the adapter's, so that bytes are not known before.
    personal : tuple of str
        What stays with each client.
    changes_base : bool
        Whether clients are also sent what became of the base before the last round, which `bytes_down` leaves out.
    privacy : mapping, optional
        What may be said of a private run beforehand, see `fedpeft.simulations.plan.plan_privacy`.
    notes : tuple of str
        What should be known of base and adapter, and of how the rows were read.
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
    changes_rank: bool = False
    personal: tuple[str, ...] = ()
    changes_base: bool = False
    privacy: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def cohort(self) -> int:
        """Clients drawn each round."""
        federation, clients = self.config.federation, len(self.client_rows)
        return min(clients, max(1, federation.min_clients, round(federation.fraction * clients)))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run, both ways, if no client has to be asked twice."""
        return (self.bytes_up + self.bytes_down) * self.cohort

    @property
    def head(self) -> str:
        """What happens to the classifier head, in words."""
        if not self.head_parameters:
            return NO_HEAD
        return HEADS["local" if "head" in self.personal else self.config.adapter.head or "shared"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for ``--json``."""
        return {
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "task": self.config.task,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "layers": self.layers,
            "bytes_up_per_client": self.bytes_up // self.config.federation.rounds,
            "bytes_down_per_client": self.bytes_down // self.config.federation.rounds,
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
            "changes_rank": self.changes_rank,
            "personal": list(self.personal),
            "changes_base": self.changes_base,
            "notes": list(self.notes),
            **({} if self.privacy is None else {"privacy": strict_json(self.privacy)}),
        }


def _kind_in_words(adapter: AdapterConfig, layers: int) -> str:
    chosen = "of its own choice" if adapter.facts.choose else "query and value"
    targets = ", ".join(adapter.targets) if adapter.targets else chosen
    ranks = f"{', '.join(map(str, adapter.ranks))} in turn" if adapter.ranks else str(adapter.rank)
    numbers = {"rank": f"rank {ranks}", "alpha": f"alpha {adapter.alpha:g}"}
    own = [said for key, said in numbers.items() if key not in adapter.facts.lacks]
    return ", ".join([adapter.kind, *own, f"{layers} layers ({targets})"])


def dry_run_table(planned: DryRun) -> RenderableType:
    """Lay out what a run would do."""
    config = planned.config
    adapter, train, federation = config.adapter, config.train, config.federation
    options = "".join(f", {name} {as_typed(value)}" for name, value in config.strategy.options.items())
    length = _several(train.local_steps, "step") if train.local_steps else _several(train.local_epochs or 1, "epoch")
    sees = "must see each client's factors" if planned.needs_single_factors else "needs sums over clients only"
    if planned.bytes_up == 0:
        sees = "is sent nothing"
    share = 100 * planned.trainable / max(1, planned.parameters)
    rows = list(planned.client_rows.values())
    up, down = (moved / federation.rounds for moved in (planned.bytes_up, planned.bytes_down))  # means
    at_rank = f" while the rank is {adapter.rank}, which the method may change" if planned.changes_rank else ""
    facts: list[tuple[str, object]] = [
        (
            "model",
            f"{config.model.name or NONE} ({config.task}, {planned.parameters:,} parameters, on {planned.device})",
        ),
        ("data", f"{config.data.source or NONE} ({sum(rows):,} training rows, {planned.test_rows:,} test rows)"),
        *(("", note) for note in planned.notes),
        ("strategy", f"{config.strategy.name}{options}"),
        ("", f"{planned.paper}; exact: {planned.exact}"),
        ("server", sees),
        ("personal", _stays(planned.personal)),
        ("adapter", _kind_in_words(adapter, planned.layers)),
        ("trainable", f"{planned.trainable:,} parameters a client ({share:.2g} % of the base)"),
        *(("note", note) for note in planned.notes),
        ("head", f"{planned.head}" + (f" ({planned.head_parameters:,} parameters)" if planned.head_parameters else "")),
        (
            "a round trains",
            f"{length} with batches of {train.batch_size}, {train.optimizer}, learning rate {train.learning_rate:g}",
        ),
        ("partition", f"{config.partition.scheme}{_partition_options(config)}"),
        ("clients", rows_summary(rows)),
        ("rounds", f"{federation.rounds}, {_cohorts(planned)}"),
        ("a client moves", f"{size(up)} up and {size(down)} down a round{at_rank}"),
        *([("", CATCH_UP)] if planned.changes_base else []),
        ("in all", f"{size(planned.total_bytes)} for {federation.rounds} rounds"),
        *([] if planned.privacy is None else planned_rows(planned.privacy, config.privacy)),
        ("seed", config.run.seed),
    ]
    parts: list[RenderableType] = [pairs(facts)]
    if 1 < len(rows) <= 12:
        table = new_table("client", "rows", right=("rows",))
        for client, count in planned.client_rows.items():
            table.add_row(cell(client, "bold cyan"), str(count))
        parts += [Text(), table]
    return Group(*parts, Text(), Text("Nothing was trained and nothing was written.", "dim"))


def _cohorts(planned: DryRun) -> str:
    """Say how many clients take part in a round."""
    privacy, clients = planned.config.privacy, len(planned.client_rows)
    if privacy.level == "client" and privacy.cohort == "poisson":
        expected = planned.config.federation.fraction * clients  # each by its own coin, whatever min_clients
        return f"each with {expected:.4g} of {clients} clients on average (Poisson)"
    return f"with {planned.cohort} of {clients} clients each"


def _stays(personal: tuple[str, ...]) -> str:
    verb = "stay" if len(personal) > 1 else "stays"
    return f"{' and '.join(personal) or 'nothing'} {verb} with each client"


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
