"""A source device's table as a function of the architecture: a robust sum of small arrays.

Source tables are large but noisy (drift, outliers of 2x on phones), and hold other architectures than those asked.
What a new device can learn from them is the part that is a function of the architecture; that part is fitted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from latbench.errors import TableError, UsageError
from latbench.oracle.base import Floats, check_archs, space_of
from latbench.oracle.factors import MAX_TABULATED, Factor, FactorOracle, in_full
from latbench.oracle.features import identity
from latbench.provenance import Provenance
from latbench.spaces.base import FactoredSpace, SearchSpace
from latbench.tables import LatencyTable

MIN_NETWORKS = 10  # of a source
LOWEST = 0.1  # no network is predicted below this share of the fastest measured one
_PAIR_SCALE = 0.3  # size expected of an interaction, relative to a main effect's
_MAX_BLOCKS = 600  # distinct ones that get columns of their own
_STUDENT_DOF = 4.0  # of the noise: an outlier of 5 sigma counts a tenth
_ITERATIONS = 6


@dataclass(frozen=True, eq=False)
class Basis:
    """Columns of a linear model, each a function of the decisions of one scope."""

    space: SearchSpace
    parts: tuple[tuple[tuple[int, ...], Floats], ...]  # scope -> (K_1, ..., K_s, columns)

    def design(self, archs: NDArray[np.int64]) -> Floats:
        """(N, D) -> (N, P)."""
        return np.concatenate([values[tuple(archs[:, d] for d in scope)] for scope, values in self.parts], axis=1)

    def factors(self, coefficients: Floats, name: str) -> Iterator[Factor]:
        """(P,) -> the sum of columns times coefficients, one factor per scope."""
        start = 0
        for i, (scope, values) in enumerate(self.parts):
            stop = start + values.shape[-1]
            yield Factor(f"{name}{i}", scope, values @ coefficients[start:stop])
            start = stop


@lru_cache(maxsize=4)
def main_effects(space: SearchSpace) -> Basis:
    """One column per option."""
    options = [len(decision.options) for decision in space.decisions]
    return Basis(space, tuple(((d,), np.eye(k)) for d, k in enumerate(options)))


@lru_cache(maxsize=4)
def source_basis(space: SearchSpace) -> Basis:
    """Main effects; the blocks of sites that depend on several decisions; in a small space all pairs of decisions."""
    options = [len(decision.options) for decision in space.decisions]
    parts = list(main_effects(space).parts)
    if isinstance(space, FactoredSpace):
        parts += _block_columns(space)
    if space.size <= MAX_TABULATED:
        for a, b in combinations(range(len(options)), 2):
            pairs = np.eye(options[a] * options[b]).reshape(options[a], options[b], -1)
            parts.append(((a, b), _PAIR_SCALE * pairs))
    return Basis(space, tuple(parts))


def _block_columns(space: FactoredSpace) -> Iterator[tuple[tuple[int, ...], Floats]]:
    """Per scope of several decisions and block (whatever the size of its map): 1, sqrt(MACs) and MACs.

    A block on a smaller map costs less in a way that a device has of its own: the three shapes span launch-bound, side
    and area. MACs are relative to the block's largest. Where blocks are many (widths), those of a scope are one.
    """
    many = len({identity(block) for block in space.all_blocks().values()}) > _MAX_BLOCKS
    seen = set()
    for site in space.sites:
        if len(site.scope) < 2 or site.scope in seen:
            continue
        seen.add(site.scope)
        shape = tuple(len(space.decisions[d].options) for d in site.scope)
        groups: dict[str, list[tuple[tuple[int, ...], float]]] = {}
        for picks in np.ndindex(shape):
            block = space.block(site, picks)
            if block is not None:
                groups.setdefault("" if many else identity(block), []).append((picks, float(block.macs)))
        columns = []
        for entries in groups.values():
            largest = max(macs for _, macs in entries)
            varies = largest > min(macs for _, macs in entries)
            for power in (0.0, 0.5, 1.0) if varies else (0.0,):
                column = np.zeros(shape)
                for picks, macs in entries:
                    column[picks] = (macs / largest) ** power if largest else 1.0
                columns.append(column)
        yield site.scope, np.stack(columns, axis=-1)


def source_model(table: LatencyTable) -> FactorOracle:
    """The table's networks as a sum over ``source_basis``.

    Ridge on relative errors with Student-t noise (iteratively reweighted), as strong as generalised cross-validation
    says. Raises TableError where the table has fewer than MIN_NETWORKS networks, or one that takes no time.
    """
    space, name = space_of(table.provenance), device_of(table.provenance)
    archs, ms = table.networks()
    if len(ms) < MIN_NETWORKS:
        raise TableError(
            f"source {name} has {len(ms)} measured networks of {space.name}, at least {MIN_NETWORKS} are needed;"
            " measure more of them (latbench profile --networks), or leave it out"
        )
    if (ms <= 0).any():
        raise TableError(
            f"source {name} has a network of {ms.min():g} ms: latencies must be positive; measure it again"
        )
    return nearest_sum(space, table.provenance, check_archs(space, archs), ms)


def nearest_sum(space: SearchSpace, provenance: Provenance, archs: NDArray[np.int64], ms: Floats) -> FactorOracle:
    """(N, D) architectures and their (N,) latencies, positive -> a sum over ``source_basis``."""
    basis = source_basis(space)
    level = float(np.median(ms))
    constant, coefficients = robust_ridge(basis.design(archs), ms / level)
    factors = (Factor("level", (), np.array(constant * level)), *basis.factors(coefficients * level, "effect"))
    raw = FactorOracle(space, factors, provenance)
    return replace(raw, factors=positive(raw, LOWEST * float(ms.min())))


def device_of(provenance: Provenance) -> str:
    """For people."""
    return provenance.device_name or provenance.device or "of no name"


def robust_ridge(design: Floats, y: Floats) -> tuple[float, Floats]:
    """(N, P), (N,) of about 1 -> constant and (P,) of a fit to relative errors in which outliers count little."""
    mean = design.mean(axis=0)
    x = design - mean
    constant, coefficients = 1.0, np.zeros(x.shape[1])
    fitted = np.ones(len(y))
    weights = 1 / np.maximum(y, 0.1) ** 2
    for _ in range(_ITERATIONS):
        constant, coefficients = _ridge(x, y, weights / weights.mean())
        fitted = np.maximum(constant + x @ coefficients, 0.1)
        relative = (y - fitted) / fitted
        scale = 1.4826 * float(np.median(np.abs(relative - np.median(relative)))) + 1e-9
        weights = 1 / (fitted**2 * (1 + (relative / scale) ** 2 / _STUDENT_DOF))
    return constant - float(mean @ coefficients), coefficients


def _ridge(x: Floats, y: Floats, weights: Floats) -> tuple[float, Floats]:
    """Weighted ridge with a free constant; the penalty of the smallest generalised cross-validation score."""
    n, total = len(y), weights.sum()
    centre, level = weights @ x / total, float(weights @ y / total)
    root = np.sqrt(weights)[:, None]
    xw, yw = root * (x - centre), root[:, 0] * (y - level)
    values, vectors = np.linalg.eigh(xw.T @ xw)
    values = np.maximum(values, 0)
    projected = vectors.T @ (xw.T @ yw)
    best, chosen = np.inf, np.zeros_like(projected)
    for penalty in 10.0 ** np.arange(-3.0, 4.5, 0.5):
        shrunk = projected / (values + penalty)
        left = float(yw @ yw - 2 * shrunk @ projected + (shrunk**2) @ values)
        freedom = 1 + float((values / (values + penalty)).sum())
        score = left / (1 - freedom / n) ** 2 if freedom < 0.95 * n else np.inf
        if score < best:
            best, chosen = score, shrunk
    coefficients = vectors @ chosen
    return level - float(centre @ coefficients), coefficients


def positive(oracle: FactorOracle, floor: float) -> tuple[Factor, ...]:
    """Factors of the same sum, nowhere below `floor` ms.

    A small space is written out in full and cut off there. In a large one the sum keeps its form: where the fastest
    architecture would be below, all are drawn towards the mean, as far as that one needs.
    """
    space = oracle.space
    if space.size <= MAX_TABULATED:
        return (in_full(space, lambda archs: np.maximum(oracle.latencies(archs), floor)),)
    try:
        _, fastest = oracle.fastest()
    except UsageError:  # too entangled: a bound
        fastest = sum(float(f.values.min()) for f in oracle.factors)
    if fastest >= floor:
        return oracle.factors
    means = [float(f.values.mean()) for f in oracle.factors]
    middle = max(sum(means), floor)
    keep = (middle - floor) / (middle - fastest)
    drawn = [
        Factor(f.site, f.scope, mean + keep * (f.values - mean)) for f, mean in zip(oracle.factors, means, strict=True)
    ]
    return (Factor("floor", (), np.array(middle - sum(means))), *drawn)
