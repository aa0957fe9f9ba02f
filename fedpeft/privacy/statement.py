"""What a run may say of its privacy: numbers for machines, and a paragraph that names what they rest on."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.errors import RunDirectoryError
from fedpeft.privacy.accounting import Charge, Spent, spent
from fedpeft.privacy.levels import Level, find_level, level_of
from fedpeft.privacy.overlap import InTheClear
from fedpeft.privacy.words import accountants
from fedpeft.rounding import upwards

PRIVACY = "privacy.json"  # in a run directory
NOTHING = InTheClear()
Facts = dict[str, Any]

PUBLIC = (
    *("base model", "tokenizer or image processor", "label set", "columns and layout of the rows", "test rows"),
    "configuration",
)


def void(privacy: PrivacyConfig) -> list[str]:
    """Return why no epsilon can be stated at all; mostly nothing."""
    reasons = []
    if privacy.sampling == "shuffle":
        reasons.append("privacy.sampling = 'shuffle': batches are no Poisson samples, which the accounting rests on")
    if privacy.release_metrics:
        reasons.append("privacy.release_metrics = true: losses leave the clients without noise")
    if privacy.noise_multiplier == 0:
        reasons.append("privacy.noise_multiplier = 0: there is no noise")
    return reasons


def state(
    config: RunConfig,
    charges: Mapping[str, Sequence[Charge]],
    examples: Mapping[str, int],
    clear: InTheClear = NOTHING,
    *,
    notes: Sequence[str] = (),
    kept: Sequence[str] = (),
    silent: Sequence[str] = (),
    largest: int | None = None,
) -> Facts:
    """Return a run's statement, as privacy.json holds it.

    Parameters
    ----------
    config : RunConfig
        With ``privacy.level`` other than ``none``.
    charges : mapping of str to sequence of Charge
        What was spent on each client, over ALL rounds; clients that were never asked have none.
    examples : mapping of str to int
        Public row counts, where they are public.
    clear : InTheClear
        What of the training rows no noise covers.
    notes : sequence of str
        What else qualifies it.
    kept : sequence of str
        What stays with each client, by role.
    silent : sequence of str
        Clients that were asked to train and never said what that cost.
    largest : int, optional
        Rows of the client that has most, where they are known and not public: `examples` then holds none.
    """
    privacy, level, words = config.privacy, level_of(config.privacy), level_of(config.privacy).words(config)
    by_client = {client: spent(each, privacy.delta, privacy.accountant) for client, each in charges.items()}
    trained = [by_client[client] for client, each in charges.items() if each]
    epsilons = [each.epsilon for each in trained]
    voided = _voided(privacy, silent, epsilons)
    reasons = [*voided, *_replayable(privacy, words.drawn, voided), *_uncovered(config, clear), *level.uncovered(kept)]
    protected, population = level.protected(config, len(by_client), examples, largest)
    facts: Facts = {
        "level": privacy.level,
        "epsilon_max": None if voided else max(epsilons, default=0.0),
        "epsilon_median": None if voided else statistics.median(epsilons or [0.0]),
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "computed_by": sorted({each.accountant for each in trained}),
        "guarantee": not reasons,
        "reasons": reasons,
        "scores_tell_of_rows": clear.in_scores,
        "adjacency": words.adjacency,
        "adversary": level.adversary,
        "mechanism": words.mechanism,
        "sampling": words.sampling,
        "public": [*PUBLIC, *words.declared, *_declared(config)],
        "warnings": [*_warnings(config, level, protected, population), *notes],
        "rounds": config.federation.rounds,
        "trained": len(trained),
        "clients": _clients(privacy, charges, by_client, examples, voided=bool(voided)),
    }
    return facts | {"statement": paragraph(facts)}


def _voided(privacy: PrivacyConfig, silent: Sequence[str], epsilons: Sequence[float]) -> list[str]:
    """Return why no epsilon can be stated of a run, given what came of it."""
    reasons = void(privacy)
    if silent:
        reasons.append(
            f"{', '.join(silent)} was asked to train and never answered: what that cost is in its own ledger alone"
        )
    if not reasons and math.inf in epsilons:
        reasons.append("privacy.noise_multiplier is too small for any finite epsilon")
    return reasons


def _replayable(privacy: PrivacyConfig, drawn: str, voided: Sequence[str]) -> list[str]:
    if privacy.rng == "secure":
        return []
    worth = "" if voided else "; epsilon is what the mechanism gives with secret randomness (privacy.rng=secure)"
    return [f"privacy.rng = 'seeded': whoever knows the seed can replay {drawn} and noise{worth}"]


def _uncovered(config: RunConfig, clear: InTheClear) -> list[str]:
    """Return what no noise covers of the rows themselves."""
    reasons = []
    if clear.held_out:
        reasons.append(
            f"data.test is not given: {config.data.test_fraction:.0%} of data.source were held out as test rows, which "
            "are scored without noise and have no protection; give data.test with rows that may be public"
        )
    if clear.scored:
        reasons.append(
            f"{clear.scored} test row{'s are training rows' if clear.scored > 1 else ' is a training row'} too, which "
            "are scored without noise and have no protection; give data.test with rows that may be public"
        )
    if clear.owned:
        which = "test rows are" if clear.owned > 1 else "test row is"
        reasons.append(
            f"{clear.owned} {which} the clients' own, by data.source, which are scored without noise and have no "
            "protection; give data.test with rows that may be public"
        )
    if clear.started:
        reasons.append(
            f"adapter.start is of the run '{clear.started}', which trained on this data.source: what that adapter "
            "tells of its rows comes on top, and epsilons of runs on the same rows add up"
        )
    if clear.begun:
        which = (
            "rows of adapter.init_data are training rows"
            if clear.begun > 1
            else "row of adapter.init_data is a training row"
        )
        reasons.append(
            f"{clear.begun} {which} too, which the adapter begins at without noise; give it rows that may be public"
        )
    return reasons


def _clients(
    privacy: PrivacyConfig,
    charges: Mapping[str, Sequence[Charge]],
    found: Mapping[str, Spent],
    examples: Mapping[str, int],
    *,
    voided: bool,
) -> dict[str, Facts]:
    """Return what each client spent; where counts are private, that is in the client's own ledger only."""
    if not level_of(privacy).lists_clients(privacy):
        return {}
    rows: dict[str, Facts] = {}
    for client, held in charges.items():
        epsilon = found[client].epsilon
        last = held[-1] if held else None
        rows[client] = {
            "epsilon": None if voided or not math.isfinite(epsilon) else epsilon,
            "noise_multiplier": last and last.noise_multiplier,
            "sample_rate": last and last.sample_rate,
            "steps": sum(charge.steps for charge in held),
            "examples": examples.get(client),
        }
        if found[client].accountant not in (privacy.accountant, "none"):
            rows[client]["accountant"] = found[client].accountant
    return rows


