"""What a base in few bits weighs, costs a step and loses: SmolLM2-135M in fp32, bf16, int8 and nf4.

    python -m benchmarks.quantised [--turns 10] [--rounds 1] [--quick] [--json FILE] [KEY=VALUE ...]

Bytes are those of the base's tensors as they lie in memory. A step is a whole one on the longest rows of the preset
``chat``, adapter and optimiser included, in turns with the same step in fp32, in one process and on one thread; the
figure is the median over turns of the ratio of one pair, in CPU time. At last a short run is trained over nf4, and its
adapter scored over nf4 and over the base as it is saved, as ``fedpeft evaluate RUN model.quantization=none`` does.
``--quick`` is a few rows and one turn, to see that it runs: its figures say nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.job import Work
from benchmarks.record import Figure, machine, parser, publish, ratio
from benchmarks.step import cpu_seconds, make_step
from fedpeft.models import base_folder, load_base
from fedpeft.rescoring import rescore
from fedpeft.simulations.simulate import simulate

SETTINGS = {"train.batch_size": 4, "train.local_steps": 4, "data.max_length": 128, "simulation.workers": 0}
QUICK = {"train.batch_size": 1, "train.local_steps": 1, "data.max_length": 48, "federation.fraction": 0.1}
HELD: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train__precision": "bf16"},
    "int8": {"model__quantization": "int8"},
    "nf4": {"model__quantization": "nf4"},
}


def weight(work: Work) -> int:
    """Return the bytes of a base's tensors, the scales that lie beside quantised ones included."""
    config = work.config()
    model = load_base(config, base_folder(config.model), ()).model
    total = sum(tensor.nbytes for tensor in model.parameters()) + sum(tensor.nbytes for tensor in model.buffers())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        scales = [getattr(parameter, "SCB", None), getattr(state, "absmax", None)]
        scales.append(getattr(getattr(state, "state2", None), "absmax", None))
        total += sum(scale.nbytes for scale in scales if isinstance(scale, torch.Tensor))
    return total


def steps(works: dict[str, Work], turns: int) -> list[Figure]:
    """Return what a step takes, as a ratio to that in fp32, in pairs."""
    first = make_step(works["fp32"])
    found = []
    for name, work in works.items():
        if name == "fp32":
            continue
        step = make_step(work)
        for warm in (first, step):
            warm()
        pairs = [(cpu_seconds(step), cpu_seconds(first)) for _ in range(turns)]
        detail = {"seconds": [pair[0] for pair in pairs], "fp32": [pair[1] for pair in pairs]}
        found.append(Figure(f"{name}: a step", ratio(*zip(*pairs, strict=True)), detail=detail))
    return found


def losses(work: Work, rounds: int) -> list[Figure]:
    """Return what an adapter that was trained over nf4 loses over nf4, and over the base as it is saved."""
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        run = Path(folder) / "run"
        simulate(work.but(federation__rounds=rounds).config(), run)
        over = {"nf4": rescore(run, {}), "fp32": rescore(run, {"model": {"quantization": None}})}
    return [Figure(f"trained over nf4: loss over {name}", scored["loss"], "") for name, scored in over.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Weigh, measure and train, and print the table."""
    reader = parser(__doc__)
    reader.add_argument("--turns", type=int, default=10)
    reader.add_argument("--rounds", type=int, default=1)
    reader.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = reader.parse_args(arguments)
    settings: dict[str, Any] = dict(word.split("=", 1) for word in given.settings)
    start = Work({**SETTINGS, **(QUICK if given.quick else {}), **settings}, "chat")
    works = {name: start.but(**held) for name, held in HELD.items()}
    before = machine()
    torch.set_num_threads(1)
    found = [Figure(f"{name}: base", weight(work) / 1e6, "MB") for name, work in works.items()]
    found += steps(works, 1 if given.quick else given.turns)
    found += losses(works["nf4"], given.rounds)
    publish("quantised", found, given, before)


if __name__ == "__main__":
    main()
