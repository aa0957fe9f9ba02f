"""A client's control variate, which says where its own rows pull: for methods that take that out of its steps.

With c the server's and c_i the client's own, every step's gradient g becomes g + c - c_i. After K steps at learning
rates lr_1 .. lr_K, from x to y, the client keeps

    c_i+ = c_i - c + (x - y) / sum_k lr_k,

the mean of the gradients g that it stepped along: option II of SCAFFOLD, see `fedpeft.strategies.scaffold`. It never
leaves the client: what it changed by follows from x, y, c and the sum of the learning rates.

The server's c is made of the c_i that it has counted. An answer that comes too late, or is refused, is not counted, and
the client must go on from the c_i before it: each order says which one, by the round that it was made in, and the
client keeps the last two. A client that does not hold the one it is asked for, as after a restart of its SuperNode,
takes the round's steps uncorrected, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedpeft.clients.received import once_each
from fedpeft.errors import MessageError
from fedpeft.wire import CONTROL_RECORD, TrainOrder, to_record, to_tensors

# records of a client's own state: c_i, the one before it, and the rounds that they were made in
OWN_CONTROL, EARLIER, MADE_IN = "control", "control-earlier", "control-made-in"

_decoded = once_each(to_tensors)


@dataclass(frozen=True)
class Control:
    """The control variates of one client's round, by the names of the tensors that it sends back.

    Parameters
    ----------
    server : mapping of str to Tensor
        c.
    own : mapping of str to Tensor
        c_i.
    made_in : int
        The round that c_i was made in; 0 where it is zero.
    server_round : int
        The round that is.
    is_lost : bool
        Whether the client does not hold the c_i that the server counts; c stands in for it.
    """

    server: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    made_in: int
    server_round: int
    is_lost: bool = False

    @classmethod
    def of(cls, order: TrainOrder, sent_back: Mapping[str, Tensor], state: RecordDict) -> Self | None:
        """Read an order's control variate, and the client's own that it asks for; None for an order without one.

        Parameters
        ----------
        order : TrainOrder
            What the client is asked.
        sent_back : mapping of str to Tensor
            What the client is to send back, for names and shapes.
        state : flwr.app.RecordDict
            The client's own.

        Raises
        ------
        MessageError
            Names or shapes that are not those of what is sent back.
        """
        if order.control is None:
            return None
        server = _decoded(order.control)
        for name in sorted(server.keys() | sent_back.keys()):
            if name not in server or name not in sent_back or server[name].shape != sent_back[name].shape:
                raise MessageError(f"'{CONTROL_RECORD}' of the order does not fit what is trained: {name}")
        asked, now = order.control_made_in, order.server_round
        if not asked:
            return cls(server, {name: torch.zeros_like(tensor) for name, tensor in server.items()}, 0, now)
        rounds = state.config_records.get(MADE_IN, ConfigRecord())
        record = next((name for name in (OWN_CONTROL, EARLIER) if rounds.get(name) == asked), None)
        if record is None:
            return cls(server, server, 0, now, is_lost=True)
        return cls(server, to_tensors(state.array_records[record]), asked, now)

    def correction(self) -> dict[str, Tensor]:
        """Return c - c_i."""
        return {name: c - self.own[name] for name, c in self.server.items()}

    def keep(
        self, start: Mapping[str, Tensor], trained: Mapping[str, Tensor], rate_sum: float, state: RecordDict
    ) -> None:
        """Put c_i+ into the client's state, beside the c_i that it was made of.

        Parameters
        ----------
        start, trained : mapping of str to Tensor
            x and y.
        rate_sum : float
            Of the steps' learning rates; where it is zero, nothing was stepped along, and c_i stays.
        state : flwr.app.RecordDict
            The client's own.
        """
        if rate_sum == 0:
            return
        state[OWN_CONTROL] = to_record(
            {
                name: self.own[name] - c + (start[name].to(trained[name]) - trained[name]) / rate_sum
                for name, c in self.server.items()
            }
        )
        state[MADE_IN] = ConfigRecord({OWN_CONTROL: self.server_round, EARLIER: self.made_in})
        if self.made_in:
            state[EARLIER] = to_record(self.own)
        else:
            state.pop(EARLIER, None)
