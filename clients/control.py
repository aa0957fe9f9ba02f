"""A client's control variate, which says where its own rows pull: for methods that take that out of its steps.

With c the server's and c_i the client's own, every step's gradient g becomes g + c - c_i. After K steps at learning
rates lr_1 .. lr_K, from x to y, the client keeps

    c_i+ = c_i - c + (x - y) / sum_k lr_k,

the mean of the gradients g that it stepped along: option II of SCAFFOLD, see `fedpeft.strategies.scaffold`. It never
leaves the client: what it changed by follows from x, y, c and the sum of the learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedpeft.clients.received import once_each
from fedpeft.errors import MessageError
from fedpeft.wire import CONTROL_RECORD, to_record, to_tensors

OWN_CONTROL = "control"  # record of a client's own state

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
    """

    server: Mapping[str, Tensor]
    own: Mapping[str, Tensor]

    @classmethod
    def of(cls, received: ArrayRecord | None, sent_back: Mapping[str, Tensor], state: RecordDict) -> Self | None:
        """Read an order's control variate, and the client's own, zero before its first round; None for no such order.

        Parameters
        ----------
        received : flwr.app.ArrayRecord, optional
            What the order brings.
        sent_back : mapping of str to Tensor
            What the client is to send back, for names and shapes.
        state : flwr.app.RecordDict
            The client's own.

        Raises
        ------
        MessageError
            Names or shapes that are not those of what is sent back.
        """
        if received is None:
            return None
        server = _decoded(received)
        for name in sorted(server.keys() | sent_back.keys()):
            if name not in server or name not in sent_back or server[name].shape != sent_back[name].shape:
                raise MessageError(f"'{CONTROL_RECORD}' of the order does not fit what is trained: {name}")
        kept = to_tensors(state.array_records[OWN_CONTROL]) if OWN_CONTROL in state else {}
        return cls(server, {name: kept.get(name, torch.zeros_like(tensor)) for name, tensor in server.items()})

    def correction(self) -> dict[str, Tensor]:
        """Return c - c_i."""
        return {name: c - self.own[name] for name, c in self.server.items()}

    def keep(
        self, start: Mapping[str, Tensor], trained: Mapping[str, Tensor], rate_sum: float, state: RecordDict
    ) -> None:
        """Put c_i+ into the client's state.

        Parameters
        ----------
        start, trained : mapping of str to Tensor
            x and y.
        rate_sum : float
            Of the steps' learning rates; where it is zero, nothing was stepped along, and c_i stays.
        state : flwr.app.RecordDict
            The client's own.
        """
        if rate_sum > 0:
            state[OWN_CONTROL] = to_record(
                {
                    name: self.own[name] - c + (start[name].to(trained[name]) - trained[name]) / rate_sum
                    for name, c in self.server.items()
                }
            )
