"""An audit from inside: what the noised sum of a step gives away of one row, to somebody who knows all the rest.

Canaries in the training rows (`fedpeft.privacy.audit`) are seen by an auditor who has the last adapter only, and who
is therefore told little. The accountant assumes far more: that every noised sum is seen, and that everything but one
row is known. This auditor has just that (M. Nasr et al., "Tight Auditing of Differentially Private Machine Learning",
USENIX Security 2023, arXiv 2302.07956). On the run's own model, rows and settings, by the code that trains:

1. Batches of a client's rows are drawn, and of each the sum of clipped gradients is computed with a row, S', and
   without it, S. Nothing is noised yet, and of all pairs the one with the largest difference is kept.
2. The noised sum is drawn `draws` times with the row and `draws` times without. Each is scored by its component along
   S' - S, counted from the middle of the two: above zero, the auditor says that the row is in.
3. Of a Gaussian mechanism with mu = sensitivity / deviation of the noise, no test has
   Phi^-1(1 - false alarms) - Phi^-1(misses) above mu (J. Dong, A. Roth and W. Su, "Gaussian Differential Privacy",
   arXiv 1905.02383). Both rates are replaced by their upper limits, Clopper and Pearson's, each at half of what the
   confidence leaves; what comes out is a LOWER bound on mu that holds with the confidence, whatever the model does.

What is claimed of a step is mu = 1 / sigma: one row moves the sum by the clipping norm C at most, and the noise has
deviation sigma C. A bound above it means that rows move sums by more than C, or that noise is missing. For comparison,
both figures are also expressed as epsilons: of a step that holds the row, and of all rounds that were planned, if every
step gave away as much.

Weights are those that the run begins with, moved at random, since B is zero there and hides A; privacy has to hold at
any weights. Dropout and noise on embeddings are off, as they would differ between S' and S. Noise of the run's own kind
is drawn anew; that of the run itself is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.config import RunConfig
from fedpeft.errors import PrivacyError
from fedpeft.privacy.accounting import Charge, gaussian_epsilon, spent
from fedpeft.privacy.audit import CONFIDENCE, Facts
from fedpeft.privacy.dp_sgd import PrivateGradients
from fedpeft.privacy.independence import probing, row_engine
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import Randomness, secure, seeded
from fedpeft.privacy.statement import read_statement
from fedpeft.resident import Resident, resident
from fedpeft.runs import read_config
from fedpeft.seeds import generator

PAIRS, DRAWS = 32, 1000


@dataclass(frozen=True)
class Shown:
    """What the noised sums of one step give away.

    Parameters
    ----------
    mu : float
        With the confidence asked for, a step's mu is at least this.
    most : float
        What the bound would be had every guess been right.
    false_alarms, misses : int
        Sums without the row that were taken for sums with it, and the other way round.
    draws : int
        Of each of the two.
    sensitivity : float
        By how much one row was seen to move the sum before noise, over the clipping norm.
    """

    mu: float
    most: float
    false_alarms: int
    misses: int
    draws: int
    sensitivity: float


def mu_lower_bound(false_alarms: int, misses: int, draws: int, confidence: float = CONFIDENCE) -> float:
    """Bound a Gaussian mechanism's mu from below by the errors of a test that was fixed beforehand.

    Parameters
    ----------
    false_alarms, misses : int
        Errors of both kinds.
    draws : int
        Tries of each kind.
    confidence : float
        Probability of a bound that holds.
    """
    from scipy.special import betaincinv, ndtri

    def upper(errors: int) -> float:
        if errors >= draws:
            return 1.0
        return float(betaincinv(errors + 1, draws - errors, 1.0 - (1.0 - confidence) / 2.0))

    return max(0.0, float(-ndtri(upper(false_alarms)) - ndtri(upper(misses))))


class Auditor:
    """One client's steps, with and without a row, by the code that trains.

    Parameters
    ----------
    home : Resident
        Model and rows.
    mechanism : RecordMechanism
        The client's.
    rows : array of int, shape (n,)
        The client's rows.
    randomness : Randomness
        Where noise comes from.
    """

    def __init__(
        self, home: Resident, mechanism: RecordMechanism, rows: NDArray[np.int64], randomness: Randomness
    ) -> None:
        self._rows, self._mechanism = rows, mechanism
        train = home.config.train
        self._parameters = home.adapted.begin_training(home.adapted.trained)
        self._gradients = PrivateGradients(
            row_engine(home),
            home.data.train,
            rows,
            mechanism,
            randomness,
            torch.optim.SGD(self._parameters, lr=train.learning_rate),
            physical=home.physical_rows,
            train=train.model_copy(update={"neftune_alpha": 0.0}),
        )

    def pair(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the sums of clipped gradients of a batch without its first row, and with it, before any noise.

        Parameters
        ----------
        size : int
            Rows of the larger batch.
        rng : numpy.random.Generator
            Draws the batch.
        """
        batch = rng.choice(self._rows, min(size, len(self._rows)), replace=False)
        return self._gradients.clipped_sum(batch[1:]), self._gradients.clipped_sum(batch)

    def released(self, total: Tensor) -> Tensor:
        """Return a sum as it leaves the mechanism, noise added."""
        return self._gradients.noised(total)

    def audit(self, size: int, pairs: int, draws: int, rng: np.random.Generator) -> Shown:
        """Look for the row that moves a sum most, and see how well it can be told."""
        found = [self.pair(size, rng) for _ in range(pairs)]
        without, with_row = max(found, key=lambda pair: float((pair[1] - pair[0]).norm()))
        difference = with_row - without
        size_of_it = float(difference.norm())
        if not size_of_it > 0:
            raise PrivacyError("no row moves a sum of gradients: nothing is trained that an audit could see.")
        direction = difference / size_of_it
        middle = float(direction @ without) + 0.5 * size_of_it

        def says_in(total: Tensor) -> int:
            return sum(float(direction @ self.released(total)) > middle for _ in range(draws))

        alarms, misses = says_in(without), draws - says_in(with_row)
        bound = self._mechanism.max_grad_norm
        return Shown(
            mu_lower_bound(alarms, misses, draws),
            mu_lower_bound(0, 0, draws),
            alarms,
            misses,
            draws,
            size_of_it / bound,
        )


