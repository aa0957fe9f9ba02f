"""What a run would do, without doing it: for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import AdapterState, Role, role_of
from fedpeft.config import RunConfig, cohort_size
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.overlap import in_the_clear
from fedpeft.privacy.rows import public_counts
from fedpeft.privacy.statement import state
from fedpeft.report.planned import DryRun
from fedpeft.resident import Resident, resident
from fedpeft.rounding import as_given
from fedpeft.strategies import find, with_typed_options
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.federation import build_strategy, client_ranks, personal_names
from fedpeft.strategies.rounds.exchange import sent_down
from fedpeft.strategies.rounds.ranks import Ranks
from fedpeft.strategies.rounds.report import require_enough


def plan(config: RunConfig) -> DryRun:
    """Load model and rows, and count; nothing is trained and nothing written but the cache.

    Parameters
    ----------
    config : RunConfig
        Checked as a run would check it.
    """
    config = with_typed_options(config)
    home = resident(config)
    adapted, held = home.adapted, home.partition
    method = find(config.strategy.name)
    require_enough(len(held.client_ids), config.federation.min_clients)
    rounds = range(1, config.federation.rounds + 1)
    names = [name for name in adapted.initial if name not in adapted.personal]
    facts = method.capabilities
    ranks = _dealt(config, held.client_ids)
    up = sum(_volume(adapted, method.exchange(number).sent_up(names, adapted.frozen), ranks) for number in rounds)
    down = sum(_volume(adapted, sent_down(method.exchange, names, adapted.frozen, number), ranks) for number in rounds)
    cohort = cohort_size(len(held.client_ids), config.federation.fraction, config.federation.min_clients)
    ready = build_strategy(config, home)
    ready.check_cohort(ready.options, cohort)
    level_of(config.privacy).check_model(home)  # what a run would refuse
    if not any(role_of(name) is Role.A for name in adapted.frozen):  # else factors of a mean are exact
        down += (len(rounds) - 1) * _step(method, adapted, ranks[:cohort])
    head = [name for name in adapted.initial if role_of(name) is Role.HEAD]
    whole = sum(parameter.numel() for parameter in adapted.model.parameters())
    return DryRun(
        config=config,
        parameters=whole - sum(tensor.numel() for tensor in adapted.initial.values()),
        trainable=sum(adapted.initial[name].numel() for name in adapted.trained),
        layers=len(adapted.layers),
        bytes_up=up,
        bytes_down=down,
        client_rows={client: len(rows) for client, rows in zip(held.client_ids, held.indices, strict=True)},
        test_rows=len(home.test),
        paper=facts.paper,
        exact=facts.exact,
        needs_single_factors=facts.needs_single_factors,
        head_parameters=sum(adapted.initial[name].numel() for name in head),
        device=str(adapted.device),
        changes_rank=facts.changes_rank,
        personal=tuple(sorted({str(role_of(name)) for name in personal_names(method, adapted)})),
        changes_base=facts.changes_base,
        privacy=plan_privacy(config, home),
        notes=(*adapted.notes, *home.data.notes),
    )


def plan_privacy(config: RunConfig, home: Resident) -> dict[str, Any] | None:
    """Return what may be said of a run's privacy beforehand: the worst case, where all take part in all rounds.

    Parameters
    ----------
    config : RunConfig
        With typed options, see `fedpeft.strategies.with_typed_options`.
    home : Resident
        Its rows.

    Returns
    -------
    dict or None
        `fedpeft.privacy.statement.state` of the charges planned, without its paragraph, and beside it ``rng``,
        ``calibrated_to`` (an epsilon, or None where the noise was given) and least and most over clients of
        ``noise_multiplier``, ``sample_rate`` and ``steps`` in all rounds. None where the run is not private.

    Raises
    ------
    PrivacyError
        No noise meets the budget.
    """
    privacy, rounds = config.privacy, config.federation.rounds
    if not privacy.is_private:
        return None
    counts, level = public_counts(home), level_of(privacy)
    one_round = {client: level.charge(config, rows) for client, rows in counts.items()}
    charges = {client: replace(charge, steps=charge.steps * rounds) for client, charge in one_round.items()}
    planned = {client: [charge] for client, charge in charges.items()}
    personal = {str(role) for role in find(config.strategy.name).capabilities.personal}
    kept = sorted(personal | ({str(Role.HEAD)} if config.adapter.head == "local" else set()))
    facts = state(
        config,
        planned,
        counts if privacy.public_counts else {},
        in_the_clear(home),
        kept=kept,
        largest=max(counts.values(), default=None),
    )
    del facts["statement"]  # which speaks of what was done
    largest = facts["epsilon_max"]
    if privacy.epsilon is not None and largest is not None and largest > privacy.epsilon:
        facts["warnings"].append(_exhaustion(privacy, privacy.epsilon, one_round.values(), rounds))
    held = list(charges.values())
    return facts | {
        "rng": privacy.rng,
        "calibrated_to": privacy.epsilon if privacy.noise_multiplier is None else None,
        **{
            key: [min(getattr(charge, key) for charge in held), max(getattr(charge, key) for charge in held)]
            for key in ("noise_multiplier", "sample_rate", "steps")
        },
    }


def _exhaustion(privacy: PrivacyConfig, epsilon: float, one_round: Iterable[Charge], rounds: int) -> str:
    """Say when a budget that does not last for all rounds is spent, and what happens then."""
    lasts = [_affordable(charge, epsilon, privacy, rounds) for charge in dict.fromkeys(one_round)]
    least = min(lasts)
    of = f"privacy.epsilon = {as_given(epsilon)}"
    noise = f"at noise multiplier {privacy.noise_multiplier:g}"
    if level_of(privacy).hides_cohort:  # one account for all of them
        if least == 0:
            return f"{of} does not last for a single round {noise}: the run ends before its first round"
        return f"{of} lasts for {least} of {rounds} rounds {noise}: the run ends then"
    given = f"with privacy.on_exhausted = '{privacy.on_exhausted}'"
    if least == 0:
        if privacy.on_exhausted == "stop":
            result = "the run ends as soon as such a client is drawn"
        else:
            result = "no client ever trains" if max(lasts) == 0 else "such clients never train"
        return f"{of} does not last for a single round {noise} (worst client): {given} {result}"
    result = "clients drop out then" if privacy.on_exhausted == "skip" else "the run ends then"
    return f"{of} lasts for {least} of {rounds} rounds {noise} (worst client): {given} {result}"


def _affordable(charge: Charge, epsilon: float, privacy: PrivacyConfig, rounds: int) -> int:
    """Return in how many rounds, up to all, a client of this charge may take part."""
    enough, too_many = 0, rounds + 1
    while too_many - enough > 1:
        tried = (enough + too_many) // 2
        cost = spent([replace(charge, steps=charge.steps * tried)], privacy.delta, privacy.accountant).epsilon
        enough, too_many = (tried, too_many) if cost <= epsilon else (enough, tried)
    return enough


def _dealt(config: RunConfig, clients: Sequence[str]) -> list[int]:
    """Return the rank of each client."""
    ranks = Ranks(client_ranks(config) or (config.adapter.rank,), config.adapter.scaling_of)
    ranks.deal(clients)
    return list(ranks.of.values())


def _volume(adapted: AdaptedModel, names: Iterable[str], ranks: Sequence[int]) -> int:
    """Return the bytes of these tensors for a client of mean rank."""
    share = sum(ranks) / len(ranks) / max(ranks)
    total = 0.0
    for name in names:
        size = adapted.initial[name].numel() * adapted.initial[name].element_size()
        total += size * share if role_of(name) in (Role.A, Role.B) else size
    return round(total)


def _step(method: type[AdapterStrategy], adapted: AdaptedModel, ranks: Sequence[int]) -> int:
    """Return the bytes of a round's change of the base."""
    factors = AdapterState.from_tensors(adapted.initial, adapted.scaling).factors
    return sum(4 * method.step_size(f.A.shape[1], f.B.shape[0], ranks) for f in factors.values())
