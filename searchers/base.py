"""What every searcher shares: the problem it is given and the result it gives.

A searcher is one entry point under ``latbench.searchers``; its options are the fields of a frozen dataclass. Nothing
here imports torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.oracle.additive import AdditiveOracle
from latbench.oracle.base import Constraint
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.factors import FactorOracle
from latbench.spaces.base import Arch, SearchSpace

TOLERANCE = 1e-12  # relative: a sum of entries may differ from the target in its last bit
Scalar = int | float | str | bool | None


class DataSource(Protocol):
    """Labelled images in two splits. ``searchers.data.open_data`` makes one from a text such as ``digits``."""

    @property
    def name(self) -> str:
        """The text that names it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def mirrored(self) -> bool:
        """Whether an image's mirror image has its label: not for digits."""
        ...

    def labels(self, split: str) -> NDArray[np.int64]:
        """(N,) class indices of "train" or "test", disjoint sets of images."""
        ...

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """(H, W, 3). Raises UsageError, naming the image, where it cannot be decoded."""
        ...


class Reporter(Protocol):
    """Who wants to know how far a search is."""

    def advance(self, done: int, total: int, text: str) -> None:
        """Steps done and in all; the latest figures, for people."""
        ...

    def epoch(self, history: Sequence[Mapping[str, Scalar]]) -> None:
        """One more row: all of them so far."""
        ...


class Evaluator(Protocol):
    """Says how good an architecture is."""

    def evaluate(self, arch: Arch) -> float:
        """Finite, larger is better; an accuracy lies in [0, 1]. The same whatever was asked before."""
        ...


class Fleet(Protocol):
    """Machines that evaluate candidates. ``searchers.candidates.candidate_fleet`` makes one."""

    def evaluate(
        self, make: Callable[[Problem], Evaluator], problem: Problem, archs: Sequence[Arch]
    ) -> Iterator[tuple[int, float]]:
        """Positions in `archs` and values, as they come, by evaluators that `make` makes on the machines."""
        ...


@dataclass(frozen=True)
class Problem:
    """Find the best network for `data` under every constraint.

    `out` keeps checkpoints and results; a search that was cut off goes on from there. Raises UsageError where there is
    no constraint, or their oracles speak of different decisions.
    """

    constraints: tuple[Constraint, ...]
    data: str | DataSource  # "digits", "folder:DIR", "parquet:FILE", "cifar10:DIR"
    out: Path
    seed: int = 0
    max_images: int | None = None  # at most so many training images, a balanced sample
    fleet: Fleet | None = None  # where independent candidates are evaluated; the result does not depend on it

    def __post_init__(self) -> None:
        if not self.constraints:
            raise UsageError("a search needs at least one constraint: an oracle and its target")
        first = self.constraints[0].oracle.space
        for other in (constraint.oracle.space for constraint in self.constraints[1:]):
            if (other.name, other.decisions) != (first.name, first.decisions):
                raise UsageError(
                    f"the constraints speak of different networks: {first.name} with settings {first.settings()}, "
                    f"{other.name} with {other.settings()}; profile both tables with the same ones"
                )
        if self.max_images is not None and self.max_images < 1:
            raise UsageError(f"max_images must be at least 1, got {self.max_images}")

    @property
    def space(self) -> SearchSpace:
        """Of the first constraint: its resolution and batch are those of the network that is found."""
        return self.constraints[0].oracle.space

    @property
    def targets(self) -> tuple[float, ...]:
        """One per constraint, in its oracle's unit."""
        return tuple(constraint.target for constraint in self.constraints)

    @property
    def data_name(self) -> str:
        """The text that names the data wherever one stands: paths are absolute."""
        if not isinstance(self.data, str):
            return self.data.name
        kind, colon, where = self.data.partition(":")
        return f"{kind}:{Path(where).resolve()}" if colon else kind

    def summed(self, searcher: str) -> Problem:
        """The same problem with sums over sites for oracles: of a calibrated one, the nearest at its target.

        Raises UsageError, naming the searcher, where an oracle has none.
        """
        pairs = zip(self.constraints, self.sums(searcher), strict=True)
        return replace(self, constraints=tuple(replace(constraint, oracle=oracle) for constraint, oracle in pairs))

    def sums(self, searcher: str) -> tuple[FactorOracle, ...]:
        """The oracles of ``summed``."""
        return tuple(_sum(constraint, searcher) for constraint in self.constraints)

    def identity(self, options: Mapping[str, Scalar], *, constraints: bool = True) -> dict[str, Any]:
        """What a training depends on, as JSON: checkpoints of another one do not fit.

        `options` are the searcher's, less those that may change when it goes on; without `constraints` any target can
        be answered from the same training.
        """
        space = self.space
        identity = {
            "searcher": dict(options),
            "space": {"name": space.name, **{k: v for k, v in space.settings().items() if k not in ("batch", "dtype")}},
            "data": [self.data_name, self.max_images],
        }
        if not constraints:
            return identity
        rng = np.random.default_rng(0)
        archs = np.array([space.sample(rng) for _ in range(16)], np.int64)
        told = [
            {"target": c.target, "confidence": c.confidence, "oracle": zlib.crc32(c.oracle.latencies(archs).tobytes())}
            for c in self.constraints
        ]
        return {**identity, "constraints": told}

    def predicted(self, arch: Arch) -> tuple[float, ...]:
        """What each constraint's oracle says of `arch`."""
        return tuple(constraint.oracle.latency(arch) for constraint in self.constraints)

    def satisfied(self, arch: Arch) -> bool:
        """Whether `arch` keeps every constraint, confidence included, up to ``TOLERANCE``."""
        archs = np.array([arch], np.int64)
        return all(float(c.bounds(archs)[0]) <= c.target * (1 + TOLERANCE) for c in self.constraints)

    def budgets(self) -> tuple[float, ...]:
        """The targets as bounds on predictions: lower where a constraint holds with a confidence.

        Raises UsageError where an oracle's interval is not proportional to its prediction: no sum of factors then.
        """
        return tuple(_budget(constraint) for constraint in self.constraints)

    def check_feasible(self) -> None:
        """Raises InfeasibleTargetError, naming the fastest architecture, where a constraint cannot be kept.

        Each constraint by itself; where an oracle cannot tell its fastest network, nothing is raised for it.
        """
        for constraint in self.constraints:
            oracle = sum_near(constraint)
            if oracle is None:
                continue
            arch, _ = oracle.fastest()
            bound = float(constraint.bounds(np.array([arch], np.int64))[0])
            if bound > constraint.target * (1 + TOLERANCE):
                raise InfeasibleTargetError(infeasible(constraint, arch, bound))


