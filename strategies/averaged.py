"""Methods whose server averages: a robust mean in the mean's place, and a server optimizer after it, for each of them.

With m the mean of what the clients trained and x_t what they started from, the plain method sends m. `robust` replaces
the weighted mean by one that a few lying clients cannot move far (see `.averaging.robust`); `server_optimizer`
takes m - x_t for a gradient and steps from x_t (see `.averaging.server_optimizers`). Both act on the entries of
A and of B (or R, where it is trained instead), each on the scale of the adapter that is sent, and on all else that is
trained; neither sees a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, Role, role_of
from fedpeft.errors import ConfigError
from fedpeft.strategies.algebra.means import trained_tensors, weighted_mean
from fedpeft.strategies.averaging.robust import Robustness, robust_mean, trimmed_clients
from fedpeft.strategies.averaging.server_optimizers import ServerOptimizer, tensor_of
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions

# which kind of robust mean reads which option
PARAMETERS = {"trim": "trimmed-mean", "byzantine": "krum", "max_norm": "norm-clip"}


class AveragingOptions(StrategyOptions):
    """Options of every method whose server averages."""

    robust: Literal["median", "trimmed-mean", "krum", "norm-clip"] | None = Field(
        None, description="a mean that a few lying clients cannot move far; the server then sees each client's update"
    )
    trim: float | None = Field(None, gt=0, lt=0.5, description="trimmed-mean: share left out at each end; 0.1 if unset")
    byzantine: int | None = Field(None, ge=0, description="krum: how many of a cohort may lie; 1 if unset")
    max_norm: float | None = Field(
        None, gt=0, description="norm-clip: longest change of a client; the cohort's median norm if unset"
    )
    server_optimizer: Literal["avgm", "adagrad", "adam", "yogi"] | None = Field(
        None, description="takes the mean's change for a gradient"
    )
    server_learning_rate: float | None = Field(None, gt=0, description="1 for avgm, else 0.01, if unset")
    server_beta1: float | None = Field(None, ge=0, lt=1, description="momentum; 0.9, for adagrad 0, if unset")
    server_beta2: float | None = Field(None, ge=0, lt=1, description="adam, yogi: second moment; 0.99 if unset")
    server_tau: float | None = Field(None, gt=0, description="adagrad, adam, yogi: adaptivity; 0.001 if unset")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        for name, kind in PARAMETERS.items():
            if getattr(self, name) is not None and self.robust != kind:
                raise ValueError(f"strategy.{name} belongs to strategy.robust = '{kind}', not to {self.robust!r}")
        if self.server_optimizer is None:
            for name in type(self).model_fields:
                if name.startswith("server_") and getattr(self, name) is not None:
                    raise ValueError(f"strategy.{name} needs strategy.server_optimizer, which is not set")
        else:
            try:
                self.new_optimizer()
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    def robustness(self) -> Robustness | None:
        """Return the robust mean's parameters, or None for the plain mean."""
        if self.robust is None:
            return None
        given = {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None}
        return Robustness(self.robust, **given)

    def new_optimizer(self) -> ServerOptimizer | None:
        """Return a server optimizer that has taken no step yet, or None."""
        if self.server_optimizer is None:
            return None
        return ServerOptimizer(
            self.server_optimizer, self.server_learning_rate, self.server_beta1, self.server_beta2, self.server_tau
        )


class AveragingStrategy(AdapterStrategy):
    """Base of the methods whose server averages; `average` does what their options ask for."""

    Options = AveragingOptions
    options: AveragingOptions

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._robustness = self.options.robustness()
        # one for each role: a round may train one factor only
        self._optimizers = {role: new for role in Role if (new := self.options.new_optimizer()) is not None}

    @classmethod
    def check_cohort(cls, options: AveragingOptions, clients: int) -> None:
        """Raise ConfigError if the robust mean cannot do its work on so many clients."""
        robust = options.robustness()
        if robust is None:
            return
        if robust.kind == "trimmed-mean" and trimmed_clients(robust.trim, clients) == 0:
            raise ConfigError(
                f"strategy.trim = {robust.trim:g} of {clients} clients leaves nobody out; "
                f"give at least {1 / clients:.2g}, or draw more clients"
            )
        if robust.kind == "krum" and clients < 2 * robust.byzantine + 3:
            raise ConfigError(
                f"strategy.byzantine = {robust.byzantine} needs a cohort of at least {2 * robust.byzantine + 3}, "
                f"and {clients} clients are drawn; lower it, or draw more clients"
            )

    @classmethod
    def needs_singles(cls, options: AveragingOptions) -> str:
        """Return the robust mean."""
        return "" if options.robust is None else f"robust = '{options.robust}'"

    @classmethod
    def needs_start(cls, options: AveragingOptions) -> str:
        """Return the server optimizer, or clipping of changes, which both go by what clients started from."""
        if options.server_optimizer is not None:
            return f"server_optimizer = '{options.server_optimizer}'"
        return cls.needs_singles(options) if options.robust == "norm-clip" else ""

    def memory(self) -> dict[str, Tensor]:
        """Return the state of the server optimizer."""
        return {
            name: tensor for optimizer in self._optimizers.values() for name, tensor in optimizer.state_dict().items()
        }

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Take up the state of the server optimizer."""
        for role, optimizer in self._optimizers.items():
            optimizer.load_state_dict({name: t for name, t in memory.items() if role_of(tensor_of(name)) is role})

    def average(
        self, updates: Iterable[ClientUpdate], current: AdapterState, trains_a: bool = True, trains_b: bool = True
    ) -> AdapterState:
        """Average what the round trained, as the options ask; see `weighted_mean` for the parameters."""
        if self._robustness is None and not self._optimizers:
            return weighted_mean(updates, current, trains_a, trains_b)
        if self._robustness is None:
            state = weighted_mean(updates, current, trains_a, trains_b).to_tensors()
            fixed = {role for role, trained in ((Role.A, trains_a), (Role.B, trains_b)) if not trained}
            sent = {name for name in state if role_of(name) not in fixed | {Role.BASE}}
            mean: Mapping[str, Tensor] = {name: state[name] for name in sent if name not in self.terms.frozen}
        else:
            cohort = list(updates)
            clients = [{**trained_tensors(update, current, trains_a, trains_b), **update.dense} for update in cohort]
            start = {name: tensor for name, tensor in current.to_tensors().items() if name in clients[0]}
            rows = [update.num_examples for update in cohort]
            mean = robust_mean(self._robustness.kind, clients, rows, start, self._robustness)
        return self._stepped(mean, current)

    def _stepped(self, mean: Mapping[str, Tensor], current: AdapterState) -> AdapterState:
        before = current.to_tensors()
        after = dict(mean)
        for role, optimizer in self._optimizers.items():
            names = sorted(name for name in mean if role_of(name) is role)
            if names:
                after |= optimizer.step({name: before[name] for name in names}, {name: mean[name] for name in names})
        tensors = {name: after[name].to(tensor) if name in after else tensor for name, tensor in before.items()}
        scalings = {f.scaling for f in current.factors.values()} or {self.terms.scaling}
        assert len(scalings) == 1, "a mean of factors has one scaling"
        return AdapterState.from_tensors(tensors, scalings.pop())
