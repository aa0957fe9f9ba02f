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
from fedpeft.rounding import number as number

PRIVACY = "privacy.json"  # in a run directory
Facts = dict[str, Any]

ADJACENCY = {
    (
        "record",
        "",
    ): "add or remove one row of one client (a row of its data, not a person, who may have several); {counts}",
    ("client", "poisson"): "add or remove one client with all its rows; the number of clients is public",
    ("client", "fixed"): "replace one client with all its rows by another; the number of clients is public",
}
COUNTS = {
    True: "row counts are public and held fixed, so that a removed row is one that contributes nothing",
    False: "sample rate, noise and divisor are fixed publicly, so that row counts show in nothing",
}
PUBLIC = ("base model", "tokenizer or image processor", "label set", "test rows", "configuration")
ADVERSARY = {
    "record": "a server that keeps to the protocol, the other clients, and whoever sees any adapter of the run; not "
    "whoever reads a client's own disk, or learns how long its training takes",
    "client": "the other clients and whoever sees any adapter or record of the run; the SERVER IS TRUSTED: it sees "
    "single updates, and who took part",
}


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
    *,
    notes: Sequence[str] = (),
    kept: Sequence[str] = (),
    silent: Sequence[str] = (),
    held_out: bool = False,
    scored: int = 0,
    begun: int = 0,
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
    notes : sequence of str
        What else qualifies it.
    kept : sequence of str
        What stays with each client, by role.
    silent : sequence of str
        Clients that were asked to train and never said what that cost.
    held_out : bool
        Whether test rows were held out of the clients' own source: they are scored in the clear.
    scored : int
        Test rows that are training rows too, and scored in the clear all the same.
    begun : int
        Rows of ``adapter.init_data`` that are training rows too.
    largest : int, optional
        Rows of the client that has most, where they are known and not public: `examples` then holds none.
    """
    privacy = config.privacy
    voided = void(privacy)
    if silent:
        voided.append(
            f"{', '.join(silent)} was asked to train and never answered: what that cost is in its own ledger alone"
        )
    found = {client: spent(held, privacy.delta, privacy.accountant) for client, held in charges.items()}
    epsilons = [found[client].epsilon for client, held in charges.items() if held]  # of those that trained
    if not voided and math.inf in epsilons:
        voided.append("privacy.noise_multiplier is too small for any finite epsilon")
    reasons = list(voided)
    if privacy.rng != "secure":
        drawn = "batches" if privacy.level == "record" else "cohorts"
        worth = "" if voided else "; epsilon is what the mechanism gives with secret randomness (privacy.rng=secure)"
        reasons.append(f"privacy.rng = 'seeded': whoever knows the seed can replay {drawn} and noise{worth}")
    if held_out:
        reasons.append(
            f"data.test is not given: {config.data.test_fraction:.0%} of data.source were held out as test rows, which "
            "are scored without noise and have no protection; give data.test with rows that may be public"
        )
    if scored:
        reasons.append(
            f"{scored} test row{'s are training rows' if scored > 1 else ' is a training row'} too, which are scored "
            "without noise and have no protection; give data.test with rows that may be public"
        )
    if begun:
        which = (
            "rows of adapter.init_data are training rows" if begun > 1 else "row of adapter.init_data is a training row"
        )
        reasons.append(
            f"{begun} {which} too, which the adapter begins at without noise; give it rows that may be public"
        )
    reasons += _kept(privacy, kept)
    facts: Facts = {
        "level": privacy.level,
        "epsilon_max": None if voided else max(epsilons, default=0.0),
        "epsilon_median": None if voided else statistics.median(epsilons or [0.0]),
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "computed_by": sorted({found[client].accountant for client, held in charges.items() if held}),
        "guarantee": not reasons,
        "reasons": reasons,
        "adjacency": _adjacency(privacy),
        "adversary": ADVERSARY[privacy.level],
        "mechanism": _mechanism(privacy),
        "sampling": _sampling(config),
        "public": [*PUBLIC, *_declared(config)],
        "warnings": [*_warnings(config, _protected(config, len(found), examples, largest)), *notes],
        "rounds": config.federation.rounds,
        "trained": sum(bool(held) for held in charges.values()),
        "clients": _clients(privacy, charges, found, examples, voided=bool(voided)),
    }
    return facts | {"statement": paragraph(facts)}


def _clients(
    privacy: PrivacyConfig,
    charges: Mapping[str, Sequence[Charge]],
    found: Mapping[str, Spent],
    examples: Mapping[str, int],
    *,
    voided: bool,
) -> dict[str, Facts]:
    """Return what each client spent; where counts are private, that is in the client's own ledger only."""
    if privacy.level == "record" and not privacy.public_counts:
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


def _adjacency(privacy: PrivacyConfig) -> str:
    kind = (privacy.level, "" if privacy.level == "record" else privacy.cohort)
    return ADJACENCY[kind].format(counts=COUNTS[privacy.public_counts])


def _mechanism(privacy: PrivacyConfig) -> str:
    if privacy.level == "record":
        return (
            f"DP-SGD at every client: each row's gradient over all trained tensors together clipped to "
            f"{privacy.max_grad_norm:g}, Gaussian noise on the sum, at every step, also where its batch is empty"
        )
    moving = ", moved along by a noised quantile whose cost is included" if privacy.adaptive_clipping else ""
    return (
        f"each client's whole update clipped to {privacy.max_update_norm:g}{moving}; uniform weights; Gaussian noise "
        "on the sum, in every round, also where nobody answers; divided by the public size of a cohort"
    )


