"""``compare``: what became faster or slower between two tables, row by row and overall, from their stored samples.

A row is compared by the median of its block medians. The error of the ratio comes from the spread between blocks on
either side (``measure.statistics.estimate``: Student's t with the median's efficiency) and a process term for each
side, joined by Welch and Satterthwaite's rule. With a threshold such as 5 %, the true change lies in one of three
regions, and each is tested (three-sided testing: Goeman, Solari and Stijnen 2010):

SLOWER  by more than the threshold       FASTER  by more than the threshold
SAME    within the threshold either way (two one-sided tests)       UNSURE  none of these can be told

A difference that is significant and smaller than the threshold is therefore SAME, and a noisy row UNSURE, never SAME.
Rows are many: the tests of change are two-sided and adjusted together by Benjamini and Hochberg (1995), so that at
most 1 - confidence of the claimed changes are expected to be false, direction included (Benjamini and Yekutieli 2005);
so are the tests of sameness. The interval beside a row is that of the row alone.

A sandwich row is compared gross, with its two thin convolutions in it: that is what was timed, and an increment is
known only up to a term that its neighbour gives back. A change of the block itself is diluted by their share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from latbench.compare.statistics import CERTAIN, Floats, adjust, moderate, region_tests
from latbench.errors import ProvenanceConflictError, TableError, UsageError
from latbench.measure.statistics import PROCESS_TERM, estimate
from latbench.tables import LatencyTable, Provenance, Row

Verdict = Literal["SLOWER", "FASTER", "SAME", "UNSURE"]
VERDICTS: tuple[Verdict, ...] = ("SLOWER", "FASTER", "UNSURE", "SAME")  # by what a reader wants to see first

THRESHOLD = 0.05
CONFIDENCE = 0.95
ACROSS = {  # what may differ when asked for -> the fields of a provenance
    "versions": ("versions",),
    "backend": ("backend", "options", "versions"),
    "device": ("device_name", "environment"),
    "environment": ("environment",),
    "policy": ("policy", "options"),
    "space": ("space", "settings"),
}


@dataclass(frozen=True)
class Timing:
    """One side of a comparison: a latency, and how well it is known."""

    value_ms: float
    error: float  # relative standard error
    dof: float  # degrees of freedom behind it
    n_blocks: int
    process: float  # relative error that no block of its session can show


@dataclass(frozen=True)
class Change:
    """One row in both tables. Latencies in ms, NEW's at OLD's reference clock; `ratio` is new / old."""

    key: str
    kind: str
    context: str
    name: str  # block type and site, or architecture
    old_ms: float
    new_ms: float
    ratio: float
    low: float  # interval of the ratio
    high: float
    q_change: float  # adjusted p-value of "no change beyond the threshold"
    q_same: float  # adjusted p-value of "a change beyond the threshold"
    verdict: Verdict


@dataclass(frozen=True)
class Overall:
    """Geometric mean of the ratios of `n` rows of one kind, with its interval."""

    kind: str
    n: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """All rows that both tables hold, slowest changes first."""

    threshold: float
    confidence: float
    clock: str  # what latencies are stated at
    rows: tuple[Change, ...]
    overall: tuple[Overall, ...]
    differs: tuple[str, ...]  # conditions that differ, old / new
    lost: tuple[str, ...]  # rows with a figure in OLD and none in NEW, and why
    failed: int  # of these, rows that failed in NEW
    gained: int  # rows with a figure in NEW alone
    skipped: tuple[str, ...]  # rows in both that cannot be compared, and why

    @property
    def counts(self) -> dict[Verdict, int]:
        """Rows by verdict."""
        verdicts = [row.verdict for row in self.rows]
        return {verdict: verdicts.count(verdict) for verdict in VERDICTS}

    @property
    def regressed(self) -> bool:
        """Whether a row, or the mean of all, is slower by more than the threshold."""
        return any(row.verdict == "SLOWER" for row in self.rows) or any(
            one.low > 1 + self.threshold for one in self.overall
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "counts": self.counts, "regressed": self.regressed}


def compare(
    old: LatencyTable,
    new: LatencyTable,
    *,
    threshold: float = THRESHOLD,
    confidence: float = CONFIDENCE,
    across: Sequence[str] = (),
) -> Comparison:
    """What changed from `old` to `new`; `across` names the conditions (keys of ``ACROSS``) that may differ.

    Raises UsageError on a threshold or confidence out of range or an unknown condition, ProvenanceConflictError where
    other conditions differ, TableError where the tables share no row that has a figure and an interval in both.
    """
    if not 0 < threshold < 10:
        raise UsageError(f"the threshold must lie between 0 and 10 (5 % is 0.05), got {threshold}")
    if not 0.5 <= confidence < 1:
        raise UsageError(f"the confidence must lie between 0.5 and 1, got {confidence}")
    differs = _differences(old.provenance, new.provenance, across)
    clock_us = old.provenance.clock_ref_us if new.provenance.clock_ref_us else None
    before, after = _by_identity(old), _by_identity(new)
    wanted = {identity: row for identity, row in before.items() if row.status == "ok"}
    lost = {i: row for i, row in wanted.items() if i not in after or after[i].status != "ok"}
    both = [(row, after[identity]) for identity, row in wanted.items() if identity not in lost]
    timed = [(a, b, _timing(a, old.provenance, clock_us), _timing(b, new.provenance, clock_us)) for a, b in both]
    pairs = [(a, x, y) for a, b, x, y in timed if x is not None and y is not None and a.clock == b.clock]
    skipped = [f"{a.kind} {a.key}: {_why_not(a, b)}" for a, b, x, y in timed if not x or not y or a.clock != b.clock]
    if not pairs:
        raise TableError(_nothing_shared(old, new, skipped))
    rows = _changes(pairs, threshold, confidence)
    return Comparison(
        threshold=threshold,
        confidence=confidence,
        clock="the reference clock of OLD" if clock_us else "the clock that ran",
        rows=rows,
        overall=tuple(_overall(rows, confidence)),
        differs=tuple(differs),
        lost=tuple(f"{row.kind} {row.key}: {_fate(after.get(identity))}" for identity, row in lost.items()),
        failed=sum(identity in after for identity in lost),
        gained=sum(row.status == "ok" and identity not in wanted for identity, row in after.items()),
        skipped=tuple(skipped),
    )


def _changes(pairs: Sequence[tuple[Row, Timing, Timing]], threshold: float, confidence: float) -> tuple[Change, ...]:
    sides = [one for _, one, _ in pairs], [two for _, _, two in pairs]
    old_ms, new_ms = (np.array([timing.value_ms for timing in side]) for side in sides)
    spreads = [_spread(side) for side in sides]
    variances, dofs = (np.stack(values, 1) for values in zip(*spreads, strict=True))  # (N, 2) each
    total = variances.sum(1) + np.array([one.process**2 + two.process**2 for _, one, two in pairs])
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = total**2 / (variances**2 / dofs).sum(1)  # Welch and Satterthwaite; the process term is known
    dof = np.where(np.isfinite(dof), np.minimum(dof, CERTAIN), CERTAIN)
    log_ratio, error = np.log(new_ms / old_ms), np.sqrt(total)
    p_change, p_same = region_tests(log_ratio, error, dof, math.log1p(threshold))
    q_change, q_same = adjust(p_change), adjust(p_same)
    half = stdtrit(dof, (1 + confidence) / 2) * error
    low, ratio, high = np.exp(log_ratio - half), np.exp(log_ratio), np.exp(log_ratio + half)
    rows = []
    for i, (row, _, _) in enumerate(pairs):
        verdict: Verdict = "UNSURE"
        if q_change[i] <= 1 - confidence:
            verdict = "SLOWER" if log_ratio[i] > 0 else "FASTER"
        elif q_same[i] <= 1 - confidence:
            verdict = "SAME"
        rows.append(
            Change(
                key=row.key,
                kind=row.kind,
                context=row.context,
                name=_name(row),
                old_ms=float(old_ms[i]),
                new_ms=float(new_ms[i]),
                ratio=float(ratio[i]),
                low=float(low[i]),
                high=float(high[i]),
                q_change=float(q_change[i]),
                q_same=float(q_same[i]),
                verdict=verdict,
            )
        )
    rows.sort(key=lambda row: (VERDICTS.index(row.verdict), -abs(math.log(row.ratio))))
    return tuple(rows)


def _spread(timings: Sequence[Timing]) -> tuple[Floats, Floats]:
    """(N,) squared relative errors of one table's rows, moderated over all of them, and their degrees of freedom."""
    n_blocks = np.array([max(t.n_blocks, 1) for t in timings])
    per_block, dofs = moderate(np.array([t.error**2 for t in timings]) * n_blocks, np.array([t.dof for t in timings]))
    return per_block / n_blocks, dofs


