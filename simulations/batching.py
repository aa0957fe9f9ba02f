"""Whether clients of a run are trained together, how many at a time, and what that gains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.state import Role, role_of
from fedpeft.clients.together import MOST_TOKENS, longest
from fedpeft.config import RunConfig, TrainConfig, cohort_size
from fedpeft.models import num_threads, torch_seed
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import seeded
from fedpeft.resident import Resident
from fedpeft.simulations.grids.bundles import Bundling
from fedpeft.training.batched.together import JointGradients, JointPlainGradients, Part, Stacks, train_together, why_not
from fedpeft.training.local import PlainGradients, Turn, train_locally

TOGETHER = "fedpeft.clients.together:answer_together"
SIZES = (8, 32)  # that a timing chooses among
GAIN = 1.2  # of a client's time, from which on it is worth other last digits
TURNS, STEPS = 3, 2
TOLERANCE = {"fp32": 1e-2, "bf16": 0.2}  # of a gradient's norm


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
    with num_threads(config.simulation.threads_per_worker):
        return _disagreement(config, home)


def _disagreement(config: RunConfig, home: Resident) -> str:
    """Try it: two clients of different adapters must have the gradients together that they have alone."""
    adapted, split, train = home.adapted, home.data.train, config.train
    parts = _parts(config, home, 2)
    gradients = JointPlainGradients(adapted, home.own_layers, split, train, parts)
    stacks = Stacks.of(adapted, parts, range(2), adapted.trained)
    batches = [next(gradients.batches(index)) for index in range(2)]
    adapted.begin_training(())
    try:
        gradients.compute(stacks, batches)
        for index, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            adapted.load(part.tensors, part.scaling)
            adapted.begin_training(adapted.trained)
            PlainGradients(adapted, split, part.rows, train, 1, part.turn.batches).compute(batch)
            for name, whole in stacks.trained.items():
                parameter = adapted.parameter(name)
                together = None if whole.grad is None else whole.grad[index]
                if not _alike(parameter.grad, together, TOLERANCE[train.precision]):
                    return f"the model gives '{name}' another gradient when two clients share a batch"
                parameter.grad = None
    except Exception as error:  # a model's own code raises whatever it likes
        return f"the model cannot be run for several at once ({type(error).__name__})"
    finally:
        adapted.load(adapted.initial, adapted.scaling)
    return ""


def _alike(alone: Tensor | None, together: Tensor | None, tolerance: float) -> bool:
    if alone is None or together is None:
        return alone is together
    return bool((alone - together).norm() <= tolerance * alone.norm() + 1e-6)


def _parts(config: RunConfig, home: Resident, count: int) -> list[Part]:
    """Return parts of so many clients, whose adapters were moved from where they begin."""
    clients, held, seed = home.partition.client_ids, home.partition.indices, config.run.seed
    chosen = [index for index in range(len(clients)) if len(held[index])] or [0]
    parts = []
    for number in range(count):
        index = chosen[number % len(chosen)]
        with torch_seed(number):
            own = {
                name: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t
                for name, t in home.adapted.initial.items()
                if role_of(name) is not Role.BASE
            }
        parts.append(Part(own, home.adapted.scaling, held[index], Turn(seed, clients[index], 1, 1)))
    return parts


def _choose(config: RunConfig, home: Resident) -> tuple[int, float]:
    """Time a client's round alone and together; return the best size, 1 where it gains little, and what it gains."""
    federation, simulation = config.federation, config.simulation
    cohort = cohort_size(len(home.partition.client_ids), federation.fraction, federation.min_clients)
    train = home.data.train
    tokens = config.train.batch_size * longest(train, np.arange(len(train)))
    best, gain = 1, GAIN
    with num_threads(simulation.threads_per_worker):
        alone = _fastest(lambda: _alone(config, home, _parts(config, home, 1)[0]))
        for size in SIZES:
            if size > cohort or size * tokens > MOST_TOKENS:
                break
            parts = _parts(config, home, size)
            times = alone * size / _fastest(lambda: _together(config, home, parts))  # noqa: B023
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


def _alone(config: RunConfig, home: Resident, part: Part) -> None:
    level, private = level_of(config.privacy), None
    if level.clients_add_noise:
        private = level.gradients(home, home.data.train, part.rows, _mechanism(config, part), seeded(0, "timing"))
    home.adapted.load(part.tensors, part.scaling)
    train_locally(home.adapted, home.data.train, part.rows, _short(config), part.turn, private=private)


def _together(config: RunConfig, home: Resident, parts: Sequence[Part]) -> None:
    adapted, train, split, level = home.adapted, _short(config), home.data.train, level_of(config.privacy)
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
