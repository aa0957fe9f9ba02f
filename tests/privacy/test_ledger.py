"""The book of what was spent: never less than what was released, whatever is killed and whoever writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.errors import LedgerError
from fedpeft.privacy import ledger as module
from fedpeft.privacy.budget import Budget, Limit, charged
from fedpeft.privacy.ledger import Entry, Ledger, read_entries

ENTRY = Entry("run", "a", 1, 1.1, 0.25, 10)


def test_what_was_charged_is_there_after_a_restart(tmp_path: Path) -> None:
    book = Ledger.create(tmp_path / "deep" / "ledger.jsonl")
    assert book.charge(ENTRY)
    assert book.charge(replace(ENTRY, client="b", round=2))
    again = Ledger(book.path)
    assert again.entries() == [ENTRY, replace(ENTRY, client="b", round=2)]
    assert again.entries("b") == [replace(ENTRY, client="b", round=2)]
    assert again.entries(run="other") == []


def test_a_release_is_charged_once_and_what_names_none_every_time(tmp_path: Path) -> None:
    book = Ledger.create(tmp_path / "ledger.jsonl")
    seeded = replace(ENTRY, release="abc")
    assert [book.charge(seeded), book.charge(seeded), Ledger(book.path).charge(seeded)] == [True, False, False]
    assert book.charge(replace(seeded, client="b"))  # other rows, another release
    assert book.charge(replace(seeded, run="next"))
    assert [book.charge(ENTRY), book.charge(ENTRY)] == [True, True]
    assert len(book.entries()) == 5


def test_a_file_of_another_kind_is_no_book(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "round", "round": 1}\n')
    for used in (lambda: read_entries(path), lambda: Ledger(path).charge(ENTRY)):
        with pytest.raises(LedgerError, match="is no privacy ledger"):
            used()
    book = Ledger.create(tmp_path / "ledger.jsonl")
    book.charge(ENTRY)
    with book.path.open("a") as file:
        file.write('{"event": "round"}\n')
    with pytest.raises(LedgerError, match="damaged in line 3"):
        read_entries(book.path)


def test_a_book_that_is_taken_away_lets_nobody_train(tmp_path: Path) -> None:
    book = Ledger.create(tmp_path / "ledger.jsonl")
    book.charge(ENTRY)
    book.path.unlink()
    with pytest.raises(LedgerError, match="gone"):
        book.charge(ENTRY)


def test_a_book_that_cannot_be_synced_lets_nobody_train_and_holds_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Ledger.create(tmp_path / "ledger.jsonl")
    book.charge(ENTRY)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(LedgerError, match="No space left"):
        book.charge(replace(ENTRY, round=2))
    monkeypatch.undo()
    assert Ledger(book.path).entries() == [ENTRY]
    assert book.charge(replace(ENTRY, round=3))


def test_it_is_synced_before_charge_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: (synced.append(descriptor), sync(descriptor))[1])
    Ledger.create(tmp_path / "ledger.jsonl").charge(ENTRY)
    assert len(synced) >= 5  # what it is to hold, and then the book


def test_a_second_process_waits_and_then_sees_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    held = Ledger.create(path)
    code = "import sys; from pathlib import Path; from fedpeft.privacy.ledger import *\n"
    code += "book = Ledger(Path(sys.argv[1]))\nprint('ready', flush=True)\n"
    code += "print(book.charge(Entry('run', 'b', 1, 1.0, 0.5, 3)), len(book.entries()), flush=True)"
    with held.held():
        other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        held.charge(ENTRY)
        time.sleep(0.3)
        assert other.poll() is None  # it waits
    assert other.communicate(timeout=600)[0] == "True 2\n"
    assert len(held.entries()) == 2
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with Ledger(path).held(), pytest.raises(LedgerError, match="another process"):
        Ledger(path).charge(ENTRY)


def test_a_process_that_is_killed_as_it_trains_has_paid(tmp_path: Path) -> None:
    path = Ledger.create(tmp_path / "ledger.jsonl").path
    code = "import sys, time; from pathlib import Path; from fedpeft.privacy.ledger import *\n"
    code += "Ledger(Path(sys.argv[1])).charge(Entry('run', 'a', 1, 1.1, 0.25, 10))\nprint('trains', flush=True)\n"
    code += "time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "trains\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Ledger(path).entries() == [ENTRY]  # and its lock is free


def test_a_charge_that_would_pass_the_budget_is_not_made(tmp_path: Path) -> None:
    book = Ledger.create(tmp_path / "ledger.jsonl")
    from fedpeft.privacy.accounting import spent

    two = spent([ENTRY.charge, ENTRY.charge], 1e-5).epsilon
    budget = Budget(two, 1e-5)
    made = [charged(book, replace(ENTRY, round=number), [Limit(budget, "a")]) for number in (1, 2, 3)]
    assert made == [True, True, False]
    assert len(book.entries()) == 2
    assert charged(book, replace(ENTRY, client="b"), [Limit(budget, "b")])  # another client's account
    assert not charged(book, replace(ENTRY, client="c"), [Limit(budget)])  # all of the book
    assert charged(book, replace(ENTRY, client="c", run="next"), [Limit(budget, run="next")])
    assert not charged(book, replace(ENTRY, client="c"), [Limit(budget, run="next"), Limit(budget)])
    assert charged(book, replace(ENTRY, client="c"))


def test_a_plan_within_the_budget_allows_its_parts_and_asks_the_accountant_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fedpeft.privacy.budget as budgets
    from fedpeft.privacy.accounting import Charge, spent

    planned = Charge(1.1, 0.25, 40)
    whole = spent([planned], 1e-5).epsilon
    asked: list[object] = []
    monkeypatch.setattr(budgets, "spent", lambda *given: (asked.append(given[0]), spent(*given))[1])
    budget = Budget(whole, 1e-5)
    before: list[Charge] = []
    for _ in range(4):
        assert budget.allows(before, ENTRY.charge, planned)
        before.append(ENTRY.charge)
    assert asked == [[planned]] * 4  # which is cached
    assert not budget.allows(before, ENTRY.charge, planned)  # beyond the plan
    assert not Budget(0.99 * whole, 1e-5).allows(before[:3], ENTRY.charge, planned)  # a plan too dear allows nothing
    other = Charge(0.5, 0.25, 1)
    assert not budget.allows(before, other, planned)


def test_a_release_that_is_on_the_books_may_be_computed_again_though_the_budget_is_spent(tmp_path: Path) -> None:
    book = Ledger.create(tmp_path / "ledger.jsonl")
    seeded = replace(ENTRY, release="abc")
    book.charge(seeded)
    limits = [Limit(Budget(0.01, 1e-5))]
    assert charged(book, seeded, limits)
    assert not charged(book, replace(seeded, release="other"), limits)


def test_a_link_to_a_book_is_that_book(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "ledger.jsonl")
    book, link = Ledger.create(tmp_path / "ledger.jsonl"), Ledger(tmp_path / "link.jsonl")
    link.charge(ENTRY)
    book.charge(replace(ENTRY, round=2))
    assert link.entries() == book.entries() == [ENTRY, replace(ENTRY, round=2)]
    assert not list(tmp_path.glob(".link*"))
