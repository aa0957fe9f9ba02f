"""Ray beside a command, and workers forked from it: what a command starts before anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.simulations.grids import host, nursery
from fedpeft.simulations.grids.cluster import ray_connection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are no forks")

COMMAND = """
import json, os, signal, sys
from pathlib import Path
from fedpeft.cli.app import THREADLESS
os.environ.update(THREADLESS)
from fedpeft.cli.options import prepare_workers
prepare_workers({"simulation": {"workers": 1}})
from fedpeft.simulations.grids import host, nursery
from fedpeft.simulations.grids.ray import RayGrid
assert {name: os.environ.get(name) for name in ("RAY_JOB_ID", "RAY_RAYLET_PID")} == dict.fromkeys(
    ("RAY_JOB_ID", "RAY_RAYLET_PID"))
with RayGrid(workers=1) as grid:
    (parent,) = grid.map("builtins:eval", ["__import__('os').getppid()"])
    folders = [str(nursery._hatched), str(host.begun().folder)]
    title = Path(f"/proc/{parent}/cmdline").read_text()
    fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    pids = [parent, host.begun()._process.pid]
    print(json.dumps({"title": title, "grandparent": int(fields[1]), "own": os.getpid(), "pids": pids,
                      "folders": folders}), flush=True)
    if "die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def gone(facts: dict[str, list[object]]) -> bool:
    processes = [Path(f"/proc/{pid}") for pid in facts["pids"]]
    return not any(path.exists() for path in [*processes, *(Path(str(folder)) for folder in facts["folders"])])


def soon(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


@pytest.mark.parametrize("end", ["well", "die"])
def test_a_command_s_workers_are_forks_of_what_it_forked_and_all_ends_with_it(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND, end], capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (end == "well"), done.stderr
    facts = json.loads(done.stdout)
    assert facts["title"].startswith(nursery.TITLE)
    assert facts["grandparent"] == facts["own"]
    assert soon(lambda: gone(facts))


def test_where_ray_beside_a_command_has_died_it_starts_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    beside = host.Host()
    assert beside._process is not None
    beside._process.kill()
    monkeypatch.setattr(host, "_begun", beside)
    with ray_connection():
        assert ray.is_initialized()
        assert ray._private.worker._global_node is not None
        assert ray._private.worker._global_node.is_head()
    assert host.begun() is None


def test_where_there_is_no_place_for_a_socket_nothing_is_forked(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    script = "from fedpeft.simulations.grids import nursery; import sys; sys.exit(nursery.hatch())"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(long)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list(long.glob(f"{nursery.PREFIX}*"))


def test_a_process_that_has_begun_to_work_is_not_forked() -> None:
    assert not nursery.hatch()  # pytest's, which has imported and computed
    assert not {"RAY_JOB_ID", "RAY_RAYLET_PID"} & os.environ.keys()
