"""Whether clients of a run are trained together, how many at a time, and what that gains."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.state import Role, role_of
from fedpeft.clients.together import MOST_TOKENS, longest
from fedpeft.config import RunConfig, TrainConfig, cohort_size
from fedpeft.data.splits import EncodedSplit
from fedpeft.models import num_threads, torch_seed
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import seeded
from fedpeft.resident import Resident
from fedpeft.simulations.grids.bundles import Bundling
from fedpeft.training.batched.together import (
    JointGradients,
    JointPlainGradients,
    Part,
    Rows,
    Stacks,
    train_together,
    why_not,
)
from fedpeft.training.local import PlainGradients, Turn, train_locally

TOGETHER = "fedpeft.clients.together:answer_together"
SIZES = (8, 32)  # that a timing chooses among
GAIN = 1.2  # of a client's time, from which on it is worth other last digits
TURNS, STEPS = 3, 2
MIXED, LONGEST = ((0, 1, 4), (2, 3, 5)), (4, 5)  # of the rows that are made up: of all lengths, and the longest
TOLERANCE = {"fp32": 1e-2, "bf16": 0.2, "fp16": 0.05}  # of a gradient's norm


def batched(config: RunConfig, home: Resident) -> tuple[RunConfig, str]:
    """Fix how many clients a worker trains at a time: what a timing chooses must not change when a run goes on.

    Parameters
    ----------
    config : RunConfig
        Says ``simulation.batch_clients``.
    home : Resident
        Model and rows.

    Returns
    -------
    tuple of RunConfig and str
        The same with a number or "off", and what there is to say of it; mostly nothing.
    """
    asked = config.simulation.batch_clients
    if asked in ("off", 1):
        return config, ""
    key = f"simulation.batch_clients = {asked}"
    if why := _refusal(config, home):
        return _fixed(config, "off"), f"{key}: clients are trained one by one, since {why}"
    if asked != "auto":
        return config, ""
    size, gain = _choose(config, home)
    if size == 1:
        return _fixed(config, "off"), f"{key}: clients are trained one by one, which is as fast here"
    return _fixed(config, size), f"{key}: {size} clients are trained at a time, each in 1/{gain:.1f} of its time alone"


def bundling_of(config: RunConfig) -> Bundling:
    """Return how messages are bundled; ``simulation.batch_clients`` is fixed already."""
    size = config.simulation.batch_clients
    return Bundling(size, TOGETHER) if isinstance(size, int) else Bundling()


def _fixed(config: RunConfig, size: int | str) -> RunConfig:
    return config.model_copy(update={"simulation": config.simulation.model_copy(update={"batch_clients": size})})


def _refusal(config: RunConfig, home: Resident) -> str:
    """Say why clients of this run cannot be trained together; empty if they can."""
    if why := why_not(home.adapted, home.own_layers, config.train):
        return why
    with num_threads(config.simulation.threads_per_worker), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # of a private run, whose hooks sleep
        return _disagreement(config, home)


def _disagreement(config: RunConfig, home: Resident) -> str:
    """Try it: two clients of different adapters must have the gradients together that they have alone."""
    adapted, train = home.adapted, config.train
    split, held = _rows(config, home, MIXED)
    parts = _parts(config, home, held, 2)
    gradients = JointPlainGradients(adapted, home.own_layers, split, train, parts)
    stacks = Stacks.of(adapted, parts, range(2), adapted.trained)
    batches = [next(gradients.batches(index)) for index in range(2)]
    adapted.begin_training(())
    try:
        gradients.compute(stacks, batches)
        for index, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            adapted.load(part.tensors, part.scaling)
            for parameter in adapted.begin_training(adapted.trained):
                parameter.grad = None
            PlainGradients(adapted, split, part.rows, train, 1, part.turn.batches).compute(batch)
            for name, whole in stacks.trained.items():
                parameter = adapted.parameter(name)
                together = None if whole.grad is None else whole.grad[index]
                if not _alike(parameter.grad, together, TOLERANCE[train.precision]):
                    return f"the model gives '{name}' another gradient when two clients share a batch"
    except Exception as error:  # a model's own code raises whatever it likes
        return f"the model cannot be run for several at once ({type(error).__name__})"
    finally:
        for parameter in adapted.begin_training(adapted.trained):
            parameter.grad = None
        adapted.load(adapted.initial, adapted.scaling)
    return ""


def _alike(alone: Tensor | None, together: Tensor | None, tolerance: float) -> bool:
    if alone is None or together is None:
        return alone is together
    return bool((alone - together).norm() <= tolerance * alone.norm() + 1e-6)


def _rows(
    config: RunConfig, home: Resident, made_up: Sequence[Sequence[int]]
) -> tuple[EncodedSplit, Mapping[str, Rows]]:
    """Return rows, and which of them are whose.

    What is tried and timed goes on record. Of a private run it must tell of no row and no count: then rows are made up,
    see `public_rows`, and those of `made_up` are the clients'.
    """
    if config.privacy.is_private:
        from fedpeft.privacy.independence import public_rows  # which loads Opacus

        return home.once(public_rows), {str(client): np.array(rows) for client, rows in enumerate(made_up)}
    held = dict(zip(home.partition.client_ids, home.partition.indices, strict=True))
    return home.data.train, {client: rows for client, rows in held.items() if len(rows)} or held


def _parts(config: RunConfig, home: Resident, held: Mapping[str, Rows], count: int) -> list[Part]:
    """Return parts of so many clients, whose adapters were moved from where they begin."""
    clients = list(held)
    parts = []
    for number in range(count):
        with torch_seed(number):
            own = {
                name: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t
                for name, t in home.adapted.initial.items()
                if role_of(name) is not Role.BASE
            }
        client = clients[number % len(clients)]
        parts.append(Part(own, home.adapted.scaling, held[client], Turn(config.run.seed, client, 1, 1)))
    return parts


def _choose(config: RunConfig, home: Resident) -> tuple[int, float]:
    """Time a client's round alone and together; return the best size, 1 where it gains little, and what it gains."""
    federation, simulation = config.federation, config.simulation
    cohort = cohort_size(len(home.partition.client_ids), federation.fraction, federation.min_clients)
    split, held = _rows(config, home, [LONGEST * 2 * config.train.batch_size])
    tokens = config.train.batch_size * longest(split, np.arange(len(split)))
    best, gain = 1, GAIN
    with num_threads(simulation.threads_per_worker):
        alone = _fastest(lambda: _alone(config, home, split, _parts(config, home, held, 1)[0]))
        for size in SIZES:
            if size > cohort or size * tokens > MOST_TOKENS:
                break
            parts = _parts(config, home, held, size)
            times = alone * size / _fastest(lambda: _together(config, home, split, parts))  # noqa: B023
            if times > gain:
                best, gain = size, times
    home.adapted.load(home.adapted.initial, home.adapted.scaling)
    return best, gain


