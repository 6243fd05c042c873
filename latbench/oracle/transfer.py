"""``TransferOracle``: a new device from 10 to 50 measured networks and other devices' tables of the same space.

The new device's latency is a sum of ingredients: other devices' latencies (each first made a function of the
architecture, ``transfer_sources``), physical quantities of the blocks, and a free effect per option. How much of each
the measurements speak for is averaged over models (``transfer_blend``), among them those without any source, which win
where the sources mislead (a phone from GPUs). Where a device has almost no noise, ``LearnedOracle`` on its own networks
may be better still: a share of it, as a sum, is mixed in, as large as predictions for networks left out ask for. The
result is a sum over scopes again, and so answers as every ``FactorOracle`` does.

Related: Lee et al. 2021 (HELP) and Dudziak et al. 2020 (BRP-NAS) adapt networks across devices; Akhauri and Abdelfattah
2024 (NASFLAT) pretrain on them. A linear model with averaged scales needs no pretraining.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latbench.errors import TableError, UsageError
from latbench.oracle.base import Floats, check_archs, space_of
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors import MAX_TABULATED, Factor, FactorOracle, in_full
from latbench.oracle.features import Additive, View, physical, views
from latbench.oracle.learned import LearnedOracle, left_out
from latbench.oracle.transfer_blend import Ingredient, blend
from latbench.oracle.transfer_sources import (
    LOWEST,
    device_of,
    main_effects,
    nearest_sum,
    positive,
    source_model,
)
from latbench.provenance import Provenance
from latbench.spaces.base import SearchSpace
from latbench.tables import LatencyTable

MIN_NETWORKS = 3  # of the new device
_REFERENCE = 2000  # random architectures over which ingredients are scaled
_SAMPLES = 4000  # of what is fitted without sources, as a sum
_DOUBT = 7.0  # measurements' worth of belief that sources do not mislead; chosen on HELP's latencies
_UNTOLD = 0.2  # share of what sources tell below which a network does something else than on them; 0.1 to 0.5 are alike

Source = LatencyTable | FactorOracle


@dataclass(frozen=True, eq=False)
class TransferOracle(FactorOracle):
    """A ``FactorOracle`` with a note of what it was made from."""

    name: ClassVar[str] = "transfer"

    chances: Mapping[str, float] = field(default_factory=dict)  # ingredient -> posterior probability that it matters
    share: float = 0.0  # of what was learned on the new device alone

    @classmethod
    def fit(cls, table: LatencyTable, *, sources: Sequence[Source] = (), seed: int = 0) -> TransferOracle:
        """`table`: the new device's networks; `sources`: tables of other devices, or sums already fitted to them.

        A source may be of another batch size or number type, but its decisions must be the same. Raises TableError
        where a table has too few networks or is of another space, UsageError where there is no source.
        """
        if not sources:
            raise UsageError("transfer needs tables of other devices of the same space; without any, fit learned")
        space = space_of(table.provenance)
        archs, ms = table.networks()
        if len(ms) < MIN_NETWORKS:
            raise TableError(
                f"the table has {len(ms)} measured networks of {space.name}, transfer needs at least {MIN_NETWORKS};"
                " measure some (latbench profile --networks)"
            )
        if (ms <= 0).any():
            raise TableError(f"a network of {ms.min():g} ms: latencies must be positive; measure it again")
        archs = check_archs(space, archs)
        terms = [*(_source_term(space, s, i) for i, s in enumerate(sources, 1)), *_own_terms(space)]
        level = float(np.median(ms))
        found = blend(ms / level, [t.ingredient(archs) for t in terms], np.random.default_rng(seed))
        factors = _collect(
            [Factor("level", (), np.array(level * (1 + found.constant)))],
            *(t.factors(level * c) for t, c in zip(terms, found.coefficients, strict=True)),
        )
        raw = FactorOracle(space, factors, table.provenance)
        factors, lowest = positive(raw, LOWEST * float(ms.min())), LOWEST * ms.min()
        alone = LearnedOracle.fit(table, calibrated=False)
        without = left_out(alone)[False][0]
        share, predicted = _mix(_told(np.maximum(level * found.left_out, lowest), without), without, ms)
        summed = FactorOracle(space, factors, table.provenance)
        if alone.tabulated is not None:
            factors = (in_full(space, lambda a: _told(summed.latencies(a), alone.latencies(a))),)
        if share:
            parts = FactorOracle(space, factors, table.provenance), _sum(alone)
            factors = _collect(*(part.scaled(by).factors for part, by in zip(parts, (1 - share, share), strict=True)))
        return cls(
            space,
            factors,
            table.provenance,
            calibration=Conformal.of(predicted, ms),
            chances={t.name: float(chance) for t, chance in zip(terms, found.chances, strict=True)},
            share=share,
        )

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays, meta = super().state()
        return arrays, {**meta, "chances": dict(self.chances), "share": self.share}

    @classmethod
    def from_state(
        cls, space: SearchSpace, provenance: Provenance, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> TransferOracle:
        made = super().from_state(space, provenance, arrays, meta)
        return replace(made, chances=dict(meta["chances"]), share=float(meta.get("share", 0.0)))


class _Prior(NamedTuple):
    """See ``Ingredient``."""

    median: float
    spread: float
    chance: float
    guess: bool = False
    source: bool = False


# Set once for all spaces and devices, on HELP's latencies: a device's latency is about another's, or about its kernels,
# MACs or traffic; kinds of kernels add some per cent, single options fewer.
_SOURCE = _Prior(0.3, 1.0, 0.9, guess=True, source=True)
_PAPER = _Prior(0.3, 1.0, 0.5, guess=True)
_KINDS = _Prior(0.05, 1.2, 0.5)
_OPTIONS = _Prior(0.02, 1.0, 0.7)
_ON_PAPER = ("kernels", "macs", "bytes")


@dataclass(frozen=True, eq=False)
class _Term:
    """Functions of the architecture that are sums over scopes, relative to the latency and less their mean."""

    name: str
    prior: _Prior
    constant: Floats  # (p,)
    parts: tuple[tuple[tuple[int, ...], Floats], ...]  # scope -> (K_1, ..., K_s, p)

    def columns(self, archs: NDArray[np.int64]) -> Floats:
        """(N, D) -> (N, p)."""
        total = np.tile(self.constant, (len(archs), 1))
        for scope, values in self.parts:
            total += values[tuple(archs[:, d] for d in scope)]
        return total

    def ingredient(self, archs: NDArray[np.int64]) -> Ingredient:
        return Ingredient(self.columns(archs), **self.prior._asdict())

    def factors(self, coefficients: Floats) -> Iterable[Factor]:
        """(p,) ms -> factors whose sum is columns @ coefficients."""
        yield Factor(self.name, (), np.array(self.constant @ coefficients))
        for scope, values in self.parts:
            yield Factor(self.name, scope, values @ coefficients)


def _source_term(space: SearchSpace, source: Source, position: int) -> _Term:
    """A device's latency relative to its mean over random architectures, less 1."""
    provenance = source.provenance
    own, name = space_of(provenance), device_of(provenance)
    if own.name != space.name or own.decisions != space.decisions:
        differ = "" if own.name != space.name else " with other decisions"
        raise TableError(f"source {position} ({name}) is of {own.name}{differ}, the new device's table of {space.name}")
    model = source if isinstance(source, FactorOracle) else source_model(source)
    if any(np.isnan(f.values).any() for f in model.factors):
        raise TableError(
            f"source {position} ({name}) lacks entries; fit it with missing='interpolate', or leave it out"
        )
    mean = float(model.latencies(_reference(space)).mean())
    constant = sum(float(f.values) for f in model.factors if not f.scope) / mean - 1
    parts = tuple((f.scope, f.values[..., None] / mean) for f in model.factors if f.scope)
    return _Term(f"source {position}: {name}", _SOURCE, np.array([constant]), parts)


