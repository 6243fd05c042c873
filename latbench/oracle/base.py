"""What every latency oracle answers, and the constraint that a searcher holds.

An oracle is made from tables (``fit``), asked in three ways (one architecture, a batch, an expectation over choices
that are still probabilities), and says how sure it is and where its figures come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from latbench import plugins
from latbench.errors import TableError, UsageError
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, Decision, SearchSpace
from latbench.tables import LatencyTable

Floats = NDArray[np.float64]
Archs = NDArray[Any]  # (N, D) integers: one option index per decision
P = TypeVar("P")  # a numpy array or a torch tensor; the oracle gives back what it is given

# Where a figure comes from, the most trustworthy first. "absent" costs nothing by the space's own definition;
# "missing" is no figure: asking for it raises MissingEntryError.
SOURCES = ("absent", "measured", "imported", "fitted", "simulated", "interpolated", "missing")


class LatencyOracle(Protocol):
    """Latencies of the architectures of one space on one device. One conformance suite: ``testing.OracleConformance``.

    Every query raises UsageError where an architecture does not fit the space, and MissingEntryError where it needs a
    figure that the table lacks: never 0, never a constant.
    """

    @property
    def space(self) -> SearchSpace: ...

    @property
    def provenance(self) -> Provenance:
        """Of the table that it was made from."""
        ...

    @property
    def unit(self) -> str:
        """ "ms", or what else is counted: "parameters", "MACs"."""
        ...

    def latency(self, arch: Arch) -> float:
        """One option index per decision -> ms."""
        ...

    def latencies(self, archs: Archs) -> Floats:
        """(N, D) option indices -> (N,) ms."""
        ...

    def expected_latency(self, probs: P) -> P:
        """(..., D, K) option probabilities -> (...) ms; K >= every number of options, what lies beyond is ignored.

        Decisions are independent. Numpy in, numpy out; torch in, torch out, differentiable. An architecture's one-hot
        rows give its ``latency``.
        """
        ...

    def interval(self, archs: Archs, confidence: float = 0.9) -> tuple[Floats, Floats] | None:
        """(N, D) -> lower and upper ends, (N,) ms each, that hold a measurement with this probability.

        None where too few networks were kept out of the fit to say.
        """
        ...

    def sources(self, arch: Arch) -> Mapping[str, int]:
        """How many terms of the answer have which of ``SOURCES``."""
        ...


class Model(LatencyOracle, Protocol):
    """An oracle that is fitted and kept in a file; registered by its name under ``latbench.oracles``."""

    name: ClassVar[str]

    @classmethod
    def fit(cls, table: LatencyTable, **options: Any) -> Model:
        """From the rows of a table. Raises TableError where it lacks what this model needs, UsageError on an option."""
        ...

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays (numbers only) and a JSON mapping from which ``from_state`` makes an equal oracle."""
        ...

    @classmethod
    def from_state(
        cls, space: SearchSpace, provenance: Provenance, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> Model: ...


def space_of(provenance: Provenance) -> SearchSpace:
    """The space that a table's rows belong to. Raises TableError where it names none, UsageError where unknown."""
    if not provenance.space:
        raise TableError("the table names no search space, so nothing can be predicted from it")
    kind: type[SearchSpace] = plugins.load("latbench.spaces", provenance.space)
    return kind.from_settings(provenance.settings)


def check_archs(space: SearchSpace, archs: Archs) -> NDArray[np.int64]:
    """(N, D) integers within the options, as int64; raises UsageError, naming the first decision that is not."""
    array = np.asarray(archs)
    n_options = np.array([len(decision.options) for decision in space.decisions])
    if array.ndim != 2 or array.shape[1] != len(n_options) or array.dtype.kind not in "iu":
        raise UsageError(
            f"{space.name}: architectures must be whole numbers of shape (N, {len(n_options)}),"
            f" got {array.dtype} of shape {array.shape}"
        )
    wrong = ((array < 0) | (array >= n_options)).any(axis=1)
    if wrong.any():
        space.check(tuple(int(i) for i in array[int(wrong.argmax())]))
    return array.astype(np.int64, copy=False)


def one_hot(space: SearchSpace, archs: Archs) -> Floats:
    """(N, D) -> (N, D, K) probabilities that are certain."""
    array = check_archs(space, archs)
    k = max((len(decision.options) for decision in space.decisions), default=0)
    probs: Floats = (array[:, :, None] == np.arange(k)).astype(np.float64)
    return probs


def spread(decision: Decision, value: float) -> Floats:
    """(K,) probabilities of the two options around a value between them: a width of 41.5 is half 40 and half 43.

    The expectation then interpolates linearly. Raises UsageError where the options are not numbers or do not span it.
    """
    options = decision.options
    if any(isinstance(option, bool | str) for option in options):
        raise UsageError(f"{decision.name}: its options are no numbers, so {value} lies between none of them")
    x = np.array(options, np.float64)
    order = np.argsort(x)
    if not x[order[0]] <= value <= x[order[-1]]:
        raise UsageError(f"{decision.name}: {value} is outside {x[order[0]]:g} to {x[order[-1]]:g}")
    right = int(np.searchsorted(x[order], value))
    probs = np.zeros(len(x))
    if x[order[right]] == value:
        probs[order[right]] = 1.0
        return probs
    low, high = order[right - 1], order[right]
    probs[high] = (value - x[low]) / (x[high] - x[low])
    probs[low] = 1 - probs[high]
    return probs


@dataclass(frozen=True)
class Constraint:
    """A budget: what `oracle` says of a network must not exceed `target`, in the oracle's unit.

    With a confidence, the chance that a measurement exceeds the target must be at most 1 - confidence, by the oracle's
    calibrated interval. Raises UsageError on a target that is not positive, or where the oracle has no interval.
    """

    oracle: LatencyOracle
    target: float
    confidence: float | None = None  # above 0.5; None: the prediction itself decides

    def __post_init__(self) -> None:
        if not (np.isfinite(self.target) and self.target > 0):
            raise UsageError(f"a target must be a positive number of {self.oracle.unit}, got {self.target}")
        if self.confidence is not None:
            if not 0.5 < self.confidence < 1:
                raise UsageError(f"a confidence lies between 0.5 and 1, got {self.confidence}")
            d = len(self.oracle.space.decisions)
            if self.oracle.interval(np.empty((0, d), np.int64), 2 * self.confidence - 1) is None:
                raise UsageError(
                    f"this oracle cannot say what holds with confidence {self.confidence}: too few networks were kept "
                    "out of its fit; fit it on a table with more measured networks, or leave the confidence out"
                )

    def bounds(self, archs: Archs) -> Floats:
        """(N, D) -> (N,): what is compared with the target, the prediction or its upper end."""
        if self.confidence is None:
            return self.oracle.latencies(archs)
        found = self.oracle.interval(archs, 2 * self.confidence - 1)
        assert found is not None
        return found[1]

    def satisfied(self, archs: Archs) -> NDArray[np.bool_]:
        """(N, D) -> (N,)."""
        held: NDArray[np.bool_] = self.bounds(archs) <= self.target
        return held
