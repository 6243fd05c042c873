"""Files that are whole or not there: a temporary file beside, synced, renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """What `write` puts into the file it is given becomes `path`. On any error the old file is intact, nothing is left
    beside it, and the error goes on (OSError where the system refuses)."""
    path = path.resolve()  # a link stays a link
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a directory")
        with beside.open("wb") as file:
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


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
