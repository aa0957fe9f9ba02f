"""Robust means: what takes the place of the weighted mean where a few clients may send anything.

With x_k the K clients' tensors, taken coordinate by coordinate or as one vector over all of them:

``median``        x[j] = med_k x_k[j]. D. Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
                  Statistical Rates", arXiv 1803.01498, Definition 1.
``trimmed-mean``  x[j] = mean of x_k[j] without the m = floor(beta K) largest and the m smallest. Ibid., Definition 2.
``krum``          x = x_i,  i = argmin_k s(k),  s(k) = sum over the K - f - 2 others l nearest to k of |x_k - x_l|^2,
                  for f clients that may lie and K >= 2f + 3. P. Blanchard et al., "Machine Learning with Adversaries:
                  Byzantine Tolerant Gradient Descent", NeurIPS 2017, arXiv 1703.02757.
``norm-clip``     x = x_0 + sum_k p_k min(1, S / |x_k - x_0|) (x_k - x_0), x_0 what the clients started from. Z. Sun et
                  al., "Can You Really Backdoor Federated Learning?", arXiv 1911.07963, without its noise.

Median, trimmed mean and Krum count every client once: the number of rows is the client's own word, and with weights
one liar would outvote everyone. Norm-clip keeps the weights p_k = n_k / sum n; no p_k is so large that the result
moves further than S.

What differs from the papers: S may be the median of the cohort's norms; f is given, never guessed.

What to mind: m is 0 below 1 / beta clients, and the trimmed mean is then a plain mean; the median of two clients is
their mean. Coordinates are compared as they are, so all clients must hold factors of one adapter, of equal ranks, and
with B on one scale. A robust mean of A and one of B give no robust mean of the products B A. None of this is private:
the server sees each client's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fedpeft.errors import AdapterError, ConfigError, nearest
from fedpeft.strategies.algebra.factors import no_rows

Tensors = Mapping[str, Tensor]


def coordinate_median(updates: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the median of each coordinate (arXiv 1803.01498, Definition 1).

    Up to (K - 1) // 2 clients cannot move it beyond the others' range, whatever they send.

    Parameters
    ----------
    updates : sequence of mapping of str to Tensor
        The clients' tensors, of equal names and shapes; any float type.
    weights : sequence of float
        Rows of each client. By design without influence on the result, see the module; only their sum is checked.

    Returns
    -------
    dict of str to Tensor
        float64, of the same shapes. Of an even number of clients the mean of the middle two.

    Raises
    ------
    AdapterError
        Clients whose names or shapes differ.
    TooFewClientsError
        No client, or none that trained on any row.
    """
    require_alike(updates, weights)
    low, high = (len(updates) - 1) // 2, len(updates) // 2
    merged = {}
    for name in sorted(updates[0]):
        ordered = _stack(updates, name).sort(dim=0).values  # (K, ..)
        merged[name] = (ordered[low] + ordered[high]) / 2
    return merged


def trimmed_clients(trim: float, clients: int) -> int:
    """Return m = floor(trim * clients), the values left out at EACH end; exact, as 0.29 * 100 in floats is below 29."""
    return math.floor(Fraction(str(float(trim))) * clients)


def trimmed_mean(updates: Sequence[Tensors], weights: Sequence[float], trim: float = 0.1) -> dict[str, Tensor]:
    """Return the mean of each coordinate without its largest and smallest values (arXiv 1803.01498, Definition 2).

    Up to m = floor(trim * K) clients cannot move it beyond the others' range, whatever they send.

    Parameters
    ----------
    updates, weights
        As for `coordinate_median`.
    trim : float
        beta, the share of the clients left out at each end, 0 <= trim < 0.5.

    Returns
    -------
    dict of str to Tensor
        float64, of the same shapes; no coordinate lies outside the values that were kept.

    Raises
    ------
    ConfigError
        A trim that leaves nothing. For the rest see `coordinate_median`.
    """
    _require_trim(trim)
    require_alike(updates, weights)
    left_out = trimmed_clients(trim, len(updates))
    merged = {}
    for name in sorted(updates[0]):
        kept = _stack(updates, name).sort(dim=0).values[left_out : len(updates) - left_out]  # (K - 2m, ..)
        # A sum of distances from the smallest gives equal values back exactly, and never passes the largest.
        merged[name] = kept[0] + (kept - kept[0]).mean(dim=0)
    return merged


