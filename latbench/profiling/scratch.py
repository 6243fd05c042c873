"""Temporary folders that outlive nobody: a shell that waits on a pipe from its run removes the folder of a killed one.

What even that one could not remove (a machine that was switched off, a container killed as a whole) goes with the next
run. Locks tell the folders of dead runs, neither pids nor times: containers that share /tmp share no pids, and clocks
are set.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latbench.errors import MeasurementError
from latbench.files import locked, unowned

PREFIX = "latbench-run-"
MEMORY_BYTES = 4 << 30  # free in /dev/shm from which it is used; a chunk of models takes 1 GiB at most
HEIR = 'trap "" INT TERM HUP; read -r _; exec rm -rf -- "$0"'  # reads until the pipe's other end is gone


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, locked while it is used; those that dead runs left behind are removed first.

    Raises MeasurementError where none can be made.
    """
    try:
        root = _root()
        _sweep(root)
        folder, lock = _claim(root)
    except OSError as error:
        raise MeasurementError(
            f"cannot make a temporary folder: {error.strerror or error}; make room, or set TMPDIR"
        ) from None
    try:
        with _heir(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def _heir(folder: Path) -> Iterator[None]:
    """A shell in a session of its own, which removes `folder` when this process is gone, or the block is left."""
    quiet = subprocess.DEVNULL
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", HEIR, str(folder)],
            stdin=subprocess.PIPE,
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
        )
    except OSError:  # no shell here: the next run removes what a killed one leaves
        yield
        return
    try:
        yield
    finally:
        assert shell.stdin is not None
        shell.stdin.close()
        shell.wait()


def _root() -> Path:
    """TMPDIR where it is set; else memory where there is plenty: thousands of small files cost a disk seconds."""
    memory = Path("/dev/shm")
    if "TMPDIR" not in os.environ and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY_BYTES:
        return memory
    return Path(tempfile.gettempdir())


def _claim(root: Path) -> tuple[Path, int]:
    """A new folder and its locked descriptor."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            if locked(lock, folder):  # else another run swept it before we had the lock
                return folder, lock
            os.close(lock)


def _sweep(root: Path) -> None:
    """Removes the folders of dead runs."""
    for stale in root.glob(f"{PREFIX}*"):
        if stale.is_dir() and (lock := unowned(stale)) is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)
