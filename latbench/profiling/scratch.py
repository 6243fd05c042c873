"""Temporary folders that outlive nobody: a killed run cannot remove its own, so the next one does."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "latbench-run-"
MEMORY_BYTES = 4 << 30  # free in /dev/shm from which it is used; a chunk of models takes 1 GiB at most
GRACE_S = 60.0  # a folder younger than this may not be locked yet


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, locked while it is used; those that killed runs left behind are removed first."""
    root = _root()
    _sweep(root)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=root) as name:
        lock = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield Path(name)
        finally:
            os.close(lock)


def _root() -> Path:
    """TMPDIR where it is set; else memory where there is plenty: thousands of small files cost a disk seconds."""
    memory = Path("/dev/shm")
    if "TMPDIR" not in os.environ and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY_BYTES:
        return memory
    return Path(tempfile.gettempdir())


def _sweep(folder: Path) -> None:
    """Removes the folders of dead runs. Locks, not pids, tell them: containers that share /tmp do not share pids."""
    for stale in folder.glob(f"{PREFIX}*"):
        try:
            if time.time() - stale.stat().st_mtime < GRACE_S:
                continue
            lock = os.open(stale, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another run has just removed it, or it is another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:  # in use
            pass
        finally:
            os.close(lock)