def _sampling(config: RunConfig) -> str:
    privacy = config.privacy
    if privacy.level == "record":
        drawn = "Poisson sampling of rows" if privacy.sampling == "poisson" else "shuffled rows"
        return f"{drawn}; every round that a client was asked in is charged in full"
    if privacy.cohort == "poisson":
        return f"Poisson sampling of clients with chance {config.federation.fraction:g}, kept secret"
    return "fixed cohorts: no amplification, every client is taken to be in every round, at twice the sensitivity"


def _declared(config: RunConfig) -> list[str]:
    declared = []
    if config.privacy.level == "client":
        declared.append("number of clients")
    elif config.privacy.public_counts:
        declared.append("row counts of the clients")
    if config.adapter.init_data is not None:
        declared.append(f"adapter.init_data ({Path(config.adapter.init_data).name})")
    return declared


def _protected(config: RunConfig, clients: int, examples: Mapping[str, int], largest: int | None) -> int:
    """Return the number that delta is held against; 0 where nothing is known of it."""
    privacy = config.privacy
    if privacy.level == "client":
        return clients
    known = [*examples.values(), *([] if largest is None else [largest])]
    if not known and privacy.sample_rate:
        # what is public says how many rows a client is thought to have
        known.append(round(config.train.batch_size / privacy.sample_rate))
    return max(known, default=0)


def _warnings(config: RunConfig, protected: int) -> list[str]:
    """Return what an expert would ask about."""
    privacy = config.privacy
    unit = "client" if privacy.level == "client" else "row"
    warnings = []
    if protected and privacy.delta * protected >= 1 and unit == "row" and not privacy.public_counts:
        warnings.append(
            f"delta = {privacy.delta:g} is not below 1/n for the rows of the largest client, whose number is not told"
            ": releasing one row in the clear would satisfy it; set a smaller privacy.delta"
        )
    elif protected and privacy.delta * protected >= 1:
        whose = "" if unit == "client" else " of the largest client"
        warnings.append(
            f"delta = {privacy.delta:g} is not below 1/n for the {protected} {unit}s{whose}: releasing one {unit} in "
            f"the clear would satisfy it; set privacy.delta below 1/{protected}"
        )
    if privacy.level == "record" and config.train.precision == "bf16":
        warnings.append(
            "train.precision = 'bf16': a long row widens the padding of its batch, which may change how the others are "
            "rounded"
        )
    if privacy.canaries:
        warnings.append(f"{privacy.canaries} false rows were planted for an audit: the adapter is not for use")
    return warnings


def _kept(privacy: PrivacyConfig, kept: Sequence[str]) -> list[str]:
    """Return what noise on a sum does not reach: DP-SGD does, since it covers all that a client trains."""
    if privacy.level != "client" or not kept:
        return []
    what = " and ".join(kept)
    return [
        f"{what} stays with each client and is covered by no noise: neither it, nor scores of models that hold it "
        "(clients/, test scores), may be shown to anybody else, and they are records of this run"
    ]


def paragraph(facts: Mapping[str, Any]) -> str:
    """Say a statement in words, so that it can be quoted whole.

    Parameters
    ----------
    facts : mapping
        See `state`.
    """
    unit = "row" if facts["level"] == "record" else "client"
    if facts["epsilon_max"] is None:
        return f"No guarantee, and no epsilon: {'; '.join(facts['reasons'])}."
    if not facts["trained"]:
        return "Nobody trained, so that nothing was spent."
    largest, median = number(facts["epsilon_max"]), number(facts["epsilon_median"])
    sentences = [
        f"Over all rounds, each {unit} is protected with epsilon = {largest} at delta = {facts['delta']:g} in the "
        f"worst case over clients (median {median}): whoever looks at what this run releases for a {unit}, and is "
        f"wrong about 1 in 100 of those that were not in it, finds at most {_found(facts)} in 100 of those that were.",
        *([] if facts["guarantee"] else [f"No guarantee for this very run: {'; '.join(facts['reasons'])}."]),
        f"Neighbours: {facts['adjacency']}.",
        f"Against: {facts['adversary']}.",
        f"Mechanism: {facts['mechanism']}.",
        f"Sampling: {facts['sampling']}.",
        f"Accountant: {_accountants(facts)}, composed over every step that was charged, repeats included.",
        f"Public: {', '.join(facts['public'])}.",
        f"Assumed: Gaussians in floating point are as good as real ones, {_independent(facts)}and the clients run this "
        "code.",
        *(f"Warning: {warning}." for warning in facts["warnings"]),
    ]
    return " ".join(sentences)


def _independent(facts: Mapping[str, Any]) -> str:
    """Say what the proof of independence cannot exclude; see `fedpeft.privacy.independence`."""
    if facts["level"] != "record":
        return ""
    return "the model keeps a batch's rows apart as it did for rows that were made up, "


def _found(facts: Mapping[str, Any], wrong: float = 0.01) -> str:
    """Return what share of the units an attack may find, in percent, rounded up.

    P. Kairouz et al., "The Composition Theorem for Differential Privacy", arXiv 1311.0776, theorem 2.1: of a test whose
    false positives are `wrong`, the true positives are at most e^epsilon wrong + delta, and at most
    1 - e^-epsilon (1 - delta - wrong).
    """
    epsilon, delta = facts["epsilon_max"], facts["delta"]
    right = min(math.exp(min(epsilon, 700.0)) * wrong + delta, 1 - math.exp(-epsilon) * (1 - delta - wrong))
    return f"{math.ceil(1000 * min(right, 1.0) - 1e-9) / 10:g}"


def _accountants(facts: Mapping[str, Any]) -> str:
    """Name who computed the numbers: RDP where PRV overflows, the exact formula where all take part in every step."""
    names = {"gaussian": "the analytic Gaussian"}
    return " and ".join(names.get(name, name.upper()) for name in facts["computed_by"] or [facts["accountant"]])


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
