from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp.client_app import LoadClientAppError

from fedpeft.errors import ConfigError, DataError, SimulationError
from fedpeft.runs.machine import Footprint
from fedpeft.simulations.grids.cluster import Node, Sizing
from fedpeft.simulations.grids.inline import InlineGrid
from fedpeft.simulations.grids.pace import Pace
from fedpeft.simulations.grids.ray import RayGrid
from fedpeft.wire import LentArray

MakeContexts = Callable[[int], dict[int, Context]]
MakeMessage = Callable[..., Message]
MakeArrays = Callable[..., ArrayRecord]


@pytest.fixture(scope="module")
def workers(importable_apps: None) -> Iterator[RayGrid]:
    """Two workers for the whole file, since Ray takes seconds to start."""
    with RayGrid("simulated_clients:app", workers=2) as grid:
        yield grid


@pytest.fixture
def grid(workers: RayGrid, make_contexts: MakeContexts) -> RayGrid:
    workers.contexts = make_contexts(12)
    workers.on_failure = workers.on_worker_death = workers.on_dispatch = None
    workers.pace = Pace()
    return workers


def seen(reply: Message, key: str) -> object:
    assert not reply.has_error(), reply.error
    return reply.content.config_records["seen"][key]


def test_replies_come_in_the_order_of_messages_though_the_first_takes_longest(
    grid: RayGrid, make_message: MakeMessage, tmp_path: Path
) -> None:
    # the first goes on only when the other worker has come to the sixth: as many are pulled before the first is done
    mark = str(tmp_path / "sixth")
    waits = {12: {"awaited": mark}, 7: {"started": mark}}
    messages = [make_message(node_id, **waits.get(node_id, {})) for node_id in range(12, 0, -1)]
    replies = list(grid.send_and_receive(iter(messages)))
    assert [seen(reply, "partition") for reply in replies] == list(range(11, -1, -1))
    assert len({seen(reply, "pid") for reply in replies}) == 2
    assert {seen(reply, "rate") for reply in replies} == {0.5}
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]


def test_messages_are_pulled_no_further_than_twice_the_workers_and_two(
    grid: RayGrid, make_message: MakeMessage
) -> None:
    pulled = []

    def messages() -> Iterator[Message]:
        for node_id in range(1, 13):
            pulled.append(node_id)
            yield make_message(node_id)

    replies = grid.send_and_receive(messages())
    assert pulled == []
    next(replies)
    assert len(pulled) == 6
    assert len(list(replies)) == 11


def test_a_client_can_be_repeated_between_two_replies(grid: RayGrid, make_message: MakeMessage) -> None:
    partitions = []
    for reply in grid.send_and_receive(make_message(node_id) for node_id in range(1, 9)):
        if reply.metadata.src_node_id in (1, 4, 8):
            (again,) = grid.send_and_receive([make_message(reply.metadata.src_node_id)])
            partitions.append(seen(again, "partition"))
        partitions.append(seen(reply, "partition"))
    assert partitions == [0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 7]


def test_a_worker_killed_at_work_is_replaced_and_its_message_repeated(
    grid: RayGrid, make_message: MakeMessage, tmp_path: Path
) -> None:
    deaths: list[tuple[int, int]] = []
    grid.on_worker_death = lambda *death: deaths.append(death)
    attempts = tmp_path / "attempts"
    messages = [
        make_message(1),
        make_message(2, "train.die", attempts=str(attempts), deaths=1),
        *(make_message(node_id) for node_id in range(3, 7)),
    ]
    assert [seen(reply, "partition") for reply in grid.send_and_receive(messages)] == list(range(6))
    assert attempts.read_text() == "xx"
    assert deaths == [(2, 1)]


def test_work_that_is_no_clients_is_spread_over_the_workers_and_comes_back_in_order(grid: RayGrid) -> None:
    assert list(grid.map("simulated_work:plus", [3, 1, 2], np.ones(5), 0.5)) == [8.5, 6.5, 7.5]
    done = list(grid.map("simulated_work:where", range(12)))
    assert [job for job, _, _ in done] == list(range(12))
    assert os.getpid() not in {pid for _, pid, _ in done}
    assert {threads for _, _, threads in done} == {1}


def test_work_can_be_done_between_two_replies(grid: RayGrid, make_message: MakeMessage) -> None:
    replies = grid.send_and_receive(make_message(node_id) for node_id in (1, 2, 3))
    found = [(seen(reply, "partition"), next(grid.map("simulated_work:where", [7]))[0]) for reply in replies]
    assert found == [(0, 7), (1, 7), (2, 7)]


