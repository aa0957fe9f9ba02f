"""Who the clients are, and what they answer: which replies are good, who is asked again, and what counts as a fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedpeft.adapters.state import BASE_EARLIER
from fedpeft.errors import BudgetSpentError, DeploymentError, MessageError
from fedpeft.strategies.rounds.outgoing import Outgoing
from fedpeft.strategies.rounds.report import Fault, RoundReport, error_class, in_order
from fedpeft.wire import Identity, ShortAnswer, TrainAnswer, value_bytes

SIZES = 16  # of records that are kept in mind


def known_clients(grid: Grid, client_ids: dict[int, str], timeout: float | None) -> dict[int, str]:
    """Return the client id of each node that is there, asking those that are new.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Knows the nodes.
    client_ids : dict of int to str
        Those that are known; new ones are added.
    timeout : float or None
        Seconds to wait for an answer.

    Raises
    ------
    DeploymentError
        A node that cannot say which client it is, or two that are the same.
    """
    nodes = list(grid.get_node_ids())
    asked = [node for node in nodes if node not in client_ids]
    if asked:
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in asked]
        for reply in grid.send_and_receive(messages, timeout=timeout):
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise MessageError(error_class(reply.error.reason or ""))
                client_ids[node] = Identity.from_record(reply.content).client_id
            except MessageError as error:
                raise DeploymentError(f"node {node} could not say which client it is: {error}") from None
    known = {node: client_ids[node] for node in nodes if node in client_ids}
    if len(set(known.values())) < len(known):
        twice = next(client for client in known.values() if list(known.values()).count(client) > 1)
        raise DeploymentError(
            f"two nodes call themselves client '{twice}'; give each its own client-id in --node-config."
        )
    return known


class Answers:
    """The answers to a round's messages.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Where a client is asked again.
    timeout : float or None
        Seconds to wait for that.
    outgoing : Outgoing
        What was sent to whom.
    client_ids : mapping of int to str
        By node id.
    stop_when_spent : bool
        Whether a client whose privacy budget is spent ends the run.
    """

    def __init__(
        self,
        grid: Grid,
        timeout: float | None,
        outgoing: Outgoing,
        client_ids: Mapping[int, str],
        stop_when_spent: bool = False,
    ) -> None:
        self._grid, self._timeout, self._outgoing = grid, timeout, outgoing
        self._client_ids, self._stop_when_spent = client_ids, stop_when_spent
        # bytes of records that many messages share; held, so that an id is not given to another
        self._sizes: dict[int, tuple[ArrayRecord, int, int]] = {}

    def good(
        self, sent: Iterable[Message], replies: Iterable[Message], report: RoundReport
    ) -> Iterator[tuple[str, TrainAnswer]]:
        """Yield good answers in message order, whatever order they came in, repeating a client that raised once.

        Parameters
        ----------
        sent : iterable of Message
            The round's messages.
        replies : iterable of Message
            The stream of first replies.
        report : RoundReport
            Counts bytes, faults, and how often each client was asked to train.

        Yields
        ------
        tuple of str and TrainAnswer
            Client id and answer, whose arrays nobody has looked at yet.

        Raises
        ------
        BudgetSpentError
            A client's privacy budget is spent, and the run is to end then.
        """
        for message, first in in_order(sent, replies):
            client = self._client_ids[message.metadata.dst_node_id]
            self._count_down(message, report)
            reply = first
            if _short(reply) is ShortAnswer.NEEDS_ARRAYS:
                message = self._again(message, self._outgoing.everything(client), report)
                reply = self._ask(message)
            raised = False
            if reply is not None and reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                raised = True
                report.asked[client] += 1
                message = self._again(message, message.content, report)
                reply = self._ask(message)
            if reply is None:
                report.faults.append(Fault(client, "no reply"))
            elif reply.has_error():
                reason = error_class(reply.error.reason or "no reason given")
                report.faults.append(Fault(client, f"{'raised twice' if raised else 'failed'}: {reason}", raised))
            elif _short(reply) is ShortAnswer.BUDGET_SPENT:
                self._out_of_budget(client, report)
            elif _short(reply) is ShortAnswer.NEEDS_ARRAYS:
                report.faults.append(Fault(client, "asks for tensors that it was sent"))
            else:
                self._outgoing.delivered(client)
                report.bytes_up += sum(
                    value_bytes(each) for each in reply.content.values() if isinstance(each, ArrayRecord)
                )
                try:
                    answer = TrainAnswer.from_record(reply.content)
                except MessageError as error:
                    report.faults.append(Fault(client, f"update refused: {error}"))
                else:
                    yield client, answer

    def _again(self, message: Message, content: RecordDict, report: RoundReport) -> Message:
        repeated = Message(content, message.metadata.dst_node_id, MessageType.TRAIN, group_id=message.metadata.group_id)
        self._count_down(repeated, report)
        return repeated

    def _ask(self, message: Message) -> Message | None:
        replies = list(self._grid.send_and_receive([message], timeout=self._timeout))
        return replies[0] if replies else None

    def _out_of_budget(self, client: str, report: RoundReport) -> None:
        """Count a client that may train no more."""
        report.exhausted += 1
        report.asked[client] -= 1
        report.faults.append(Fault(client, "its privacy budget allows no further training"))
        if self._stop_when_spent:
            raise BudgetSpentError(
                f"round {report.server_round}: the privacy budget of client {client} is spent, and "
                "privacy.on_exhausted = 'stop'. What was done before this round is saved."
            )

    def _count_down(self, message: Message, report: RoundReport) -> None:
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                if id(record) not in self._sizes:
                    if len(self._sizes) == SIZES:
                        self._sizes.clear()
                    down = value_bytes(record), value_bytes(record, lambda name: BASE_EARLIER in name)
                    self._sizes[id(record)] = record, *down
                _, all_of_it, catch_up = self._sizes[id(record)]
                report.bytes_down += all_of_it
                report.bytes_catch_up += catch_up


def _short(reply: Message | None) -> ShortAnswer | None:
    return ShortAnswer.from_record(reply.content) if reply is not None and reply.has_content() else None