def _fastest(call: Callable[[], object]) -> float:
    """Return the least seconds of a few turns, after one that warms up."""
    call()
    seconds = []
    for _ in range(TURNS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _alone(config: RunConfig, home: Resident, split: EncodedSplit, part: Part) -> None:
    level, private = level_of(config.privacy), None
    if level.clients_add_noise:
        private = level.gradients(home, split, part.rows, _mechanism(config, part), seeded(0, "timing"))
    home.adapted.load(part.tensors, part.scaling)
    train_locally(home.adapted, split, part.rows, _short(config), part.turn, private=private)


def _together(config: RunConfig, home: Resident, split: EncodedSplit, parts: Sequence[Part]) -> None:
    adapted, train, level = home.adapted, _short(config), level_of(config.privacy)
    gradients: JointGradients = JointPlainGradients(adapted, home.own_layers, split, train, parts)
    if level.clients_add_noise:
        rows = [part.rows for part in parts]
        mechanisms = [_mechanism(config, part) for part in parts]
        randomness = [seeded(0, "timing", index) for index in range(len(parts))]
        gradients = level.joint_gradients(home, split, rows, mechanisms, randomness)
    train_together(adapted, train, parts, adapted.trained, gradients)


def _short(config: RunConfig) -> TrainConfig:
    return config.train.model_copy(update={"local_steps": STEPS, "local_epochs": None})


def _mechanism(config: RunConfig, part: Part) -> RecordMechanism:
    return replace(level_of(config.privacy).client_mechanism(config, len(part.rows)), steps=STEPS)
