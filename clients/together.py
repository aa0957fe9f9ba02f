"""Many clients of a simulation answered at once: every message checked by itself, and the trainings done in one.

Whoever cannot be trained with others is left to be answered alone, by `fedpeft.clients.app`, and so are all of a
training that fails: what is wrong with one client spoils no other's answer. Nothing is charged here: under record-level
privacy only messages that a simulation's driver has charged already are trained together.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.adapters.pruning import PRUNED_RANK
from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX, Role, role_of
from fedpeft.clients.app import Ready, finish, prepare, run_config_of
from fedpeft.clients.privacy import LEDGER_FILE, check_site
from fedpeft.clients.verdicts import Verdict, simulated
from fedpeft.config import TrainConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.models import num_threads
from fedpeft.privacy.levels import level_of
from fedpeft.resident import Resident
from fedpeft.training.batched.together import (
    JointGradients,
    JointPlainGradients,
    Part,
    Trained,
    train_together,
    why_not,
)
from fedpeft.training.prefix import feeding
from fedpeft.wire import ShortAnswer

# what a forward pass holds at most: its activations grow with rows, their tokens and the width of the model
MOST_TOKENS = 2**14
PATCH = 3 * 16 * 16  # numbers of an image that make a token

log = logging.getLogger(__name__)
Job = tuple[Message, Context, Verdict | None]


@dataclass(frozen=True)
class _Member:
    """A client of a bundle that may be trained with others."""

    place: int
    ready: Ready
    part: Part
    state: RecordDict
    tokens: int  # of a step


def answer_together(jobs: Sequence[Job]) -> list[RecordDict | None]:
    """Answer messages at once, as far as that can be done.

    Parameters
    ----------
    jobs : sequence of tuple of Message, Context and Verdict or None
        Of different clients; what a client keeps is put into its context's state.

    Returns
    -------
    list of RecordDict or None
        Contents of the replies, in the order of the messages; None for those that are to be answered alone.
    """
    answers: list[RecordDict | None] = [None] * len(jobs)
    groups: dict[Hashable, list[_Member]] = defaultdict(list)
    for place, (message, context, verdict) in enumerate(jobs):
        try:
            with simulated(verdict):
                found = _member(place, message, context, verdict)
        except Exception as error:  # it comes again where the message is answered alone, and is told there
            log.debug("a message of a bundle is answered alone (%s)", type(error).__name__)
            continue
        if isinstance(found, _Member):
            groups[_key(found)].append(found)
        elif found is not None:
            answers[place] = found.to_record()
    for group in groups.values():
        for members in _fitting(group):
            if len(members) > 1:
                _answer_group(members, answers)
    return answers


def _answer_group(members: Sequence[_Member], answers: list[RecordDict | None]) -> None:
    try:
        trained = _train(members)
    except Exception as error:  # of its text no more than its class, since it may quote rows
        name = type(error).__name__
        log.warning("training %d clients together failed (%s); they are trained one by one", len(members), name)
        return
    for member, each in zip(members, trained, strict=True):
        tensors = {**member.part.tensors, **each.tensors}
        answers[member.place] = finish(member.ready, tensors, each.result, member.state)


def _member(place: int, message: Message, context: Context, verdict: Verdict | None) -> _Member | ShortAnswer | None:
    """Check a message as it is checked alone; None where it must be answered alone."""
    run = run_config_of(context)
    check_site(run, context.node_config)
    if context.node_config.get(LEDGER_FILE) or (level_of(run.privacy).clients_add_noise and verdict is None):
        return None  # which has something written down before it trains
    ready = prepare(message, context)
    if isinstance(ready, ShortAnswer):
        return ready
    home, start, order = ready.home, ready.start, ready.order
    if PRUNED_RANK in order.settings or ready.control is not None or home.once(_why_not, run.train):
        return None
    own = {name: tensor for name, tensor in start.tensors.items() if role_of(name) is not Role.BASE}
    if not _fits(own, home.adapted.initial):
        return None  # which says what is wrong with it
    part = Part(own, order.scaling, ready.rows.indices, ready.turn)
    return _Member(
        place, ready, part, context.state, run.train.batch_size * longest(ready.rows.split, ready.rows.indices)
    )


def _why_not(home: Resident, train: TrainConfig) -> str:
    return why_not(home.adapted, home.own_layers, train)


def _fits(own: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> bool:
    """Tell whether an adapter is of the shapes that it began with, but for its ranks."""
    if own.keys() != initial.keys():
        return False
    free = {Role.A: slice(1, None), Role.B: slice(0, 1)}
    kept = {name: free.get(role_of(name), slice(None)) for name in own}
    alike = all(own[name].ndim == initial[name].ndim for name in own)
    alike = alike and all(own[name].shape[kept[name]] == initial[name].shape[kept[name]] for name in own)
    pairs = [(name, name.removesuffix(A_SUFFIX) + B_SUFFIX) for name in own if role_of(name) is Role.A]
    return alike and all(own[a].shape[0] == own[b].shape[1] for a, b in pairs)


def longest(split: EncodedSplit, rows: NDArray[np.int64]) -> int:
    """Return the tokens of the longest of some rows; of an image, patches of the usual size."""
    if split.image_shape is not None:
        return 1 + math.prod(split.image_shape) // PATCH
    return int(split.lengths[rows].max()) if len(rows) else 0


def _key(member: _Member) -> Hashable:
    """Return what clients must share to be trained together."""
    ready, part = member.ready, member.part
    base = tuple((name, id(t)) for name, t in ready.start.tensors.items() if role_of(name) is Role.BASE)
    rates = part.rates(ready.run.train)
    return id(ready.run), id(ready.home), id(ready.rows.split), tuple(ready.trained), base, rates


def _fitting(members: Sequence[_Member]) -> Iterator[list[_Member]]:
    """Cut a group where its rows would be too many for one forward pass."""
    taken: list[_Member] = []
    for member in members:
        widest = max(each.tokens for each in [*taken, member])
        if taken and widest * (len(taken) + 1) > MOST_TOKENS:
            yield taken
            taken = []
        taken.append(member)
    yield taken


def _train(members: Sequence[_Member]) -> list[Trained]:
    first, parts = members[0].ready, [member.part for member in members]
    home, run = first.home, first.run
    home.adapted.load(first.start.tensors, first.order.scaling)  # changes of the base are one and the same for all
    one = num_threads(run.simulation.threads_per_worker)
    with one, feeding(home.adapted.model, run), torch.enable_grad():
        return train_together(home.adapted, run.train, parts, first.trained, _gradients(members))


def _gradients(members: Sequence[_Member]) -> JointGradients:
    first = members[0].ready
    home, run, split = first.home, first.run, first.rows.split
    permissions = [member.ready.permission for member in members]
    given = [permission for permission in permissions if permission is not None]
    if not given:
        parts = [member.part for member in members]
        return JointPlainGradients(home.adapted, home.own_layers, split, run.train, parts)
    return level_of(run.privacy).joint_gradients(
        home,
        split,
        [member.part.rows for member in members],
        [permission.mechanism for permission in given],
        [permission.randomness for permission in given],
    )
