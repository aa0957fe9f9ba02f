"""What a run would do, without doing it: for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft.config import RunConfig
from fedpeft.report.planned import DryRun
from fedpeft.resident import resident
from fedpeft.state import A_SUFFIX, B_SUFFIX, num_bytes
from fedpeft.strategies import find, with_typed_options
from fedpeft.strategies.exchange import sent_down


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
    rounds = range(1, config.federation.rounds + 1)
    names = [name for name in adapted.initial if name not in adapted.personal]

    def volume(sent: Iterable[str]) -> int:
        return num_bytes(adapted.initial[name] for name in sent)

    up = sum(volume(method.exchange(number).sent_up(names, adapted.frozen)) for number in rounds)
    down = sum(volume(sent_down(method.exchange, names, adapted.frozen, number)) for number in rounds)
    head = [name for name in adapted.initial if not name.endswith((A_SUFFIX, B_SUFFIX))]
    facts = method.capabilities
    whole = sum(parameter.numel() for parameter in adapted.model.parameters())
    return DryRun(
        config=config,
        parameters=whole - sum(tensor.numel() for tensor in adapted.initial.values()),
        trainable=sum(adapted.initial[name].numel() for name in adapted.trained),
        layers=sum(name.endswith(A_SUFFIX) for name in adapted.initial),
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
    )