def krum_scores(updates: Sequence[Tensors], byzantine: int) -> list[float]:
    """Return s(k) of each client, in units of squared distance; the smallest wins (arXiv 1703.02757).

    Parameters
    ----------
    updates : sequence of mapping of str to Tensor
        The clients' tensors, of equal names and shapes; each client is ONE vector over all of them.
    byzantine : int
        f, how many clients may lie; K >= 2f + 3.

    Returns
    -------
    list of float
        Sums of the squared distances to the K - f - 2 nearest others. Distances are taken of differences: from a Gram
        matrix they would cancel.

    Raises
    ------
    ConfigError
        Too few clients for f.
    """
    _require_byzantine(byzantine)
    clients = len(updates)
    if clients < 2 * byzantine + 3:
        most = (clients - 3) // 2
        remedy = f"lower it to {most} or have" if most >= 0 else "take kind = 'median' or have"
        raise ConfigError(
            f"krum with byzantine = {byzantine} needs at least 2 * {byzantine} + 3 = {2 * byzantine + 3} updates a "
            f"round and has {clients}; {remedy} more clients take part in each round"
        )
    squares = torch.zeros(clients, clients, dtype=torch.float64)
    for name in sorted(updates[0]):  # one order, so that sums round alike however clients send their tensors
        values = _stack(updates, name).reshape(clients, updates[0][name].numel())
        for k in range(clients - 1):
            distances = (values[k + 1 :] - values[k]).square().sum(dim=1)
            squares[k, k + 1 :] += distances
            squares[k + 1 :, k] += distances
    squares.fill_diagonal_(math.inf)  # no client is its own neighbour
    nearest_others = squares.sort(dim=1).values[:, : clients - byzantine - 2]
    scores: list[float] = nearest_others.sum(dim=1).tolist()
    return scores


def krum(updates: Sequence[Tensors], weights: Sequence[float], byzantine: int = 1) -> dict[str, Tensor]:
    """Return the tensors of the one client that lies nearest to its neighbours (arXiv 1703.02757).

    Parameters
    ----------
    updates, weights
        As for `coordinate_median`.
    byzantine : int
        f, how many clients may lie; K >= 2f + 3.

    Returns
    -------
    dict of str to Tensor
        The chosen client's values exactly, as float64. Of equal scores the first client's.

    Raises
    ------
    ConfigError
        Too few clients for f. For the rest see `coordinate_median`.
    """
    require_alike(updates, weights)
    scores = krum_scores(updates, byzantine)
    chosen = updates[scores.index(min(scores))]
    return {name: _wide(chosen[name]).clone() for name in sorted(chosen)}


