"""A third-party back-end that works, or fails as its artifact says. Runs in real workers: standard library only.

Artifact: JSON {"how": ..., "call": n, "once": path}; strikes on loading (call 0) or in the n-th ``sample``; with `once`
only where that file does not exist yet. Every inference takes 10 ms by its own account.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

INFERENCE_MS = 10.0


class FaultyBackend:
    name = "faulty"
    artifact = "graph"
    clock = "host"

    def __init__(self, options: Mapping[str, Any]) -> None:
        if "refuse" in options:
            raise OSError(f"no device\n  {options['refuse']}")

    @classmethod
    def available(cls) -> None:
        """Always."""

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[Runner]:
        runner = Runner(json.loads(artifact.read_text()))
        runner.strike()
        yield runner


class Runner:
    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.calls = fault, 0

    def sample(self, repeat: int) -> float:
        self.calls += 1
        self.strike()
        return repeat * INFERENCE_MS

    def outputs(self, inputs: object) -> dict[str, Any]:
        return {}

    def layers(self) -> None:
        self.calls = self.fault.get("call", 0)
        self.strike()

    def strike(self) -> None:
        how, once = self.fault.get("how"), self.fault.get("once")
        if how is None or self.calls != self.fault.get("call", 0) or (once and Path(once).exists()):
            return
        if once:
            Path(once).touch()
        FAULTS[how]()


def flood() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.write("x" * 999 + "\n")
        for _ in range(4096):
            stream.write("flood " * 170 + "\n")
        stream.flush()


def flood_and_die() -> None:
    flood()
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def fail(words: str) -> NoReturn:
    raise RuntimeError(words)


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: sys.exit(3),
    "hang": lambda: time.sleep(3600),
    "raise": lambda: fail("the kernel\n  said no"),
    "lookup": lambda: FAULTS["a bug of theirs"],
    "allocate": lambda: bytearray(1 << 60),
    "flood": flood,
    "flood and die": flood_and_die,
    "babble": lambda: os.write(int(sys.argv[2]), b"\xff no message\n"),
    "number": lambda: os.write(int(sys.argv[2]), b"1\n"),
    "modules": lambda: fail(json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))),
    "environment": lambda: fail(json.dumps(dict(os.environ))),
}