def _declared(config: RunConfig) -> list[str]:
    adapter, declared = config.adapter, list[str]()
    if adapter.init_data is not None:
        declared.append(f"adapter.init_data ({Path(adapter.init_data).name})")
    if adapter.start is not None:
        declared.append(f"adapter.start ('{adapter.start}', sha256 {adapter.start_sha256})")
    return declared


def _warnings(config: RunConfig, level: Level, protected: int, population: str) -> list[str]:
    """Return what an expert would ask about."""
    privacy, unit = config.privacy, level.unit
    warnings = []
    if protected and privacy.delta * protected >= 1:
        smaller = f"privacy.delta below 1/{protected}" if level.lists_clients(privacy) else "a smaller privacy.delta"
        warnings.append(
            f"delta = {privacy.delta:g} is not below 1/n for {population}: releasing one {unit} in the clear would "
            f"satisfy it; set {smaller}"
        )
    if config.adapter.start is not None:
        warnings.append(
            f"adapter.start is taken to be public: had it been trained on rows that are protected here, this epsilon "
            f"would not cover what it tells of the {unit}s that they are of"
        )
    warnings += level.warnings(config)
    if privacy.canaries:
        warnings.append(f"{privacy.canaries} false rows were planted for an audit: the adapter is not for use")
    return warnings


def paragraph(facts: Mapping[str, Any]) -> str:
    """Say a statement in words, so that it can be quoted whole.

    Parameters
    ----------
    facts : mapping
        See `state`.
    """
    level = find_level(facts["level"])
    unit = level.unit
    if facts["epsilon_max"] is None:
        return f"No guarantee, and no epsilon: {'; '.join(facts['reasons'])}."
    if not facts["trained"]:
        return "Nobody trained, so that nothing was spent."
    largest, median = upwards(facts["epsilon_max"]), upwards(facts["epsilon_median"])
    sentences = [
        f"Over all rounds, each {unit} is protected with epsilon = {largest} at delta = {facts['delta']:g} in the "
        f"worst case over clients (median {median}): whoever looks at what this run releases for a {unit}, and is "
        f"wrong about 1 in 100 of those that were not in it, finds at most {_found(facts)} in 100 of those that were.",
        *([] if facts["guarantee"] else [f"No guarantee for this very run: {'; '.join(facts['reasons'])}."]),
        f"Neighbours: {facts['adjacency']}.",
        f"Against: {facts['adversary']}.",
        f"Mechanism: {facts['mechanism']}.",
        f"Sampling: {facts['sampling']}.",
        f"Accountant: {accountants(facts)}, composed over every step that was charged, repeats included.",
        f"Public: {', '.join(facts['public'])}.",
        f"Assumed: Gaussians in floating point are as good as real ones, {level.assumed}and the clients run this code.",
        *(f"Warning: {warning}." for warning in facts["warnings"]),
    ]
    return " ".join(sentences)


def _found(facts: Mapping[str, Any], wrong: float = 0.01) -> str:
    """Return what share of the units an attack may find, in percent, rounded up.

    P. Kairouz et al., "The Composition Theorem for Differential Privacy", arXiv 1311.0776, theorem 2.1: of a test whose
    false positives are `wrong`, the true positives are at most e^epsilon wrong + delta, and at most
    1 - e^-epsilon (1 - delta - wrong).
    """
    epsilon, delta = facts["epsilon_max"], facts["delta"]
    right = min(math.exp(min(epsilon, 700.0)) * wrong + delta, 1 - math.exp(-epsilon) * (1 - delta - wrong))
    return f"{math.ceil(1000 * min(right, 1.0) - 1e-9) / 10:g}"


def read_statement(run: Path) -> Facts | None:
    """Read a run's privacy.json; None where it has none.

    Raises
    ------
    RunDirectoryError
        It cannot be read.
    """
    path = run / PRIVACY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"'{path}' cannot be read: {error}.") from None
    if not isinstance(found, dict) or "level" not in found:
        raise RunDirectoryError(f"'{path}' is no privacy statement.")
    return found
