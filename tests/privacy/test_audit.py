"""The audit's statistics, on mechanisms whose epsilon is known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.stats import binom
from typer.testing import CliRunner

from fedpeft.cli.privacy import privacy_app
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import FedpeftError, PrivacyError, RunDirectoryError
from fedpeft.privacy.audit import FRACTIONS, audit_run, bound_of, downwards, epsilon_lower_bound, p_value


def randomised_response(
    m: int, epsilon: float, seed: int, delta: float = 0.0
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Toss m coins and tell each by an (epsilon, delta)-DP mechanism: truly with delta, else randomised response."""
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    told = coins ^ (rng.random(m) > 1 / (1 + math.exp(-epsilon)))
    caught = rng.random(m) < delta
    scores = np.where(caught, np.where(coins, 3.0, -3.0), np.where(told, 1.0, -1.0))
    return coins, scores + rng.uniform(0.0, 0.1, m)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (2.0, 0.0), (1.0, 1e-3)])
@pytest.mark.parametrize("guesses", [None, 60])
def test_the_bound_is_above_the_true_epsilon_in_at_most_one_audit_of_twenty(
    epsilon: float, delta: float, guesses: int | None
) -> None:
    repeats = 400
    bounds = [
        epsilon_lower_bound(*randomised_response(200, epsilon, seed, delta), delta, guesses=guesses).epsilon
        for seed in range(repeats)
    ]
    wrong = sum(bound > epsilon for bound in bounds)
    assert wrong <= binom.ppf(0.999, repeats, 0.05)


def test_the_bound_comes_close_to_the_true_epsilon_with_many_canaries() -> None:
    coins, scores = randomised_response(40_000, 1.5, 0)
    bound = epsilon_lower_bound(coins, scores, 0.0)
    assert 1.35 < bound.epsilon < 1.5
    one = epsilon_lower_bound(coins, scores, 0.0, guesses=20_000)
    assert (one.guesses, 1.4 < one.epsilon < 1.5) == (20_000, True)


@pytest.mark.parametrize("guesses", [5, 17, 100])
def test_right_guesses_alone_have_a_closed_form(guesses: int) -> None:
    q = 0.05 ** (1 / guesses)
    assert bound_of(100, guesses, guesses, 0.0) == pytest.approx(math.log(q / (1 - q)), rel=1e-6)


def test_guesses_at_random_show_nothing() -> None:
    rng = np.random.default_rng(0)
    shown = [epsilon_lower_bound(rng.random(300) < 0.5, rng.random(300), 1e-5).epsilon for _ in range(200)]
    assert np.mean(np.array(shown) == 0.0) >= 0.95


def test_scores_that_are_all_equal_show_nothing_whatever_the_order_of_the_coins() -> None:
    for coins in (np.arange(300) < 150, np.arange(300) >= 150):
        assert epsilon_lower_bound(coins, np.zeros(300), 1e-5).epsilon == 0.0
        assert epsilon_lower_bound(coins, np.full(300, np.nan), 1e-5).epsilon == 0.0


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_more_right_guesses_never_lower_the_bound(delta: float) -> None:
    bounds = [bound_of(120, 60, correct, delta) for correct in range(61)]
    assert all(one <= other for one, other in itertools.pairwise(bounds))
    assert bounds[30] == 0.0 < bounds[60]


def test_a_larger_delta_lowers_the_bound() -> None:
    bounds = [bound_of(200, 100, 95, delta) for delta in (0.0, 1e-5, 1e-4, 1e-3)]
    assert all(one > other for one, other in itertools.pairwise(bounds))


def test_more_confidence_lowers_the_bound() -> None:
    assert bound_of(200, 100, 90, 1e-5, 0.99) < bound_of(200, 100, 90, 1e-5, 0.95)


