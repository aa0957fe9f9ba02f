"""Runs that are killed by the system or ended by a signal, from outside as a user sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedpeft.simulations.contexts as contexts
from benchmarks.record import read
from fedpeft.errors import RunDirectoryError
from fedpeft.runs import read_config, read_events, resumable_round
from fedpeft.simulations.simulate import resume, simulate
from tests.conftest import RunConfigMaker

ROOT = Path(__file__).resolve().parents[2]


def test_runs_killed_at_random_moments_end_as_if_nothing_had_been(text_config: RunConfigMaker, tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(text_config(partition__by=None).to_toml())
    kinds = ("driver, personal heads and B", "driver, record level, seeded")
    out = ["--json", str(tmp_path / "kills.json")]
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "2", "--config", str(file), *out]
    done = subprocess.run(
        [*command, *(word for kind in kinds for word in ("--only", kind))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = read(tmp_path / "kills.json")["figures"]
    assert [(each.what, each.value, each.unit) for each in figures] == [
        (f"{kind}: as without kills", 2, "of 2") for kind in kinds
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_good_order_and_says_how_to_go_on(
    number: int, code: int, text_config: RunConfigMaker, tmp_path: Path
) -> None:
    config = text_config(federation__rounds=400, run__checkpoint_every=10, strategy__name="fedit")
    file, run = tmp_path / "run.toml", tmp_path / "run"
    file.write_text(config.to_toml())
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpeft", "simulate", str(file), "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not resumable_round(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert said.rstrip().endswith(f"go on with: fedpeft simulate --resume {run}")
    assert read_events(run)[-1]["reason"] == "interrupted"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    done = resumable_round(run)
    assert done in (read_events(run)[-1]["round"], read_events(run)[-1]["round"] - 1)  # that was not scored yet
    assert read_config(run).federation.rounds == 400


def test_a_run_that_has_no_room_for_what_clients_keep_goes_on_when_there_is(
    text_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(federation__rounds=2, strategy__name="fedsa-lora")
    whole = simulate(config, tmp_path / "whole").path
    true_write, written = contexts.write_whole, list[Path]()

    def write(path: Path, data: bytes, partial: Path) -> None:
        written.append(path)
        if len(written) == 5:  # of the second round
            raise OSError(28, "No space left on device")
        true_write(path, data, partial)

    with monkeypatch.context() as patch:
        patch.setattr(contexts, "write_whole", write)
        with pytest.raises(
            RunDirectoryError, match=r"cannot write what client .* keeps .*No space left on device; make room"
        ):
            simulate(config, tmp_path / "run")
    resume(tmp_path / "run")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
