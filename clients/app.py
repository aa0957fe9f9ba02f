"""The Flower ClientApp: the very same code under a simulation's grid and on a SuperNode.

A message brings the adapter and a few numbers; base model, tokenizer and rows are resident (`fedpeft.resident`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.pruning import Tail
from fedpeft.adapters.state import PrivacyClaim, Role, TrainMetrics, fingerprint, role_of
from fedpeft.clients.control import Control
from fedpeft.clients.privacy import (
    SITE_EPSILON,
    Permission,
    SitePolicyError,
    check_site,
    note_open_training,
    permit,
)
from fedpeft.clients.received import decoded
from fedpeft.clients.rows import DATA, ClientRows, client_rows, site_name
from fedpeft.config import RunConfig, Scalar
from fedpeft.deployment import run_config
from fedpeft.errors import DeploymentError, MessageError
from fedpeft.models import num_threads
from fedpeft.privacy.levels import level_of
from fedpeft.resident import Resident, resident
from fedpeft.training.local import LocalResult, Turn, num_steps, train_locally
from fedpeft.training.prefix import feeding
from fedpeft.training.steps import Additions
from fedpeft.wire import Identity, ShortAnswer, TrainAnswer, TrainOrder, to_record, to_tensors

TRUST_REMOTE_CODE = "trust-remote-code"  # key of the node's own config: a server cannot decide this for a site
# records of a client's own state: tensors that never leave it, and tensors that it need not be sent again
OWN_PERSONAL, OWN_KEPT = "personal", "kept"

app = ClientApp()


WITHHELD = "Withheld"


class ClientFailedError(Exception):
    """Something went wrong at a client; mostly says the class only, since texts of errors may carry rows."""


def withhold_error_text(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let nothing but an error's class leave the client; the cause stays in the site's own log.

    What a site demands is told whole, and what is wrong with an order, since they depend on configurations and on no
    row. Of the rest, where a site has a privacy budget, not even the class: what makes rows fail, and how, would tell
    of them.
    """
    try:
        check_site(run_config_of(context), context.node_config)
        return call_next(message, context)
    except Exception as error:
        name = type(error).__name__
        if isinstance(error, SitePolicyError | MessageError):
            raise ClientFailedError(f"{name}: {error}") from error
        raise ClientFailedError(WITHHELD if SITE_EPSILON in context.node_config else name) from error


@app.query(mods=[withhold_error_text])
def tell_name(message: Message, context: Context) -> Message:
    """Say which client this node is, without a look at rows of its own."""
    name = site_name(context.node_config)
    if name is None:
        name = client_rows(_home(context), context.node_config).client_id
    return Message(Identity(name).to_record(), reply_to=message)


@app.train(mods=[withhold_error_text])
def train(message: Message, context: Context) -> Message:
    """Train the adapter that the order brings, and send back what was trained."""
    ready = prepare(message, context)
    if isinstance(ready, ShortAnswer):
        return Message(ready.to_record(), reply_to=message)
    order, adapted = ready.order, ready.home.adapted
    adapted.load(ready.start.tensors, order.scaling)
    tail = Tail.of(adapted, order.settings)
    result = _train(ready, None if tail is None else tail.loss)
    content = finish(ready, adapted.tensors([*ready.trained, *ready.start.personal]), result, context.state, tail)
    return Message(content, reply_to=message)


@dataclass(frozen=True)
class Ready:
    """An order that passed every check, and all that its training takes.

    Parameters
    ----------
    run : RunConfig
        The run.
    home : Resident
        Model and rows.
    order : TrainOrder
        What is asked.
    start : Start
        The tensors that the round begins with.
    rows : ClientRows
        The client's.
    permission : Permission or None
        How to train under record-level privacy.
    control : Control or None
        What corrects the steps, where the order brings a control variate.
    """

    run: RunConfig
    home: Resident
    order: TrainOrder
    start: Start
    rows: ClientRows
    permission: Permission | None
    control: Control | None = None

    @cached_property
    def trained(self) -> list[str]:
        """Names of what is trained."""
        return _trained(self.order, self.home.adapted)

    @cached_property
    def turn(self) -> Turn:
        """Whose round it is, and which; under privacy its dropout's seed is the first that is drawn."""
        run, order, rows, permission = self.run, self.order, self.rows, self.permission
        return Turn(
            run.run.seed,
            rows.client_id,
            order.server_round,
            order.num_rounds,
            rows.num_examples,
            None if permission is None else permission.randomness.seed(),
        )


def prepare(message: Message, context: Context) -> Ready | ShortAnswer:
    """Read an order and check it, charge what it costs; or say why it is not followed."""
    home, run = _home(context), run_config_of(context)
    order, adapted = TrainOrder.from_record(message.content), home.adapted
    start = Start.of(order, adapted, context.state)
    if start.held_hash(adapted) != order.held_hash:
        return ShortAnswer.NEEDS_ARRAYS
    sent_back = [name for name in _trained(order, adapted) if name not in start.personal]
    control = Control.of(order, {name: adapted.initial[name] for name in sent_back}, context.state)
    rows = client_rows(home, context.node_config)
    permission, level = None, level_of(run.privacy)
    if level.clients_add_noise:
        with num_threads(run.simulation.threads_per_worker), feeding(adapted.model, run):
            level.check_model(home)  # a model that mixes rows is refused before anything is charged
        permission = permit(order, context, home, rows, run)
        if permission is None:
            return ShortAnswer.BUDGET_SPENT
    else:
        note_open_training(order, context, rows, num_steps(run.train, rows.num_examples))
    return Ready(run, home, order, start, rows, permission, control)


