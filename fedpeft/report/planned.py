"""What a run would do, as ``fedpeft simulate --dry-run`` prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.config import AdapterConfig, RunConfig
from fedpeft.formats import NONE, size
from fedpeft.privacy.levels import level_of
from fedpeft.report.holdings import rows_summary
from fedpeft.report.layout import as_typed, cell, new_table, pairs
from fedpeft.report.privacy import planned_rows

HEADS = {
    "shared": "averaged over the clients, as the adapter is",
    "local": "stays with each client; scores are the mean over the clients' own models",
    "frozen": "left as drawn from the seed; nobody trains it",
}
CATCH_UP = "besides, each round, what became of the base before the last one: at most the size of the adapted layers"
NO_HEAD = "none: a causal language model keeps its own"


def dry_run_table(facts: Mapping[str, Any], config: RunConfig) -> RenderableType:
    """Lay out what a run would do.

    Parameters
    ----------
    facts : mapping
        What `fedpeft.simulations.plan.DryRun.to_dict` returns.
    config : RunConfig
        The run's, the strategy's options spelled out.
    """
    rows = facts["client_rows"]
    parts: list[RenderableType] = [
        pairs(
            [
                *_of_model(facts, config),
                *_of_rounds(facts, config),
                *([] if facts.get("privacy") is None else planned_rows(facts["privacy"], config)),
                *([("workers", facts["workers"]["said"])] if "workers" in facts else []),
                *([("memory", _memory(facts["memory"]))] if "memory" in facts else []),
                ("seed", config.run.seed),
            ]
        )
    ]
    if 1 < len(rows) <= 12:
        table = new_table("client", "rows", right=("rows",))
        for client, count in rows.items():
            table.add_row(cell(client, "bold cyan"), str(count))
        parts += [Text(), table]
    return Group(*parts, Text(), Text("Nothing was trained and nothing was written.", "dim"))


def _kind_in_words(adapter: AdapterConfig, layers: int) -> str:
    chosen = "of its own choice" if adapter.facts.choose else "query and value"
    targets = ", ".join(adapter.targets) if adapter.targets else chosen
    ranks = f"{', '.join(map(str, adapter.ranks))} in turn" if adapter.ranks else str(adapter.rank)
    numbers = {"rank": f"rank {ranks}", "alpha": f"alpha {adapter.alpha:g}"}
    own = [said for key, said in numbers.items() if key not in adapter.facts.lacks]
    among = "" if adapter.layers is None else f" of blocks {adapter.layers}"
    return ", ".join([adapter.kind, *own, f"{layers} layers ({targets}{among})"])


def _of_model(facts: Mapping[str, Any], config: RunConfig) -> list[tuple[str, object]]:
    """Say what would be trained, on what, and by which method."""
    adapter, strategy = config.adapter, config.strategy
    options = "".join(f", {name} {as_typed(value)}" for name, value in strategy.options.items())
    sees = "must see each client's factors" if facts["needs_single_factors"] else "needs sums over clients only"
    if facts["bytes_up_per_client"] == 0:
        sees = "is sent nothing"
    share = 100 * facts["trainable"] / max(1, facts["parameters"])
    training = sum(facts["client_rows"].values())
    base = f"{facts['task']}, {facts['parameters']:,} parameters, on {facts['device']}"
    return [
        ("model", f"{config.model.name or NONE} ({base})"),
        ("data", f"{config.data.source or NONE} ({training:,} training rows, {facts['test_rows']:,} test rows)"),
        ("strategy", f"{strategy.name}{options}"),
        ("", f"{facts['paper']}; exact: {facts['exact']}"),
        ("server", sees),
        ("personal", _stays(facts["personal"])),
        ("adapter", _kind_in_words(adapter, facts["layers"])),
        ("trainable", f"{facts['trainable']:,} parameters a client ({share:.2g} % of the base)"),
        *(("note", note) for note in facts["notes"]),
        ("head", _head(facts)),
    ]


def _of_rounds(facts: Mapping[str, Any], config: RunConfig) -> list[tuple[str, object]]:
    """Say who would take part, how often, and what would be moved."""
    train, rounds = config.train, config.federation.rounds
    length = _several(train.local_steps, "step") if train.local_steps else _several(train.local_epochs or 1, "epoch")
    at_rank = f" while the rank is {config.adapter.rank}, which the method may change" if facts["changes_rank"] else ""
    up, down = size(facts["bytes_up_per_client"]), size(facts["bytes_down_per_client"])
    return [
        (
            "a round trains",
            f"{length} with batches of {train.rows_a_step}, {train.optimizer}, learning rate {train.learning_rate:g}",
        ),
        ("prefix cache", facts["prefix_cache"]["said"]),
        ("partition", f"{config.partition.scheme}{_partition_options(config)}"),
        ("clients", rows_summary(list(facts["client_rows"].values()))),
        ("rounds", f"{rounds}, {_cohorts(facts, config)}"),
        ("a client moves", f"{up} up and {down} down a round{at_rank}"),
        *([("", CATCH_UP)] if facts["changes_base"] else []),
        ("in all", f"{size(facts['total_bytes'])} for {rounds} rounds"),
        *([("budget", _budget(facts, config))] if "affordable_rounds" in facts else []),
    ]


def _memory(facts: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {size(facts[name])}" for name in ("libraries", "weights", "training", "scoring"))
    seen = f"; a worker took {size(facts['measured'])} before" if "measured" in facts else ""
    return f"{size(facts['total'])} a worker at its peak, predicted ({parts}){seen}"


def _budget(facts: Mapping[str, Any], config: RunConfig) -> str:
    """Say how far the communication budget goes."""
    paid, rounds = facts["affordable_rounds"], config.federation.rounds
    whole = "all rounds" if paid == rounds else f"{paid} of {rounds} rounds: the run ends then"
    return f"run.max_megabytes = {config.run.max_megabytes:g} pays for {whole}"


def _head(facts: Mapping[str, Any]) -> str:
    if not facts["head_parameters"]:
        return NO_HEAD
    words = HEADS["local" if "head" in facts["personal"] else facts["head"] or "shared"]
    return f"{words} ({facts['head_parameters']:,} parameters)"


def _cohorts(facts: Mapping[str, Any], config: RunConfig) -> str:
    """Say how many clients take part in a round."""
    privacy, clients = config.privacy, len(facts["client_rows"])
    if level_of(privacy).secret_cohort(privacy):
        expected = config.federation.fraction * clients  # each by its own coin, whatever min_clients
        return f"each with {expected:.4g} of {clients} clients on average (Poisson)"
    return f"with {facts['cohort']} of {clients} clients each"


def _stays(personal: Sequence[str]) -> str:
    verb = "stay" if len(personal) > 1 else "stays"
    return f"{' and '.join(personal) or 'nothing'} {verb} with each client"


def _several(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count > 1 else "")


def _partition_options(config: RunConfig) -> str:
    partition = config.partition
    words = {
        "dirichlet": f", alpha {partition.concentration:g}",
        "pathological": f", {partition.classes_per_client} labels a client",
        "shard": f", {partition.shards_per_client} shards a client",
        "natural": f", by {partition.by}",
    }
    return words.get(partition.scheme, "")
