"""What a run's planted rows show: a lower bound on epsilon, from one training run.

The audit is that of Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (2023, arXiv 2305.08846).
Of m canaries, each was in the training rows by the toss of a fair coin. Whoever sees the adapter guesses r of the
coins, and abstains on the rest. If the run is private, few guesses can be right; if many are, the run is not.

**How many may be right.** Let training be epsilon-DP with respect to adding or removing one row. Whatever the adapter,
and whatever the other coins are, the odds of one coin were 1 before, and are between e^-epsilon and e^epsilon after the
adapter was seen: no guess is right with more than q = e^epsilon / (1 + e^epsilon). Uncovering the coins one after the
other, v right guesses of r are therefore never more probable than v or more heads of r coins that show heads with q:

    f(v) = P[Binomial(r, q) >= v]

Under (epsilon, delta)-DP the odds may also leave that range, on outputs that are rare. Let F be the number of guesses
that are won in that way; its mean is at most 2 m delta (the paper's theorem; all m coins are counted, those that were
not guessed included). Then P[v or more right] <= P[Binomial(r, q) + F >= v], and the worst F of that mean is i with as
much probability as the mean allows, and 0 else. Each i gains f(v - i) - f(v) and uses up i of the mean, so that

    p(v) = f(v) + 2 m delta max_{i = 1..v} (f(v - i) - f(v)) / i

**The bound** is the largest epsilon with p(v) <= 1 - confidence: had the run been as private as that, so many right
guesses would have been seen with that probability at most. It is no estimate. Weak canaries, or a weak score, show less
than is there; so a low bound proves nothing, and a bound above what is claimed proves that the claim is false.

**How many guesses** must not be chosen for their result. Either r is given beforehand, or the few fractions of m in
`FRACTIONS` are tried, each at a confidence that is raised by Bonferroni's correction, and the best is taken.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpeft.errors import PrivacyError
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.statement import read_statement
from fedpeft.rounding import upwards
from fedpeft.runs import CANARIES, read_config
from fedpeft.seeds import generator

FRACTIONS = (0.1, 0.25, 0.5, 1.0)  # of the canaries, how many coins are guessed; all are corrected for
CONFIDENCE = 0.95
Facts = dict[str, Any]


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon, and the guesses that it rests on.

    Parameters
    ----------
    epsilon : float
        With the confidence asked for, the run's epsilon is at least this.
    guesses, correct : int
        Coins that were guessed, and those of them that were guessed right.
    most : float
        What the bound would be if every guess were right: so few canaries cannot show more.
    """

    epsilon: float
    guesses: int
    correct: int
    most: float


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the probability of so many right guesses, or more, under (epsilon, delta)-DP; see the module.

    Parameters
    ----------
    canaries, guesses, correct : int
        m, r and v, ``0 <= v <= r <= m``.
    epsilon, delta : float
        What is put to the test.
    """
    q = 1.0 / (1.0 + math.exp(-epsilon))
    at_least = _at_least(correct - np.arange(correct + 1), guesses, q)  # (v + 1,): f(v), f(v - 1), .. f(0)
    gains = (at_least[1:] - at_least[0]) / np.arange(1, correct + 1)  # (v,)
    return float(min(1.0, at_least[0] + 2.0 * canaries * delta * gains.max(initial=0.0)))


def _at_least(heads: NDArray[np.int64], coins: int, q: float) -> NDArray[np.float64]:
    """Return P[Binomial(coins, q) >= heads], as the incomplete beta function has it."""
    from scipy.special import betainc

    some = np.maximum(heads, 1)
    return np.where(heads > 0, betainc(some, coins - some + 1, q), 1.0)


def bound_of(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return the largest epsilon, at least 0, that so many right guesses refute.

    Parameters
    ----------
    canaries, guesses, correct : int
        m, r and v.
    delta : float
        The claim's.
    confidence : float
        Probability, over the coins, of a bound that holds.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) <= 1.0 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):  # ends: as epsilon grows, any number of right guesses becomes probable
        low, high = high, 2.0 * high
    while high - low > 1e-7 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def epsilon_lower_bound(
    included: ArrayLike,
    scores: ArrayLike,
    delta: float,
    confidence: float = CONFIDENCE,
    guesses: int | None = None,
) -> Bound:
    """Bound epsilon from below by guessing which canaries were trained on.

    Half of the guesses say that the canaries of the highest scores were included, the other half that those of the
    lowest were not.

    Parameters
    ----------
    included : array of bool, shape (m,)
        The coins.
    scores : array of float, shape (m,)
        Higher where the adapter speaks for inclusion; NaN counts as lowest. Nothing but the adapter may enter them.
    delta : float
        The claim's.
    confidence : float
        Probability, over the coins, of a bound that holds.
    guesses : int, optional
        How many coins to guess, chosen BEFORE any result was seen; if not given, `FRACTIONS` of m, all corrected for.

    Raises
    ------
    PrivacyError
        Too few canaries to show anything, or a number of guesses that is not in 1 .. m.
    """
    coins = np.asarray(included, dtype=bool)
    values = np.asarray(scores, dtype=np.float64)
    m = len(coins)
    if guesses is not None and not 1 <= guesses <= m:
        raise PrivacyError(f"{guesses} guesses of {m} canaries; give a number from 1 to {m}.")
    tries = sorted({max(1, round(m * part)) for part in FRACTIONS}) if guesses is None else [guesses]
    each = 1.0 - (1.0 - confidence) / len(tries)
    most = max(bound_of(m, r, r, delta, each) for r in tries)
    if most == 0.0:
        given = f"{m} canaries" + ("" if guesses is None else f" and {guesses} guesses")
        raise PrivacyError(
            f"{given} are too few: at delta = {delta:g} they show nothing even if every guess is right. "
            "Plant some hundreds."
        )
    order = _ascending(values)
    bounds = []
    for r in tries:
        low = r // 2
        right = int((~coins[order[:low]]).sum() + coins[order[m - (r - low) :]].sum())
        bounds.append(Bound(bound_of(m, r, right, delta, each), r, right, most))
    return max(bounds, key=lambda bound: bound.epsilon)


def _ascending(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Order scores; equal ones by a fixed shuffle, since their places might have been given by the coins."""
    ties = generator(0, "audit", len(values)).permutation(len(values))
    return np.lexsort((ties, np.where(np.isnan(values), -np.inf, values)))


