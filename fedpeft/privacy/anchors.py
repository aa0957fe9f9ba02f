"""What is known of a ledger apart from its file, so that an older copy of it, or a shorter one, is noticed.

An anchor holds a ledger's last line, and is written BEFORE that line: where a process dies between the two, or in the
middle of the second, the next one finds the whole line here and counts it. It is found by the ledger's own id, not by
its file's name.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from fedpeft.errors import LedgerError
from fedpeft.privacy.chain import Head

DATA_VARIABLE = "FEDPEFT_DATA_DIR"


@dataclass(frozen=True)
class Anchor:
    """How far a ledger had come.

    Parameters
    ----------
    count : int
        Its charges.
    hash : str
        Of its last line.
    line : str
        Its last line; empty where it is not at hand.
    """

    count: int
    hash: str
    line: str = ""


def data_dir() -> Path:
    """Return the folder named by the environment variable ``FEDPEFT_DATA_DIR``, else the user's data folder.

    Raises
    ------
    LedgerError
        It is another one wherever a process is started.
    """
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(os.path.expanduser(named)) if named else platformdirs.user_data_path("fedpeft")
    if not folder.is_absolute():
        raise LedgerError(
            f"{DATA_VARIABLE} = '{named}' is no absolute path: what is known of privacy ledgers would be lost to "
            "whoever starts elsewhere. Write it from the root on."
        )
    return folder


def anchor_file(head: Head, ledger: Path) -> Path:
    """Return where a ledger's anchor is: of a run, beside it; of a site, in the user's data folder."""
    if head.keeper == "run":
        return anchor_of_run(ledger)
    return data_dir() / "ledgers" / f"{head.ledger}.json"


def anchor_of_run(ledger: Path) -> Path:
    """Return where the anchor of a run's ledger is."""
    return ledger.with_name(f".{ledger.name}.anchor")


def read_anchor(ledger: Path, head: Head) -> Anchor | None:
    """Return the anchor of a ledger's file; None where there is none.

    Raises
    ------
    LedgerError
        It cannot be read, or is another ledger's.
    """
    file = anchor_file(head, ledger)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        anchor = Anchor(found["count"], found["hash"], found["line"])
        right = found["ledger"] == head.ledger and type(anchor.count) is int and anchor.count >= 0
        if not (right and isinstance(anchor.hash, str) and isinstance(anchor.line, str)):
            raise ValueError(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(
            f"cannot read '{file}', which says how far a privacy ledger had come: {error.strerror or error}; nobody "
            "trains until it can be read."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LedgerError(
            f"'{file}', which says how far a privacy ledger had come, is damaged or another ledger's; nobody trains "
            "until it is put back as it was."
        ) from None
    return anchor


def kept_there_before(ledger: Path, head: Head) -> bool:
    """Tell whether another ledger than this one was last known in the same place."""
    for file in anchor_file(head, ledger).parent.glob("*.json"):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # whoever opens that ledger is told
        if isinstance(found, dict) and found.get("path") == str(ledger) and found.get("ledger") != head.ledger:
            return True
    return False


def write_anchor(ledger: Path, head: Head, anchor: Anchor) -> None:
    """Write an anchor, whole or not at all, and return when it is on the disk.

    Parameters
    ----------
    ledger : Path
        The ledger's file.
    head : Head
        Its first line.
    anchor : Anchor
        How far it has come.

    Raises
    ------
    LedgerError
        It cannot be written.
    """
    file = anchor_file(head, ledger)
    facts = {"ledger": head.ledger, "path": str(ledger), **asdict(anchor)}
    partial = file.with_name(f".{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("x", encoding="utf-8") as written:
            written.write(json.dumps(facts) + "\n")
            written.flush()
            os.fsync(written.fileno())
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise LedgerError(
            f"cannot write '{file}', which says how far a privacy ledger has come: {error.strerror or error}; nobody "
            f"trains without it. Make room, or set {DATA_VARIABLE} to a folder that is kept and can be written."
        ) from None
