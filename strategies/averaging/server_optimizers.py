"""Server optimizers: the mean of the clients' tensors as a gradient, not as the next state.

S. Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, Algorithm 2. With x_t what the round started from
and m the mean of the clients' tensors, the pseudo-gradient is Delta_t = m - x_t, and coordinate by coordinate

    m_t = beta1 m_{t-1} + (1 - beta1) Delta_t,                                          m_0 = 0
    v_t = v_{t-1} + Delta_t^2                                             (adagrad),    v_0 = tau^2
    v_t = v_{t-1} - (1 - beta2) Delta_t^2 sign(v_{t-1} - Delta_t^2)       (yogi)
    v_t = beta2 v_{t-1} + (1 - beta2) Delta_t^2                           (adam)
    x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau),

rounds counted from t = 1. ``avgm`` is FedAvgM of T.-M. H. Hsu et al., "Measuring the Effects of Non-Identical Data
Distribution for Federated Visual Classification", arXiv 1909.06335:

    m_t = beta1 m_{t-1} + Delta_t,    x_{t+1} = x_t + eta m_t.

Its m_t has no factor 1 - beta1: steps that agree grow to 1 / (1 - beta1) times one.

No bias correction, as in the paper; Flower's FedAdam has one, and starts from v = 0 where the paper asks for
v >= tau^2.

eta belongs to the size of Delta, not to the clients' learning rate. Where |Delta| is well above tau, adam's and yogi's
steps grow to about eta in each coordinate while rounds agree, and adagrad's fall as eta / sqrt(t); where it is well
below, a step is at first eta m_t / (2 tau).

On adapters: the pseudo-gradient is that of A and of B each, not of their product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.errors import AdapterError, ConfigError, nearest

PREFIX = "server_optimizer."  # of all names in a checkpoint
MOMENTUM = PREFIX + "momentum."  # m_t
SECOND_MOMENT = PREFIX + "second_moment."  # v_t


def tensor_of(name: str) -> str:
    """Return which tensor a name in a `ServerOptimizer.state_dict` speaks of."""
    return name.removeprefix(MOMENTUM).removeprefix(SECOND_MOMENT)


@dataclass(frozen=True)
class Hyperparameters:
    """What a kind of optimizer reads; None for what it has not.

    Parameters
    ----------
    learning_rate : float
        eta > 0.
    beta1 : float
        Momentum, 0 <= beta1 < 1.
    beta2 : float, optional
        Decay of the second moment, 0 <= beta2 < 1.
    tau : float, optional
        Adaptivity > 0, in the units of the tensors.
    """

    learning_rate: float
    beta1: float
    beta2: float | None = None
    tau: float | None = None


# Betas as in the experiments of arXiv 2003.00295 (momentum 0.9 for FedAvgM, beta1 = 0 for FedAdagrad, 0.9 and 0.99 for
# the others), which also finds tau = 1e-3 to do nearly as well as any. It names no one eta but searches a grid for each
# task; 0.01 is what Flower takes for FedYogi, a place to search around. eta = 1 for avgm is Hsu et al.'s.
DEFAULTS: Mapping[str, Hyperparameters] = {
    "avgm": Hyperparameters(learning_rate=1.0, beta1=0.9),
    "adagrad": Hyperparameters(learning_rate=0.01, beta1=0.0, tau=1e-3),
    "adam": Hyperparameters(learning_rate=0.01, beta1=0.9, beta2=0.99, tau=1e-3),
    "yogi": Hyperparameters(learning_rate=0.01, beta1=0.9, beta2=0.99, tau=1e-3),
}


def second_moment(kind: str, v: Tensor, delta: Tensor, beta2: float) -> Tensor:
    """Return v_t of one tensor.

    Parameters
    ----------
    kind : {"adagrad", "adam", "yogi"}
        Which of Algorithm 2's three lines.
    v : Tensor
        v_{t-1} > 0, float64.
    delta : Tensor
        Delta_t, of the same shape.
    beta2 : float
        Decay; adagrad has none.

    Returns
    -------
    Tensor
        v_t, of the same shape, never negative.
    """
    square = delta.square()
    if kind == "adagrad":
        return v + square
    if kind == "yogi":
        return v - (1 - beta2) * square * torch.sign(v - square)
    return beta2 * v + (1 - beta2) * square


class ServerOptimizer:
    """An optimizer of the server's tensors, with its state from round to round; everything in float64.

    Parameters
    ----------
    kind : str
        ``"avgm"``, ``"adagrad"``, ``"adam"`` or ``"yogi"``.
    learning_rate : float, optional
        eta > 0. This and the following default to the kind's `DEFAULTS`.
    beta1 : float, optional
        Momentum, 0 <= beta1 < 1.
    beta2 : float, optional
        Decay of the second moment, 0 <= beta2 < 1; of adam and yogi only.
    tau : float, optional
        Adaptivity > 0, in the units of the tensors: coordinates that move much less step in proportion, those that
        move much more by about eta. Not of avgm.

    Raises
    ------
    ConfigError
        An unknown kind, a parameter that the kind has not, or one out of range.
    """

    def __init__(
        self,
        kind: str,
        learning_rate: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        tau: float | None = None,
    ) -> None:
        if kind not in DEFAULTS:
            raise ConfigError(f"there is no server optimizer '{kind}'. {nearest(kind, DEFAULTS)}")
        defaults = DEFAULTS[kind]
        for name, given, default in (("beta2", beta2, defaults.beta2), ("tau", tau, defaults.tau)):
            if given is not None and default is None:
                raise ConfigError(f"server optimizer '{kind}' has no {name}, but {name} = {given} was given; remove it")
        self.kind = kind
        self.hyperparameters = Hyperparameters(
            defaults.learning_rate if learning_rate is None else learning_rate,
            defaults.beta1 if beta1 is None else beta1,
            defaults.beta2 if beta2 is None else beta2,
            defaults.tau if tau is None else tau,
        )
        _require_in_range(self.hyperparameters)
        self._momentum: dict[str, Tensor] = {}
        self._second_moment: dict[str, Tensor] = {}

    def step(self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take one round's step; call it once a round.

        Parameters
        ----------
        current : mapping of str to Tensor
            x_t, what the clients started from; any float type, not changed.
        mean : mapping of str to Tensor
            The mean of what they sent, of the same names and shapes.

        Returns
        -------
        dict of str to Tensor
            x_{t+1}, float64. For avgm with learning rate 1, the first step and every step without momentum return
            the mean exactly.

        Raises
        ------
        AdapterError
            Names or shapes that differ between current, mean and the steps before. The state then stays as it was.
        """
        _require_alike(_shapes(mean), _shapes(current), "the mean", "the current adapter")
        if self._momentum:
            _require_alike(_shapes(current), _shapes(self._momentum), "the current adapter", "the optimizer's state")
        eta, beta1 = self.hyperparameters.learning_rate, self.hyperparameters.beta1
        tau, beta2 = self.hyperparameters.tau, self.hyperparameters.beta2
        stepped, momentum, second = {}, {}, {}
        for name in sorted(current):
            x, target = _wide(current[name]), _wide(mean[name])
            delta = target - x
            m = self._momentum.get(name)
            m = torch.zeros_like(x) if m is None else m
            if tau is None:
                momentum[name] = beta1 * m + delta
                stepped[name] = target + (eta * momentum[name] - delta)  # x + eta m_t, but exact where that is Delta
                continue
            v = self._second_moment.get(name)
            v = torch.full_like(x, tau**2) if v is None else v
            momentum[name] = beta1 * m + (1 - beta1) * delta
            second[name] = second_moment(self.kind, v, delta, 0.0 if beta2 is None else beta2)
            stepped[name] = x + eta * momentum[name] / (second[name].sqrt() + tau)
        self._momentum, self._second_moment = momentum, second
        return stepped

    def state_dict(self) -> dict[str, Tensor]:
        """Return m_t and v_t under prefixed names, as copies that safetensors can write; empty before the first step.

        Hyperparameters are not in it: they are the configuration's.
        """
        named = {MOMENTUM + name: tensor for name, tensor in self._momentum.items()}
        named |= {SECOND_MOMENT + name: tensor for name, tensor in self._second_moment.items()}
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the state that `state_dict` returned; steps then go on bit by bit as they would have.

        Parameters
        ----------
        state : mapping of str to Tensor
            All of a `state_dict`, and nothing else; empty starts anew.

        Raises
        ------
        AdapterError
            A name without the prefix, or moments whose names or shapes differ.
        ConfigError
            The state of an optimizer with other moments.
        """
        momentum = {n.removeprefix(MOMENTUM): _wide(t).clone() for n, t in state.items() if n.startswith(MOMENTUM)}
        second = {
            n.removeprefix(SECOND_MOMENT): _wide(t).clone() for n, t in state.items() if n.startswith(SECOND_MOMENT)
        }
        if strangers := sorted(n for n in state if not n.startswith((MOMENTUM, SECOND_MOMENT))):
            raise AdapterError(
                f"'{strangers[0]}' is no state of a server optimizer; load the names that begin with '{PREFIX}' only"
            )
        adaptive = self.hyperparameters.tau is not None
        if state and bool(second) != adaptive:
            saved = "adagrad, adam or yogi" if second else "avgm"
            raise ConfigError(
                f"the saved state is that of {saved}, not of server optimizer '{self.kind}'; go on with the optimizer "
                "that the run began with"
            )
        if adaptive:
            _require_alike(_shapes(second), _shapes(momentum), "the saved second moment", "the saved momentum")
        self._momentum, self._second_moment = momentum, second


def _require_in_range(values: Hyperparameters) -> None:
    if not 0 < values.learning_rate < math.inf:
        raise ConfigError(f"the server's learning_rate = {values.learning_rate}; it is a number above 0")
    for name, beta in (("beta1", values.beta1), ("beta2", values.beta2)):
        if beta is not None and not 0 <= beta < 1:
            raise ConfigError(f"the server optimizer's {name} = {beta}; 0 <= {name} < 1 is allowed")
    if values.tau is not None and not 0 < values.tau < math.inf:
        raise ConfigError(f"the server optimizer's tau = {values.tau}; it is a number above 0")


def _require_alike(
    given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], this: str, that: str
) -> None:
    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) != expected.get(name):
            raise AdapterError(
                f"{this} has {name} with shape {given.get(name)} where {that} has {expected.get(name)}; a server "
                "optimizer needs the same tensors in every round"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
