"""Privacy as it is shown: in a run's lines and on its page, before it begins, and out of its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.config import RunConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.formats import NONE, finite, one_line
from fedpeft.privacy.levels import find_level
from fedpeft.privacy.words import accountants
from fedpeft.report.layout import cell, new_table, pairs
from fedpeft.rounding import as_given, upwards

Facts = Mapping[str, Any]
LONGEST = 10_000  # characters of a statement
EVERYONE = "all clients"  # of whom a client-level run keeps one account


def epsilon(value: object) -> str:
    """Show an epsilon, rounded up; a dash where there is none."""
    known = finite(value)
    return NONE if known is None else upwards(known)


def caveats(privacy: PrivacyConfig) -> list[str]:
    """Say in a word or two each why a run gives no guarantee; `fedpeft.privacy.statement.state` says it whole."""
    reasons = {
        "shuffled batches": privacy.sampling == "shuffle",
        "losses released": privacy.release_metrics,
        "no noise": privacy.noise_multiplier == 0,
        "seeded": privacy.rng != "secure",
    }
    return [words for words, holds in reasons.items() if holds]


def guarantee(facts: Facts, privacy: PrivacyConfig) -> str:
    """Say in short whether a statement, or the event of it, is a guarantee."""
    if facts.get("guarantee"):
        return "guaranteed"
    return f"no guarantee: {', '.join(caveats(privacy)) or 'see the statement'}"


def claim(facts: Facts, privacy: PrivacyConfig) -> str:
    """Put a statement, or the event of it, on one line."""
    if finite(facts.get("epsilon_max")) is None:
        return f"no epsilon can be stated; {guarantee(facts, privacy)}"
    spent = f"epsilon {epsilon(facts['epsilon_max'])} at delta {privacy.delta:g} ({privacy.level})"
    return spent if facts.get("guarantee") else f"{spent}, {guarantee(facts, privacy)}"


def span(values: Sequence[float], digits: str = ".4g") -> str:
    """Write the range of what may differ among clients."""
    low, high = (format(edge(values), digits) for edge in (min, max))
    return low if low == high else f"{low} to {high}"


# --- before a run ------------------------------------------------------------------------------------------------


def planned_rows(facts: Facts, config: RunConfig) -> list[tuple[str, str]]:
    """Return what a dry run says of privacy, as names and words.

    Parameters
    ----------
    facts : mapping
        See `fedpeft.simulations.plan.plan_privacy`.
    config : RunConfig
        The run's.
    """
    source = (
        "as given" if facts["calibrated_to"] is None else f"calibrated to epsilon {as_given(facts['calibrated_to'])}"
    )
    promise = "yes, if randomness stays secret" if facts["guarantee"] else f"none: {'; '.join(facts['reasons'])}"
    words = find_level(facts["level"]).words(config)
    sums = words.sums.format(steps=span(facts["steps"], "d"), chance=span(facts["sample_rate"]))
    return [
        ("privacy", f"{facts['level']} level"),
        ("noise", f"multiplier {span(facts['noise_multiplier'])}, {source}"),
        ("", sums),
        *([("clipping", words.clipping)] if words.clipping else []),
        ("epsilon", _planned_epsilon(facts, config.privacy, words.whose)),
        ("randomness", facts["rng"]),
        ("guarantee", promise),
        *(("warning", warning) for warning in facts["warnings"]),
    ]


def _planned_epsilon(facts: Facts, privacy: PrivacyConfig, whose: str) -> str:
    """Say what a run would spend at most, and on whom."""
    if finite(facts["epsilon_max"]) is None:
        return "none can be stated"
    spent = f"{epsilon(facts['epsilon_max'])} at delta {facts['delta']:g} ({accountants(facts)})"
    spare = privacy.spare_rounds if facts["calibrated_to"] is not None else 0
    repeats = "repeat" if spare == 1 else "repeats"
    return f"{spent}, {whose}" + (f" (the rest is kept for {spare} {repeats}: privacy.spare_rounds)" if spare else "")


# --- out of a ledger ---------------------------------------------------------------------------------------------


def ledger_table(facts: Facts) -> RenderableType:
    """Lay out what `fedpeft.privacy.spending` returns of a run, or of a site's ledger."""
    by = "client" if "clients" in facts else "run"
    entries = facts[f"{by}s"]
    one_account = "level" in facts and find_level(facts["level"]).hides_cohort  # of a site's ledger no level is known
    columns = ("epsilon", "noise", "sample rate", "steps", "messages", "rounds")
    table = new_table(by, *columns, right=columns, whole=columns)
    for each in entries:
        table.add_row(
            cell(EVERYONE if one_account else each[by], "bold cyan"),
            cell(epsilon(each["epsilon"]), "bold green"),
            cell(_range(each["noise_multiplier"])),
            cell(_range(each["sample_rate"])),
            cell(each["steps"]),
            cell(each["messages"]),
            cell(_rounds(each["rounds"])),
        )
    at = f"at delta {facts['delta']:g} ({accountants(facts)})"
    rows: list[tuple[str, object]] = [("ledger", facts["ledger"])]
    if by == "client":
        rows.append(("worst", f"epsilon {epsilon(facts['epsilon_max'])} {at}"))
        rows.append(("median", f"epsilon {epsilon(facts['epsilon_median'])}"))
    else:
        rows.append(("in all", f"epsilon {epsilon(facts['epsilon'])} {at}"))
    if facts.get("budget") is not None:
        rows.append(("budget", f"epsilon {as_given(facts['budget'])}"))
    shown: list[RenderableType] = [table, Text()] if entries else [Text("nothing was charged yet.")]
    return Group(*shown, pairs(rows), Text(), Text(one_line(facts["statement"], LONGEST)))


def _range(edges: Sequence[float] | None) -> str:
    return NONE if edges is None else span(edges)


def _rounds(edges: Sequence[int] | None) -> str:
    if edges is None:
        return NONE
    first, last = edges
    return str(first) if first == last else f"{first}-{last}"
