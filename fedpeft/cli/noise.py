"""How much noise a budget needs, and what noise costs: ``fedpeft privacy noise`` and ``epsilon``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fedpeft.cli.options import Json, quiet, show, spread
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedpeft.config.privacy import Accountant
    from fedpeft.privacy.accounting import Charge, Spent

Delta = Annotated[float, typer.Option(help="Of the guarantee; keep it below 1 / number of records.")]
AccountantName = Annotated[
    str, typer.Option("--accountant", help="prv, or the looser rdp; where prv cannot compute, rdp does.")
]

ASSUMED = (
    "Assumed: {drawn}, data sets differ in one record added or removed, row counts are public, and the randomness "
    "stays secret."
)
POISSON, ALL = "batches are Poisson samples", "every record is in every step"
NO_PRIVACY = "no privacy: epsilon is infinite"


@dataclass(frozen=True)
class PlannedSteps:
    """The steps that a client is to take, in words of the command line."""

    rounds: Annotated[
        int,
        typer.Option(
            help="Rounds that a client takes part in; at client level all rounds, with --sample-rate "
            "federation.fraction and --local-steps 1."
        ),
    ]
    examples: Annotated[int | None, typer.Option(help="Rows of the client.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Rows a step draws on average.")] = None
    sample_rate: Annotated[
        float | None, typer.Option(help="Chance of each row to be in a batch, in place of --batch-size.")
    ] = None
    local_steps: Annotated[int | None, typer.Option(help="Steps of a round.")] = None
    local_epochs: Annotated[int | None, typer.Option(help="Passes of a round, in place of --local-steps.")] = None

    def check(self) -> None:
        """Refuse what is no number of rows, steps or rounds."""
        for name in ("rounds", "examples", "batch_size", "local_steps", "local_epochs"):
            count = getattr(self, name)
            if count is not None and count < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {count} is too few; give a whole number of 1 or more.")

    @property
    def rate(self) -> float:
        """The chance of a row to be in a batch."""
        if self.sample_rate is not None:
            if self.batch_size is not None:
                raise ConfigError("--sample-rate and --batch-size say the same twice; give one of them.")
            if not 0 < self.sample_rate <= 1:
                raise ConfigError(
                    f"--sample-rate {self.sample_rate} is not allowed; give a number above 0 and up to 1."
                )
            return self.sample_rate
        if self.examples is None or self.batch_size is None:
            raise ConfigError(
                "the chance of a row to be in a batch is not known; give --examples and --batch-size, or --sample-rate."
            )
        return min(1.0, self.batch_size / self.examples)

    @property
    def steps(self) -> int:
        """The steps over all rounds."""
        if self.local_steps is not None and self.local_epochs is not None:
            raise ConfigError("--local-steps and --local-epochs say the same twice; give one of them.")
        if self.local_steps is None and self.local_epochs is None:
            raise ConfigError("the steps of a round are not known; give one of --local-steps and --local-epochs.")
        # a pass has ceil(rows / batch size) steps, as in training; the quotient of a quotient may be off in its last
        # bit
        return self.rounds * (self.local_steps or (self.local_epochs or 1) * math.ceil(1 / self.rate - 1e-9))


@spread()
def noise(
    epsilon: Annotated[float, typer.Option(help="Budget over all rounds.")],
    planned: PlannedSteps,
    delta: Delta = 1e-5,
    accountant: AccountantName = "prv",
    json_lines: Json = False,
) -> None:
    """Find the least noise with which DP-SGD stays within a budget.

    For example `fedpeft privacy noise --epsilon 3 --examples 500 --batch-size 32 --local-steps 10 --rounds 20`.
    """
    quiet(False)
    planned.check()
    rate, steps, examples = planned.rate, planned.steps, planned.examples
    from fedpeft.privacy.accounting import Charge, spent
    from fedpeft.privacy.calibration import calibrate

    chosen = cast("Accountant", accountant)  # which is checked there
    multiplier = calibrate(epsilon, delta, rate, steps, chosen)
    charge = Charge(multiplier, rate, steps)
    cost = spent([charge], delta, chosen)
    if examples is not None and delta * examples >= 1:
        print(
            f"warning: delta {delta:g} is no less than 1 / {examples} rows, so one row may be given away whole; "
            f"give --delta below 1/{examples}.",
            file=sys.stderr,
        )
    _show_cost(charge, cost, delta, json_lines)


def epsilon_command(
    noise_multiplier: Annotated[float, typer.Option(help="Standard deviation of the noise over the clipping norm.")],
    sample_rate: Annotated[float, typer.Option(help="Chance of each row to be in a batch.")],
    steps: Annotated[int, typer.Option(help="Steps over all rounds.")],
    delta: Delta = 1e-5,
    accountant: AccountantName = "prv",
    json_lines: Json = False,
) -> None:
    """Find what so many steps of DP-SGD cost.

    For example `fedpeft privacy epsilon --noise-multiplier 1.1 --sample-rate 0.064 --steps 200`.
    """
    quiet(False)
    from fedpeft.privacy.accounting import Charge, spent

    charge = Charge(noise_multiplier, sample_rate, steps)
    cost = spent([charge], delta, cast("Accountant", accountant))
    _show_cost(charge, cost, delta, json_lines)


def _show_cost(charge: Charge, cost: Spent, delta: float, json_lines: bool) -> None:
    facts = {
        "noise_multiplier": charge.noise_multiplier,
        "epsilon": cost.epsilon if math.isfinite(cost.epsilon) else None,  # infinity is no JSON
        "delta": delta,
        "accountant": cost.accountant,
        "sample_rate": charge.sample_rate,
        "steps": charge.steps,
    }
    show(facts, _cost_table, json_lines)


def _cost_table(facts: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from fedpeft.report.layout import pairs
    from fedpeft.rounding import upwards

    infinite = facts["epsilon"] is None
    names = {
        "prv": "prv: composition of privacy random variables",
        "rdp": "rdp: Renyi differential privacy, a looser bound",
        "gaussian": "analytic: every row takes part in every step",
    }
    rows = [
        ("noise multiplier", f"{facts['noise_multiplier']:.6g}"),
        ("epsilon", upwards(math.inf if infinite else facts["epsilon"])),
        ("delta", f"{facts['delta']:g}"),
        ("sample rate", f"{facts['sample_rate']:.6g}"),
        ("steps", str(facts["steps"])),
        *([] if infinite else [("accountant", names[facts["accountant"]])]),
    ]
    assumed = ASSUMED.format(drawn=ALL if facts["sample_rate"] == 1 else POISSON)
    return Group(pairs(rows), Text(), Text(NO_PRIVACY if infinite else assumed))
