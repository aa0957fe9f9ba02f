"""How long messages will take their clients: by how much there is to do, and by how long they took before.

What is guessed here decides which client begins first and which messages travel together, and nothing else: each is
answered by itself, and replies count in the order of the messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from flwr.app import Message

from fedpeft.simulations.grids.bundles import Bundle
from fedpeft.simulations.grids.transport import Newest

Work = Callable[[Message], float]
REMEMBERED = 4096  # clients whose time is known
QUICK_SECONDS = 0.02  # of work that is sent as one: sending it takes a tenth as long
MOST_MESSAGES, MOST_BYTES = 32, 4 << 20  # of one sending, and of its replies


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
        self._largest = 1  # bytes of a reply

    def learn(self, message: Message, seconds: float, num_bytes: int = 0) -> None:
        """Take in how long a message took, and how large the reply was."""
        self._largest = max(self._largest, num_bytes)
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

    def bundles(self, messages: Iterator[Message], workers: int = 1) -> Iterator[Bundle]:
        """Put neighbours together that take next to no time; no client is twice in one bundle.

        Parameters
        ----------
        messages : iterator of Message
            Pulled as far as they fill a bundle of each worker.
        workers : int
            Among whom messages are divided evenly where they fill no more: nobody idles beside who has two.
        """
        while block := self._block(messages, workers):
            share = min(self._most(), math.ceil(len(block) / workers))
            taken: dict[int, Message] = {}
            seconds = 0.0
            for message in block:
                node = message.metadata.dst_node_id
                if len(taken) == share or seconds >= QUICK_SECONDS or node in taken:
                    yield tuple(taken.values())
                    taken, seconds = {}, 0.0
                taken[node] = message
                seconds += self._seconds_of(message)
            yield tuple(taken.values())

    def _block(self, messages: Iterator[Message], workers: int) -> list[Message]:
        """Pull what fills a bundle of each worker; no more after one that is not quick."""
        block: list[Message] = []
        seconds = 0.0
        for message in messages:
            block.append(message)
            seconds += self._seconds_of(message)
            if seconds >= workers * QUICK_SECONDS or len(block) >= workers * self._most():
                break
        return block

    def _most(self) -> int:
        """Return how many messages a bundle may have by the size of replies."""
        return max(1, min(MOST_MESSAGES, MOST_BYTES // self._largest))

    def _seconds_of(self, message: Message) -> float:
        return self.expected(message) if self._worked else math.inf

    def _work(self, message: Message) -> float:
        return 1.0 if self.work is None else self.work(message)


def _key(message: Message) -> tuple[int, str]:
    return message.metadata.dst_node_id, message.metadata.message_type
