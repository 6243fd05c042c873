"""Ctrl-C, SIGTERM and a terminal that is closed: the first unwinds the command, the second ends it at once.

Either way a run is lost no further than a kill would cost: files are whole or not there, workers die with their parent,
and somebody else removes its temporary files.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = b"\x1b[?25h"
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
AGAIN_S = 0.01  # after which a signal that was swallowed is sent again

_came: list[int] = []


class Interrupted(KeyboardInterrupt):
    """The first signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def message(number: int, command: str | None) -> str:
    """ "interrupted; ...", and how to go on."""
    how = "goes on from here" if command in ("profile", "search", "train") else "starts again"
    return f"{WORDS[signal.Signals(number)]}; the same command {how}"


def came() -> int | None:
    """The signal that came first within `heeded`."""
    return _came[0] if _came else None


@contextmanager
def heeded(command: Callable[[], str | None]) -> Iterator[None]:
    """Raises Interrupted within the block, once; then ends the process. `command` () tells which one runs. After one
    came, and while the interpreter goes, they are ignored: the exit status stands.

    One that falls into a place that swallows exceptions (``__del__``, a weak reference's callback) is sent again.
    Signals that this process was started to ignore (nohup, a shell's background) stay ignored.
    """
    _came.clear()

    def stop(number: int, frame: Any) -> None:
        _came.append(number)
        if len(_came) == 1:
            raise Interrupted(number)
        _end(_came[0], command())

    def swallowed(unraisable: Any) -> None:
        if not isinstance(error := unraisable.exc_value, Interrupted):
            hook(unraisable)
            return
        _came.clear()
        again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), error.number))
        again.daemon = True
        again.start()

    hook = sys.unraisablehook
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
        atexit.register(signal.signal, number, signal.SIG_IGN)
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _came else handler)


def find_tempdir() -> None:
    """Lets Python find its folder for temporary files while signals wait: it tries folders with a file, which one that
    came just before the file goes would leave there. To be called while this process has one thread."""
    import tempfile  # a tenth of the time in which `latbench --help` answers

    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with contextlib.suppress(OSError):  # who needs one says so
            tempfile.gettempdir()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(number: int, command: str | None) -> None:
    with contextlib.suppress(OSError):
        cursor = SHOW_CURSOR if sys.stderr.isatty() else b""
        os.write(2, cursor + f"\nError: {message(number, command)}\n".encode())
    os._exit(128 + number)
