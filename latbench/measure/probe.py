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
