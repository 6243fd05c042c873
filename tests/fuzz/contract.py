"""What every parser promises: a value, or a ``LatbenchError`` of one line, within a second and a few hundred MiB."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from latbench.errors import LONGEST, LatbenchError

LIMIT_S = 20.0  # of CPU time, of one case: what is no hang takes milliseconds
WAIT = 6  # as much time on the clock as CPU time, where a case waits; this process may have been stopped
MEMORY_BYTES = 1 << 30  # that one case may add to the address space


@dataclass(frozen=True)
class Parser:
    """Something that reads what others wrote."""

    name: str
    case: Callable[[Random], Any]  # a case, hostile more often than not; equal for equal states of the generator
    parse: Callable[[Any, Path], object]  # a case, and a folder that it may write into, of this parser alone
    gate: int = 100  # cases that the gate has time for


class HangError(BaseException):
    """A case took longer than its limit. No ``Exception``: no parser may swallow it."""


@contextmanager
def bounded(seconds: float, nbytes: int = MEMORY_BYTES) -> Iterator[None]:
    """The block may take so long, and so much more memory. Raises HangError; memory beyond raises MemoryError."""

    def hang(_number: int, _frame: FrameType | None) -> None:
        raise HangError(f"no end within {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, hard))
    before = [signal.signal(number, hang) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAIT * seconds)  # what waits for ever takes no CPU time
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(parser: Parser, case: Any, folder: Path) -> str:
    """ "value", or the name of the LatbenchError that the case ended in. Raises whatever else it ended in, and
    AssertionError where the error's message is not one printable line."""
    try:
        with bounded(LIMIT_S):
            parser.parse(case, folder)
        return "value"
    except LatbenchError as error:
        kind, said = type(error).__name__, str(error)
    assert said, f"{kind} without a word"
    assert said.isprintable(), f"{kind} of several lines, or with control characters: {said!r}"
    assert len(said) <= LONGEST, f"{kind} of {len(said)} letters"
    return kind