def test_a_worker_that_dies_of_work_is_replaced_and_the_work_repeated(grid: RayGrid, tmp_path: Path) -> None:
    deaths: list[tuple[int, int]] = []
    grid.on_worker_death = lambda *death: deaths.append(death)
    jobs = [(str(tmp_path / "first"), 0), (str(tmp_path / "second"), 1), (str(tmp_path / "third"), 0)]
    assert list(grid.map("simulated_work:die", jobs)) == ["first", "second", "third"]
    assert (tmp_path / "second").read_text() == "xx"
    assert deaths == []  # it was no client's


def test_what_work_raises_is_raised_here_and_the_workers_go_on(grid: RayGrid) -> None:
    with pytest.raises(DataError, match="job 1 holds no rows"):
        list(grid.map("simulated_work:refuse", [0, 1, 2]))
    with pytest.raises(SimulationError, match=r"simulated_work:refuse failed on a worker:(.|\n)*KeyError: 3"):
        list(grid.map("simulated_work:refuse", [3]))
    assert list(grid.map("simulated_work:refuse", [4])) == [4]


def test_workers_are_forks_of_one_process_that_has_imported_everything(grid: RayGrid) -> None:
    pids = {pid for _, pid, _ in grid.map("simulated_work:where", range(8))}
    parents = {psutil.Process(pid).ppid() for pid in pids}
    assert len(parents) == 1
    assert psutil.Process(parents.pop()).cmdline()[0] == "fedpeft: what workers are forked from"
    assert {psutil.Process(pid).cmdline()[0].partition(".")[0] for pid in pids} == {"ray::Worker"}
    for pid in pids:
        sizes = dict(re.findall(r"(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text()))
        assert int(sizes["Private_Dirty"]) < int(sizes["Shared_Dirty"])  # what is imported is written to by nobody


def test_a_message_that_costs_three_workers_gets_an_error_and_the_others_their_replies(
    grid: RayGrid, make_message: MakeMessage, tmp_path: Path
) -> None:
    failures: list[tuple[int, Message, str]] = []
    grid.on_failure = lambda *failure: failures.append(failure)
    killer = make_message(1, "train.die", attempts=str(tmp_path / "attempts"), deaths=99)
    lost, other = grid.send_and_receive([killer, make_message(2)])
    assert lost.error.reason == "WorkerDied"
    assert lost.metadata.reply_to_message_id == killer.metadata.message_id
    assert seen(other, "partition") == 1
    assert [(node_id, message) for node_id, message, _ in failures] == [(1, killer)]


def test_a_client_that_raises_is_not_repeated_and_its_traceback_arrives(
    grid: RayGrid, make_message: MakeMessage
) -> None:
    failures: list[tuple[int, Message, str]] = []
    grid.on_failure = lambda *failure: failures.append(failure)
    messages = [make_message(5, "train.fail", how="caused"), make_message(6, "train.fail", how="exit")]
    replies = list(grid.send_and_receive(messages))
    assert [reply.error.reason for reply in replies] == ["KeyError", "SystemExit"]
    assert [failure[:2] for failure in failures] == [(5, messages[0]), (6, messages[1])]
    assert "row 17" in failures[0][2]
    assert "TrainingError: no luck" in failures[0][2]


def test_state_travels_to_whichever_worker_and_is_kept_only_where_the_client_did_not_raise(
    grid: RayGrid, make_message: MakeMessage
) -> None:
    counts = [make_message(2, "train.count", fail=fail) for fail in (0, 0, 1, 0)]
    others = [make_message(node_id, "train.count") for node_id in (3, 4, 5, 6)]
    replies = list(grid.send_and_receive([message for pair in zip(counts, others, strict=True) for message in pair]))
    assert replies[4].has_error()
    assert [seen(replies[index], "before") for index in (0, 2, 6)] == [0, 1, 2]
    assert grid.contexts[2].state.array_records["kept"]["n"].numpy().tolist() == [3.0]
    assert grid.contexts[3].state.array_records["kept"]["n"].numpy().tolist() == [1.0]
    assert len(grid.contexts[1].state) == 0


def test_a_worker_gets_the_same_object_for_the_same_arrays_unless_a_client_spoiled_it(
    grid: RayGrid, make_message: MakeMessage, make_arrays: MakeArrays
) -> None:
    for arrays, spoiler in ((make_arrays(300, 5), None), (make_arrays(300, 5), 5)):
        messages = [
            make_message(node_id, "train.same", arrays, spoil=int(node_id == spoiler)) for node_id in range(1, 11)
        ]
        known: dict[object, list[object]] = {}
        for reply in grid.send_and_receive(messages):
            assert seen(reply, "total") == 305.0
            known.setdefault(seen(reply, "pid"), []).append(seen(reply, "known"))
        first = [flags.pop(0) for flags in known.values()]
        assert not any(first), "an object of the round before"
        assert sum(flag == 0 for flags in known.values() for flag in flags) <= (spoiler is not None)


def test_arrays_go_to_the_store_once_a_round(
    grid: RayGrid, make_message: MakeMessage, make_arrays: MakeArrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = []
    original = ray.put

    def counted(value: object) -> object:
        put.append(value)
        return original(value)

    monkeypatch.setattr(ray, "put", counted)
    for arrays in (make_arrays(100), make_arrays(100)):
        list(grid.send_and_receive([make_message(node_id, "train.same", arrays) for node_id in range(1, 13)]))
    assert len(put) == 2


def test_workers_train_to_the_same_bytes_as_this_process(
    grid: RayGrid, make_message: MakeMessage, make_contexts: MakeContexts
) -> None:
    weight = np.random.default_rng(3).standard_normal((60, 60)).astype(np.float32)
    arrays = ArrayRecord({"weight": Array(weight)})
    inline = InlineGrid("simulated_clients:app", make_contexts(12), threads=1)
    contents = [
        [reply.content for reply in some.send_and_receive(make_message(i, "train.learn", arrays) for i in range(1, 7))]
        for some in (grid, inline)
    ]
    assert contents[0] == contents[1]
    assert len({content.array_records["arrays"]["weight"].data for content in contents[0]}) == 6


def test_workers_are_set_up_before_torch_is_loaded(grid: RayGrid, make_message: MakeMessage) -> None:
    (reply,) = grid.send_and_receive([make_message(1, "query")])
    assert dict(reply.content.config_records["seen"]) == {
        "threads": 1,
        "interop": 1,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_a_client_too_slow_for_the_timeout_has_no_reply_and_holds_no_worker(
    grid: RayGrid, make_message: MakeMessage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = [tmp_path / "1", tmp_path / "2"]
    list(grid.send_and_receive([make_message(3)]))
    # the time is up once both are at it, which two free workers take as long for as they like
    monkeypatch.setattr(grid._dispatcher, "_clock", lambda: 9.0 if all(mark.exists() for mark in begun) else 0.0)
    hanging = [make_message(int(mark.name), started=str(mark), awaited=str(tmp_path / "never")) for mark in begun]
    replies = list(grid.send_and_receive([make_message(3), *hanging, make_message(4)], timeout=0.1))
    assert [seen(reply, "partition") for reply in replies] == [2]
    assert [seen(reply, "partition") for reply in grid.send_and_receive([make_message(1)])] == [0]


def test_gpus_that_are_not_there_are_an_error_and_no_endless_wait(grid: RayGrid, make_message: MakeMessage) -> None:
    with RayGrid("simulated_clients:app", grid.contexts, workers=2, gpus_per_worker=1.0) as greedy:
        greedy.start()
        with pytest.raises(ConfigError, match="gpus_per_worker = 1 "):
            list(greedy.send_and_receive([make_message(1)]))


class Learner:
    """A `Sizer` that wants a second worker once the first has shown what it needs."""

    def __init__(self) -> None:
        self.seen: list[Footprint] = []

    def fit(self, nodes: Sequence[Node], most: int | None = None) -> Sizing:
        assert len(nodes) == 1
        return Sizing(2 if self.seen else 1)

    def learn(self, footprint: Footprint) -> None:
        self.seen.append(footprint)


def test_the_pool_follows_what_its_sizer_has_learned(grid: RayGrid, make_message: MakeMessage, tmp_path: Path) -> None:
    learner = Learner()
    with RayGrid("simulated_clients:app", grid.contexts, workers=learner) as growing:
        assert growing.sizing.workers == 1
        list(growing.send_and_receive([make_message(1)]))
        assert learner.seen[0].own + learner.seen[0].shared > 50 * 2**20  # torch alone takes as much, shared by forks
        both = str(tmp_path / "both")  # are at work at a time
        messages = [make_message(1, awaited=both), make_message(2, started=both)]
        assert len({seen(reply, "pid") for reply in growing.send_and_receive(messages)}) == 2
        assert growing.sizing.workers == 2


def test_an_app_that_workers_cannot_import_is_an_error_with_its_traceback(
    grid: RayGrid, make_message: MakeMessage
) -> None:
    with (
        RayGrid("no_such_module:app", grid.contexts) as hopeless,
        pytest.raises(LoadClientAppError, match="No module named 'no_such_module'"),
    ):
        list(hopeless.send_and_receive([make_message(1)]))


def test_workers_that_die_as_they_start_are_an_error(grid: RayGrid, make_message: MakeMessage) -> None:
    with (
        RayGrid("deadly_app:app", grid.contexts) as hopeless,
        pytest.raises(SimulationError, match="3 Ray workers in a row died"),
    ):
        list(hopeless.send_and_receive([make_message(1)]))


def test_a_closed_grid_says_so_and_leaves_a_ray_that_it_did_not_start(grid: RayGrid, make_message: MakeMessage) -> None:
    other = RayGrid("simulated_clients:app", grid.contexts)
    other.start()
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(other.send_and_receive([make_message(1)]))
    assert seen(next(grid.send_and_receive([make_message(1)])), "partition") == 0


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"threads_per_worker": 0}])
def test_no_workers_or_threads_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RayGrid(**wrong)  # type: ignore[arg-type]


PROGRAM = """
import sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from fedpeft.simulations.grids import ray as ray_grid
from fedpeft.simulations.grids.ray import RayGrid

ray_grid.PATIENCE = 3600.0  # a slow machine is worth no line here
contexts = {
    node_id: Context(1, node_id, {"partition-id": node_id - 1, "num-partitions": 8}, RecordDict(), {"rate": 0.5})
    for node_id in range(1, 9)
}
awaited, started, deaths = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    with RayGrid("simulated_clients:app", contexts, workers=2) as grid:
        config = {"awaited": awaited, "started": started, "attempts": started + "-attempts", "deaths": deaths}
        content = RecordDict({"config": ConfigRecord(config)})
        replies = list(
            grid.send_and_receive(Message(content, node_id, sys.argv[4]) for node_id in contexts)
        )
    print(len(replies), "replies")
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


def processes_with(mark: str) -> list[int]:
    """Return the processes that inherited this mark in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found


def test_an_interrupt_from_the_terminal_ends_a_round_and_leaves_nothing(tmp_path: Path) -> None:
    mark = f"FEDPEFT_TEST={uuid.uuid4().hex}"
    started = tmp_path / "started"
    with tempfile.TemporaryDirectory(dir="/tmp") as rays:  # sockets' paths must be shorter than pytest's folders are
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "never"), str(started), "0", "train"],
            env={**environment, "RAY_TMPDIR": rays, **dict([mark.split("=")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a shell's background jobs, and what they start, ignore interrupts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            while not started.exists():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            # Ctrl-C goes to all processes of the group, Ray's included
            os.killpg(process.pid, signal.SIGINT)
            printed, _ = process.communicate(timeout=600)
            assert (process.returncode, printed) == (130, "interrupted\n")
            assert list(Path(rays).iterdir()) == []
            deadline = time.monotonic() + 600
            while processes_with(mark):
                assert time.monotonic() < deadline, "processes are left"
                time.sleep(0.1)
        finally:
            if processes_with(mark):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_cluster_named_by_ray_address_is_used_quietly_and_left_running(
    grid: RayGrid, tmp_path: Path, make_message: MakeMessage
) -> None:
    list(grid.send_and_receive([make_message(1)]))
    address = ray.get_runtime_context().gcs_address
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, "", str(tmp_path / "started"), "1", "train.die"],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=True,
    )
    # one worker died on the way, which Ray would report
    assert (printed.stdout, printed.stderr) == ("8 replies\n", "")
    assert ray.is_initialized()
    assert len(list(grid.send_and_receive([make_message(1), make_message(2)]))) == 2


def test_quick_messages_travel_together_and_each_is_answered_by_itself(
    grid: RayGrid, make_message: MakeMessage, make_arrays: MakeArrays
) -> None:
    list(grid.send_and_receive(make_message(node) for node in range(1, 5)))
    sent: list[int] = []

    def note(node: int, message: Message) -> None:
        sent.append(node)

    grid.on_dispatch = note
    fails = {3: "plain", 7: "exit"}
    messages = [
        make_message(node, "train.fail", how=fails[node]) if node in fails else make_message(node)
        for node in range(1, 13)
    ]
    replies = list(grid.send_and_receive(messages))
    assert [reply.metadata.src_node_id for reply in replies] == list(range(1, 13))
    assert sent == list(range(1, 13))
    assert [node for node, reply in enumerate(replies, 1) if reply.has_error()] == [3, 7]


def test_who_keeps_large_replies_has_their_arrays_to_himself(grid: RayGrid, make_message: MakeMessage) -> None:
    order = ArrayRecord({"weight": Array(np.ones((200, 200), np.float32))})
    replies = list(grid.send_and_receive(make_message(node, "train.learn", order) for node in range(1, 7)))
    arrays = [reply.content.array_records["arrays"]["weight"] for reply in replies]
    assert [isinstance(array, LentArray) for array in arrays] == [True] * 6
    assert ["lent" in vars(array) for array in arrays] == [False] * 6
    assert len({array.data for array in arrays}) == 6
