"""The mechanism of a run that protects whole clients: how they are drawn, clipped and counted, and with what noise.

Its equations stand where it is carried out, in `fedpeft.strategies.averaging.private_mean`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedpeft.config import RunConfig
from fedpeft.config.privacy import Rng
from fedpeft.errors import ConfigError
from fedpeft.privacy.accounting import Charge
from fedpeft.privacy.calibration import calibrate


@dataclass(frozen=True)
class AdaptiveClipping:
    """How the clipping norm follows the clients' updates.

    Parameters
    ----------
    quantile : float
        g, the share of the updates that clipping should leave whole, in (0, 1).
    learning_rate : float
        eta > 0.
    count_noise : float, optional
        sigma_b; the larger of m / 20 and z if not given.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None


@dataclass(frozen=True)
class ClientPrivacy:
    """The mechanism of a run; see `fedpeft.strategies.averaging.private_mean`.

    Parameters
    ----------
    noise_multiplier : float
        z, of all that a round releases together; 0 is clipping without noise, and no privacy.
    clip : float
        S, in the first round.
    cohort : {"poisson", "fixed"}
        How a round's clients are drawn.
    rng : {"seeded", "secure"}
        Where a Poisson cohort and the noise come from.
    adaptive : AdaptiveClipping, optional
        S stays as it is if not given.

    Raises
    ------
    ConfigError
        A count noise that costs as much as the whole round may, or more.
    """

    noise_multiplier: float
    clip: float = 1.0
    cohort: Literal["poisson", "fixed"] = "poisson"
    rng: Rng = "seeded"
    adaptive: AdaptiveClipping | None = None

    def __post_init__(self) -> None:
        given = None if self.adaptive is None else self.adaptive.count_noise
        if given is not None and 2 * given <= self.noise_multiplier:
            raise ConfigError(
                f"privacy.clip_count_noise = {given:g} spends the whole round on counting; with a noise multiplier of "
                f"{self.noise_multiplier:.4g} it must be above {self.noise_multiplier / 2:.4g}. Raise it, or leave it "
                "unset"
            )

    @property
    def sensitivity(self) -> int:
        """f: by how many times S one client moves the sum at most."""
        return 1 if self.cohort == "poisson" else 2

    def sample_rate(self, fraction: float) -> float:
        """Return the chance of a client to be in a round, as far as it may be accounted for."""
        return fraction if self.cohort == "poisson" else 1.0

    def charge(self, fraction: float) -> Charge:
        """Return what one round costs, of which the clipping norm's share is a part."""
        return Charge(self.noise_multiplier, self.sample_rate(fraction), 1)

    def count_noise(self, expected: float) -> float:
        """Return sigma_b for an expected cohort m; infinity where nothing is counted."""
        if self.adaptive is None:
            return math.inf
        given = self.adaptive.count_noise
        return max(expected / 20, self.noise_multiplier) if given is None else given

    def update_noise(self, expected: float) -> float:
        """Return z_delta, the noise multiplier of the updates' sum, for an expected cohort m."""
        z, spent = self.noise_multiplier, self.noise_multiplier / (2 * self.count_noise(expected))
        return z / math.sqrt(1 - spent**2)


def client_privacy(config: RunConfig) -> ClientPrivacy:
    """Return the mechanism that a configuration asks for.

    Parameters
    ----------
    config : RunConfig
        With ``privacy.level = "client"``. Without ``privacy.noise_multiplier``, the noise is calibrated to
        ``privacy.epsilon`` over all its rounds.

    Raises
    ------
    PrivacyError
        No noise meets the budget.
    ConfigError
        See `ClientPrivacy`.
    """
    asked = config.privacy
    adaptive = AdaptiveClipping(asked.clip_quantile, asked.clip_learning_rate, asked.clip_count_noise)
    privacy = ClientPrivacy(
        asked.noise_multiplier or 0.0,
        asked.max_update_norm,
        asked.cohort,
        asked.rng or "secure",
        adaptive if asked.adaptive_clipping else None,
    )
    if asked.noise_multiplier is not None:
        return privacy
    assert asked.epsilon is not None, "the configuration insists on one of them"
    rate, rounds = privacy.sample_rate(config.federation.fraction), config.federation.rounds + asked.spare_rounds
    noise = calibrate(asked.epsilon, asked.delta, rate, rounds, asked.accountant)
    return replace(privacy, noise_multiplier=noise)