@pytest.mark.parametrize(("r", "v"), [(12, 9), (20, 20), (20, 3), (1, 1), (7, 0)])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.7, 1e-3), (2.0, 1e-2)])
def test_the_p_value_is_that_of_the_worst_number_of_lucky_guesses(r: int, v: int, epsilon: float, delta: float) -> None:
    m, q = 25, 1 / (1 + math.exp(-epsilon))
    probabilities = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    tail = [sum(probabilities[max(0, v - i) :]) for i in range(m + 1)]  # P[Binomial + i >= v]
    mean, whole = np.arange(m + 1.0)[None], np.ones((1, m + 1))
    worst = linprog(-np.array(tail), A_ub=mean, b_ub=[2 * m * delta], A_eq=whole, b_eq=[1.0])
    # one of the two limits on the distribution is left out of the formula, which is then on the safe side
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(-worst.fun, rel=1e-6)


def test_the_number_of_guesses_is_corrected_for_unless_it_is_given() -> None:
    coins = np.arange(400) % 2 == 0
    found = epsilon_lower_bound(coins, coins.astype(float), 0.0)
    q = (0.05 / len(FRACTIONS)) ** (1 / 400)
    assert found.epsilon == pytest.approx(math.log(q / (1 - q)), rel=1e-6)
    assert (found.guesses, found.correct, found.most) == (400, 400, found.epsilon)
    given = epsilon_lower_bound(coins, coins.astype(float), 0.0, guesses=400)
    assert given.epsilon > found.epsilon


def test_half_of_the_guesses_are_of_inclusion_and_half_of_the_opposite() -> None:
    scores = np.arange(100.0)
    everything = np.ones(100, dtype=bool)
    assert epsilon_lower_bound(everything, scores, 0.0, guesses=20).correct == 10
    assert epsilon_lower_bound(scores >= 50, scores, 0.0, guesses=20).correct == 20
    assert epsilon_lower_bound(scores >= 50, scores, 0.0, guesses=21).correct == 21


@pytest.mark.parametrize("guesses", [0, 101, -1])
def test_a_number_of_guesses_beyond_the_canaries_is_refused(guesses: int) -> None:
    with pytest.raises(PrivacyError, match="from 1 to 100"):
        epsilon_lower_bound(np.ones(100, dtype=bool), np.zeros(100), 0.0, guesses=guesses)


def test_too_few_canaries_are_refused() -> None:
    with pytest.raises(PrivacyError, match="5 canaries are too few"):
        epsilon_lower_bound(np.ones(5, dtype=bool), np.zeros(5), 1e-5)
    with pytest.raises(PrivacyError, match="500 canaries and 4 guesses are too few"):
        epsilon_lower_bound(np.ones(500, dtype=bool), np.zeros(500), 1e-5, guesses=4)


def write_run(path: Path, canaries: int = 300, right: float = 1.0, claim: object = 3.0, **privacy: object) -> Path:
    """Write what the audit reads of a run, in which a share of the coins can be told."""
    path.mkdir()
    settings = {f"privacy.{name}": value for name, value in privacy.items()} | {"privacy.canaries": canaries}
    (path / "config.toml").write_text(resolve([nest(settings)]).to_toml())
    rng = np.random.default_rng(0)
    coins = rng.random(canaries) < 0.5
    told = np.where(rng.random(canaries) < right, coins, ~coins)
    scores = [*(told[:-1] + rng.uniform(0, 0.1, canaries - 1)).tolist(), None]
    (path / "canaries.json").write_text(json.dumps({"included": coins.tolist(), "scores": scores}))
    if privacy:
        (path / "privacy.json").write_text(json.dumps({"level": privacy["level"], "epsilon_max": claim}))
    return path


def test_a_run_that_keeps_its_promise_is_not_contradicted(tmp_path: Path) -> None:
    found = audit_run(write_run(tmp_path / "run", right=0.6, level="record", epsilon=3.0))
    assert (found["claimed_epsilon"], found["delta"]) == (3.0, 1e-5)
    assert (found["canaries"], found["violated"]) == (300, False)
    assert 0 <= found["epsilon_lower_bound"] < 3.0 < found["most"]
    assert "no estimate" in found["meaning"]


def test_a_bound_is_never_written_larger_than_it_is() -> None:
    assert (downwards(1.2349), downwards(1.234), downwards(0.0)) == ("1.234", "1.234", "0.000")