@lru_cache(maxsize=4)
def _own_terms(space: SearchSpace) -> tuple[_Term, ...]:
    """What needs no other device: quantities on paper, and one effect per option."""
    free = main_effects(space)
    width = sum(values.shape[-1] for _, values in free.parts)
    parts, start = [], 0
    for scope, values in free.parts:
        wide = np.zeros((*values.shape[:-1], width))
        wide[..., start : start + values.shape[-1]] = values
        parts.append((scope, wide))
        start += values.shape[-1]
    spread = _Term("options", _OPTIONS, np.zeros(width), tuple(parts)).columns(_reference(space)).std(axis=0)
    options = _centred(space, "options", _OPTIONS, np.zeros(width), parts, np.full(width, np.sqrt((spread**2).sum())))
    return (*_paper_terms(space), options)


def _paper_terms(space: SearchSpace) -> Iterator[_Term]:
    """Kernels, MACs and traffic over their mean, each and by kind of kernel; none where a space does not factor.

    Where a runtime may leave out dead operations (``features.views``), also of those that live.
    """
    for view in views(space):
        figures = physical(space) if view.name == "all" else _tabulated(view)
        if not figures.names:
            return
        mean = dict(zip(figures.names, figures.of(_reference(space)).mean(axis=0).tolist(), strict=True))
        chosen = [(q, _PAPER, [figures.names.index(f"total/{q}")]) for q in _ON_PAPER]
        kinds = [i for i, name in enumerate(figures.names) if name.startswith("kind/")]
        for name, prior, columns in (*chosen, ("kinds of kernels", _KINDS, kinds)):
            found = figures.take(columns)
            units = np.array([mean["total/" + n.rpartition("/")[2]] for n in found.names])
            label = name if view.name == "all" else f"{name}, {view.name}"
            term = _centred(space, label, prior, found.constant, found.parts, units)
            if len(term.constant):  # mobilenet_v1's networks all have as many kernels
                yield term


