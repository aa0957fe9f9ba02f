"""The Flower ClientApp: the very same code under a simulation's grid and on a SuperNode.

A message brings the adapter and a few numbers; base model, tokenizer and rows are resident (`fedpeft.resident`).
"""

from __future__ import annotations

from functools import lru_cache

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedpeft.clients.rows import client_rows
from fedpeft.config import RunConfig, Scalar
from fedpeft.deployment import run_config
from fedpeft.errors import AdapterError, DeploymentError
from fedpeft.models import num_threads
from fedpeft.resident import Resident, resident
from fedpeft.state import fingerprint
from fedpeft.training import train_locally
from fedpeft.wire import (
    ARRAYS,
    CLIENT_ID,
    CONFIG,
    FROZEN,
    FROZEN_HASH,
    METRICS,
    NEEDS_FROZEN,
    NUM_EXAMPLES,
    NUM_ROUNDS,
    ROUND,
    SCALING,
    SECONDS,
    STEPS,
    TRAIN_LOSS,
    to_record,
    to_tensors,
)

TRUST_REMOTE_CODE = "trust-remote-code"  # key of the node's own config: a server cannot decide this for a site
PERSONAL = "personal"  # record of a client's own state: tensors that never leave it

app = ClientApp()


class ClientFailedError(Exception):
    """Something went wrong at a client; says the class of the error only, since texts of errors may carry rows."""


def withhold_error_text(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let nothing but an error's class leave the client; the cause stays in the site's own log."""
    try:
        return call_next(message, context)
    except Exception as error:
        raise ClientFailedError(type(error).__name__) from error


@app.query(mods=[withhold_error_text])
def identify(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    rows = client_rows(_home(context), context.node_config)
    return Message(RecordDict({CONFIG: ConfigRecord({CLIENT_ID: rows.client_id})}), reply_to=message)


@app.train(mods=[withhold_error_text])
def train(message: Message, context: Context) -> Message:
    """Train the adapter that the message brings, and send back what was trained."""
    home = _home(context)
    settings = message.content.config_records[CONFIG]
    frozen = _frozen(home, message)
    if frozen is None:
        return Message(RecordDict({CONFIG: ConfigRecord({NEEDS_FROZEN: True})}), reply_to=message)
    adapted, config = home.adapted, home.config
    personal = {name: adapted.initial[name] for name in adapted.personal}
    if PERSONAL in context.state:
        personal = to_tensors(context.state.array_records[PERSONAL])
    sent = _decoded(message.content.array_records[ARRAYS])
    if lacking := set(adapted.trained) - set(adapted.personal) - sent.keys():
        raise AdapterError(f"the message lacks {min(lacking)}")
    adapted.load({**sent, **frozen, **personal}, float(settings[SCALING]))  # type: ignore[arg-type]
    rows = client_rows(home, context.node_config)
    with num_threads(_run_config(context).simulation.threads_per_worker):
        result = train_locally(
            adapted,
            rows.split,
            rows.indices,
            config.train,
            seed=config.run.seed,
            client_id=rows.client_id,
            server_round=int(settings[ROUND]),  # type: ignore[arg-type]
            num_rounds=int(settings[NUM_ROUNDS]),  # type: ignore[arg-type]
        )
    if adapted.personal:
        context.state[PERSONAL] = to_record(adapted.tensors(adapted.personal))
    trained = adapted.tensors([name for name in adapted.trained if name not in adapted.personal])
    metrics = MetricRecord(
        {NUM_EXAMPLES: len(rows.indices), TRAIN_LOSS: result.loss, STEPS: result.steps, SECONDS: result.seconds}
    )
    return Message(RecordDict({ARRAYS: to_record(trained), METRICS: metrics}), reply_to=message)


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


def _frozen(home: Resident, message: Message) -> dict[str, Tensor] | None:
    """Return the frozen tensors to train with: its own draw if that has the server's hash, else those sent."""
    wanted = str(message.content.config_records[CONFIG].get(FROZEN_HASH, ""))
    own = {name: home.adapted.initial[name] for name in home.adapted.frozen}
    if wanted == home.adapted.frozen_hash:
        return own
    if FROZEN not in message.content.array_records:
        return None
    sent = to_tensors(message.content.array_records[FROZEN])
    if fingerprint(sent) != wanted:
        raise AdapterError("the frozen tensors sent are not those whose hash was announced")
    return sent


_last: tuple[ArrayRecord, dict[str, Tensor]] | None = None


def _decoded(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack the arrays once for all clients of a round that this process trains: they share one record object."""
    global _last
    if _last is None or _last[0] is not record:
        _last = (record, to_tensors(record))
    return _last[1]