def infeasible(constraint: Constraint, arch: Arch, bound: float) -> str:
    """One line on a target below the fastest architecture."""
    space, unit = constraint.oracle.space, constraint.oracle.unit
    sure = "" if constraint.confidence is None else f" with confidence {constraint.confidence:g}"
    return (
        f"no {space.name} network meets {constraint.target:.6g} {unit}{sure}: the fastest is {space.format_arch(arch)}"
        f" at {bound:.6g} {unit}; raise the target above that, or profile a space with smaller options"
    )


def sum_near(constraint: Constraint) -> FactorOracle | None:
    """The oracle as a sum over sites: of a calibrated one, the nearest at the target; None where it has none."""
    oracle = constraint.oracle
    if isinstance(oracle, FactorOracle):
        return oracle
    return AdditiveOracle.of(oracle, constraint.target) if isinstance(oracle, CalibratedOracle) else None


def _sum(constraint: Constraint, searcher: str) -> FactorOracle:
    found = sum_near(constraint)
    if found is None:
        raise UsageError(
            f"{searcher} needs sums over sites, not {type(constraint.oracle).__name__}: give it the table itself, or a "
            "calibrated or pairwise model of it"
        )
    return found


def _budget(constraint: Constraint) -> float:
    if constraint.confidence is None:
        return constraint.target
    space, rng = constraint.oracle.space, np.random.default_rng(0)
    archs = np.array([space.sample(rng) for _ in range(16)], np.int64)
    widening = constraint.bounds(archs) / constraint.oracle.latencies(archs)
    if float(np.ptp(widening)) > 1e-9 * float(widening.max()):
        raise UsageError("a confidence needs an oracle whose intervals are proportional to its predictions: lut or fit")
    return constraint.target / float(widening.max())


@dataclass(frozen=True)
class SearchResult:
    """A network that keeps the budget, and how it was found."""

    searcher: str
    arch: Arch
    predicted: tuple[float, ...]  # per constraint, in its oracle's unit
    target: tuple[float, ...]
    score: float  # the searcher's own estimate of quality, larger is better; its docstring says of what
    history: tuple[Mapping[str, Scalar], ...]  # one row per epoch
    network: Path  # ONNX, batch norms folded, with the weights that the search gave it
    notes: Mapping[str, Any] = field(default_factory=dict)  # JSON: what else the searcher tells


class Searcher(Protocol):
    """Finds an architecture. Options are dataclass fields. One conformance suite: ``testing.SearcherConformance``."""

    name: ClassVar[str]

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """Raises InfeasibleTargetError, with the fastest architecture, before any training; UsageError where the space
        or the data do not fit.

        Writes `problem.out` (``save_result``). Called again on the same folder it goes on where it was and ends in the
        same result; nothing is trained twice. A target may differ from the one trained for where the searcher can
        answer it from what it trained, else UsageError.
        """
        ...