def _tabulated(view: View) -> Additive:
    """A view's figures, which need not add up, of every architecture of a small space."""
    if view.space.size > MAX_TABULATED:
        return Additive((), np.zeros(0), ())
    names = physical(view.space).names
    every = in_full(view.space, lambda archs: view.figures(archs)[1])
    return Additive(names, np.zeros(len(names)), ((every.scope, every.values),))


def _centred(
    space: SearchSpace,
    name: str,
    prior: _Prior,
    constant: Floats,
    parts: Iterable[tuple[tuple[int, ...], Floats]],
    units: Floats,
) -> _Term:
    """(p,) units of the columns; those that do not vary are left out."""
    raw = _Term(name, prior, constant, tuple(parts))
    columns = raw.columns(_reference(space))
    kept = columns.std(axis=0) > 1e-9 * np.abs(columns).max(axis=0)
    centred = (constant - columns.mean(axis=0))[kept] / units[kept]
    return replace(raw, constant=centred, parts=tuple((scope, v[..., kept] / units[kept]) for scope, v in raw.parts))


@lru_cache(maxsize=4)
def _reference(space: SearchSpace) -> NDArray[np.int64]:
    """(_REFERENCE, D) random architectures, always the same."""
    rng = np.random.default_rng(0)
    return np.array([space.sample(rng) for _ in range(_REFERENCE)], np.int64)


def _told(transferred: Floats, alone: Floats) -> Floats:
    """Predictions with sources, but where that without them is far below: of such a network the device runs little or
    nothing (cells of which no path leads to the output, where a runtime leaves them out), and sources do not tell."""
    return np.where(alone < _UNTOLD * transferred, alone, transferred)


def _mix(transferred: Floats, alone: Floats, ms: Floats) -> tuple[float, Floats]:
    """(N,) predictions with and without sources for networks left out, and their latencies -> the share of the latter,
    by ridge on relative errors, and (N,) the mixtures, each with the share that the others ask for."""
    with_sources, difference = transferred / ms - 1, (alone - transferred) / ms
    products, squares = -with_sources * difference, difference**2
    held = _DOUBT * float((with_sources**2).mean())

    def share(product: Any, square: Any) -> Any:
        return np.clip(np.divide(product, square + held + np.finfo(float).tiny), 0.0, 1.0)

    total = float(share(products.sum(), squares.sum()))
    return total, transferred + share(products.sum() - products, squares.sum() - squares) * (alone - transferred)


def _sum(oracle: LearnedOracle) -> FactorOracle:
    """The nearest sum over scopes; of a small space it is exact."""
    if oracle.tabulated is not None:
        return oracle.tabulated
    rng = np.random.default_rng(0)
    archs = np.unique([oracle.space.sample(rng) for _ in range(_SAMPLES)], axis=0)
    return nearest_sum(oracle.space, oracle.provenance, archs, oracle.latencies(archs))


def _collect(*groups: Iterable[Factor]) -> tuple[Factor, ...]:
    """One factor per scope."""
    sums: dict[tuple[int, ...], Floats] = {}
    for factor in (f for group in groups for f in group):
        held = sums.get(factor.scope)
        sums[factor.scope] = factor.values if held is None else held + factor.values
    return tuple(Factor("+".join(map(str, scope)) or "level", scope, values) for scope, values in sums.items())