def norm_clip(
    updates: Sequence[Tensors], weights: Sequence[float], start: Tensors, max_norm: float | None = None
) -> dict[str, Tensor]:
    """Return the weighted mean of the clients' changes, none longer than a bound, added to the start.

    The result lies within `max_norm` of `start`, whatever clients send or claim of their rows (arXiv 1911.07963).

    Parameters
    ----------
    updates
        As for `coordinate_median`.
    weights : sequence of float
        Rows of each client, not negative; p_k = n_k / sum n.
    start : mapping of str to Tensor
        x_0, what the clients started from; it may hold tensors that they do not send.
    max_norm : float, optional
        S > 0, the longest change, in the L2 norm over all of a client's tensors as one vector. None takes the median
        of the cohort's norms, each client counted once, so that about half of the changes are shortened: it follows
        the cohort from round to round, and no minority of liars raises it above every honest norm.

    Returns
    -------
    dict of str to Tensor
        float64, the tensors that clients send. The order of clients moves it by rounding at most.

    Raises
    ------
    ConfigError
        A bound that is no positive number.
    AdapterError
        A start of other shapes. For the rest see `coordinate_median`.
    """
    _require_max_norm(max_norm)
    require_alike(updates, weights)
    names = sorted(updates[0])
    for name in names:
        begun = tuple(start[name].shape) if name in start else None
        if begun != tuple(updates[0][name].shape):
            raise AdapterError(
                f"clients sent {name} with shape {tuple(updates[0][name].shape)} where the round started from {begun}; "
                "a change is clipped against the tensors that were sent to the clients"
            )
    norms = [
        math.sqrt(sum(float((_wide(update[name]) - _wide(start[name])).square().sum()) for name in names))
        for update in updates
    ]
    if max_norm is None:
        ordered = sorted(norms)
        max_norm = (ordered[(len(norms) - 1) // 2] + ordered[len(norms) // 2]) / 2
    total = math.fsum(weights)
    merged = {name: torch.zeros(start[name].shape, dtype=torch.float64) for name in names}
    for update, weight, norm in zip(updates, weights, norms, strict=True):
        share = weight / total * (1.0 if norm <= max_norm else max_norm / norm)
        for name in names:
            merged[name].add_(_wide(update[name]) - _wide(start[name]), alpha=share)
    return {name: _wide(start[name]) + change for name, change in merged.items()}


@dataclass(frozen=True)
class Robustness:
    """Which robust mean, and its parameters; each kind reads its own only.

    Parameters
    ----------
    kind : str
        A name in `ROBUST`.
    trim : float
        For ``trimmed-mean``: the share of the clients left out at each end, 0 <= trim < 0.5.
    byzantine : int
        For ``krum``: how many clients may lie; rounds need 2 * byzantine + 3 updates.
    max_norm : float, optional
        For ``norm-clip``: the longest change, L2 over all tensors; None takes the median of the cohort's norms.

    Raises
    ------
    ConfigError
        A kind that does not exist, or a parameter out of range.
    """

    kind: str
    trim: float = 0.1
    byzantine: int = 1
    max_norm: float | None = None

    def __post_init__(self) -> None:
        _require_kind(self.kind)
        _require_trim(self.trim)
        _require_byzantine(self.byzantine)
        _require_max_norm(self.max_norm)


Rule = Callable[[Sequence[Tensors], Sequence[float], Tensors, Robustness], dict[str, Tensor]]

ROBUST: dict[str, Rule] = {
    "median": lambda updates, weights, start, options: coordinate_median(updates, weights),
    "trimmed-mean": lambda updates, weights, start, options: trimmed_mean(updates, weights, options.trim),
    "krum": lambda updates, weights, start, options: krum(updates, weights, options.byzantine),
    "norm-clip": lambda updates, weights, start, options: norm_clip(updates, weights, start, options.max_norm),
}


def robust_mean(
    kind: str,
    updates: Sequence[Tensors],
    weights: Sequence[float],
    start: Tensors,
    options: Robustness | None = None,
) -> dict[str, Tensor]:
    """Merge a cohort by the robust mean of that name.

    Parameters
    ----------
    kind : str
        ``"median"``, ``"trimmed-mean"``, ``"krum"`` or ``"norm-clip"``.
    updates, weights, start
        As for `norm_clip`, which alone weights with rows and reads the start.
    options : Robustness, optional
        The kind's parameters; its defaults where not given.

    Returns
    -------
    dict of str to Tensor
        float64, of the same names and shapes as the updates.

    Raises
    ------
    ConfigError
        An unknown kind, options of another kind, a parameter out of range, or too few clients for Krum.
    AdapterError, TooFewClientsError
        As for `coordinate_median`.
    """
    _require_kind(kind)
    options = options or Robustness(kind)
    if options.kind != kind:
        raise ConfigError(f"robust mean '{kind}' was given the options of '{options.kind}'; give both the same kind")
    return ROBUST[kind](updates, weights, start, options)


def require_alike(updates: Sequence[Tensors], weights: Sequence[float]) -> None:
    """Raise AdapterError unless all clients sent the same names and shapes, TooFewClientsError if there are no rows."""
    if len(updates) != len(weights) or not all(weight >= 0 for weight in weights):
        raise ValueError(f"{len(updates)} updates need as many weights from 0 up, not {list(weights)}")
    if math.fsum(weights) == 0:
        raise no_rows(len(updates))
    expected = {name: tuple(tensor.shape) for name, tensor in updates[0].items()}
    for position, update in enumerate(updates[1:], start=2):
        shapes = {name: tuple(tensor.shape) for name, tensor in update.items()}
        for name in sorted(shapes.keys() | expected.keys()):
            if shapes.get(name) != expected.get(name):
                raise AdapterError(
                    f"update {position} of {len(updates)} has {name} with shape {shapes.get(name)} where the first has "
                    f"{expected.get(name)}; a robust mean of factors needs equal ranks, so give all clients one rank"
                )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _stack(updates: Sequence[Tensors], name: str) -> Tensor:
    """Return one tensor of all clients, ``(K, ..)``, float64."""
    return torch.stack([_wide(update[name]) for update in updates])


def _require_kind(kind: str) -> None:
    if kind not in ROBUST:
        raise ConfigError(f"there is no robust mean '{kind}'. {nearest(kind, ROBUST)}")


def _require_trim(trim: float) -> None:
    if not 0 <= trim < 0.5:
        raise ConfigError(f"trim = {trim} leaves no clients to average; it is a share at each end, 0 <= trim < 0.5")


def _require_byzantine(byzantine: int) -> None:
    if byzantine < 0:
        raise ConfigError(f"byzantine = {byzantine}; how many clients may lie is a whole number from 0 up")


def _require_max_norm(max_norm: float | None) -> None:
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise ConfigError(
            f"max_norm = {max_norm}; the longest change is a number above 0, or left out for the median of the norms"
        )
