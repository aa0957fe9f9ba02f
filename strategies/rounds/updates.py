"""Answers to updates: what an answer must hold before it may be averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.wire import TrainAnswer, to_tensors


class RefusedUpdateError(ValueError):
    """An answer that must not enter an average, and why."""


def read_update(
    answer: TrainAnswer, client_id: str, expected: Mapping[str, Tensor], held: Mapping[str, Tensor], scaling: float
) -> ClientUpdate:
    """Check the tensors of one client's answer, or refuse it by name.

    Parameters
    ----------
    answer : TrainAnswer
        Read from the client's reply.
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
        Missing, unknown, misshapen or non-finite tensors.
    """
    names = set(answer.arrays)
    if missing := sorted(expected.keys() - names):
        raise RefusedUpdateError(f"missing tensor {missing[0]} ({len(missing)} of {len(expected)} missing)")
    if unknown := sorted(names - expected.keys()):
        raise RefusedUpdateError(f"unknown tensor {unknown[0]}")
    try:
        tensors = to_tensors(answer.arrays)
    except Exception:  # bytes of a stranger: NumPy's reader fails in more ways than it documents
        raise RefusedUpdateError("an array that cannot be decoded") from None
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise RefusedUpdateError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(wanted.shape)} {wanted.dtype}"
            )
        # a sum is finite only if all of it is, or else it has grown too large; and it is one pass, with nothing made
        if not (math.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
            raise RefusedUpdateError(f"{name} holds NaN or infinity")
    state = AdapterState.from_tensors({**held, **tensors}, scaling)
    dense = {name: tensor for name, tensor in state.dense.items() if name not in held}
    return ClientUpdate(client_id, answer.num_examples, state.factors, dense, answer.metrics)