def _overall(rows: Sequence[Change], confidence: float) -> Iterator[Overall]:
    """Of each kind. The rows are a sample of what may be timed, and share each session's process term."""
    for kind in dict.fromkeys(row.kind for row in rows):
        found = [row for row in rows if row.kind == kind]
        logs = np.log([row.ratio for row in found])
        n = len(logs)
        if n == 1:
            yield Overall(kind, 1, found[0].ratio, found[0].low, found[0].high)
            continue
        centre = float(logs.mean())
        half = float(stdtrit(n - 1, (1 + confidence) / 2)) * float(logs.std(ddof=1)) / math.sqrt(n)
        exact = all(row.low == row.high for row in found)
        shared = 0.0 if exact else float(stdtrit(CERTAIN, (1 + confidence) / 2)) * math.sqrt(2) * PROCESS_TERM
        half = math.hypot(half, shared)
        yield Overall(kind, n, math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def _timing(row: Row, provenance: Provenance, clock_us: float | None) -> Timing | None:
    """From the stored samples, else from the stored interval; None where there is neither, or no positive latency."""
    blocks = [b for b in _blocks(row, clock_us) if len(b)]
    if len(blocks) > 1:
        found = estimate([block.tolist() for block in blocks])
        if found.value <= 0:
            return None
        half = (found.high - found.low) / 2 / found.value
        error, process = half / float(stdtrit(len(blocks) - 1, 0.975)), PROCESS_TERM * (row.origin == "measured")
        return Timing(found.value, error, len(blocks) - 1, len(blocks), process)
    value = row.latency_ms if row.latency_ref_ms is None or not clock_us else row.latency_ref_ms
    centre = row.latency_ms if row.latency_ref_ms is None else row.latency_ref_ms
    if not value or not centre or value < 0 or row.ci_low_ms is None or row.ci_high_ms is None:
        return None
    error = (row.ci_high_ms - row.ci_low_ms) / 2 / centre / float(stdtrit(CERTAIN, 0.975))
    if clock_us and provenance.clock_ref_us and row.latency_ref_ms is not None:
        value *= clock_us / provenance.clock_ref_us
    return Timing(value, error, CERTAIN, 0, 0.0)  # a stored interval holds the process term


def _blocks(row: Row, clock_us: float | None) -> list[Floats]:
    """The samples of the blocks that count, ms; at `clock_us` where they were probed. See ``profiling.rows``."""
    ends = np.cumsum(row.block_sizes, dtype=np.int64)
    blocks = np.split(np.asarray(row.samples_ms, np.float64), ends[:-1]) if len(ends) else []
    starts = [i for i, at in enumerate(row.probe_at) if at == 0]
    if clock_us and len(starts) == len(blocks):
        cuts = zip(starts, [*starts[1:], len(row.probe_at)], strict=True)
        blocks = [
            samples * clock_us / np.interp(np.arange(len(samples)) + 0.5, row.probe_at[a:b], row.probes_us[a:b])
            for samples, (a, b) in zip(blocks, cuts, strict=True)
        ]
    clean = [block for block, flag in zip(blocks, row.block_flags, strict=False) if not flag]
    return clean or blocks


def _by_identity(table: LatencyTable) -> dict[tuple[str, str, str], Row]:
    """Without the stubs, which are half of other rows."""
    return {(row.key, row.kind, row.context): row for row in table.rows() if row.kind != "stub"}


def _name(row: Row) -> str:
    if row.arch is not None:
        return ",".join(map(str, row.arch))
    return " at ".join(filter(None, (row.block_type, row.site))) or row.signature[:80]


def _fate(row: Row | None) -> str:
    """What became of a row that has no figure in NEW."""
    if row is None:
        return "not in NEW"
    return " ".join(f"{row.status} while in {row.stage or 'the worker'}: {row.error or 'no message'}".split())


def _why_not(old: Row, new: Row) -> str:
    """Why two rows with figures cannot be compared."""
    if old.clock != new.clock:
        return f"timed on different clocks ({old.clock} / {new.clock})"
    return "a latency that is not above 0, or no interval and fewer than two blocks of samples"


def _differences(old: Provenance, new: Provenance, across: Sequence[str]) -> list[str]:
    """Conditions that differ. Raises where one was not asked for; the seed only orders the measurements."""
    unknown = [name for name in across if name not in ACROSS]
    if unknown:
        raise UsageError(f"nothing to compare across is called {unknown[0]!r}: {', '.join(ACROSS)}")
    found = [text for text in old.conflicts(new) if not text.startswith("policy.seed:")]
    allowed = {field for name in across for field in ACROSS[name]}
    refused = [text for text in found if text.split(":")[0].split(".")[0] not in allowed]
    if refused:
        fields = {text.split(":")[0].split(".")[0] for text in refused}
        need = [name for name, held in ACROSS.items() if fields & set(held)]
        enough = next(([name] for name in need if fields <= set(ACROSS[name])), need)
        raise ProvenanceConflictError(
            f"these tables were measured under different conditions (old / new): {'; '.join(refused)}; where that is "
            f"what you compare, say so: {' '.join(f'--across {name}' for name in enough)}"
        )
    return found


def _nothing_shared(old: LatencyTable, new: LatencyTable, skipped: Sequence[str]) -> str:
    ok = [len(table.select(status="ok")) for table in (old, new)]
    if skipped:
        return f"none of {len(skipped)} shared rows can be compared ({skipped[0]}): measure them with more blocks"
    return (
        f"the tables share no row with a figure ({ok[0]} ok rows in OLD, {ok[1]} in NEW): compare tables of one space"
    )
