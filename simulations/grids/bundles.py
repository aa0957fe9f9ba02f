"""Bundles of messages: a worker that is given several at once may train their clients together.

What is in a bundle follows from the messages and their order alone, so that results depend neither on how many workers
there are nor on which is faster. All else is as if the messages came by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Context, Message, MessageType, RecordDict

from fedpeft.clients.verdicts import Verdict

Bundle = tuple[Message, ...]
Job = tuple[Message, Context, Verdict | None]
# what answers several clients at once: contents of the replies, None for those that are to be answered alone
Together = Callable[[Sequence[Job]], Sequence[RecordDict | None]]


@dataclass(frozen=True)
class Bundling:
    """How messages are put together.

    Parameters
    ----------
    size : int
        Most messages of a bundle; 1 bundles nothing.
    together : str
        What answers a bundle, as ``module:attribute``, see `Together`.
    """

    size: int = 1
    together: str = ""

    def bundles(self, messages: Iterator[Message]) -> Iterator[Bundle]:
        """Cut a stream into bundles of messages to train, in their order; no client is twice in one."""
        taken: list[Message] = []
        for message in messages:
            metadata = message.metadata
            joins = metadata.message_type == MessageType.TRAIN and all(
                metadata.dst_node_id != other.metadata.dst_node_id
                and (metadata.message_type, metadata.group_id) == (other.metadata.message_type, other.metadata.group_id)
                for other in taken
            )
            if taken and not joins:
                yield tuple(taken)
                taken = []
            taken.append(message)
            if len(taken) >= self.size:
                yield tuple(taken)
                taken = []
        if taken:
            yield tuple(taken)


def nodes_of(bundle: Bundle) -> frozenset[int]:
    """Return whom a bundle is for."""
    return frozenset(message.metadata.dst_node_id for message in bundle)
