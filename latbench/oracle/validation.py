"""How far off a model is on networks that it was not fitted on: figures, splits, cross-validation, learning curves.

Two rows are the same network where their graph keys agree or where the space's ``canonical`` form of their
architectures does (NAS-Bench-201's dead edges); the same network never stands on both sides of a split.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.oracle.base import Archs, Floats, LatencyOracle, Model, check_archs, space_of
from latbench.oracle.conformal import coverage
from latbench.spaces.base import Arch, SearchSpace
from latbench.tables import LatencyTable

CONFIDENCE = 0.9
FOLDS = 5
Networks = LatencyTable | tuple[Archs, Floats]  # (N, D) architectures and (N,) measured, in the oracle's unit


@dataclass(frozen=True)
class Validation:
    """Predictions against measurements; shares are of 1, errors relative to the measurement."""

    n: int
    mape: float  # mean of |predicted / measured - 1|
    within_5: float  # share of networks less than 5 % off
    within_10: float
    bias: float  # mean of predicted / measured - 1
    rmse: float  # in the oracle's unit: ms
    kendall: float | None  # tau-b; None below three networks, or where all are equal
    spearman: float | None
    confidence: float
    coverage: float | None  # share of measurements inside the interval; None without one
    half_width: float | None  # mean half-width of the interval over the prediction
    n_missing: int = 0  # networks left out, because the oracle lacks an entry for them

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for a model's notes."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an oracle says of networks, beside what was measured."""

    archs: NDArray[np.int64]  # (N, D)
    measured: Floats  # (N,)
    predicted: Floats  # (N,)
    interval: tuple[Floats, Floats] | None  # (N,) each
    confidence: float
    n_missing: int = 0

    @classmethod
    def of(cls, oracle: LatencyOracle, networks: Networks, *, confidence: float = CONFIDENCE) -> Predictions:
        """Asks `oracle` for every network; those whose entries are missing are counted and left out.

        Raises TableError where there is no network, or one that is not positive, MissingEntryError where every one
        lacks an entry, UsageError where an architecture does not fit the oracle's space.
        """
        raw, measured = networks.networks() if isinstance(networks, LatencyTable) else networks
        if not len(raw):
            raise TableError("there is no measured network to compare predictions with; profile some: --networks N")
        archs, measured = check_archs(oracle.space, raw), np.asarray(measured, np.float64)
        if measured.shape != (len(archs),) or not (measured > 0).all():
            raise TableError("a measured network must have a latency above zero to be compared with")
        try:
            predicted, kept = oracle.latencies(archs), np.ones(len(archs), bool)
        except MissingEntryError as error:
            predicted, kept = _one_by_one(oracle, archs)
            if not kept.any():
                raise error from None
        archs, measured = archs[kept], measured[kept]
        interval = oracle.interval(archs, confidence)
        return cls(archs, measured, predicted, interval, confidence, int((~kept).sum()))

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """All parts after one another; without an interval where a part has none."""
        intervals = [part.interval for part in parts if part.interval is not None]
        whole = len(intervals) == len(parts)
        return cls(
            np.concatenate([part.archs for part in parts]),
            np.concatenate([part.measured for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            (np.concatenate([low for low, _ in intervals]), np.concatenate([high for _, high in intervals]))
            if whole
            else None,
            parts[0].confidence,
            sum(part.n_missing for part in parts),
        )

    @property
    def relative(self) -> Floats:
        """(N,) predicted / measured - 1."""
        return self.predicted / self.measured - 1

    def validation(self) -> Validation:
        """The figures."""
        off = np.abs(self.relative)
        kendall, spearman = rank_correlations(self.predicted, self.measured)
        inside = half_width = None
        if self.interval is not None:
            inside = coverage(self.interval, self.measured)
            half_width = float(((self.interval[1] - self.interval[0]) / 2 / self.predicted).mean())
        return Validation(
            n=len(off),
            mape=float(off.mean()),
            within_5=float((off < 0.05).mean()),
            within_10=float((off < 0.10).mean()),
            bias=float(self.relative.mean()),
            rmse=float(np.sqrt(((self.predicted - self.measured) ** 2).mean())),
            kendall=kendall,
            spearman=spearman,
            confidence=self.confidence,
            coverage=inside,
            half_width=half_width,
            n_missing=self.n_missing,
        )


@dataclass(frozen=True)
class CurvePoint:
    """Error after a fit on `n` measured networks: mean and standard deviation over seeds."""

    n: int
    mape: float
    sd: float
    n_seeds: int


def validate(oracle: LatencyOracle, networks: Networks, *, confidence: float = CONFIDENCE) -> Validation:
    """Figures of `oracle` on measured networks; raises as ``Predictions.of``."""
    return Predictions.of(oracle, networks, confidence=confidence).validation()


def rank_correlations(a: Floats, b: Floats) -> tuple[float | None, float | None]:
    """Kendall's tau-b and Spearman's rho of (N,) and (N,); None below three, or where one side is constant."""
    if len(a) < 3 or not np.ptp(a) or not np.ptp(b):
        return None, None
    from scipy.stats import kendalltau, spearmanr

    return float(kendalltau(a, b).statistic), float(spearmanr(a, b).statistic)


def network_rows(table: LatencyTable) -> NDArray[np.int64]:
    """(N,) positions of the rows that ``table.networks()`` gives, in its order."""
    frame = table.frame_of("kind", "status", "arch")
    positions: NDArray[np.int64] = np.flatnonzero(
        (frame["kind"] == "network") & (frame["status"] == "ok") & frame["arch"].notna()
    )
    return positions


def network_names(table: LatencyTable) -> list[tuple[str, str]]:
    """What tells each of ``table.networks()`` from others: its row's key, and 12 hex digits of its canonical form."""
    space, (archs, _) = space_of(table.provenance), table.networks()
    keys = table.frame_of("key")["key"].to_numpy(object)[network_rows(table)]
    return [(str(key), _arch_id(space, tuple(arch))) for key, arch in zip(keys, archs.tolist(), strict=True)]


def distinct_networks(table: LatencyTable) -> list[list[int]]:
    """Positions of the network rows, those of one network together."""
    number: dict[str, int] = {}
    groups: list[list[int]] = []
    for row, names in zip(network_rows(table).tolist(), network_names(table), strict=True):
        found = next((number[name] for name in names if name in number), len(groups))
        if found == len(groups):
            groups.append([])
        groups[found].append(row)
        number |= dict.fromkeys(names, found)
    return groups


def unseen(table: LatencyTable, seen: Collection[str]) -> LatencyTable:
    """The network rows of `table` of which no name (``network_names``) is among `seen`."""
    known = frozenset(seen)
    new = [known.isdisjoint(names) for names in network_names(table)]
    return table.take(network_rows(table)[np.array(new, bool)])


def split(table: LatencyTable, held_out: float, seed: int) -> tuple[LatencyTable, LatencyTable]:
    """(the table without some networks, those networks): `held_out` is a share below 1, or a number of networks.

    Networks are kept out at random, with every other row of the same network, so a few more than asked for may be.
    Raises UsageError where none would be left.
    """
    groups = distinct_networks(table)
    n = sum(map(len, groups))
    wanted = round(held_out * n) if 0 < held_out < 1 else int(held_out)
    if not 0 < wanted < n or len(groups) < 2:
        raise UsageError(f"cannot keep {wanted} of {n} measured networks out and fit on the rest")
    out: list[int] = []
    for group in _shuffled(groups, seed):
        if len(out) >= wanted or len(out) + len(group) == n:
            break
        out += group
    return _without(table, out), table.take(sorted(out))


def folds(table: LatencyTable, n_folds: int, seed: int) -> Iterator[tuple[LatencyTable, LatencyTable]]:
    """`n_folds` splits that keep every network out once. Raises UsageError below two distinct networks."""
    groups = _shuffled(distinct_networks(table), seed)
    if len(groups) < 2:
        raise UsageError(f"cannot cross-validate on {len(groups)} measured networks: two at least")
    for i in range(min(n_folds, len(groups))):
        out = sorted(row for group in groups[i::n_folds] for row in group)
        yield _without(table, out), table.take(out)


def cross_validate(
    kind: type[Model],
    table: LatencyTable,
    *,
    n_folds: int = FOLDS,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    **options: Any,
) -> Predictions:
    """Every network predicted by a model that was fitted without it; `options` are those of ``kind.fit``."""
    parts = [
        Predictions.of(kind.fit(fitted, **options), kept_out, confidence=confidence)
        for fitted, kept_out in folds(table, n_folds, seed)
    ]
    return Predictions.joined(parts)


def learning_curve(
    kind: type[Model],
    table: LatencyTable,
    counts: Sequence[int],
    held_out: float,
    seeds: Sequence[int],
    **options: Any,
) -> tuple[CurvePoint, ...]:
    """Error on kept-out networks against the number of measured networks in the fit; blocks are all kept.

    Every seed keeps other networks out (``split``) and takes its fits' networks from the rest, the smaller count a part
    of the larger. `options` are those of ``kind.fit``. Raises UsageError where a count exceeds what is left.
    """
    found = defaultdict(list)
    for seed in seeds:
        rest, kept_out = split(table, held_out, seed)
        rows = network_rows(rest)
        order = np.random.default_rng([seed, 1]).permutation(rows)
        if max(counts) > len(rows):
            raise UsageError(f"cannot fit on {max(counts)} networks: {len(rows)} are left beside {len(kept_out)}")
        for n in counts:
            model = kind.fit(_without(rest, order[n:].tolist()), **options)
            found[n].append(validate(model, kept_out).mape)
    return tuple(
        CurvePoint(n, float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v))
        for n, v in found.items()
    )


def _one_by_one(oracle: LatencyOracle, archs: NDArray[np.int64]) -> tuple[Floats, NDArray[np.bool_]]:
    """Predictions of the networks that have one, and (N,) which these are."""
    predicted, kept = [], np.ones(len(archs), bool)
    for i, arch in enumerate(archs.tolist()):
        try:
            predicted.append(oracle.latency(tuple(arch)))
        except MissingEntryError:
            kept[i] = False
    return np.array(predicted), kept


def _arch_id(space: SearchSpace, arch: Arch) -> str:
    text = space.format_arch(space.canonical(arch))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _shuffled(groups: list[list[int]], seed: int) -> list[list[int]]:
    """In the order in which rows drawn at random first meet them."""
    of_row = {row: i for i, group in enumerate(groups) for row in group}
    drawn = np.random.default_rng(seed).permutation(np.array(sorted(of_row), np.int64))
    return [groups[i] for i in dict.fromkeys(of_row[row] for row in drawn.tolist())]


def _without(table: LatencyTable, rows: Sequence[int]) -> LatencyTable:
    keep = np.ones(len(table), bool)
    keep[list(rows)] = False
    return table.take(np.flatnonzero(keep))
