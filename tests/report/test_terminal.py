from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.report.console import JsonListener, RunConsole, open_console
from fedpeft.report.terminal import TerminalListener
from tests.runs.events import STATEMENT

Events = Callable[..., list[dict[str, Any]]]
Config = Callable[..., RunConfig]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_console(**options: Any) -> RunConsole:
    return RunConsole(file=io.StringIO(), force_terminal=False, width=80, **options)


def live_console() -> RunConsole:
    return RunConsole(file=io.StringIO(), force_terminal=True, force_interactive=True, width=80, _environ={})


def written(console: RunConsole) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def show(
    config: RunConfig, events: Iterable[dict[str, Any]], run: Path | None = Path("runs/first"), *, live: bool = False
) -> tuple[str, str]:
    """Return what is printed to stdout and stderr."""
    out, progress = (live_console(), live_console()) if live else (plain_console(), plain_console())
    with TerminalListener(config, out=out, progress=progress, clock=Clock()) as listener:
        for event in events:
            listener(event)
        if run is not None:
            listener.finish(run)
    return written(out), written(progress)


def round_lines(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", ESCAPES.sub("", text)) if re.match(r"round +\d+/\d+  ", line)]


def test_without_a_terminal_every_round_is_one_line_with_all_its_numbers(config: Config, events: Events) -> None:
    out, progress = show(config(), events(4))
    lines = round_lines(out)
    assert [line.split()[1] for line in lines] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    assert "test loss 2.0000" in lines[0]
    assert "accuracy 0.2500" in lines[0]
    for expected in (
        "train loss 0.7500",
        "test loss 1.5000",
        "accuracy 0.5000",
        "aggregation error 0.2500",
        "3.5 MB",
        "8.2 s",
    ):
        assert expected in lines[2]
    assert "\x1b" not in out
    assert progress == ""


def test_a_round_that_is_not_evaluated_is_one_line_too(config: Config, events: Events) -> None:
    out, _ = show(config(run__evaluate_every=3), events(4, every=3))
    lines = round_lines(out)
    assert [line.split()[1] for line in lines] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    assert ["accuracy" in line for line in lines] == [True, False, False, True, True]


def test_a_round_is_shown_only_when_its_due_scores_are_known(config: Config, events: Events) -> None:
    out = plain_console()
    listener = TerminalListener(config(), out=out, progress=plain_console())
    stream = events(1, reason=None)
    for event in stream[:-1]:
        listener(event)
    assert len(round_lines(written(out))) == 1
    listener(stream[-1])
    assert len(round_lines(written(out))) == 2


def test_a_round_whose_evaluation_was_interrupted_is_shown_once(config: Config, events: Events) -> None:
    stream = [event for event in events(2, reason="interrupted") if (event["event"], event["round"]) != ("evaluate", 2)]
    out, _ = show(config(), stream)
    assert [line.split()[1] for line in round_lines(out)] == ["0/4", "1/4", "2/4"]


def test_the_eta_is_the_pace_of_recent_rounds_times_those_left(config: Config, events: Events) -> None:
    out, clock = plain_console(), Clock()
    with TerminalListener(config(), out=out, progress=plain_console(), clock=clock) as listener:
        clock.now += 1000  # preparation and the first evaluation, which are no rounds
        for event in events(4):
            if event["event"] == "round":
                clock.now += 20
            listener(event)
    lines = round_lines(written(out))
    assert [line.rpartition("ETA ")[2] for line in lines[1:4]] == ["1:00", "40.0 s", "20.0 s"]
    assert "ETA" not in lines[0]
    assert "ETA" not in lines[4]


def test_faults_and_warnings_are_one_line_each_beside_the_results(config: Config, events: Events) -> None:
    site = "site\x1b[2J\n[red]b"
    fault = (site, "raised twice: ValueError\n  at x")
    stream = events(2, clients=("a", site), faults={1: fault}, warnings={2: "disk\nfull"})
    out, progress = show(config(federation__rounds=2), stream)
    assert progress.splitlines() == [
        r"round 1: client site\x1b[2J [red]b failed: raised twice: ValueError at x",
        "warning: disk full",
    ]
    assert "1 failed" in round_lines(out)[1]
    assert "failed" not in round_lines(out)[2]


def test_on_a_terminal_evaluated_rounds_stay_below_80_columns(config: Config, events: Events) -> None:
    _, progress = show(config(run__evaluate_every=2), events(4, every=2), live=True)
    lines = round_lines(progress)
    assert [line.split()[1] for line in lines] == ["0/4", "2/4", "4/4"]
    assert max(map(len, lines)) <= 80


def test_on_a_terminal_a_bar_shows_round_score_loss_clients_bytes_and_times(config: Config, events: Events) -> None:
    console, clock = live_console(), Clock()
    with TerminalListener(config(), out=live_console(), progress=console, clock=clock) as listener:
        more = [{"event": "client", "round": 2, "id": "0"}, {"event": "fault", "round": 2, "client": "1", "reason": ""}]
        for event in [*events(1, reason=None), *more]:
            clock.now += 5
            listener(event)
    drawn = ESCAPES.sub("", written(console))
    # round 1 took 5 events of 5 s each; 3 rounds are left, 10 s into the first of them
    for expected in (
        "evaluating round 1/4",
        "round 2/4",
        "━",
        "40.0 s elapsed, ETA 1:05",
        "accuracy 0.3750",
        "train loss 1.5000",
        "clients 2/3",
        "3.5 MB moved",
    ):
        assert expected in drawn


def test_after_the_end_the_bar_promises_no_more_rounds(config: Config, events: Events) -> None:
    _, progress = show(config(), events(2, planned=4, reason="interrupted"), live=True)
    after = ESCAPES.sub("", progress).partition("writing the report")[2]
    assert "elapsed" in after
    assert "ETA" not in after


def test_the_cursor_is_given_back_when_a_run_raises(config: Config, events: Events) -> None:
    console = live_console()

    def raise_amid_a_run() -> None:
        with TerminalListener(config(), out=live_console(), progress=console) as listener:
            listener(events(1)[0])
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        raise_amid_a_run()
    text = written(console)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "stopped after 0 of 4 rounds" in text


def test_results_stay_in_a_redirected_stdout_while_the_bar_moves_on_stderr(config: Config, events: Events) -> None:
    out, progress = plain_console(), live_console()
    with TerminalListener(config(), out=out, progress=progress) as listener:
        for event in events(4):
            listener(event)
        listener.finish(Path("runs/first"))
    assert len(round_lines(written(out))) == 5
    assert "completed 4 of 4 rounds" in written(out)
    assert round_lines(written(progress)) == []


def test_force_color_makes_no_bar_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not open_console(stderr=True).is_interactive


def test_the_summary_says_what_was_done_where_it_is_and_what_to_try(config: Config, events: Events) -> None:
    stream = events(4, domains=True, by_client=True, faults={1: ("0", "no reply"), 2: ("1", "no reply")})
    out, _ = show(config(), stream, Path("runs/a run"))
    summary = out[out.index("completed") :]
    for expected in (
        "completed 4 of 4 rounds",
        "0.2500 -> 0.7500 (round 0 -> 4)",
        "0.2250 -> 0.7250 (round 0 -> 4)",  # mean over domains
        "0.1500 -> 0.6500 (round 0 -> 4), sketch",
        "mean 0.7500, worst tenth 0.7300",
        "6.0 MB up, 8.0 MB down",
        "33.0 s",
        "2, of 2 clients",
        "runs/a run",
        "fedpeft evaluate 'runs/a run'",
    ):
        assert expected in summary


def private(config: Config, **settings: object) -> RunConfig:
    return config(privacy__level="record", privacy__epsilon=3, privacy__rng="seeded", **settings)


def test_a_private_run_shows_epsilon_rounded_up_in_the_place_of_a_training_loss(config: Config, events: Events) -> None:
    stream = events(4, private=True)
    stream[-4]["epsilon_max"] = 1.23400001
    out, _ = show(private(config), stream)
    lines = round_lines(out)
    assert "epsilon 1.000" in lines[2]
    assert "epsilon 1.235" in lines[4]
    assert "epsilon" not in lines[0]
    assert "train loss" not in out
    _, progress = show(private(config), stream, live=True)
    assert max(map(len, round_lines(progress))) <= 80
    assert "train loss" not in progress


def test_a_round_of_an_unknown_epsilon_shows_none(config: Config, events: Events) -> None:
    stream = events(1, private=True, reason=None)
    for event in stream:
        event.pop("epsilon_max", None)
    out, _ = show(private(config), stream, None)
    assert "epsilon" not in round_lines(out)[1]


def test_clients_out_of_budget_are_no_failures(config: Config, events: Events) -> None:
    stream = events(1, private=True)
    for event in stream:
        if event["event"] == "round":
            event |= {"failed": 3, "exhausted": 2}
    out, _ = show(private(config), stream)
    assert "1 failed  2 out of budget" in round_lines(out)[1]
    reason = "its privacy budget allows no further training"
    _, progress = show(private(config), events(2, private=True, faults={1: ("2", reason), 2: ("0", "no reply")}))
    assert f"round 1: client 2 did not train: {reason}" in progress
    assert "round 2: client 0 failed: no reply" in progress


def test_the_summary_states_privacy_with_its_caveat_and_the_whole_paragraph_once(
    config: Config, events: Events
) -> None:
    out, _ = show(private(config), events(4, private=True), Path("runs/a run"))
    summary = out[out.index("completed") :]
    assert "  privacy       epsilon 1.800 at delta 1e-05 (record), no guarantee: seeded\n" in summary
    assert "fedpeft privacy ledger 'runs/a run'" in summary
    assert max(map(len, summary.splitlines())) <= 80
    assert " ".join(summary.split()).count(STATEMENT) == 1
    heading = "\nstatement (privacy.json):\n  Each row"
    assert summary.index("run directory") < summary.index(heading) < summary.index("next:")


def test_the_summary_of_a_guarantee_and_of_a_run_without_one(config: Config, events: Events) -> None:
    stream = events(4, private=True)
    (stated,) = [event for event in stream if event["event"] == "privacy"]
    stated["guarantee"] = True
    out, _ = show(private(config), stream)
    assert "epsilon 1.800 at delta 1e-05 (record)\n" in out
    stated |= {"guarantee": False, "epsilon_max": None}
    out, _ = show(private(config, privacy__sampling="shuffle"), stream)
    assert "privacy       no epsilon can be stated; no guarantee: shuffled batches, seeded\n" in out


def test_a_run_that_is_not_private_says_nothing_of_privacy(config: Config, events: Events) -> None:
    out, _ = show(config(), events(4))
    assert "privacy" not in out
    assert "epsilon" not in out


def test_a_causal_run_is_judged_by_perplexity(config: Config, events: Events) -> None:
    out, _ = show(config(model__task="causal-lm"), events(4, causal=True))
    assert "perplexity 20.0000" in round_lines(out)[0]
    assert re.search(r"perplexity +20\.0000 -> 10\.0000", out)
    assert "accuracy" not in out


@pytest.mark.parametrize(
    ("done", "reason", "expected"),
    [
        (2, "interrupted", ["interrupted after 2 of 4 rounds", "adapter of round 2"]),
        (0, "interrupted", ["interrupted after 0 of 4 rounds", "untrained adapter"]),
        (
            1,
            "round 2: 1 good updates",
            ["stopped after 1 of 4 rounds", "round 2: 1 good updates", "adapter of round 1"],
        ),
    ],
)
def test_a_run_that_ended_early_says_so_and_what_was_saved(
    config: Config, events: Events, done: int, reason: str, expected: list[str]
) -> None:
    out, _ = show(config(), events(done, planned=4, reason=reason))
    assert "completed 4" not in out
    assert "completed 0" not in out
    for words in expected:
        assert words in out


def test_a_run_that_never_was_evaluated_or_trained_prints_nothing_about_itself(config: Config) -> None:
    assert show(config(), [], run=None) == ("", "")


def test_letters_that_the_encoding_lacks_do_not_end_the_run(config: Config, events: Events) -> None:
    raw = io.BytesIO()
    console = RunConsole(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=False, width=80)
    with TerminalListener(config(), out=console, progress=console) as listener:
        for event in events(1, faults={1: ("Zürich", "leider")}, clients=("Zürich", "Bern")):
            listener(event)
    assert rb"client Z\xfcrich failed" in raw.getvalue()


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_reader_that_goes_away_does_not_end_the_run(config: Config, events: Events, kind: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as file:
        listener: TerminalListener | JsonListener
        if kind == "json":
            listener = JsonListener(file)
        else:
            listener = TerminalListener(config(), out=RunConsole(file=file), progress=RunConsole(file=file))
        with listener:
            for event in events(4):
                listener(event)
            listener.finish(Path("runs/first"))


def test_each_event_is_one_line_of_strict_json_and_nothing_else(
    events: Events, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    stream = events(2, domains=True, faults={1: ("0", "line\nbreak")})
    stream[1]["loss"] = float("nan")
    with JsonListener() as listener:
        for event in stream:
            listener(event)
        listener.finish(Path("runs/first"))
    captured = capsys.readouterr()
    parsed = [json.loads(line, parse_constant=refuse) for line in captured.out.splitlines()]
    stream[1]["loss"] = None
    assert parsed == stream
    assert captured.err == ""


def test_json_lines_are_flushed_one_by_one(events: Events) -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as file, open(reading) as reader:
        JsonListener(file)(events(1)[0])
        assert json.loads(reader.readline())["event"] == "evaluate"


def test_the_listeners_load_nothing_heavy() -> None:
    heavy = {"torch", "matplotlib", "numpy", "flwr", "jinja2"}
    code = f"""
import sys, fedpeft.config  # which whoever has a run to listen to has read
before = set(sys.modules)
import fedpeft.report.terminal, fedpeft.report.tables
print({heavy} & (set(sys.modules) - before))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
