"""The clock probe: how fast this core runs at this moment, and how long it waited for its turn."""

from __future__ import annotations

from io import FileIO
from time import perf_counter_ns

import numpy as np

# accumulate over uint64 is a chain of dependent multiplications: bound by the core's clock alone, no memory, no
# compiled code of ours. 8,000 of them take about 6 us; beside a compiled chain its Spearman with the clock is 0.97.
_ONES = np.ones(8000, np.uint64)
_OUT = np.empty_like(_ONES)


def probe_us(best_of: int = 5) -> float:
    """Microseconds of a fixed chain of dependent multiplications: the best of a few, to miss interrupts."""
    best = 1 << 62
    for _ in range(best_of):
        start = perf_counter_ns()
        np.multiply.accumulate(_ONES, out=_OUT)
        best = min(best, perf_counter_ns() - start)
    return best / 1e3


class CacheProbe:
    """How much of the last-level cache neighbours leave us at this moment.

    Virtual machines share it: a network whose weights fill half of it runs 3 to 20 % slower while others press, for
    tenths of a second at a time. The time to read 12 MiB again tells: beside MobileNets of 16 MiB its Spearman with
    their latency is 0.6 to 0.75; in the quietest fifth of the moments their 10-90 % range shrinks from 12 to 4 %.
    """

    def __init__(self, nbytes: int = 12 << 20) -> None:
        self._data = np.ones(nbytes // 4, np.float32)

    def us(self) -> float:
        """Microseconds of one read, after five that bring the data back from wherever a model has pushed them."""
        for _ in range(5):
            self._data.max()
        start = perf_counter_ns()
        self._data.max()
        return (perf_counter_ns() - start) / 1e3


def timer_cost_ns() -> float:
    """Nanoseconds that one pair of clock readings costs: median of many."""
    costs = []
    for _ in range(501):
        start = perf_counter_ns()
        costs.append(perf_counter_ns() - start)
    return float(np.median(costs))


class WaitClock:
    """Time that this thread stood ready without a core: Linux' run-queue delay, from schedstat; 0 elsewhere."""

    def ns(self) -> int:
        """Nanoseconds since the thread began."""
        try:
            with FileIO("/proc/thread-self/schedstat") as file:
                return int(file.read(128).split()[1])
        except OSError:
            return 0
