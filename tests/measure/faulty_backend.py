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
from contextlib import contextmanager
from pathlib import Path

INFERENCE_MS = 10.0


class FaultyBackend:
    name = "faulty"
    artifact = "graph"
    clock = "host"

    def __init__(self, options):
        if "refuse" in options:
            raise OSError(f"no device\n  {options['refuse']}")

    @classmethod
    def available(cls):
        """Always."""

    @classmethod
    def versions(cls):
        return {}

    @contextmanager
    def load(self, artifact):
        runner = Runner(json.loads(artifact.read_text()))
        runner.strike()
        yield runner


class Runner:
    def __init__(self, fault):
        self.fault, self.calls = fault, 0

    def sample(self, repeat):
        self.calls += 1
        self.strike()
        return repeat * INFERENCE_MS

    def outputs(self, inputs):
        return {}

    def layers(self):
        self.calls = self.fault.get("call", 0)
        self.strike()

    def strike(self):
        how, once = self.fault.get("how"), self.fault.get("once")
        if how is None or self.calls != self.fault.get("call", 0) or (once and Path(once).exists()):
            return
        if once:
            Path(once).touch()
        FAULTS[how]()


def flood():
    for stream in (sys.stdout, sys.stderr):
        stream.write("x" * 999 + "\n")
        for _ in range(4096):
            stream.write("flood " * 170 + "\n")
        stream.flush()


def flood_and_die():
    flood()
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(words):
    raise RuntimeError(words)


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: sys.exit(3),
    "hang": lambda: time.sleep(3600),
    "raise": lambda: fail("the kernel\n  said no"),
    "lookup": lambda: {}["a bug of theirs"],
    "allocate": lambda: bytearray(1 << 60),
    "flood": flood,
    "flood and die": flood_and_die,
    "modules": lambda: fail(json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))),
    "environment": lambda: fail(json.dumps(dict(os.environ))),
}
