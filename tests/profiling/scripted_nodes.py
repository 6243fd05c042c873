"""Nodes of a fleet that answer from a script: no process, no network, every moment of a run at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from scripted import PROBE_US, ScriptedLauncher, steady

from latbench.measure.base import Measurement, Request, SamplingPlan
from latbench.measure.fleet import NodeLostError
from latbench.profiling import Target
from latbench.profiling.jobs import jobs_of
from latbench.provenance import Provenance
from latbench.spaces.base import SearchSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space

PLAN = SamplingPlan(block_s=0.001, min_time_s=0.001, rounds=1)
SPACE = MobileNetV1Space(resolution=32, levels=3, max_width=0.75, num_classes=10)
STUBS = {job.key for job in jobs_of(SPACE) if job.row.kind == "stub"}
TARGET = Target("cpu", "a made-up CPU", "onnxruntime", {"threads": 1}, PLAN)


def usual_ms(key: str) -> float:
    """What a graph takes on a node of pace 1, by its key: 1 to 2 ms, a stub half of it."""
    return (1 + int(key[:4], 16) / 0x10000) / (2 if key in STUBS else 1)


class ScriptedNode:
    """Takes `pace` times the usual; `at` is told of each request before it is answered, and may raise."""

    def __init__(
        self,
        name: str,
        *,
        pace: float = 1.0,
        clock_us: float = PROBE_US,
        at: Callable[[ScriptedNode, int], None] = lambda node, n: None,
        **about: Any,
    ) -> None:
        self.name, self.pace, self.clock_us, self.at = name, pace, clock_us, at
        self.target, self.about = TARGET, about
        self.measured: list[Measurement] = []
        self.opened = 0
        self.aborted = threading.Event()
        self.first: Callable[[], object] = lambda: None

    @contextmanager
    def open(self, space: SearchSpace, waiting: Callable[[str], None]) -> Iterator[tuple[Any, Provenance]]:
        self.opened += 1
        yield _Launcher(self), self.provenance(space)

    def provenance(self, space: SearchSpace) -> Provenance:
        """What a real node would say, without asking this machine."""
        environment = {"kernel": "5.10", "memory_gib": 16, **self.about.get("environment", {})}
        return Provenance(
            **{
                "device": "cpu",
                "device_name": "a made-up CPU",
                "backend": "onnxruntime",
                "versions": {"onnxruntime": "1.20"},
                "space": space.name,
                "settings": space.settings(),
                "options": dict(TARGET.options),
                "policy": self.target.policy,
                "clock_ref_us": self.clock_us,
                "host": self.name,
                "started_at": "2026-01-01T00:00:00+00:00",
                **self.about,
                "environment": environment,
            }
        )

    def abort(self) -> None:
        self.aborted.set()


class _Launcher(ScriptedLauncher):
    def __init__(self, node: ScriptedNode) -> None:
        super().__init__()
        self.node = node

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        node = self.node
        for request in requests:
            if not node.measured:
                node.first()
            node.at(node, len(node.measured))
            one = steady(request, 0)
            samples = tuple(node.pace * usual_ms(request.key) * ms for ms in one.samples_ms)
            one = replace(one, samples_ms=samples, probes_us=(node.clock_us,) * 2)
            node.measured.append(one)
            yield one


def together(*nodes: ScriptedNode) -> list[ScriptedNode]:
    """The nodes, each waiting with its first measurement until all have one to make: so all take part."""
    barrier = threading.Barrier(len(nodes))
    for node in nodes:
        node.first = lambda: barrier.wait(120)
    return list(nodes)


def lost_at(k: int) -> Callable[[ScriptedNode, int], None]:
    """The node goes away with its k-th measurement, the first time that it comes to it."""

    def at(node: ScriptedNode, n: int) -> None:
        if n == k and node.opened == 1:
            raise NodeLostError(f"{node.name} is lost: as the script says")

    return at
