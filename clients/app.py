"""The Flower ClientApp: the very same code under a simulation's grid and on a SuperNode.

A message brings the adapter and a few numbers; base model, tokenizer and rows are resident (`fedpeft.resident`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.draws import first_ranks
from fedpeft.adapters.pruning import Tail
from fedpeft.adapters.state import fingerprint, role_of
from fedpeft.clients.privacy import (
    SITE_EPSILON,
    Permission,
    SitePolicyError,
    check_site,
    note_open_training,
    permit,
)
from fedpeft.clients.rows import ClientRows, client_rows, site_name
from fedpeft.config import RunConfig, Scalar
from fedpeft.deployment import run_config
from fedpeft.errors import DeploymentError
from fedpeft.models import num_threads
from fedpeft.resident import Resident, resident
from fedpeft.training.local import Gradients, LocalResult, Turn, num_steps, train_locally
from fedpeft.wire import (
    ARRAYS,
    BUDGET_SPENT,
    CLIENT_ID,
    CONFIG,
    DRAW,
    HELD_HASH,
    KEPT,
    METRICS,
    NEEDS_ARRAYS,
    NUM_EXAMPLES,
    NUM_ROUNDS,
    PERSONAL,
    PRUNED_RANK,
    RANK,
    ROUND,
    SCALING,
    SECONDS,
    STEPS,
    TAIL_PENALTY,
    TRAIN_LOSS,
    TRAINED,
    to_record,
    to_tensors,
)

TRUST_REMOTE_CODE = "trust-remote-code"  # key of the node's own config: a server cannot decide this for a site
# records of a client's own state: tensors that never leave it, and tensors that it need not be sent again
OWN_PERSONAL, OWN_KEPT = "personal", "kept"

app = ClientApp()


WITHHELD = "Withheld"


class ClientFailedError(Exception):
    """Something went wrong at a client; mostly says the class only, since texts of errors may carry rows."""


def withhold_error_text(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let nothing but an error's class leave the client; the cause stays in the site's own log.

    What a site demands is told whole, since it depends on configurations and on no row. Of the rest, where a site has
    a privacy budget, not even the class: what makes rows fail, and how, would tell of them.
    """
    try:
        check_site(_run_config(context), context.node_config)
        return call_next(message, context)
    except Exception as error:
        if isinstance(error, SitePolicyError):
            raise ClientFailedError(f"{SitePolicyError.__name__}: {error}") from error
        told = SITE_EPSILON not in context.node_config
        raise ClientFailedError(type(error).__name__ if told else WITHHELD) from error


@app.query(mods=[withhold_error_text])
def identify(message: Message, context: Context) -> Message:
    """Say which client this node is, without a look at rows of its own."""
    name = site_name(context.node_config)
    if name is None:
        name = client_rows(_home(context), context.node_config).client_id
    return Message(RecordDict({CONFIG: ConfigRecord({CLIENT_ID: name})}), reply_to=message)


@app.train(mods=[withhold_error_text])
def train(message: Message, context: Context) -> Message:
    """Train the adapter that the message brings, and send back what was trained."""
    home = _home(context)
    adapted, config = home.adapted, home.config
    settings = message.content.config_records[CONFIG]
    sent = _decoded(message.content.array_records[ARRAYS])
    personal = _stored(
        context, OWN_PERSONAL, adapted.initial, _names(home, settings, PERSONAL) + list(adapted.personal)
    )
    drawn = adapted.drawn(int(settings[DRAW]), int(settings[RANK]))  # type: ignore[arg-type]
    held = _stored(context, OWN_KEPT, drawn, adapted.initial.keys() - sent.keys() - personal.keys())
    if _fingerprint(home, held) != settings[HELD_HASH]:
        return Message(RecordDict({CONFIG: ConfigRecord({NEEDS_ARRAYS: True})}), reply_to=message)
    run = _run_config(context)
    rows = client_rows(home, context.node_config)
    permission = None
    if run.privacy.level == "record":
        with num_threads(run.simulation.threads_per_worker):
            _ = home.row_engine  # a model that mixes rows is refused before anything is charged
        permission = permit(message, context, home, rows, run)
        if permission is None:
            return Message(RecordDict({CONFIG: ConfigRecord({BUDGET_SPENT: True})}), reply_to=message)
    else:
        note_open_training(message, context, rows, num_steps(config.train, rows.num_examples))
    adapted.load({**sent, **held, **personal}, float(settings[SCALING]))  # type: ignore[arg-type]
    if kept := _names(home, settings, KEPT):
        context.state[OWN_KEPT] = to_record(adapted.tensors(kept))
    trained = [name for name in _names(home, settings, TRAINED) if name in adapted.trained]
    tail = _tail(adapted, settings)
    tail_before = float(tail.size().detach()) if tail else 0.0
    with num_threads(run.simulation.threads_per_worker):
        result = train_locally(
            adapted,
            rows.split,
            rows.indices,
            config.train,
            Turn(
                config.run.seed,
                rows.client_id,
                int(settings[ROUND]),  # type: ignore[arg-type]
                int(settings[NUM_ROUNDS]),  # type: ignore[arg-type]
                rows.num_examples,
                None if permission is None else permission.randomness.seed(),
            ),
            names=trained,
            penalty=tail.loss if tail else None,
            private=None if permission is None else _private(home, rows, run, permission),
        )
    if personal:
        context.state[OWN_PERSONAL] = to_record(adapted.tensors(personal))
    sent_up = adapted.tensors([name for name in trained if name not in personal])
    if tail and float(tail.size().detach()) < tail_before:
        sent_up = first_ranks(sent_up, tail.kept)
    metrics = _told(run, rows, result, {} if permission is None else permission.told)
    return Message(RecordDict({ARRAYS: to_record(sent_up), METRICS: metrics}), reply_to=message)


