"""Events in the shape in which a run emits them, and run directories made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig, nest, resolve

Event = dict[str, Any]
DOMAINS = {"photo": 0.05, "sketch": -0.1}
STATEMENT = "Each row is protected, and this sentence goes on for more than a line of a terminal. " * 2 + "So it ends."


def accuracy(at: int) -> float:
    return 0.25 + 0.125 * at


def evaluation(at: int, *, causal: bool = False, domains: bool = False, clients: Sequence[str] = ()) -> Event:
    loss = 2.0 - 0.25 * at
    metrics: dict[str, float] = {"loss": loss}
    metrics |= {"perplexity": 10.0 * loss} if causal else {"accuracy": accuracy(at), "macro_f1": accuracy(at) - 0.0625}
    event: Event = {"event": "evaluate", "round": at, "split": "test", **metrics}
    if domains:
        event["domains"] = {
            name: {key: value + (0 if key == "loss" else shift) for key, value in metrics.items()}
            for name, shift in DOMAINS.items()
        }
    if clients:
        scores = {client: metrics | {"accuracy": accuracy(at) - 0.01 * i} for i, client in enumerate(clients)}
        event["clients"] = {"accuracy": {"mean": accuracy(at), "worst_tenth": accuracy(at) - 0.02}, "scores": scores}
    return event


def make_events(
    done: int = 4,
    *,
    planned: int | None = None,
    every: int = 1,
    clients: Sequence[str] = ("0", "1", "2"),
    faults: dict[int, tuple[str, str]] | None = None,
    warnings: dict[int, str] | None = None,
    reason: str | None = "completed",
    causal: bool = False,
    domains: bool = False,
    by_client: bool = False,
    private: bool = False,
) -> list[Event]:
    """Return what a run emits, in order; `reason` None leaves the end out, and the statement of a private one."""
    scored = clients if by_client else ()
    events = [evaluation(0, causal=causal, domains=domains, clients=scored)]
    for at in range(1, done + 1):
        fault = (faults or {}).get(at)
        good = [client for client in clients if fault is None or client != fault[0]]
        for client in good:
            facts = {"id": client, "num_examples": 100 + len(client), "loss": 1.5 / at, "seconds": 0.5}
            events.append({"event": "client", "round": at, **facts})
        if fault is not None:
            events.append({"event": "fault", "round": at, "client": fault[0], "reason": fault[1]})
        round_event: Event = {"event": "round", "round": at, "train_loss": 1.5 / at, "clients": len(good)}
        round_event |= {"failed": len(clients) - len(good), "bytes_up": 1_500_000, "bytes_down": 2_000_000}
        round_event |= {"seconds": 8.25, "aggregation_error": 0.5 / at, "aggregation_error_of_total": 0.125 / at}
        if private:
            round_event |= {"train_loss": None, "exhausted": 0, "epsilon_max": 0.5 * at}
        events.append(round_event)
        if at in (warnings or {}):
            events.append({"event": "warning", "round": at, "message": (warnings or {})[at]})
        if at % every == 0 or at == (planned or done):
            events.append(evaluation(at, causal=causal, domains=domains, clients=scored))
    if reason is not None and private:
        facts = {"level": "record", "epsilon_max": 0.45 * done, "delta": 1e-5, "guarantee": False}
        events.append({"event": "privacy", "round": done, **facts, "statement": STATEMENT})
    if reason is not None:
        events.append({"event": "end", "round": done, "reason": reason})
    return events


def make_config(**settings: object) -> RunConfig:
    """Return a configuration; keyword arguments are section__key."""
    base: dict[str, object] = {"federation.rounds": 4, "federation.clients": 3, "model.name": "/models/tiny"}
    return resolve([nest(base), nest({name.replace("__", "."): value for name, value in settings.items()})])


@pytest.fixture
def events() -> Callable[..., list[Event]]:
    return make_events


@pytest.fixture
def config() -> Callable[..., RunConfig]:
    return make_config


@pytest.fixture
def run_directory(tmp_path: Path) -> Callable[..., Path]:
    """Return ``run_directory(config, events, name)``, which writes what a run leaves behind."""

    def make(config: RunConfig, events: Sequence[Event], name: str = "first") -> Path:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.toml").write_text(config.to_toml())
        (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        packages = {"torch": "2.0", "peft": "0.1"}
        (run / "environment.json").write_text(
            json.dumps({"python": "3.11", "gpus": [], "packages": packages, "seed": 0})
        )
        return run

    return make