def audit_steps(home: Resident, config: RunConfig, pairs: int = PAIRS, draws: int = DRAWS) -> tuple[Shown, str, Charge]:
    """Audit the steps of the client that has most rows; return what is shown, the client, and what a round costs it.

    Parameters
    ----------
    home : Resident
        Model and rows of the run.
    config : RunConfig
        The run's, with ``privacy.level = "record"``.
    pairs : int
        Batches that are tried without noise.
    draws : int
        Noised sums with the row, and as many without.
    """
    held = home.partition
    index = max(range(len(held.client_ids)), key=lambda client: len(held.indices[client]))
    client, rows = held.client_ids[index], held.indices[index]
    mechanism = level_of(config.privacy).client_mechanism(config, len(rows))
    if mechanism.noise_multiplier == 0:
        raise PrivacyError(
            "privacy.noise_multiplier = 0 adds no noise, and nothing is claimed that could be broken; audit a run with "
            "noise."
        )
    seed = config.run.seed
    randomness = seeded(seed, "white-box audit") if config.privacy.rng == "seeded" else secure()
    row_engine(home)  # proves what it proves before anything is moved
    with probing(home.adapted, seed):
        auditor = Auditor(home, mechanism, rows, randomness)
        rng = generator(seed, "white-box batches")
        shown = auditor.audit(max(2, config.train.batch_size), pairs, draws, rng)
    return shown, client, mechanism.charge


