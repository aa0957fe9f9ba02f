"""The mechanism of a run: how often rows are drawn, by what their sum is divided, and how much noise it gets.

Record level. With n_k rows, batches of expected size b and T_k steps a round, client k draws every row with probability
q_k = min(1, b / n_k) at every step, clips each row's gradient to C, and divides the noised sum by q_k n_k. Calibration
assumes the worst: that client k takes part in EVERY round, and in ``privacy.spare_rounds`` repeats. Clients of other
fractions spend less.

n_k is held to be public here, as it shows in q_k, T_k, the noise and the client's weight. Without
``privacy.public_counts`` q and T are given, the divisor is b, and n_k shows in nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from fedpeft.config import FederationConfig, RunConfig, TrainConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.errors import PrivacyError
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.budget import Budget
from fedpeft.privacy.calibration import calibrate
from fedpeft.rounding import as_given, upwards
from fedpeft.training.local import num_steps


@dataclass(frozen=True)
class RecordMechanism:
    """What a client does to its gradients in a round.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over `max_grad_norm`.
    sample_rate : float
        Chance of each row to be in a step's batch.
    steps : int
        Steps a round.
    denominator : float
        What the noised sum of a step is divided by: the expected number of rows, never the number drawn.
    max_grad_norm : float
        Bound on the norm of each row's gradient over all trained tensors.
    shuffled : int, optional
        Size of batches that are cut from shuffled rows in place of Poisson sampling: voids the guarantee.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    denominator: float
    max_grad_norm: float
    shuffled: int | None = None

    @property
    def charge(self) -> Charge:
        """What one round costs."""
        return Charge(self.noise_multiplier, self.sample_rate, self.steps)


def record_mechanism(config: RunConfig, num_examples: int, noise_multiplier: float | None = None) -> RecordMechanism:
    """Return the mechanism of a client with so many rows.

    Parameters
    ----------
    config : RunConfig
        With ``privacy.level = "record"``.
    num_examples : int
        The client's rows; without ``privacy.public_counts`` they change nothing.
    noise_multiplier : float, optional
        What calibration gave, where somebody has done it before.

    Raises
    ------
    PrivacyError
        No noise meets the budget.
    """
    privacy = config.privacy
    if noise_multiplier is not None:
        privacy = privacy.model_copy(update={"noise_multiplier": noise_multiplier})
    count = num_examples if privacy.public_counts else 0
    return _record_mechanism(privacy, config.train, config.federation, count)


def require_a_round(config: RunConfig, counts: Iterable[int]) -> None:
    """Refuse a given noise of which the budget allows no client a single round, before anybody starts.

    Parameters
    ----------
    config : RunConfig
        With ``privacy.level = "record"``.
    counts : iterable of int
        The clients' rows.

    Raises
    ------
    PrivacyError
        Nobody could ever train.
    """
    budget = Budget.of(config.privacy)
    if budget is None:
        return
    charges = {record_mechanism(config, count).charge for count in counts}
    least = min(spent([charge], budget.delta, budget.accountant).epsilon for charge in charges)
    if least > budget.epsilon:
        raise PrivacyError(
            f"privacy.epsilon = {as_given(budget.epsilon)} does not last for one round of any client: with "
            f"privacy.noise_multiplier = {config.privacy.noise_multiplier} it costs {upwards(least)} or more. Drop "
            "privacy.noise_multiplier to have it calibrated, or raise the budget."
        )


@lru_cache(maxsize=4096)
def _record_mechanism(
    privacy: PrivacyConfig, train: TrainConfig, federation: FederationConfig, num_examples: int
) -> RecordMechanism:
    if privacy.public_counts:
        rate = min(1.0, train.rows_a_step / num_examples)
        steps, denominator = num_steps(train, num_examples), rate * num_examples
    else:
        assert privacy.sample_rate is not None, "the configuration insists on it"
        assert train.local_steps is not None, "the configuration insists on it"
        rate, steps, denominator = privacy.sample_rate, train.local_steps, float(train.rows_a_step)
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None, "the configuration insists on one of them"
        total = steps * (federation.rounds + privacy.spare_rounds)
        noise = calibrate(privacy.epsilon, privacy.delta, rate, total, privacy.accountant)
    shuffled = train.rows_a_step if privacy.sampling == "shuffle" else None
    return RecordMechanism(noise, rate, steps, denominator, privacy.max_grad_norm, shuffled)