def finish(
    ready: Ready, tensors: Mapping[str, Tensor], result: LocalResult, state: RecordDict, tail: Tail | None = None
) -> RecordDict:
    """Keep what a client keeps, and return what it sends back.

    Parameters
    ----------
    ready : Ready
        What was trained, and how.
    tensors : mapping of str to Tensor
        As they are after training, on the CPU: what was trained, and what is personal.
    result : LocalResult
        How it went.
    state : RecordDict
        The client's own.
    tail : Tail, optional
        Of the ranks that the client may leave out.
    """
    adapted, start, permission = ready.home.adapted, ready.start, ready.permission
    if kept := _names(adapted, ready.order.kept):
        state[OWN_KEPT] = to_record({name: start.tensors[name].to(adapted.parameter(name).dtype) for name in kept})
    if start.personal:
        state[OWN_PERSONAL] = to_record({name: tensors[name] for name in start.personal})
    update = {name: tensors[name] for name in ready.trained if name not in start.personal}
    if tail is not None:
        update = tail.left_out(update)
    claim = None if permission is None else permission.claim
    if ready.control is not None:
        ready.control.keep(start.tensors, update, result.rate_sum, state)
    return _answer(ready, update, result, claim).to_record()


@dataclass(frozen=True)
class Start:
    """The tensors that a client's round begins with, by where they come from.

    Parameters
    ----------
    sent : mapping of str to Tensor
        What the order brings.
    held : mapping of str to Tensor
        What the server believes to be here: kept from earlier rounds, or drawn from the run's seed.
    personal : mapping of str to Tensor
        What the server never sees.
    """

    sent: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    personal: Mapping[str, Tensor]

    @classmethod
    def of(cls, order: TrainOrder, adapted: AdaptedModel, state: RecordDict) -> Self:
        """Put together what an order brings and what the client has."""
        sent = decoded(order.arrays)
        names = _names(adapted, order.personal) + list(adapted.personal)
        personal = _stored(state, OWN_PERSONAL, adapted.initial, names)
        drawn = adapted.drawn(order.draw, order.rank)
        return cls(
            sent, _stored(state, OWN_KEPT, drawn, adapted.initial.keys() - sent.keys() - personal.keys()), personal
        )

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The whole adapter, and changes of the base."""
        return {**self.sent, **self.held, **self.personal}

    def held_hash(self, adapted: AdaptedModel) -> str:
        """Return the fingerprint of what is held, empty for nothing."""
        held = self.held
        if held.keys() == set(adapted.frozen) and all(held[name] is adapted.initial[name] for name in held):
            return adapted.frozen_hash  # computed once, not for every message
        return fingerprint(held) if held else ""


def _train(ready: Ready, penalty: Callable[[], Tensor] | None) -> LocalResult:
    """Train the loaded adapter on the client's rows, by the mechanism of its permission if it needs one."""
    run, home, rows, permission = ready.run, ready.home, ready.rows, ready.permission
    private = None
    if permission is not None:
        level, mechanism = level_of(run.privacy), permission.mechanism
        private = level.gradients(home, rows.split, rows.indices, mechanism, permission.randomness)
    with num_threads(run.simulation.threads_per_worker), feeding(home.adapted.model, run):
        return train_locally(
            home.adapted,
            rows.split,
            rows.indices,
            run.train,
            ready.turn,
            names=ready.trained,
            additions=Additions(penalty, {} if ready.control is None else ready.control.correction()),
            private=private,
        )


def _answer(ready: Ready, update: Mapping[str, Tensor], result: LocalResult, claim: PrivacyClaim | None) -> TrainAnswer:
    """Return what a client sends back: under privacy neither its loss, nor how long it took.

    Where row counts are not public, all clients weigh alike.
    """
    run, rows, control, level = ready.run, ready.rows, ready.control, level_of(ready.run.privacy)
    metrics = TrainMetrics(result.steps, spent=claim)
    if control is not None:
        metrics = replace(metrics, rate_sum=result.rate_sum or None, control_lost=control.is_lost)
    if level.tells_metrics(run.privacy):
        metrics = replace(metrics, loss=result.loss, seconds=result.seconds)
    return TrainAnswer(to_record(update), rows.num_examples if level.weighs_rows(run.privacy) else 1, metrics)


@lru_cache(maxsize=4)
def _parsed(flat: tuple[tuple[str, Scalar], ...]) -> RunConfig:
    return run_config(dict(flat))


def run_config_of(context: Context) -> RunConfig:
    """Return the run that a context's configuration is of."""
    return _parsed(tuple(sorted(context.run_config.items())))


def _home(context: Context) -> Resident:
    config = run_config_of(context)
    if config.model.trust_remote_code and not context.node_config.get(TRUST_REMOTE_CODE, False):
        raise DeploymentError(
            "the run asks for model.trust_remote_code, and this site has not agreed to it by "
            "--node-config 'trust-remote-code=true'"
        )
    if DATA in context.node_config:  # a site of its own, to which the server sends what is in the folder
        start = {"start": None, "start_sha256": None}
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update=start)})
    return resident(config)


def _trained(order: TrainOrder, adapted: AdaptedModel) -> list[str]:
    return [name for name in _names(adapted, order.trained) if name in adapted.trained]


def _names(adapted: AdaptedModel, roles: frozenset[Role]) -> list[str]:
    return [name for name in adapted.initial if role_of(name) in roles]


def _stored(state: RecordDict, record: str, drawn: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the client's own copy of tensors, or else what is drawn from the run's seed."""
    own = to_tensors(state.array_records[record]) if record in state else {}
    return {name: own.get(name, drawn[name]) for name in sorted(names)}
