"""What travels between server and clients, and under which names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from torch import Tensor

# records of a message
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
# keys of the server's config record
ROUND, NUM_ROUNDS, SCALING, HELD_HASH = "server-round", "num-rounds", "scaling", "held-hash"
RANK, DRAW = "rank", "draw"  # rank 0 is the adapter's own; see fedpeft.strategies.rounds.exchange.Exchange for draws
TRAINED, PERSONAL, KEPT = "trained", "personal", "kept"  # lists of roles
PRUNED_RANK, TAIL_PENALTY = "pruned-rank", "tail-penalty"  # see fedpeft.adapters.pruning
# keys of a client's config record
CLIENT_ID, NEEDS_ARRAYS, BUDGET_SPENT = "client-id", "needs-arrays", "privacy-budget-spent"
# keys of a client's metric record
NUM_EXAMPLES, TRAIN_LOSS, STEPS, SECONDS = "num-examples", "train_loss", "steps", "seconds"
# of its record-level privacy; the steps are those of the whole run so far, repeats included
NOISE_MULTIPLIER, SAMPLE_RATE, SPENT_STEPS = "noise-multiplier", "sample-rate", "spent-steps"


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack tensors for the wire."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack tensors; NumPy's own format, never pickle."""
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


def payload_bytes(message: Message, counts: Callable[[str], bool] = lambda name: True) -> int:
    """Return the bytes of the array values in a message whose names count, without headers.

    Of an array whose header makes no sense, all its bytes count.
    """
    if not message.has_content():
        return 0
    return sum(
        _value_bytes(array)
        for record in message.content.array_records.values()
        for name, array in record.items()
        if counts(name)
    )


def _value_bytes(array: Array) -> int:
    try:
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    except TypeError:
        size = len(array.data)
    return min(max(size, 0), len(array.data))  # what a header claims is not there if the bytes are not
