"""What a run would do, without doing it: for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedpeft import tasks
from fedpeft.adapters.state import Role, role_of
from fedpeft.config import RunConfig, cohort_size
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.jsons import strict_json
from fedpeft.precision import time_products
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.overlap import in_the_clear
from fedpeft.privacy.rows import public_counts
from fedpeft.privacy.statement import state
from fedpeft.quantization import num_weights
from fedpeft.resident import Resident, resident
from fedpeft.rounding import as_given
from fedpeft.runs.machine import Footprint
from fedpeft.simulations.batching import batched
from fedpeft.simulations.grids.cluster import Sizing
from fedpeft.simulations.predicted import Prediction, predict
from fedpeft.simulations.prefixing import NOTHING_KEPT, Prefixing, decide
from fedpeft.simulations.sizing import measured, planned
from fedpeft.strategies import find, with_typed_options
from fedpeft.strategies.ending import affordable, check_ending
from fedpeft.strategies.federation import build_strategy, personal_names
from fedpeft.strategies.rounds.report import require_enough
from fedpeft.strategies.volume import volume
from fedpeft.tasks.heads import runs_whole
from fedpeft.tasks.losses import needs_some_logits


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
        The method's, see `fedpeft.strategies.capabilities.Capabilities`.
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
        What may be said of a private run beforehand, see `plan_privacy`.
    notes : tuple of str
        What should be known of base and adapter, and of how the rows were read.
    sizing : Sizing, optional
        The workers that a run would have on this machine now.
    prefixing : Prefixing
        Whether hidden states below the lowest adapted block would be kept.
    memory : Prediction, optional
        What a worker is predicted to take at its peak; None where the base's files do not tell.
    measured : Footprint, optional
        What one took in such a run before; None where there was none, or the run is private.
    affordable : int, optional
        How many of the rounds ``run.max_megabytes`` pays for.
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
    sizing: Sizing | None = None
    prefixing: Prefixing = NOTHING_KEPT
    memory: Prediction | None = None
    measured: Footprint | None = None
    affordable: int | None = None

    @property
    def cohort(self) -> int:
        """Clients drawn each round."""
        federation = self.config.federation
        return cohort_size(len(self.client_rows), federation.fraction, federation.min_clients)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run, both ways, if no client has to be asked twice."""
        return (self.bytes_up + self.bytes_down) * self.cohort

    def _seen(self) -> dict[str, int]:
        return {} if self.measured is None else {"measured": self.measured.own + self.measured.shared}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for ``--json``."""
        return {
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "task": tasks.named(self.config),
            "parameters": self.parameters,
            "trainable": self.trainable,
            "layers": self.layers,
            "bytes_up_per_client": self.bytes_up // self.config.federation.rounds,
            "bytes_down_per_client": self.bytes_down // self.config.federation.rounds,
            "total_bytes": self.total_bytes,
            "cohort": self.cohort,
            **({} if self.affordable is None else {"affordable_rounds": self.affordable}),
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
            **({} if self.sizing is None else {"workers": {**self.sizing.to_dict(), "said": str(self.sizing)}}),
            **({} if self.memory is None else {"memory": self.memory.to_dict() | self._seen()}),
            "prefix_cache": {**self.prefixing.to_dict(), "said": str(self.prefixing)},
            **({} if self.privacy is None else {"privacy": strict_json(self.privacy)}),
        }


def plan(config: RunConfig) -> DryRun:
    """Load model and rows, and count; nothing is trained and nothing written but the cache.

    Parameters
    ----------
    config : RunConfig
        Checked as a run would check it.
    """
    config = with_typed_options(config)
    home = resident(config)
    adapted, clients = home.adapted, home.partition.client_ids
    method = find(config.strategy.name)
    require_enough(len(clients), config.federation.min_clients)
    facts = method.capabilities
    every = [volume(config, home, number) for number in range(1, config.federation.rounds + 1)]
    up, down = sum(each[0] for each in every), sum(each[1] for each in every)
    cohort = cohort_size(len(clients), config.federation.fraction, config.federation.min_clients)
    ready = build_strategy(config, home)
    ready.check_cohort(ready.options, cohort)
    level_of(config.privacy).check_model(home)  # what a run would refuse
    check_ending(config, home)
    said = batched(config, home)[1]
    head = [name for name in adapted.initial if role_of(name) is Role.HEAD]
    whole = num_weights(adapted.model)
    return DryRun(
        config=config,
        parameters=whole - sum(tensor.numel() for tensor in adapted.initial.values()),
        trainable=sum(adapted.initial[name].numel() for name in adapted.trained),
        layers=len(adapted.layers),
        bytes_up=up,
        bytes_down=down,
        client_rows={client: len(rows) for client, rows in zip(clients, home.partition.indices, strict=True)},
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
        notes=(
            *adapted.notes,
            *home.data.notes,
            *home.data.cautions,
            *_on_precision(config, home),
            *([said] if said else []),
        ),
        sizing=planned(config, len(clients)),
        prefixing=decide(config, home),
        memory=predicted(config, home),
        measured=measured(config),
        affordable=affordable(config, home),
    )


def predicted(config: RunConfig, home: Resident) -> Prediction | None:
    """Predict a worker's peak; how long rows are is not told of a private run."""
    lengths = [] if config.privacy.is_private else [home.data.train.lengths, home.test.lengths]
    longest = max((int(each.max(initial=1)) for each in lengths), default=None)
    adapted = home.adapted
    by_hooks = level_of(config.privacy).clients_add_noise
    whole = needs_some_logits(adapted.task) and bool(runs_whole(adapted.model, by_hooks=by_hooks))
    return predict(config, longest, sum(adapted.initial[name].numel() for name in adapted.trained), whole=whole)


def _on_precision(config: RunConfig, home: Resident) -> Iterator[str]:
    """Recommend a precision by timing the base's products; what a run uses is what its configuration says."""
    if home.adapted.device.type != "cpu":
        return
    linear = [each for each in home.adapted.model.modules() if type(each) is nn.Linear]
    shapes = [(each.out_features, each.in_features) for each in linear]
    lengths = home.data.train.lengths
    rows = config.train.batch_size * int(lengths.max(initial=1))
    timing = time_products([shape for shape in shapes if min(shape) > config.adapter.rank], rows)
    given = config.train.precision
    if timing.better not in (None, given):
        yield (
            f"train.precision = '{given}': the base's products of a batch took {1000 * timing.fp32:.3g} ms in fp32 and "
            f"{1000 * timing.bf16:.3g} ms in bf16 here; train.precision='{timing.better}' would be faster"
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
    every = list(charges.values())
    return facts | {
        "rng": privacy.rng,
        "calibrated_to": privacy.epsilon if privacy.noise_multiplier is None else None,
        **{
            key: [min(getattr(charge, key) for charge in every), max(getattr(charge, key) for charge in every)]
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
