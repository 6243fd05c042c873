"""A folder for one run at a time: two that trained into one would leave one's network beside the other's figures.

The lock is the folder's own (``flock``), so nothing is left behind, and it ends with its process however that ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from latbench.errors import UsageError
from latbench.files import locked

_HELD: dict[Path, tuple[int, int]] = {}  # folders of this process -> descriptor that has the lock, how often taken


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder for this process alone, made where it is missing, and removed again if nothing was put into it.

    Once more within the same process is no harm. Raises UsageError where another run has it, or it cannot be written.
    """
    folder, made = folder.resolve(), not folder.exists()
    fd, count = _HELD.get(folder) or (_take(folder), 0)
    _HELD[folder] = fd, count + 1
    try:
        yield
    finally:
        _HELD[folder] = fd, count
        if not count:
            del _HELD[folder]
            if made:
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()
            os.close(fd)


def _take(folder: Path) -> int:
    """Its locked descriptor."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "it is read-only")
            fd = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"cannot write into {folder}: {error.strerror or error}; choose another -o") from None
        if locked(fd, folder):
            return fd
        os.close(fd)
        if folder.exists():  # else a run that ended with nothing has just removed it
            raise UsageError(f"another run is at work in {folder}: wait for it, or choose another -o")


def _let_go() -> None:
    """In a forked process that decodes images: it may outlive its parent for a moment, and must not keep the lock."""
    for fd, _ in _HELD.values():
        os.close(fd)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)
