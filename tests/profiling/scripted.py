"""A launcher that answers from a script: real requests and measurements, no process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from latbench.graph.ir import GraphBuilder
from latbench.graph.ops import Linear
from latbench.measure.base import Measurement, Request
from latbench.profiling.jobs import GraphJob
from latbench.tables import Row

PROBE_US = 6.0

Script = Callable[[Request, int], Measurement]  # (request, how often this key was asked for before)


def steady(request: Request, visit: int) -> Measurement:
    """Ten samples of about 1 ms at the reference clock, a tenth of a percent apart."""
    samples = tuple(1.0 + 0.001 * (i % 3) for i in range(10))
    return Measurement(
        request.key,
        request.run,
        request.round,
        request.order,
        samples_ms=samples,
        probes_us=(PROBE_US, PROBE_US),
        probe_at=(0, len(samples)),
        started_at=1.0 + request.order,
    )


class ScriptedLauncher:
    """As ``SessionLauncher``; keeps every request it was given."""

    def __init__(self, script: Script = steady) -> None:
        self.script = script
        self.conditions: Mapping[str, object] = {"clock_probe_us": PROBE_US}
        self.requests: list[Request] = []

    def prepare(self, workers: int) -> None:
        """Nothing to start."""

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        for request in requests:
            visit = sum(one.key == request.key for one in self.requests)
            self.requests.append(request)
            yield self.script(request, visit)


def jobs(n: int) -> list[GraphJob]:
    """Distinct small blocks."""
    made = []
    for i in range(n):
        b = GraphBuilder()
        graph = b.build(b.add(Linear(8, 8 + i), b.input("x", (1, 8)), name="fc"))
        made.append(GraphJob(graph, Row(graph.key, "block", graph.signature)))
    return made


def flagged(warning: str, *, when: Callable[[Request, int], bool]) -> Script:
    """Steady, but for blocks with a warning, which take three times as long."""

    def script(request: Request, visit: int) -> Measurement:
        one = steady(request, visit)
        if not when(request, visit):
            return one
        return replace(one, samples_ms=tuple(3 * s for s in one.samples_ms), warnings=(warning,))

    return script