def white_box_audit(path: Path, draws: int = DRAWS) -> Facts:
    """Audit what leaves the clients of a simulated run, step by step.

    Parameters
    ----------
    path : Path
        Its run directory; model and rows must still be where its configuration says.
    draws : int
        See `audit_steps`.

    Returns
    -------
    dict
        ``run``, ``client``, ``claimed_epsilon`` (over all rounds, as stated), ``delta``, ``confidence``, ``pairs``,
        ``draws``, ``false_alarms``, ``misses``, ``noise_multiplier``, ``sensitivity`` (seen before noise, over the
        clipping norm), ``claimed_mu``, ``mu_lower_bound``, ``most``, ``claimed_step_epsilon`` and
        ``step_epsilon_lower_bound``, ``planned_epsilon`` and ``epsilon_lower_bound`` (over all planned rounds),
        ``violated``, and ``meaning``, a sentence.

    Raises
    ------
    RunDirectoryError
        No run, or one whose statement of privacy is damaged.
    PrivacyError
        A run that is not private at record level, or without noise, or whose model mixes rows.
    """
    config = read_config(path)
    privacy = config.privacy
    if not level_of(privacy).clients_add_noise:
        raise PrivacyError(
            f"'{path}' has privacy.level = '{privacy.level}', and --white-box looks at sums of rows' gradients. Audit "
            "a run of privacy.level = 'record'."
        )
    if draws < 10:
        raise PrivacyError(f"--draws {draws} is too few to show anything; give 10 or more, such as {DRAWS}.")
    shown, client, round_charge = audit_steps(resident(config), config, draws=draws)
    return {
        "run": str(path),
        "white_box": True,
        "client": client,
        "claimed_epsilon": (read_statement(path) or {}).get("epsilon_max"),
        **_compared(config, shown, round_charge),
    }


def _compared(config: RunConfig, shown: Shown, round_charge: Charge) -> Facts:
    """Hold what is shown of a step against what is claimed of it, and of all rounds."""
    privacy, claimed_mu = config.privacy, 1.0 / round_charge.noise_multiplier

    def planned(mu: float) -> float:
        steps = round_charge.steps * config.federation.rounds
        return spent([Charge(1.0 / mu, round_charge.sample_rate, steps)], privacy.delta, privacy.accountant).epsilon

    return {
        "delta": privacy.delta,
        "confidence": CONFIDENCE,
        "pairs": PAIRS,
        "draws": shown.draws,
        "false_alarms": shown.false_alarms,
        "misses": shown.misses,
        "noise_multiplier": round_charge.noise_multiplier,
        "sensitivity": shown.sensitivity,
        "claimed_mu": claimed_mu,
        "mu_lower_bound": shown.mu,
        "most": shown.most,
        "claimed_step_epsilon": gaussian_epsilon(claimed_mu, privacy.delta),
        "step_epsilon_lower_bound": gaussian_epsilon(shown.mu, privacy.delta) if shown.mu else 0.0,
        "planned_epsilon": planned(claimed_mu),
        "epsilon_lower_bound": planned(shown.mu) if shown.mu else 0.0,
        "violated": shown.mu > claimed_mu,
        "meaning": _meaning(shown, claimed_mu),
    }


def _meaning(shown: Shown, claimed_mu: float) -> str:
    if shown.mu > claimed_mu:
        return (
            f"BROKEN: a row moves the noised sum of a step by at least {shown.mu / claimed_mu:.2f} times what is "
            "assumed. A sound step looks like this once in twenty audits at most: repeat it, and do not rely on the "
            "run's guarantee."
        )
    if shown.most <= claimed_mu:
        return (
            f"With {shown.draws} draws the bound cannot exceed {shown.most:.2f}, so a claim of {claimed_mu:.2f} could "
            "not have been contradicted: give more --draws."
        )
    return (
        "The sums do not contradict the claim. They show one client's steps for the rows tried, at weights that were "
        "drawn at random; other rows and weights may move sums by more."
    )
