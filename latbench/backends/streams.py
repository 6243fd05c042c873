"""Throughput: several inferences at once. A figure of its own, never a latency.

A back-end's streams variant is a back-end like any other whose ``sample(repeat)`` is the time for `repeat` rounds of
``streams`` inferences each, whichever stream takes them, so that all that a worker does to steady a number serves it.
Only ``latbench.profiling.throughput`` loads such variants: none is registered, no table holds their rows.

Imported by workers: standard library only, Python 3.9.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter_ns

SAMPLE_S = 0.1  # of one sample: the first and the last moments, in which not every stream is busy, weigh little
TIMER_NS = SAMPLE_S * 1e6  # what makes a worker choose that many rounds, at SamplingPlan's `timer_share` of 0.1 %


class Crew:
    """Threads that share inferences: each takes the next one as soon as its last is done. Close it, or use ``with``.

    The runtime must give Python's lock back while it computes, as ONNX Runtime does.
    """

    def __init__(self, calls: Iterable[Callable[[], object]]) -> None:
        """One thread per call."""
        self._calls = tuple(calls)
        self._work: Iterator[None] = iter(())
        self._gate = threading.Barrier(len(self._calls) + 1)
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, args=(call,), daemon=True) for call in self._calls]
        for thread in self._threads:
            thread.start()

    def run(self, n: int) -> float:
        """Milliseconds for `n` inferences, by whoever is free. Raises what a call raised."""
        self._work = iter([None] * n)
        start = perf_counter_ns()
        self._gate.wait()
        self._gate.wait()
        ms = (perf_counter_ns() - start) / 1e6
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return ms

    def close(self) -> None:
        self._closed = True
        self._gate.wait()
        for thread in self._threads:
            thread.join()

    def _serve(self, call: Callable[[], object]) -> None:
        while True:
            self._gate.wait()
            if self._closed:
                return
            try:
                for _ in self._work:  # one iterator for all: the interpreter hands out each item once
                    call()
            except BaseException as error:  # told to whoever waits in `run`
                self._error = error
            self._gate.wait()