def test_an_audit_that_could_not_have_contradicted_the_claim_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", level="record", epsilon=3.0)
    few = audit_run(run, guesses=6)
    most = math.log(0.05 ** (1 / 6) / (1 - 0.05 ** (1 / 6)))
    assert few["most"] == pytest.approx(most, abs=0.05)
    assert not few["violated"]
    assert few["meaning"] == (
        f"With 6 guesses the bound cannot exceed {downwards(few['most'])}, so a claim of 3.000 could not have been "
        "contradicted: plant more canaries, or guess at more of them."
    )
    small = audit_run(write_run(tmp_path / "small", canaries=40, level="record", epsilon=3.0))
    assert small["meaning"].startswith("With 40 canaries the bound cannot exceed")
    assert small["meaning"].endswith("contradicted: plant more canaries.")
    assert "contradict" not in audit_run(write_run(tmp_path / "plain", canaries=40))["meaning"]  # nothing is claimed


def test_a_run_that_breaks_its_promise_is_called_broken(tmp_path: Path) -> None:
    found = audit_run(write_run(tmp_path / "run", level="record", epsilon=3.0), guesses=200)
    assert found["violated"]
    assert found["guesses"] == 200
    assert found["epsilon_lower_bound"] > 3.0
    assert found["meaning"].startswith("BROKEN")


def test_without_noise_and_without_privacy_nothing_can_be_broken(tmp_path: Path) -> None:
    noiseless = audit_run(write_run(tmp_path / "noiseless", claim=None, level="record", noise_multiplier=0.0))
    assert (noiseless["claimed_epsilon"], noiseless["violated"]) == (None, False)
    plain = audit_run(write_run(tmp_path / "plain"))
    assert (plain["claimed_epsilon"], plain["violated"], plain["level"]) == (None, False, "none")
    assert plain["epsilon_lower_bound"] > 1.0


def test_what_is_no_audited_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run directory"):
        audit_run(tmp_path)
    (tmp_path / "config.toml").write_text(RunConfig().to_toml())
    with pytest.raises(PrivacyError, match="no canaries"):
        audit_run(tmp_path)
    (tmp_path / "config.toml").write_text(
        resolve([nest({"privacy.level": "client", "privacy.epsilon": 3.0})]).to_toml()
    )
    with pytest.raises(PrivacyError, match="audits are for record level") as caught:
        audit_run(tmp_path)
    assert "privacy.canaries" not in str(caught.value)
    run = write_run(tmp_path / "run")
    (run / "canaries.json").write_text('{"included": [true], "scores": []}')
    with pytest.raises(PrivacyError, match="cannot be read"):
        audit_run(run)
    (run / "canaries.json").unlink()
    with pytest.raises(PrivacyError, match="still going on"):
        audit_run(run)


def command(*words: object) -> tuple[int, str]:
    """Run ``fedpeft privacy audit``; return exit code and output, or the error."""
    result = CliRunner(env={"COLUMNS": "100"}).invoke(privacy_app, ["audit", *map(str, words)])
    if isinstance(result.exception, FedpeftError):
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, result.output


def test_the_command_prints_claim_and_bound(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", right=0.6, level="record", epsilon=3.0)
    code, text = command(run)
    assert code == 0
    assert "claimed epsilon" in text
    assert "at 95% confidence" in text
    code, text = command(run, "--json", "--guesses", 100)
    assert (code, json.loads(text)["guesses"]) == (0, 100)


def test_the_command_says_loudly_what_is_broken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", level="record", epsilon=3.0)
    for words in ((run,), (run, "--json")):
        code, text = command(*words)
        assert code == 1
        assert "BROKEN" in text


def test_the_command_refuses_what_cannot_be_audited(tmp_path: Path) -> None:
    assert command(tmp_path)[0] == 2
    code, text = command(write_run(tmp_path / "few", canaries=5))
    assert code == 2
    assert "too few" in text
    assert command(write_run(tmp_path / "run"), "--guesses", 301)[0] == 2
