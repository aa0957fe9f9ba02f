"""What goes out in a round: the adapter as each client is sent it, and no more of it than the client lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedpeft.adapters.state import AdapterState
from fedpeft.strategies.rounds.exchange import Deliveries, Exchange
from fedpeft.strategies.rounds.method import Method
from fedpeft.wire import NUM_ROUNDS, TrainOrder, to_record


class Outgoing:
    """The server's adapter, and the messages that bring clients up to it.

    Parameters
    ----------
    state : AdapterState
        As the run begins with it.
    method : Method
        Says what a round sends, and to clients of which rank.
    """

    def __init__(self, state: AdapterState, method: Method) -> None:
        self._method, self._terms = method, method.terms
        self._hides_clients = method.terms.client_privacy is not None
        self._views = {0: state}  # what clients of a rank get; rank 0 is the whole
        self._held: dict[int, Deliveries] = {}  # by rank
        self._records: dict[int, ArrayRecord] = {}
        self._arrays: dict[tuple[int, frozenset[str]], ArrayRecord] = {}
        self._contents: dict[tuple[int, frozenset[str], int], RecordDict] = {}
        self._asked: dict[str, int] = {}
        self._sent: dict[str, frozenset[str]] = {}
        self._config = ConfigRecord()
        self._round = 0
        self._control: ArrayRecord | None = None

    def begin(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> None:
        """Begin a round.

        Parameters
        ----------
        server_round : int
            From 1.
        arrays : flwr.app.ArrayRecord
            The whole adapter, packed.
        config : flwr.app.ConfigRecord
            The number of rounds, and whatever else every client is sent.
        """
        self._round, self._config = server_round, config
        self._records, self._arrays, self._contents = {0: arrays}, {}, {}
        tensors = self.view(0).adapter_tensors()
        sent_up = self._exchange.sent_up(list(tensors), frozenset(self._terms.frozen))
        control = self._method.control({name: tensors[name] for name in sent_up})
        self._control = to_record(control) if control else None

    def content(self, client: str, rank: int) -> RecordDict:
        """Return what a client is sent; clients of a rank that lack the same share one object."""
        self._asked[client] = rank
        self._sent[client] = frozenset(self._held_by(rank).lacking(client, self._exchange))
        return self._content_of(client)

    def everything(self, client: str) -> RecordDict:
        """Return all that a client can be sent, which turned out not to hold what it was believed to."""
        rank = self._asked[client]
        self._sent[client] = frozenset(self._held_by(rank).holds_others(client, self._exchange))
        return self._content_of(client)

    def asked(self, client: str) -> int:
        """Return the rank that a client was sent in this round."""
        return self._asked[client]

    def view(self, rank: int) -> AdapterState:
        """Return the adapter as clients of a rank get it."""
        if rank not in self._views:
            self._views[rank] = self._method.view(self._views[0], rank, self._terms.scaling_at(rank))
        return self._views[rank]

    def delivered(self, client: str) -> None:
        """Note that a client has trained with what it was sent last."""
        self._held_by(self._asked[client]).delivered(client, self._sent[client], self._exchange)

    def update(self, state: AdapterState) -> None:
        """Take over the adapter that the next round begins with."""
        self._views = {0: state}
        for rank, held in self._held.items():
            held.update(self.view(rank).to_tensors())

    def memory(self) -> dict[str, Any]:
        """Return which client is known to hold what, by rank, as plain JSON; nothing of it where clients are protected.

        A client that does not hold what it drew from the seed then says so once more, and is sent everything as before.
        """
        nobody: dict[str, Any] = {"known": []} if self._hides_clients else {}
        return {str(rank): held.memory() | nobody for rank, held in self._held.items()}

    def recall(self, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Take up an adapter, and what `memory` returned; the method has recalled its own before."""
        self._views, self._held = {0: state}, {}
        for rank, held in memory.items():
            self._held_by(int(rank)).recall(held)

    @property
    def _exchange(self) -> Exchange:
        exchange = self._method.exchange(self._round)
        return exchange.forgotten() if self._hides_clients else exchange

    def _held_by(self, rank: int) -> Deliveries:
        if rank not in self._held:
            tensors = self.view(rank).to_tensors()
            self._held[rank] = Deliveries(tensors, self._method.exchange(1), frozenset(self._terms.frozen))
        return self._held[rank]

    def _arrays_of(self, rank: int, names: frozenset[str]) -> ArrayRecord:
        if (rank, names) not in self._arrays:
            if rank not in self._records:
                self._records[rank] = to_record(self.view(rank).to_tensors())
            sent = {name: array for name, array in self._records[rank].items() if name in names}
            self._arrays[rank, names] = ArrayRecord(sent)
        return self._arrays[rank, names]

    def _content_of(self, client: str) -> RecordDict:
        rank, names = self._asked[client], self._sent[client]
        made_in = 0 if self._control is None else self._method.control_made_in(client)
        if (rank, names, made_in) not in self._contents:
            exchange = self._exchange
            order = TrainOrder(
                self._arrays_of(rank, names),
                server_round=self._round,
                num_rounds=int(self._config[NUM_ROUNDS]),  # type: ignore[arg-type]
                scaling=self._terms.scaling_at(rank),
                held_hash=self._held_by(rank).held_hash(names, exchange),
                rank=rank,
                draw=exchange.draw,
                trained=exchange.trained,
                personal=exchange.personal,
                kept=exchange.kept,
                settings={**self._config, **self._method.client_settings(rank)},
                control=self._control,
                control_made_in=made_in,
            )
            self._contents[rank, names, made_in] = order.to_record()
        return self._contents[rank, names, made_in]
