"""Files of a run directory: whole or not there, on the disk when that is said, and never through somebody's link."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError

from fedpeft.errors import RunDirectoryError


def write_whole(file: Path, data: bytes, partial: Path | None = None) -> None:
    """Write a file that is on the disk, or leave the one that is there.

    Parameters
    ----------
    file : Path
        In a folder that is there; the new name is on the disk when the folder is, see `fedpeft.cache.sync`.
    data : bytes
        All that it holds.
    partial : Path, optional
        Under which name it is written, hidden if not given.

    Raises
    ------
    OSError
        It cannot be written; nothing is left of it.
    """
    partial = partial or file.with_name(f".{file.name}")
    try:
        with open(open_own(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def open_own(file: Path, flags: int) -> int:
    """Open a file of the run's own, which is no link to another; return its descriptor."""
    return os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def refuse_links(run: Path, files: Collection[str], folders: Collection[str]) -> None:
    """Refuse a run directory in which a name of the run's own is a link: what it leads to would be overwritten.

    Parameters
    ----------
    run : Path
        The run directory, which may itself be reached by a link.
    files, folders : collection of str
        The run's own; files may be there under hidden names as well.

    Raises
    ------
    RunDirectoryError
        There is a link, or a folder cannot be looked into.
    """

    def fail(error: OSError) -> None:
        raise RunDirectoryError(f"cannot read the run directory '{run}': {error.strerror or error}")

    own = {*files, *folders, *(f".{name}" for name in files)}
    found = [run / name for name in sorted(own) if (run / name).is_symlink()]
    for folder in folders:
        for at, inner, names in os.walk(run / folder, onerror=fail if (run / folder).exists() else None):
            found += [path for name in (*inner, *names) if (path := Path(at, name)).is_symlink()]
    if found:
        raise RunDirectoryError(
            f"'{found[0]}' is a link to '{os.readlink(found[0])}': a run that goes on would write and remove files "
            "there. Put the file or folder itself in its place."
        )


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder, which becomes `out` when the block ends well and vanishes when it does not.

    Raises
    ------
    RunDirectoryError
        Something in the block, or the folder, cannot be written.
    """
    final = out.resolve()  # of a link, what it leads to
    draft = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, final)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunDirectoryError(f"cannot write '{out}': {reason}; give another --out.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