def audit_run(path: Path, guesses: int | None = None) -> Facts:
    """Audit a simulated run by the canaries that it planted.

    Parameters
    ----------
    path : Path
        Its run directory.
    guesses : int, optional
        See `epsilon_lower_bound`.

    Returns
    -------
    dict
        ``run``, ``level``, ``claimed_epsilon`` (None where none is claimed, as without noise), ``delta``, ``canaries``,
        ``included``, ``guesses``, ``correct``, ``confidence``, ``epsilon_lower_bound``, ``most`` (what the bound would
        be if every guess were right), ``violated``, and ``meaning``, a sentence.

    Raises
    ------
    RunDirectoryError
        No run, or one whose statement of privacy is damaged.
    PrivacyError
        A run without canaries, with too few, or whose scores are not written or damaged.
    """
    privacy = read_config(path).privacy
    level = level_of(privacy)
    if not level.settings.takes_canaries:
        raise PrivacyError(
            f"'{path}' protects whole {level.unit}s (privacy.level = '{level.name}'), and canaries are rows: audits "
            "are for record level. Audit a run of privacy.level = 'record' or 'none'."
        )
    if not privacy.canaries:
        raise PrivacyError(
            f"'{path}' has planted no canaries, and cannot be audited. Simulate with privacy.canaries=200 or more."
        )
    included, scores = _read_canaries(path)
    # of a row, since privacy.canaries goes with no other guarantee
    claimed = (read_statement(path) or {}).get("epsilon_max")
    bound = epsilon_lower_bound(included, scores, privacy.delta, guesses=guesses)
    return {
        "run": str(path),
        "level": privacy.level,
        "claimed_epsilon": claimed,
        "delta": privacy.delta,
        "canaries": len(included),
        "included": int(included.sum()),
        "guesses": bound.guesses,
        "correct": bound.correct,
        "confidence": CONFIDENCE,
        "epsilon_lower_bound": bound.epsilon,
        "most": bound.most,
        "violated": claimed is not None and bound.epsilon > claimed,
        "meaning": _meaning(bound, claimed, len(included), guesses),
    }


def downwards(epsilon: float) -> str:
    """Write a lower bound, which must not be written larger than it is."""
    return f"{math.floor(epsilon * 1000 + 1e-9) / 1000:.3f}"


def _meaning(found: Bound, claimed: float | None, canaries: int, guesses: int | None) -> str:
    bound = found.epsilon
    if claimed is not None and bound > claimed:
        return (
            f"BROKEN: the adapter gives away at least {downwards(bound)}, and {upwards(claimed)} is claimed. A sound "
            "run looks like this once in twenty times at most: repeat it with another --seed, and do not rely on its "
            "guarantee."
        )
    limits = "a lower bound is no estimate, and stronger attacks may show more"
    if claimed is None:
        return f"Nothing is claimed, and these guesses show an epsilon of at least {downwards(bound)}; {limits}."
    if found.most <= claimed:
        tried = f"{canaries} canaries" if guesses is None else f"{guesses} guesses"
        more = "plant more canaries" + ("" if guesses in (None, canaries) else ", or guess at more of them")
        return (
            f"With {tried} the bound cannot exceed {downwards(found.most)}, so a claim of {upwards(claimed)} could not "
            f"have been contradicted: {more}."
        )
    return f"The guesses do not contradict the claim, and do not prove it either; {limits}."


def _read_canaries(path: Path) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the coins and the scores."""
    file = path / CANARIES
    if not file.is_file():
        raise PrivacyError(f"'{path}' holds no {CANARIES}: the run is still going on, or was killed. Let it end.")
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        included = np.asarray([bool(coin) for coin in held["included"]])
        # a loss that JSON has no number for was written as null
        scores = np.asarray([math.nan if score is None else float(score) for score in held["scores"]])
        if len(included) != len(scores):
            raise ValueError(f"{len(included)} coins and {len(scores)} scores")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrivacyError(f"'{file}' cannot be read ({error}). Simulate again.") from None
    return included, scores
