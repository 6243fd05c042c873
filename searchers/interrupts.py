"""Interrupts that wait for a moment at which the state can be saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOLD = b"\nstopping behind this step; once more: at once, without its checkpoint\n"
Handler = Callable[[int, Any], object]


class Interrupts:
    """Signals that came while they were put off."""

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}  # as they were
        self.number: int | None = None  # of the first that came

    @property
    def pending(self) -> bool:
        """Whether one waits."""
        return self.number is not None

    def heed(self) -> None:
        """Does what the one that waits would have done: by default, KeyboardInterrupt is raised."""
        if self.number is not None:
            self.handlers[self.number](self.number, None)
            raise KeyboardInterrupt  # the handler let the program go on, but the step's caller is to stop

    def note(self, number: int, frame: Any) -> None:
        """The handler: the second signal is heeded where it strikes."""
        if self.number is not None:
            self.handlers[number](number, frame)
            return
        self.number = number
        if sys.stderr.isatty():
            os.write(2, TOLD)  # sys.stderr's buffer may be in use


_ACTIVE: list[Interrupts] = []


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """Within the block SIGINT, SIGTERM and SIGHUP wait until ``heed``, where the program handles them at all.

    Blocks within one another share what waits; in other threads than the main one nothing does.
    """
    if _ACTIVE or threading.current_thread() is not threading.main_thread():
        yield _ACTIVE[0] if _ACTIVE else Interrupts()
        return
    interrupts = Interrupts()
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler):
            interrupts.handlers[number] = handler
    _ACTIVE.append(interrupts)
    try:
        for taken in interrupts.handlers:
            signal.signal(taken, interrupts.note)
        yield interrupts
    finally:
        for taken, before in interrupts.handlers.items():
            signal.signal(taken, before)
        _ACTIVE.clear()
    interrupts.heed()  # one that came behind the last step
