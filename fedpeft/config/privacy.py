"""The ``privacy`` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from fedpeft.config.section import Section
from fedpeft.rounding import as_given

Accountant = Literal["prv", "rdp"]
Level = Literal["none", "record", "client"]
Rng = Literal["seeded", "secure"]

ANY_LEVEL = frozenset({"level", "delta", "accountant", "canaries"})


@dataclass(frozen=True)
class LevelSettings:
    """What the configuration knows of a level; `fedpeft.privacy.levels` knows the rest.

    Parameters
    ----------
    unit : str
        What one neighbour has more than the other, as words; empty where nothing is protected.
    keys : frozenset of str
        Settings of ``[privacy]`` that are of this level alone; those of no level are of all that protect something.
    takes_canaries : bool
        Whether planted rows can show anything of what it claims.
    clients_add_noise : bool
        Whether each client noises its gradients, keeps the account of it, and trusts no server with its rows.
    """

    unit: str = ""
    keys: frozenset[str] = frozenset()
    takes_canaries: bool = True
    clients_add_noise: bool = False


LEVELS: dict[Level, LevelSettings] = {
    "none": LevelSettings(),
    "record": LevelSettings(
        "row",
        frozenset({"max_grad_norm", "sampling", "public_counts", "sample_rate", "physical_batch_size"}),
        clients_add_noise=True,
    ),
    "client": LevelSettings(
        "client",
        frozenset({"max_update_norm", "cohort", "adaptive_clipping"})
        | frozenset({"clip_quantile", "clip_learning_rate", "clip_count_noise"}),
        takes_canaries=False,
    ),
}
PRIVATE_LEVELS = tuple(level for level, settings in LEVELS.items() if settings.unit)


class PrivacyConfig(Section):
    """What is protected, from whom, and how much of it may be spent."""

    level: Level = Field(
        "none",
        description="unit of protection: record (DP-SGD at every client; protects from the server too), or client "
        "(clipped updates and noise on their sum; the server is trusted)",
    )
    epsilon: float | None = Field(
        None, gt=0, description="budget over ALL rounds; without noise_multiplier, the noise is calibrated to it"
    )
    noise_multiplier: float | None = Field(
        None, ge=0, description="standard deviation of the noise over the sensitivity; 0 is no privacy"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="of the guarantee; keep it below 1 / number of units protected")
    accountant: Accountant = Field("prv", description="prv is the tighter; where it overflows, rdp is used and said")
    max_grad_norm: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
        description="record level: each row's gradient over all trained tensors is clipped to this norm",
    )
    max_update_norm: float = Field(
        1.0, ge=1e-6, le=1e6, description="client level: each client's whole update is clipped to this norm"
    )
    sampling: Literal["poisson", "shuffle"] = Field(
        "poisson", description="record level: how batches are drawn; shuffle voids the guarantee"
    )
    cohort: Literal["poisson", "fixed"] = Field(
        "poisson",
        description="client level: how a round's clients are drawn; fixed is accounted without amplification, at twice "
        "the sensitivity",
    )
    adaptive_clipping: bool = Field(
        False, description="client level: max_update_norm follows a quantile of the updates' norms, privately"
    )
    clip_quantile: float = Field(
        0.5, gt=0, lt=1, description="share of the updates that adaptive clipping leaves whole"
    )
    clip_learning_rate: float = Field(0.2, gt=0, description="how fast adaptive clipping moves the norm")
    clip_count_noise: float | None = Field(
        None,
        gt=0,
        description="standard deviation of the noise on adaptive clipping's count; if unset, a twentieth of the "
        "expected cohort, and at least the noise multiplier",
    )
    rng: Rng | None = Field(
        None,
        description="seeded: reproducible, hence no guarantee; secure: noise and batches from the operating system's "
        "entropy. A simulation's default is seeded, a deployment's secure",
    )
    public_counts: bool = Field(
        True, description="declare the clients' row counts public; else rate, noise and divisor are fixed publicly"
    )
    sample_rate: float | None = Field(
        None, gt=0, le=1, description="record level without public_counts: the chance of each row to be in a batch"
    )
    public_init_data: bool = Field(
        False, description="declare adapter.init_data public, which initialisations from data need under privacy"
    )
    release_metrics: bool = Field(
        False, description="send clients' losses all the same, which voids the guarantee: for debugging"
    )
    spare_rounds: int = Field(
        0, ge=0, description="rounds that calibration reserves for repeats, which secure randomness charges again"
    )
    on_exhausted: Literal["skip", "stop"] = Field(
        "skip", description="when a client's budget is spent: go on without it, or stop the run"
    )
    physical_batch_size: int | None = Field(
        None, ge=1, description="rows that a step holds in memory at once; twice train.batch_size if unset"
    )
    canaries: int = Field(
        0, ge=0, description="planted rows for `fedpeft privacy audit`, each in the training rows with probability 1/2"
    )

    @property
    def is_private(self) -> bool:
        """Whether anything is protected at all."""
        return bool(LEVELS[self.level].unit)

    @model_validator(mode="after")
    def _level_fits(self) -> Self:
        for key in sorted(self.model_fields_set - ANY_LEVEL):
            value, levels = getattr(self, key), [level for level in LEVELS if key in LEVELS[level].keys]
            levels = levels or list(PRIVATE_LEVELS)
            if value != type(self).model_fields[key].default and self.level not in levels:
                wanted = " or ".join(f"privacy.level={level}" for level in levels)
                raise ValueError(
                    f"privacy.{key} = {value} does nothing with privacy.level = '{self.level}'; give {wanted}, or "
                    "drop it"
                )
        if self.is_private and self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                f"privacy.level = '{self.level}' needs privacy.epsilon, the budget over all rounds, or "
                "privacy.noise_multiplier"
            )
        return self

    @model_validator(mode="after")
    def _budget_can_hold(self) -> Self:
        if self.epsilon is not None and self.noise_multiplier == 0:
            raise ValueError(
                f"privacy.noise_multiplier = 0 costs an infinite epsilon, and privacy.epsilon = "
                f"{as_given(self.epsilon)} allows none of it; drop one of them"
            )
        return self

    @model_validator(mode="after")
    def _rate_is_public(self) -> Self:
        if "sample_rate" in LEVELS[self.level].keys and self.public_counts == (self.sample_rate is not None):
            raise ValueError(
                "privacy.public_counts = false needs privacy.sample_rate, the chance of each row to be in a batch"
                if self.sample_rate is None
                else f"privacy.sample_rate = {self.sample_rate:g} goes with privacy.public_counts = false; else it is "
                "train.batch_size over the client's rows"
            )
        return self

    @model_validator(mode="after")
    def _canaries_are_rows(self) -> Self:
        settings = LEVELS[self.level]
        if self.canaries and not settings.takes_canaries:
            raise ValueError(
                f"privacy.canaries = {self.canaries} are rows, and privacy.level = '{self.level}' protects whole "
                f"{settings.unit}s; audit privacy.level = 'record' or 'none'"
            )
        return self
