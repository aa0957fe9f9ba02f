"""Privacy as it is shown: in a run's lines and on its page, before it begins, and out of its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.privacy.statement import number
from fedpeft.report.formats import NONE, finite, one_line
from fedpeft.report.layout import cell, new_table, pairs

if TYPE_CHECKING:
    from fedpeft.privacy.settings import PrivacyConfig

Facts = Mapping[str, Any]
LONGEST = 10_000  # characters of a statement


def epsilon(value: object) -> str:
    """Show an epsilon, rounded up; a dash where there is none."""
    known = finite(value)
    return NONE if known is None else number(known)


def caveats(privacy: PrivacyConfig) -> list[str]:
    """Say in a word or two each why a run gives no guarantee; `fedpeft.privacy.statement.state` says it whole."""
    found = {
        "shuffled batches": privacy.sampling == "shuffle",
        "losses released": privacy.release_metrics,
        "no noise": privacy.noise_multiplier == 0,
        "seeded": privacy.rng != "secure",
    }
    return [words for words, holds in found.items() if holds]


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


def spread(values: Sequence[float], digits: str = ".4g") -> str:
    """Write the range of what may differ among clients."""
    low, high = (format(edge(values), digits) for edge in (min, max))
    return low if low == high else f"{low} to {high}"


# --- before a run ------------------------------------------------------------------------------------------------


def planned_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return what a dry run says of privacy, as names and words.

    Parameters
    ----------
    facts : mapping
        See `fedpeft.strategies.plan.plan_privacy`.
    """
    unit = "row" if facts["level"] == "record" else "client"
    source = "as given" if facts["calibrated_to"] is None else f"calibrated to epsilon {facts['calibrated_to']:g}"
    total = spread(facts["steps"], "d")
    noisy = "noised sums" if facts["level"] == "client" else "noised steps a client"
    if finite(facts["epsilon_max"]) is None:
        planned = "none can be stated"
    else:
        planned = (
            f"{epsilon(facts['epsilon_max'])} at delta {facts['delta']:g} ({facts['accountant'].upper()}), if every "
            "client takes part in every round"
        )
    promise = "yes, if randomness stays secret" if facts["guarantee"] else f"none: {'; '.join(facts['reasons'])}"
    return [
        ("privacy", f"{facts['level']} level"),
        ("noise", f"multiplier {spread(facts['noise_multiplier'])}, {source}"),
        ("", f"{total} {noisy} in all, each {unit} in one with chance {spread(facts['sample_rate'])}"),
        ("epsilon", planned),
        ("randomness", facts["rng"]),
        ("guarantee", promise),
        *(("warning", warning) for warning in facts["warnings"]),
    ]


# --- out of a ledger ---------------------------------------------------------------------------------------------


def ledger_table(facts: Facts) -> RenderableType:
    """Lay out what `fedpeft.privacy.spending` returns of a run, or of a site's ledger."""
    by = "client" if "clients" in facts else "run"
    entries = facts[f"{by}s"]
    columns = ("epsilon", "noise", "sample rate", "steps", "messages", "rounds")
    table = new_table(by, *columns, right=columns, whole=columns)
    for each in entries:
        table.add_row(
            cell(each[by], "bold cyan"),
            cell(epsilon(each["epsilon"]), "bold green"),
            cell(_range(each["noise_multiplier"])),
            cell(_range(each["sample_rate"])),
            cell(each["steps"]),
            cell(each["messages"]),
            cell(_rounds(each["rounds"])),
        )
    at = f"at delta {facts['delta']:g} ({facts['accountant'].upper()})"
    rows: list[tuple[str, object]] = [("ledger", facts["ledger"])]
    if by == "client":
        rows.append(("worst", f"epsilon {epsilon(facts['epsilon_max'])} {at}"))
        rows.append(("median", f"epsilon {epsilon(facts['epsilon_median'])}"))
    else:
        rows.append(("in all", f"epsilon {epsilon(facts['epsilon'])} {at}"))
    if facts.get("budget") is not None:
        rows.append(("budget", f"epsilon {facts['budget']:g}"))
    shown: list[RenderableType] = [table, Text()] if entries else [Text("nothing was charged yet.")]
    return Group(*shown, pairs(rows), Text(), Text(one_line(facts["statement"], LONGEST)))


def _range(edges: Sequence[float] | None) -> str:
    return NONE if edges is None else spread(edges)


def _rounds(edges: Sequence[int] | None) -> str:
    if edges is None:
        return NONE
    first, last = edges
    return str(first) if first == last else f"{first}-{last}"
