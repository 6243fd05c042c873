"""Files that are whole or not there: a temporary file beside, synced, renamed.

A temporary file is locked by its writer, so those that killed writers left behind are told from living ones, and go
with the next write of the same file. Locks, not pids or times, tell them: hosts and containers that share a folder
share neither pids nor clocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """What `write` puts into the file it is given becomes `path`. On any error the old file is intact, nothing is left
    beside it, and the error goes on (OSError where the system refuses, or the old file is read-only)."""
    path = path.resolve()  # a link stays a link
    if path.is_dir():
        raise IsADirectoryError(21, "it is a directory")
    if path.exists():
        if not path.is_file():  # a rename would put a file in a device's place
            raise OSError(22, "it is no regular file")
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "it is read-only")
    _sweep(path)
    beside, fd = _claim(path)
    try:
        with os.fdopen(fd, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    _sync_folder(path.parent)


def why_not(error: OSError, path: Path) -> str:
    """The system's reason, and what became of `path`: one line for the user."""
    kept = "the file that was there is unchanged" if path.is_file() else "nothing was written"
    return f"cannot write {path}: {error.strerror or error}; {kept}, make room or choose another -o"


def locked(fd: int, path: Path) -> bool:
    """Takes the lock of an open file or folder; False where another process has it, or `path` is no longer its name.

    True where the file system knows no locks: then nothing sweeps there either.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def unowned(path: Path) -> int | None:
    """The locked descriptor of a temporary file or folder whose owner is gone; None where it lives, or is not ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # another process has just removed it, or it is another user's
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _claim(path: Path) -> tuple[Path, int]:
    """A new temporary file beside `path`, and its locked descriptor."""
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if locked(fd, beside):  # else another writer swept it before we had the lock
            return beside, fd
        os.close(fd)


def _sweep(path: Path) -> None:
    """Removes what killed writers of `path` left beside it."""
    with os.scandir(path.parent) as found:
        names = [e.name for e in found if e.name.startswith(f".{path.name}.") and e.name.endswith(".tmp")]
    for name in names:
        if (fd := unowned(path.with_name(name))) is not None:
            with contextlib.suppress(OSError):
                path.with_name(name).unlink()
            os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
