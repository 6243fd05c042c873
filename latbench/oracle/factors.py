"""``FactorOracle``: latency as a sum of small arrays, one per site, each over the few decisions in its scope.

The scalar, the batched and the expected query, conditioning, the chain's Viterbi terms and the exact minimum all read
the same arrays. Sites of one scope are added up beforehand, and a scope inside another joins it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise as pairs
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from latbench.errors import MissingEntryError, UsageError
from latbench.graph.ir import Graph
from latbench.oracle.base import SOURCES, Archs, Floats, P, check_archs
from latbench.oracle.conformal import Conformal
from latbench.oracle.factors_kernel import ROWS, kernel
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace

F = TypeVar("F", bound="FactorOracle")
MISSING = SOURCES.index("missing")
MAX_TABULATED = 20_000  # architectures: a smaller space can be written out in full
_MAX_TABLE = 50_000_000  # entries of one array while a minimum is sought


@dataclass(frozen=True, eq=False)
class Factor:
    """What one site adds: an array over the options of the decisions in its scope."""

    site: str
    scope: tuple[int, ...]  # ascending
    values: Floats  # (K_1, ..., K_s); NaN: missing
    source: NDArray[np.int8] | None = None  # of `values`' shape, positions in SOURCES; None: all fitted


def in_full(space: SearchSpace, figures: Callable[[NDArray[np.int64]], Floats]) -> Factor:
    """`figures`, (N, D) -> (N, ...), of every architecture of a small space, as one factor over all decisions."""
    shape = tuple(len(decision.options) for decision in space.decisions)
    values = figures(np.stack(np.unravel_index(np.arange(space.size), shape), axis=1))
    return Factor("network", tuple(range(len(shape))), values.reshape(*shape, *values.shape[1:]))


class Chain(NamedTuple):
    """A sum over neighbouring decisions: what Viterbi runs on."""

    constant: float
    unary: tuple[Floats, ...]  # D arrays (K_i,)
    pairwise: tuple[Floats, ...]  # D - 1 arrays (K_i, K_(i+1))


@dataclass(frozen=True, eq=False)
class FactorOracle:
    """A ``LatencyOracle`` whose answer is the sum of its factors. A value."""

    space: SearchSpace
    factors: tuple[Factor, ...]
    provenance: Provenance
    unit: str = "ms"
    calibration: Conformal | None = None
    missing: Callable[[Factor, tuple[int, ...]], MissingEntryError] | None = None  # what to raise for an entry

    def __post_init__(self) -> None:
        n_options = self._n_options
        for f in self.factors:
            want = tuple(n_options[d] for d in f.scope)
            if f.values.shape != want or list(f.scope) != sorted(set(f.scope)):
                raise UsageError(f"factor {f.site}: scope {f.scope} wants shape {want}, got {f.values.shape}")

    @classmethod
    def counting(cls, space: FactoredSpace, what: str) -> FactorOracle:
        """ "n_params" or "macs" of a space's blocks: a second budget beside a latency. Exact."""
        if what not in ("n_params", "macs"):
            raise UsageError(f"cannot count {what!r}: n_params or macs")
        factors = site_factors(space, lambda block: (0.0, 0) if block is None else (float(getattr(block, what)), 1))
        provenance = Provenance(device="", device_name="", backend="", space=space.name, settings=space.settings())
        return cls(space, factors, provenance, unit="parameters" if what == "n_params" else "MACs")

    def scaled(self: F, by: float) -> F:
        """Every figure `by` times what it is."""
        return replace(self, factors=tuple(replace(f, values=by * f.values) for f in self.factors))

    # -- queries

    def latency(self, arch: Arch) -> float:
        """One option index per decision -> the sum of its entries."""
        constant, rows = self._scalar
        if len(arch) != len(self._n_options):
            self.space.check(tuple(arch))
        for index, n in zip(arch, self._n_options, strict=True):
            if not 0 <= index < n:
                self.space.check(tuple(arch))
        total = constant
        for scope, strides, values in rows:
            at = 0
            for d, stride in zip(scope, strides, strict=True):
                at += arch[d] * stride
            total += values[at]
        if total != total:
            raise self._missing_in(tuple(int(i) for i in arch))
        return total

    def latencies(self, archs: Archs) -> Floats:
        """(N, D) option indices -> (N,)."""
        array = np.asarray(archs)
        if array.ndim != 2 or array.shape[1] != len(self._n_options) or array.dtype.kind not in "iu":
            check_archs(self.space, array)
        if array.dtype == np.uint64:  # times a signed stride that would be a float
            array = check_archs(self.space, array)
        out = np.empty(len(array))
        bad = kernel()(array, *self._flat, out)
        if bad >= 0:
            check_archs(self.space, array[bad : bad + ROWS])
        gaps = np.isnan(out)
        if gaps.any():
            raise self._missing_in(tuple(int(i) for i in array[int(gaps.argmax())]))
        return out

    def expected_latency(self, probs: P) -> P:
        """(..., D, K) probabilities -> (...). Raises MissingEntryError where any entry is missing: it would count."""
        p: Any = probs if hasattr(probs, "new_tensor") else np.asarray(probs, np.float64)
        n, k = len(self._n_options), max(self._n_options, default=0)
        if p.ndim < 2 or p.shape[-2] != n or p.shape[-1] < k:
            raise UsageError(f"{self.space.name}: probabilities must be (..., {n}, {k}), got {tuple(p.shape)}")
        if self._gap is not None:
            raise self._missing_at(*self._gap)
        constant, unary, larger = self._constants(p)
        total = (p[..., :k] * unary).sum(-1).sum(-1) + constant
        for scope, table in larger:
            total = total + _expectation(p, scope, table)
        return cast(P, total)

    def interval(self, archs: Archs, confidence: float = 0.9) -> tuple[Floats, Floats] | None:
        """(N, D) -> (N,) and (N,), split-conformal, relative to the prediction; None without kept-out networks."""
        if self.calibration is None:
            return None
        return self.calibration.interval(self.latencies(archs), confidence)

    def sources(self, arch: Arch) -> Mapping[str, int]:
        """How many sites' entries have which source."""
        self.space.check(tuple(arch))
        counts = Counter(
            "fitted" if f.source is None else SOURCES[int(f.source[tuple(arch[d] for d in f.scope)])]
            for f in self.factors
        )
        return dict(counts)

    # -- other forms of the same sum

    def condition(self, fixed: Mapping[int, int | Floats]) -> FactorOracle:
        """The oracle where these decisions are settled, by index or by (K,) probabilities (``base.spread``).

        Architectures keep their length; the settled decisions no longer matter.
        """
        rows = {}
        for decision, choice in fixed.items():
            if not 0 <= decision < len(self._n_options):
                raise UsageError(f"{self.space.name} has no decision {decision}: 0 to {len(self._n_options) - 1}")
            n = self._n_options[decision]
            if isinstance(choice, int | np.integer):
                if not 0 <= choice < n:
                    raise UsageError(f"{self.space.decisions[decision].name} has no option {choice}: 0 to {n - 1}")
                rows[decision] = (np.arange(n) == choice).astype(np.float64)
            elif np.shape(choice) == (n,):
                rows[decision] = np.asarray(choice, np.float64)
            else:
                raise UsageError(f"{self.space.decisions[decision].name}: wants {n} probabilities")
        return replace(self, factors=tuple(_settle(f, rows) for f in self.factors))

    def chain(self) -> Chain:
        """The sum as unary and pairwise terms of neighbouring decisions.

        Raises UsageError where a scope reaches further, MissingEntryError where an entry is missing.
        """
        if self._gap is not None:
            raise self._missing_at(*self._gap)
        n = self._n_options
        unary = [np.zeros(k) for k in n]
        pairwise = [np.zeros(pair) for pair in pairs(n)]
        constant, merged = self.merged
        for scope, values in merged:
            if len(scope) == 1:
                unary[scope[0]] = unary[scope[0]] + values
            elif len(scope) == 2 and scope[1] == scope[0] + 1:
                pairwise[scope[0]] = pairwise[scope[0]] + values
            else:
                names = ", ".join(self.space.decisions[d].name for d in scope)
                raise UsageError(f"{self.space.name} is no chain: one site depends on {names}")
        return Chain(constant, tuple(unary), tuple(pairwise))

    def fastest(self) -> tuple[Arch, float]:
        """The architecture of the smallest sum, exactly, by eliminating one decision after another.

        Missing entries are avoided; MissingEntryError where that is impossible.
        """
        _, merged = self.merged
        live = [(scope, np.where(np.isnan(values), np.inf, values)) for scope, values in merged]
        left, steps = set(range(len(self._n_options))), []
        while left:
            decision = min(left, key=lambda d: (len({e for scope, _ in live if d in scope for e in scope}), d))
            left.remove(decision)
            mine = [(scope, v) for scope, v in live if decision in scope]
            live = [(scope, v) for scope, v in live if decision not in scope]
            scope = tuple(sorted({decision, *(e for s, _ in mine for e in s)}))
            if np.prod([self._n_options[d] for d in scope], dtype=np.float64) > _MAX_TABLE:
                raise UsageError(f"{self.space.name}: its sites are too entangled to find the fastest exactly")
            total = np.zeros([self._n_options[d] for d in scope])
            for s, v in mine:
                total = total + _broadcast(v, s, scope)
            axis = scope.index(decision)
            rest = tuple(d for d in scope if d != decision)
            steps.append((decision, rest, total.argmin(axis=axis)))
            live.append((rest, total.min(axis=axis)))
        arch = [0] * len(self._n_options)
        for decision, rest, best in reversed(steps):
            arch[decision] = int(best[tuple(arch[d] for d in rest)])
        found = tuple(arch)
        return found, self.latency(found)

    # -- kept in a file

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON from which ``from_state`` makes an equal oracle."""
        arrays: dict[str, NDArray[Any]] = {}
        for i, f in enumerate(self.factors):
            arrays[f"factor{i}/values"] = f.values
            if f.source is not None:
                arrays[f"factor{i}/source"] = f.source
        if self.calibration is not None:
            arrays["calibration"] = np.array(self.calibration.scores)
        return arrays, {"unit": self.unit, "factors": [[f.site, list(f.scope)] for f in self.factors]}

    @classmethod
    def from_state(
        cls: type[F],
        space: SearchSpace,
        provenance: Provenance,
        arrays: Mapping[str, NDArray[Any]],
        meta: Mapping[str, Any],
    ) -> F:
        """Inverse of ``state``. Raises KeyError or UsageError where they do not fit together."""
        factors = tuple(
            Factor(site, tuple(scope), arrays[f"factor{i}/values"], arrays.get(f"factor{i}/source"))
            for i, (site, scope) in enumerate(meta["factors"])
        )
        scores = arrays.get("calibration")
        calibration = None if scores is None else Conformal(tuple(scores.tolist()))
        return cls(space, factors, provenance, unit=meta["unit"], calibration=calibration)

    # -- compiled forms, made once

    @cached_property
    def _n_options(self) -> tuple[int, ...]:
        return tuple(len(decision.options) for decision in self.space.decisions)

    @cached_property
    def merged(self) -> tuple[float, list[tuple[tuple[int, ...], Floats]]]:
        """The constant, and one array per scope that is part of no other."""
        by_scope: dict[tuple[int, ...], Floats] = {}
        for f in self.factors:
            held = by_scope.get(f.scope)
            by_scope[f.scope] = f.values if held is None else held + f.values
        constant = float(by_scope.pop((), np.zeros(())))
        merged: list[tuple[tuple[int, ...], Floats]] = []
        for scope in sorted(by_scope, key=len, reverse=True):
            for i, (larger, values) in enumerate(merged):
                if set(scope) <= set(larger):
                    merged[i] = larger, values + _broadcast(by_scope[scope], scope, larger)
                    break
            else:
                merged.append((scope, by_scope[scope]))
        return constant, sorted(merged, key=lambda pair: pair[0])

    @cached_property
    def _scalar(self) -> tuple[float, list[tuple[tuple[int, ...], tuple[int, ...], list[float]]]]:
        constant, merged = self.merged
        return constant, [(scope, _strides(v.shape), v.ravel().tolist()) for scope, v in merged]

    @cached_property
    def _flat(self) -> tuple[Any, ...]:
        """What the kernel reads: options per decision, then factor -> its part of (decision, stride), its offset."""
        constant, merged = self.merged
        starts = np.cumsum([0, *(len(scope) for scope, _ in merged)])
        offsets = np.cumsum([0, *(v.size for _, v in merged)])
        decisions = np.array([d for scope, _ in merged for d in scope], np.int64)
        strides = np.array([s for _, v in merged for s in _strides(v.shape)], np.int64)
        values = np.concatenate([np.zeros(0), *(v.ravel() for _, v in merged)])
        return np.array(self._n_options, np.uint64), starts, decisions, strides, offsets, values, constant

    @cached_property
    def _gap(self) -> tuple[Factor, tuple[int, ...]] | None:
        """The first missing entry."""
        for f in self.factors:
            gaps = np.argwhere(np.isnan(f.values))
            if len(gaps):
                return f, tuple(int(i) for i in gaps[0])
        return None

    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def _constants(self, p: Any) -> tuple[float, Any, list[tuple[tuple[int, ...], Any]]]:
        """The merged arrays in the kind, dtype and device of `p`."""
        like = (type(p), str(p.dtype), str(getattr(p, "device", "")))
        if like not in self._made:
            make = p.new_tensor if hasattr(p, "new_tensor") else np.asarray
            constant, merged = self.merged
            unary = np.zeros((len(self._n_options), max(self._n_options, default=0)))
            for scope, values in merged:
                if len(scope) == 1:
                    unary[scope[0], : len(values)] = values
            larger = [(scope, make(values)) for scope, values in merged if len(scope) > 1]
            self._made[like] = constant, make(unary), larger
        found: tuple[float, Any, list[tuple[tuple[int, ...], Any]]] = self._made[like]
        return found

    def _missing_in(self, arch: Arch) -> MissingEntryError:
        for f in self.factors:
            picks = tuple(arch[d] for d in f.scope)
            if np.isnan(f.values[picks]):
                return self._missing_at(f, picks)
        raise AssertionError("a sum of figures is no figure")

    def _missing_at(self, f: Factor, picks: tuple[int, ...]) -> MissingEntryError:
        if self.missing is not None:
            return self.missing(f, picks)
        chosen = ", ".join(
            f"{self.space.decisions[d].name}={self.space.decisions[d].options[i]}"
            for d, i in zip(f.scope, picks, strict=False)
        )
        return MissingEntryError(f"no figure for {f.site} at {chosen or 'any choice'} in this {self.space.name} oracle")


def site_factors(space: FactoredSpace, entry: Callable[[Graph | None], tuple[float, int]]) -> tuple[Factor, ...]:
    """One factor per site: `entry(block, or None where it is absent)` gives (value or NaN, position in SOURCES)."""
    factors = []
    for site in space.sites:
        shape = tuple(len(space.decisions[d].options) for d in site.scope)
        values, source = np.empty(shape), np.empty(shape, np.int8)
        for picks in np.ndindex(shape):
            values[picks], source[picks] = entry(space.block(site, picks))
        factors.append(Factor(site.name, site.scope, values, source))
    return tuple(factors)


def _settle(f: Factor, rows: Mapping[int, Floats]) -> Factor:
    values, source, scope = f.values, f.source, f.scope
    for d in [d for d in f.scope if d in rows]:
        axis, row = scope.index(d), rows[d]
        used = np.flatnonzero(row)
        values = np.tensordot(values.take(used, axis), row[used], (axis, 0))
        source = None if source is None else source.take(used, axis).max(axis=axis)  # the least trustworthy
        scope = scope[:axis] + scope[axis + 1 :]
    return Factor(f.site, scope, values, source)


def _broadcast(values: Floats, scope: tuple[int, ...], larger: Iterable[int]) -> Floats:
    """`values` with an axis of length 1 for each decision of `larger` that its scope lacks."""
    sizes = dict(zip(scope, values.shape, strict=True))
    return values.reshape([sizes.get(d, 1) for d in larger])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


def _expectation(p: Any, scope: tuple[int, ...], table: Any) -> Any:
    """Contracts (K_1, ..., K_s) with the rows of its decisions: (..., D, K) -> (...)."""
    shape = tuple(table.shape)
    value = p[..., scope[0], : shape[0]] @ table.reshape(shape[0], -1)  # (..., K_2 * ... * K_s)
    for d, k in zip(scope[1:-1], shape[1:-1], strict=True):
        value = value.reshape(*value.shape[:-1], k, -1)
        value = (p[..., d, None, :k] @ value)[..., 0, :]
    return (value * p[..., scope[-1], : shape[-1]]).sum(-1)