def _private(
    home: Resident, rows: ClientRows, run: RunConfig, permission: Permission
) -> Callable[[torch.optim.Optimizer], Gradients]:
    """Return how to make private gradients, on hooks that the resident model keeps."""
    from fedpeft.privacy.dp_sgd import PrivateGradients  # which loads Opacus

    privacy = run.privacy
    return lambda optimizer: PrivateGradients(
        home.row_engine,
        rows.split,
        rows.indices,
        permission.mechanism,
        permission.randomness,
        optimizer,
        physical=home.physical_rows,
        precision=run.train.precision,
        shuffled=run.train.batch_size if privacy.sampling == "shuffle" else None,
    )


def _told(run: RunConfig, rows: ClientRows, result: LocalResult, spent: Mapping[str, float]) -> MetricRecord:
    """Return what a client says beside its tensors: under privacy neither its loss, nor how long it took.

    Client-level privacy, and record-level privacy without public counts, weigh all clients alike.
    """
    privacy = run.privacy
    weighs_rows = privacy.level == "none" or (privacy.level == "record" and privacy.public_counts)
    metrics: dict[str, int | float | list[int] | list[float]] = {
        NUM_EXAMPLES: rows.num_examples if weighs_rows else 1,
        STEPS: result.steps,
        **spent,
    }
    if privacy.level == "none" or privacy.release_metrics:
        metrics |= {TRAIN_LOSS: result.loss, SECONDS: result.seconds}
    return MetricRecord(metrics)


@lru_cache(maxsize=4)
def _parsed(flat: tuple[tuple[str, Scalar], ...]) -> RunConfig:
    return run_config(dict(flat))


def _run_config(context: Context) -> RunConfig:
    return _parsed(tuple(sorted(context.run_config.items())))


def _home(context: Context) -> Resident:
    config = _run_config(context)
    if config.model.trust_remote_code and not context.node_config.get(TRUST_REMOTE_CODE, False):
        raise DeploymentError(
            "the run asks for model.trust_remote_code, and this site has not agreed to it by "
            "--node-config 'trust-remote-code=true'"
        )
    return resident(config)


def _names(home: Resident, settings: ConfigRecord, key: str) -> list[str]:
    """Return the names of the tensors whose roles a message lists."""
    roles = settings[key]
    assert isinstance(roles, list)
    return [name for name in home.adapted.initial if role_of(name) in roles]


def _tail(adapted: AdaptedModel, settings: ConfigRecord) -> Tail | None:
    """Return the ranks that the server would rather have pruned, if it says so."""
    if PRUNED_RANK not in settings:
        return None
    return Tail.of(adapted, int(settings[PRUNED_RANK]), float(settings[TAIL_PENALTY]))  # type: ignore[arg-type]


def _stored(context: Context, record: str, drawn: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the client's own copy of tensors, or else what is drawn from the run's seed."""
    own = to_tensors(context.state.array_records[record]) if record in context.state else {}
    return {name: own.get(name, drawn[name]) for name in sorted(names)}


def _fingerprint(home: Resident, held: Mapping[str, Tensor]) -> str:
    drawn = home.adapted
    if held.keys() == set(drawn.frozen) and all(held[name] is drawn.initial[name] for name in held):
        return drawn.frozen_hash  # computed once, not for every message
    return fingerprint(held) if held else ""


_last: tuple[ArrayRecord, dict[str, Tensor]] | None = None


def _decoded(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack the arrays once for all clients of a round that this process trains: they share one record object."""
    global _last
    if _last is None or _last[0] is not record:
        _last = (record, to_tensors(record))
    return _last[1]
