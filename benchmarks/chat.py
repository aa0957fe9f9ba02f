"""A small language model taught to chat by 21 clients, one a topic, without privacy and with: the table of the README.

    python -m benchmarks.chat [--rounds 3] [--epsilon 8] [--rows 64] [--quick] [--json FILE] [KEY=VALUE ...]

SmolLM2-135M-Instruct and the ChatterBot corpus (`fedpeft presets fetch chat`), LoRA-FAIR, once plainly and once with
record-level privacy; all the rest is alike. Perplexity is of all test rows' answers, ROUGE-L of the answers that the
model writes to ``--rows`` of them. Memory is that of the command and all its processes. ``--quick`` is a few steps of
two clients in this process, to see that it runs: its figures say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.job import Simulated, Work, here, simulated
from benchmarks.record import Figure, machine, parser, publish

SETTINGS = {
    "strategy.name": "lora-fair",
    "data.metric": "rouge",
    "data.max_new_tokens": 64,
    "train.local_steps": 8,
    "train.batch_size": 8,
}
QUICK = {"federation.fraction": 0.1, "train.local_steps": 1, "run.generate_rows": 2, "data.max_new_tokens": 4}
PLAIN = "plain"


def runs(rounds: int, epsilon: float, rows: int, settings: Mapping[str, Any]) -> dict[str, Work]:
    """Return what is run, by what it is called."""
    alike = Work({**SETTINGS, "federation.rounds": rounds, "run.generate_rows": rows, **settings}, "chat")
    private = {"privacy__level": "record", "privacy__epsilon": epsilon}
    return {PLAIN: alike, f"epsilon = {epsilon:g}": alike.but(**private)}


def figures(name: str, run: Simulated) -> list[Figure]:
    """Return a run's row of the table, each of its numbers a figure."""
    before, *_, after = run.of("evaluate")
    spent: dict[str, Any] = {
        key: event.get(key) for event in run.of("privacy") for key in ("epsilon_max", "delta", "guarantee")
    }
    detail = {"clients": sum(event["clients"] for event in run.of("round")), **spent}
    return [
        Figure(f"{name}: perplexity before", before["perplexity"], ""),
        Figure(f"{name}: perplexity after", after["perplexity"], "", detail=detail),
        Figure(f"{name}: ROUGE-L before", before["rouge"], ""),
        Figure(f"{name}: ROUGE-L after", after["rouge"], ""),
        Figure(f"{name}: memory", run.peak / 1e9, "GB"),
        Figure(f"{name}: time", run.wall / 60, "min"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, and print the table."""
    reader = parser(__doc__)
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--epsilon", type=float, default=8.0)
    reader.add_argument("--rows", type=int, default=64, help="test rows that are answered")
    reader.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = reader.parse_args(arguments)
    settings: dict[str, Any] = dict(word.split("=", 1) for word in given.settings)
    rounds, run = (1, here) if given.quick else (given.rounds, simulated)
    wanted = runs(rounds, given.epsilon, given.rows, {**(QUICK if given.quick else {}), **settings})
    before = machine()
    found = [figure for name, work in wanted.items() for figure in figures(name, run(work))]
    publish("chat", found, given, before)


if __name__ == "__main__":
    main()
