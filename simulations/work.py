"""How much there is to do for a client in a round: the words or pixels that it trains on."""

from __future__ import annotations

from flwr.app import Message, MessageType

from fedpeft.clients.rows import client_rows
from fedpeft.config import RunConfig
from fedpeft.resident import Resident
from fedpeft.simulations.contexts import Contexts
from fedpeft.training.local import num_steps


class Work:
    """Steps times rows times the client's mean length, of a message to train; 1 of any other.

    Parameters
    ----------
    config : RunConfig
        The run.
    home : Resident
        Its rows.
    contexts : Contexts
        Of its clients.
    """

    def __init__(self, config: RunConfig, home: Resident, contexts: Contexts) -> None:
        self._config, self._home, self._contexts = config, home, contexts
        self._known: dict[int, float] = {}

    def __call__(self, message: Message) -> float:
        """Return how much there is to do for a message."""
        if message.metadata.message_type != MessageType.TRAIN:
            return 1.0
        node = message.metadata.dst_node_id
        if node not in self._known:
            self._known[node] = self._of(node)
        return self._known[node]

    def _of(self, node: int) -> float:
        rows, train = client_rows(self._home, self._contexts.node_config(node)), self._config.train
        length = float(rows.split.lengths[rows.indices].mean()) if len(rows.indices) else 1.0
        return num_steps(train, rows.num_examples) * min(train.rows_a_step, max(rows.num_examples, 1)) * length
