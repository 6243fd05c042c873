"""Sums of factors over many architectures at once: one compiled loop."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

ROWS = 64  # architectures that the kernel takes at once: loops over them run in vector registers


@lru_cache(maxsize=1)
def kernel() -> Any:
    """Compiled on first use and kept on disk by numba; importing it takes a third of a second."""
    import numba

    return numba.njit(cache=True, nogil=True)(_sum_entries)


def _sum_entries(
    archs: Any, n_options: Any, starts: Any, decisions: Any, strides: Any, offsets: Any, values: Any, constant: Any,
    out: Any,
) -> int:  # fmt: skip
    """Fills out (N,); gives the first of the ROWS rows that hold an index out of range, or -1."""
    n_decisions = archs.shape[1]
    picks, at = np.empty((n_decisions, ROWS), np.int64), np.empty(ROWS, np.int64)
    for start in range(0, archs.shape[0], ROWS):
        rows = min(ROWS, archs.shape[0] - start)
        for i in range(rows):
            for d in range(n_decisions):
                picks[d, i] = archs[start + i, d]
        wrong = False
        for d in range(n_decisions):
            n = n_options[d]
            for i in range(rows):
                wrong |= np.uint64(picks[d, i]) >= n  # a negative index wraps to a huge one
        if wrong:
            return start
        for i in range(rows):
            out[start + i] = constant
        for f in range(len(starts) - 1):
            for i in range(rows):
                at[i] = offsets[f]
            for j in range(starts[f], starts[f + 1]):
                stride, d = strides[j], decisions[j]
                for i in range(rows):
                    at[i] += stride * picks[d, i]
            for i in range(rows):
                out[start + i] += values[at[i]]
    return -1
