"""The ClientApp of these tests: in a file of its own, because workers import it by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
not_an_app = "text"
FOR_EVER = 600.0  # seconds: what takes as long hangs, however slow the machine is
_previous: list[ArrayRecord] = []


class TrainingError(Exception):
    pass


def _reply(message: Message, **values: str | int | float) -> Message:
    return Message(RecordDict({"seen": ConfigRecord(dict(values))}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Leave a file and wait for another one, if told, then say who worked where."""
    settings = message.content.config_records["config"]
    if "started" in settings:
        Path(str(settings["started"])).touch()
    if "awaited" in settings:
        deadline = time.monotonic() + FOR_EVER
        while not Path(str(settings["awaited"])).exists():
            assert time.monotonic() < deadline, f"waited for {settings['awaited']} in vain"
            time.sleep(0.01)
    return _reply(
        message, partition=context.node_config["partition-id"], pid=os.getpid(), rate=context.run_config["rate"]
    )


@app.train("count")
def count(message: Message, context: Context) -> Message:
    """Count the calls in the state, arrays included, then raise if told."""
    before = context.state.array_records["kept"]["n"].numpy() if "kept" in context.state else torch.zeros(1).numpy()
    context.state["kept"] = ArrayRecord({"n": Array(before + 1)})
    context.node_config["partition-id"] = -1  # must reach nobody
    if message.content.config_records["config"].get("fail"):
        raise RuntimeError("after changing the state")
    return _reply(message, before=int(before[0]))


@app.train("die")
def die(message: Message, context: Context) -> Message:
    """Kill the worker in its first so many attempts."""
    settings = message.content.config_records["config"]
    attempts = Path(str(settings["attempts"]))
    with attempts.open("a") as file:
        file.write("x")
    if len(attempts.read_text()) <= int(settings["deaths"]):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)
    return _reply(message, partition=context.node_config["partition-id"])


@app.train("fail")
def fail(message: Message, context: Context) -> Message:
    """Raise what the message asks for."""
    how = message.content.config_records["config"]["how"]
    if how == "exit":
        sys.exit(3)
    if how == "none":
        return None  # type: ignore[return-value]
    if how == "own":
        return message
    try:
        raise KeyError("row 17 of the patient's file")
    except KeyError as error:
        if how == "plain":
            raise
        raise TrainingError("no luck") from error


@app.train("same")
def same(message: Message, context: Context) -> Message:
    """Say whether the arrays are the very object of the message before, and spoil it if told."""
    record = message.content.array_records["arrays"]
    known = bool(_previous) and _previous[0] is record
    _previous[:] = [record]
    total = sum(float(array.numpy().sum()) for array in record.values())
    if message.content.config_records["config"].get("spoil"):
        record.pop(next(iter(record)))
    return _reply(message, known=int(known), total=total, pid=os.getpid())


@app.train("learn")
def learn(message: Message, context: Context) -> Message:
    """Take some steps whose sums depend on the number of threads."""
    arrays = message.content.array_records["arrays"]
    weight = torch.from_numpy(arrays["weight"].numpy()).clone().requires_grad_()  # (d, d)
    partition = int(context.node_config["partition-id"])
    rows = torch.randn(700, weight.shape[0], generator=torch.Generator().manual_seed(partition))
    for _ in range(3):
        loss = (rows @ weight).tanh().pow(2).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.5 * gradient).detach().requires_grad_()
    trained = ArrayRecord({"weight": Array(weight.detach().numpy())})
    return Message(RecordDict({"arrays": trained, "metrics": MetricRecord({"loss": loss.item()})}), reply_to=message)


@app.query()
def environment(message: Message, context: Context) -> Message:
    """Say how the worker is set up."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")
    values = {name: os.environ.get(name, "unset") for name in names}
    return _reply(message, threads=torch.get_num_threads(), interop=torch.get_num_interop_threads(), **values)


@app.train("place")
def place(message: Message, context: Context) -> Message:
    """Do what `train` does, and say on which node, and on which GPU."""
    import ray

    train(message, context)
    return _reply(
        message,
        node=ray.get_runtime_context().get_node_id(),
        gpu=os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
        pid=os.getpid(),
    )
