"""Temporary folders that outlive nobody: a shell that waits on a pipe from its run removes the folder of a killed one.

What even that one could not remove (a machine that was switched off, a container killed as a whole) goes with the next
run. Locks tell the folders of dead runs, neither pids nor times: containers that share /tmp share no pids, and clocks
are set.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latbench.errors import MeasurementError
from latbench.files import locked, unowned

PREFIX = "latbench-run-"
MEMORY_SHARE = 0.25  # of what is free in /dev/shm that a folder may take; larger ones go to the disk
DISK_SHARE = 0.25  # likewise of the disk
HEIR = 'trap "" INT TERM HUP; read -r _; exec rm -rf -- "$0"'  # reads until the pipe's other end is gone


def room_bytes() -> int:
    """What a folder may take on the disk."""
    try:
        return int(DISK_SHARE * shutil.disk_usage(tempfile.gettempdir()).free)
    except OSError:  # `scratch` says so
        return 0


@contextmanager
def scratch(nbytes: int = 1 << 30) -> Iterator[Path]:
    """A temporary folder for so much, locked while it is used; those that dead runs left are removed first.

    Raises MeasurementError where none can be made.
    """
    with _told():
        folder = _root(nbytes) / f"{PREFIX}{secrets.token_hex(8)}"
        _sweep(folder.parent)
    with _heir(folder):  # before there is a folder: a Ctrl-C falls between any two lines
        lock = None
        try:
            with _told():
                lock = _claim(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MeasurementError(
            f"cannot make a temporary folder: {error.strerror or error}; make room, or set TMPDIR"
        ) from None


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


def _root(nbytes: int) -> Path:
    """TMPDIR where it is set; else memory where there is plenty: thousands of small files cost a disk seconds."""
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    if "TMPDIR" in os.environ or not os.access(memory, os.W_OK):
        return disk
    return memory if nbytes < MEMORY_SHARE * shutil.disk_usage(memory).free else disk


def _claim(folder: Path) -> int:
    """Makes the folder; its locked descriptor."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            if locked(lock, folder):  # else another run sweeps it: it came before we had the lock
                return lock
            os.close(lock)


def _sweep(root: Path) -> None:
    """Removes the folders of dead runs."""
    for stale in root.glob(f"{PREFIX}*"):
        if stale.is_dir() and (lock := unowned(stale)) is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)
