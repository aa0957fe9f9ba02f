"""How long messages will take their clients: by how much there is to do, and by how long they took before.

What is guessed here decides which client begins first, and nothing else: replies count in the order of the messages.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Message

from fedpeft.simulations.grids.transport import Newest

Work = Callable[[Message], float]
REMEMBERED = 4096  # clients whose time is known


class Pace:
    """The time that messages take, learned as replies come.

    Parameters
    ----------
    work : callable, optional
        Gives how much there is to do for a message, in any unit; the same for all if not given.
    """

    def __init__(self, work: Work | None = None) -> None:
        self.work = work
        self._taken: Newest[float] = Newest(REMEMBERED)
        self._seconds, self._worked = 0.0, 0.0

    def learn(self, message: Message, seconds: float) -> None:
        """Take in how long a message took."""
        key = _key(message)
        before = self._taken.get(key)
        # a worker's first client waits for the model to be loaded, and any may wait for the machine
        self._taken.put(key, seconds if before is None else min(before, seconds))
        self._seconds += seconds
        self._worked += self._work(message)

    def expected(self, message: Message) -> float:
        """Return how many seconds a message will take; before anything is known, how much there is to do."""
        taken = self._taken.get(_key(message))
        if taken is not None:
            return taken
        return self._work(message) * (self._seconds / self._worked if self._worked else 1.0)

    def _work(self, message: Message) -> float:
        return 1.0 if self.work is None else self.work(message)


def _key(message: Message) -> tuple[int, str]:
    return message.metadata.dst_node_id, message.metadata.message_type
