"""Split-conformal intervals: how far off the predictions for networks were that the fit had not seen.

Vovk, Gammerman, Shafer 2005; Lei et al. 2018. The score is |log(measured / predicted)|, over a scale of difficulty
where the model has one, so an interval is relative and never reaches 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Conformal:
    """Sorted scores of networks that were kept out."""

    scores: tuple[float, ...]

    @classmethod
    def of(cls, predicted: Floats, measured: Floats, scale: Floats | float = 1.0) -> Conformal:
        """(N,) predictions for kept-out networks and their measurements, both > 0; `scale` (N,) > 0."""
        scores = np.abs(np.log(np.asarray(measured) / np.asarray(predicted))) / scale
        return cls(tuple(np.sort(scores).tolist()))

    def quantile(self, confidence: float) -> float | None:
        """The score that a new network stays below with this probability; None where there are too few scores.

        The (n + 1) * confidence-th smallest, interpolated between order statistics, which makes the coverage the
        confidence itself rather than the next larger k / (n + 1). Raises UsageError unless 0 < confidence < 1.
        """
        if not 0 < confidence < 1:
            raise UsageError(f"a confidence lies between 0 and 1, got {confidence}")
        rank = (len(self.scores) + 1) * confidence
        if not self.scores or rank > len(self.scores):
            return None
        return float(np.interp(rank, np.arange(len(self.scores) + 1), [0.0, *self.scores]))

    def interval(
        self, predicted: Floats, confidence: float, scale: Floats | float = 1.0
    ) -> tuple[Floats, Floats] | None:
        """(N,) predictions -> lower and upper ends."""
        q = self.quantile(confidence)
        if q is None:
            return None
        widen = np.exp(q * np.asarray(scale, np.float64))
        return predicted / widen, predicted * widen


def coverage(interval: tuple[Floats, Floats], measured: Sequence[float] | Floats) -> float:
    """The share of (N,) measurements that lie inside (N,) and (N,)."""
    low, high = interval
    y = np.asarray(measured)
    return float(((low <= y) & (y <= high)).mean())
