"""What somebody may do to a ledger's file: never fewer charges than were made, or an error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.errors import LedgerError
from fedpeft.privacy import ledger as module
from fedpeft.privacy.anchors import Anchor, anchor_file, read_anchor, write_anchor
from fedpeft.privacy.chain import Entry, Head, entry_line, head_link, read_unchained
from fedpeft.privacy.ledger import Ledger, read_entries

ENTRY = Entry("run", "a", 1, 1.1, 0.25, 10)
MADE = [replace(ENTRY, round=number) for number in range(1, 6)]
Lines = list[bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one book, and keep what is known of it beside it: both are copied for each test."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_DATA_DIR", str(folder / "data"))
        ledger = Ledger.create(folder / "ledger.jsonl")
        for entry in MADE:
            ledger.charge(entry)
    return folder


@pytest.fixture(autouse=True)
def own_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_DATA_DIR", str(tmp_path / "data"))
    forget()


@pytest.fixture
def book(made: Path, tmp_path: Path) -> Ledger:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.entries() == MADE
    return ledger


def forget() -> None:
    """Be another process, which has seen no ledger."""
    module._remembered.clear()


def rechained(lines: Lines, change: Callable[[dict[str, object]], None], at: int) -> Lines:
    """Write lines anew with one of them changed and all hashes right, as somebody who knows how would."""
    written, before = [lines[0]], head_link(lines[0])[1].hash
    for number, line in enumerate(lines[1:], start=1):
        found = json.loads(line)
        if number == at:
            change(found)
        fields = {key: value for key, value in found.items() if key not in ("count", "before", "hash")}
        written.append(entry_line(Entry(**fields), number, before))  # type: ignore[arg-type]
        before = json.loads(written[-1])["hash"]
    return written


def edited(old: bytes, new: bytes) -> Callable[[Lines], Lines]:
    def edit(lines: Lines) -> Lines:
        assert old in lines[3]
        return [*lines[:3], lines[3].replace(old, new), *lines[4:]]

    return edit


def forged(**values: object) -> Callable[[Lines], Lines]:
    return lambda lines: rechained(lines, lambda found: found.update(values), 3)


NOISE = b'"noise_multiplier": 1.1'
TAMPERINGS: dict[str, Callable[[Lines], Lines]] = {
    "the last line dropped": lambda lines: lines[:-1],
    "two lines dropped": lambda lines: lines[:-2],
    "all lines but the first dropped": lambda lines: lines[:1],
    "a line in the middle dropped": lambda lines: [*lines[:2], *lines[3:]],
    "the first line dropped": lambda lines: lines[1:],
    "lines in another order": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "a line twice": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "the last line twice": lambda lines: [*lines, lines[-1]],
    "more noise": edited(NOISE, b'"noise_multiplier": 9.1'),
    "noise of 1e30": edited(NOISE, b'"noise_multiplier": 1e+30'),
    "noise NaN": edited(NOISE, b'"noise_multiplier": NaN'),
    "noise infinite": edited(NOISE, b'"noise_multiplier": Infinity'),
    "noise below zero": edited(NOISE, b'"noise_multiplier": -1.1'),
    "noise as text": edited(NOISE, b'"noise_multiplier": "1.1"'),
    "noise true": edited(NOISE, b'"noise_multiplier": true'),
    "noise twice": edited(NOISE, NOISE + b', "noise_multiplier": 50.0'),
    "no steps": edited(b'"steps": 10', b'"steps": 0'),
    "steps below zero": edited(b'"steps": 10', b'"steps": -10'),
    "steps of many digits": edited(b'"steps": 10', b'"steps": 1' + b"0" * 5000),
    "steps with a point": edited(b'"steps": 10', b'"steps": 10.0'),
    "a rate of zero": edited(b'"sample_rate": 0.25', b'"sample_rate": 0.0'),
    "another client": edited(b'"client": "a"', b'"client": "b"'),
    "another run": edited(b'"run": "run"', b'"run": "old"'),
    "an unknown field": edited(b'"steps": 10', b'"steps": 10, "void": true'),
    "a field gone": edited(b'"steps": 10, ', b""),
    "other spaces": edited(b'"steps": 10', b'"steps":  10'),
    "no UTF-8": edited(b'"client": "a"', b'"client": "\xff"'),
    "deep nesting": lambda lines: [*lines[:3], b"[" * 100_000, *lines[4:]],
    "a mark of byte order": lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]],
    "ends of line of another system": lambda lines: [line + b"\r" for line in lines],
    "UTF-16": lambda lines: [b"\n".join(lines).decode().encode("utf-16")],
    "an empty line": lambda lines: [*lines[:3], b"", *lines[3:]],
    "nothing": lambda lines: [],
    "only spaces": lambda lines: [b"   "],
    "a list": lambda lines: [b"[]"],
    "zeros, as after a crash": lambda lines: [*lines, b"\0" * 64],
    "forged noise with right hashes": forged(noise_multiplier=90.0),
    "forged steps with right hashes": forged(steps=1),
    "the last line forged with right hashes": lambda lines: rechained(lines, lambda found: found.update(steps=1), 5),
    "a line dropped and the others chained anew": lambda lines: rechained([*lines[:2], *lines[3:]], dict, 0),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_changed_book_is_an_error_or_holds_no_less(name: str, book: Ledger) -> None:
    lines = book.path.read_bytes().splitlines()
    changed = TAMPERINGS[name](lines)
    assert changed != lines
    book.path.write_bytes(b"".join(line + b"\n" for line in changed))
    anew = Ledger(book.path)
    for used in (book, anew):  # that has read it before, and one that has not
        try:
            used.charge(replace(ENTRY, round=6))
            held = used.entries()
        except LedgerError:
            continue
        assert held[:5] == MADE
        assert len(held) >= 6
    forget()
    with contextlib.suppress(LedgerError):
        assert read_entries(book.path)[:5] == MADE


def test_every_byte_of_a_book_counts(book: Ledger) -> None:
    """A bit turned anywhere but in the end of the last line."""
    whole = book.path.read_bytes()
    for at in range(0, len(whole) - 1, 7):
        book.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        forget()
        with pytest.raises(LedgerError):
            read_entries(book.path)
    for size in range(0, len(whole) - 1, 97):  # cut off anywhere
        book.path.write_bytes(whole[:size])
        forget()
        try:
            assert read_entries(book.path) == MADE
        except LedgerError:
            continue


def test_a_whole_last_line_counts_though_an_editor_took_its_end(book: Ledger) -> None:
    whole = book.path.read_bytes()
    book.path.write_bytes(whole.removesuffix(b"\n"))
    assert read_entries(book.path) == MADE
    anew = Ledger(book.path)
    assert anew.entries() == MADE
    for used in (anew, book):
        used.charge(replace(ENTRY, round=len(used.entries()) + 1))
    assert len(read_entries(book.path)) == 7
    assert book.path.read_bytes().startswith(whole)


def test_a_process_that_died_as_it_wrote_leaves_a_charge_that_counts(book: Ledger) -> None:
    """Whatever of the line came to the disk, none of it included: what was to be written is known elsewhere."""
    whole = book.path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, 2, 40, len(last) - 1, len(last)):
        book.path.write_bytes(whole[: len(whole) - cut])
        forget()
        assert read_entries(book.path) == MADE
        assert Ledger(book.path).entries() == MADE
        assert book.path.read_bytes().rstrip(b"\n") == whole.rstrip(b"\n")


def test_half_a_line_that_nobody_knows_of_lets_nobody_train(book: Ledger, tmp_path: Path) -> None:
    with book.path.open("ab") as file:
        file.write(b'{"run": "run", "client": "a", "rou')
    for used in (book, Ledger(book.path)):
        with pytest.raises(LedgerError, match="ends in half a line"):
            used.charge(ENTRY)
    run = Ledger.create(tmp_path / "run" / "ledger.jsonl", "run")  # whose one writer knows of all its charges
    run.charge(ENTRY)
    with run.path.open("ab") as file:
        file.write(b'{"run": "run", "client": "a", "rou')
    forget()
    assert read_entries(run.path) == [ENTRY]
    assert Ledger(run.path).charge(MADE[1])
    assert read_entries(run.path) == MADE[:2]


def test_an_older_copy_is_noticed_by_its_id_whatever_its_name(book: Ledger, tmp_path: Path) -> None:
    older = book.path.read_bytes()
    for number in (6, 7):
        book.charge(replace(ENTRY, round=number))
    other = tmp_path / "elsewhere.jsonl"
    other.write_bytes(older)
    forget()
    with pytest.raises(LedgerError, match=r"holds 5 of the 7 charges.*Put back the copy that holds all 7"):
        Ledger(other).charge(ENTRY)
    other.unlink()
    book.path.write_bytes(older)
    with pytest.raises(LedgerError, match="was changed by something else"):
        book.charge(ENTRY)
    # one who takes away what is known elsewhere has this process's memory to deal with
    with pytest.raises(LedgerError, match="holds 5 of the 7"):
        read_entries(book.path)


def test_a_process_remembers_a_book_without_its_anchor(book: Ledger, tmp_path: Path) -> None:
    older = book.path.read_bytes()
    book.charge(replace(ENTRY, round=6))
    shutil.rmtree(tmp_path / "data")
    book.path.write_bytes(older)
    with pytest.raises(LedgerError, match="holds 5 of the 6"):
        Ledger(book.path).charge(ENTRY)


def test_a_copy_taken_one_charge_ago_gets_that_charge_back(book: Ledger) -> None:
    older = book.path.read_bytes()
    book.charge(replace(ENTRY, round=6))
    book.path.write_bytes(older)
    forget()
    assert [entry.round for entry in Ledger(book.path).entries()] == [1, 2, 3, 4, 5, 6]


def test_a_book_moved_to_another_machine_goes_on_there(
    book: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_DATA_DIR", str(tmp_path / "another machine"))
    forget()
    moved = Ledger(book.path)
    with caplog.at_level("WARNING", logger="fedpeft"):
        monkeypatch.setattr(module.log, "propagate", True)
        assert moved.entries() == MADE
    assert "its 5 charges are taken for all" in caplog.text
    book.path.write_bytes(b"".join(book.path.read_bytes().splitlines(keepends=True)[:3]))
    forget()
    with pytest.raises(LedgerError):  # it is known here from then on
        Ledger(book.path).entries()


@pytest.mark.parametrize("content", ["", "{}", "[[", '{"ledger": "x", "count": 1, "hash": "", "line": ""}'])
def test_what_is_known_of_a_book_cannot_be_damaged_unseen(content: str, book: Ledger) -> None:
    head, _ = head_link(book.path.read_bytes().splitlines()[0])
    anchor_file(head, book.path).write_text(content)
    with pytest.raises(LedgerError, match="damaged or another ledger's"):
        Ledger(book.path).charge(ENTRY)


def test_what_cannot_be_noted_elsewhere_is_not_charged(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = book.path.parent / "a file"
    blocked.touch()
    monkeypatch.setenv("FEDPEFT_DATA_DIR", str(blocked))
    with pytest.raises(LedgerError, match=r"FEDPEFT_DATA_DIR|cannot read"):
        Ledger(book.path).charge(replace(ENTRY, round=6))
    monkeypatch.undo()


def test_a_charge_whose_write_failed_counts_for_nothing(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_all", full)
    with pytest.raises(LedgerError, match="No space left"):
        book.charge(replace(ENTRY, round=6))
    monkeypatch.setattr(module, "_write_all", lambda file, data: file.write(data))
    forget()
    assert Ledger(book.path).entries() == MADE


def test_a_line_that_is_given_back_from_elsewhere_stays_there_until_it_is_written(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = book.path.read_bytes()
    book.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    forget()

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(module, "_write_all", full)
        with pytest.raises(LedgerError, match="No space left"):
            Ledger(book.path).entries()
    assert Ledger(book.path).entries() == MADE


def test_a_book_that_is_not_there_is_made_by_a_word_of_its_own_only(tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    with pytest.raises(LedgerError, match="fedpeft privacy ledger --create"):
        Ledger(path).charge(ENTRY)
    assert not path.exists()
    Ledger.create(path).charge(ENTRY)
    with pytest.raises(LedgerError, match="there already, and nothing is overwritten"):
        Ledger.create(path)
    assert read_entries(path) == [ENTRY]


def test_two_names_of_one_book_are_one_account(tmp_path: Path) -> None:
    """Hard links and symbolic ones, in other folders, by processes that charge at once."""
    book = Ledger.create(tmp_path / "ledger.jsonl")
    names = [tmp_path / "hard" / "a.jsonl", tmp_path / "soft" / "b.jsonl"]
    for name in names:
        name.parent.mkdir()
    os.link(book.path, names[0])
    names[1].symlink_to(book.path)
    code = "import sys; from pathlib import Path; from fedpeft.privacy.ledger import *\n"
    code += "book = Ledger(Path(sys.argv[1]))\nprint('ready', flush=True); sys.stdin.readline()\n"
    code += "for number in range(1, 21): book.charge(Entry('run', sys.argv[2], number, 1.0, 0.5, 3))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(name), str(index)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for index, name in enumerate(names)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for number in range(1, 21):  # and here, meanwhile
        book.charge(Entry("run", "2", number, 1.0, 0.5, 3))
    for process in started:
        process.communicate(timeout=120)
        assert process.returncode == 0
    for name in (book.path, *names):
        held = Ledger(name).entries()
        assert [sum(entry.client == client for entry in held) for client in "012"] == [20, 20, 20]
    with book.held(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOCK_SECONDS", 0.05)
        for name in names:
            with pytest.raises(LedgerError, match="held by another process"):
                Ledger(name).charge(ENTRY)


def test_a_book_replaced_while_somebody_waits_for_it_is_opened_again(book: Ledger, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    shutil.copy(book.path, copy)
    waiting = Ledger(book.path)
    locked, looked = waiting._lock, []

    def replace_first(descriptor: int, deadline: float, *, write: bool) -> None:
        if not looked:
            copy.replace(book.path)
        looked.append(descriptor)
        locked(descriptor, deadline, write=write)

    waiting._lock = replace_first  # type: ignore[method-assign]
    waiting.charge(replace(ENTRY, round=6))
    assert len(looked) == 2
    assert len(read_entries(book.path)) == 6


@pytest.mark.parametrize(
    "wrong",
    [{"noise_multiplier": float("nan")}, {"noise_multiplier": -1.0}, {"sample_rate": 0.0}, {"sample_rate": 2.0}],
)
def test_what_is_no_charge_is_not_written(wrong: dict[str, float], book: Ledger) -> None:
    with pytest.raises(ValueError, match="Entry"):
        book.charge(replace(ENTRY, **wrong))  # type: ignore[arg-type]
    assert book.entries() == MADE


def test_more_noise_than_anybody_needs_counts_as_the_most_that_is_believed(book: Ledger) -> None:
    book.charge(replace(ENTRY, noise_multiplier=1e30, steps=0))
    assert book.entries()[-1].noise_multiplier == 1e6
    assert book.entries()[-1].steps == 1


def test_other_things_than_files_are_no_books(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(LedgerError):
            Ledger(path).charge(ENTRY)
        with pytest.raises(LedgerError):
            read_entries(path)


# --- ledgers of earlier versions --------------------------------------------------------------------------------


def unchained(entries: list[Entry]) -> bytes:
    return b"".join((json.dumps(vars(entry)) + "\n").encode() for entry in entries)


def test_a_book_of_an_earlier_version_is_copied_into_a_new_one_and_used_no_more(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_bytes(unchained(MADE))
    for used in (lambda: Ledger(old).charge(ENTRY), lambda: read_entries(old)):
        with pytest.raises(LedgerError, match=f"fedpeft privacy ledger --create NEW --from {old}"):
            used()
    Ledger.create(new, entries=read_unchained(old))
    assert read_entries(new) == MADE
    old.write_bytes(unchained(MADE).removesuffix(b"\n"))  # a whole last line
    assert read_unchained(old) == MADE
    for damage in (unchained(MADE)[:-20], b"\n" + unchained(MADE), b"{}\n", b"\xff\n"):
        old.write_bytes(damage)
        with pytest.raises(LedgerError, match="none of its charges are copied"):
            read_unchained(old)


def test_what_is_written_elsewhere_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    head, _ = head_link(Ledger.create(path).path.read_bytes().rstrip(b"\n"))
    file = anchor_file(head, path)
    write_anchor(path, head, Anchor(3, "abc", "line"))
    assert read_anchor(path, head) == Anchor(3, "abc", "line")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.unlink()
    assert read_anchor(path, head) is None


def test_a_book_with_another_id_in_the_place_of_one_is_noticed(book: Ledger, tmp_path: Path) -> None:
    """Right in every hash, and empty: nobody made it there."""
    book.charge(ENTRY)
    fresh = Head("0" * 32, "site").line() + b"\n"
    book.path.write_bytes(fresh)
    forget()
    for used in (lambda: Ledger(book.path).charge(ENTRY), lambda: read_entries(book.path)):
        with pytest.raises(LedgerError, match="another one than was kept there"):
            used()
    book.path.unlink()
    assert Ledger.create(book.path).charge(ENTRY)  # somebody says so
    run = Ledger.create(tmp_path / "run" / "ledger.jsonl", "run")
    with pytest.raises(LedgerError, match="is a run's, and no site's"):
        Ledger(run.path, "site").charge(ENTRY)


def test_a_book_that_could_not_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    with monkeypatch.context() as context:
        context.setenv("FEDPEFT_DATA_DIR", str(blocked))
        with pytest.raises(LedgerError, match="FEDPEFT_DATA_DIR"):
            Ledger.create(tmp_path / "new.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]
    Ledger.create(tmp_path / "new.jsonl")


def test_a_fork_of_who_holds_a_book_holds_nothing(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    with book.held():
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: 0)
            with pytest.raises(LedgerError, match="held by another process"):
                book.charge(ENTRY)
        assert book.charge(ENTRY)
    assert len(read_entries(book.path)) == len(MADE) + 1


def test_names_that_lead_nowhere_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for make in (Ledger.create, lambda path: Ledger(path).charge(ENTRY)):
        for path in (tmp_path / "one", Path("~nobody-of-this-name/ledger.jsonl")):
            with pytest.raises(LedgerError) as caught:
                make(path)
            assert "\n" not in str(caught.value)
    for folder in ("kept/here", "~nobody-of-this-name/data"):
        monkeypatch.setenv("FEDPEFT_DATA_DIR", folder)
        with pytest.raises(LedgerError, match="is no absolute path"):
            Ledger.create(tmp_path / "ledger.jsonl")
        assert not (tmp_path / "ledger.jsonl").exists()
