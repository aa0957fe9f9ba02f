"""Messages to updates: what a reply must hold before it may be averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Message, MetricRecord
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.wire import ARRAYS, METRICS, NUM_EXAMPLES, to_tensors


class RefusedUpdateError(ValueError):
    """A reply that must not enter an average, and why."""


def read_update(
    reply: Message, client_id: str, expected: Mapping[str, Tensor], held: Mapping[str, Tensor], scaling: float
) -> ClientUpdate:
    """Read one client's reply, or refuse it by name.

    Parameters
    ----------
    reply : flwr.app.Message
        Holds ``arrays`` and ``metrics`` with ``num-examples``.
    client_id : str
        Who sent it.
    expected : mapping of str to Tensor
        What the client is to send back, as it was before training: names, shapes and types must agree.
    held : mapping of str to Tensor
        The adapter's other tensors, which the client had and did not send; they complete the update.
    scaling : float
        Of the client's adapter.

    Raises
    ------
    RefusedUpdateError
        Missing, unknown, misshapen or non-finite tensors, or a row count that is no positive whole number.
    """
    records, metrics = reply.content.array_records, reply.content.metric_records
    if ARRAYS not in records or METRICS not in metrics:
        raise RefusedUpdateError(f"the reply lacks '{ARRAYS}' or '{METRICS}'")
    names = set(records[ARRAYS])
    if missing := sorted(expected.keys() - names):
        raise RefusedUpdateError(f"missing tensor {missing[0]} ({len(missing)} of {len(expected)} missing)")
    if unknown := sorted(names - expected.keys()):
        raise RefusedUpdateError(f"unknown tensor {unknown[0]}")
    try:
        tensors = to_tensors(records[ARRAYS])
    except Exception:  # bytes of a stranger: NumPy's reader fails in more ways than it documents
        raise RefusedUpdateError("an array that cannot be decoded") from None
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise RefusedUpdateError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(wanted.shape)} {wanted.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise RefusedUpdateError(f"{name} holds NaN or infinity")
    state = AdapterState.from_tensors({**held, **tensors}, scaling)
    dense = {name: tensor for name, tensor in state.dense.items() if name not in held}
    reported = metrics[METRICS]
    return ClientUpdate(client_id, _num_examples(reported), state.factors, dense, _scalars(reported))


def _num_examples(metrics: MetricRecord) -> int:
    value = metrics.get(NUM_EXAMPLES)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RefusedUpdateError(f"{NUM_EXAMPLES} = {value!r}, expected a whole number of at least 1")
    return value


def _scalars(metrics: MetricRecord) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
