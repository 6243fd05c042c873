"""``compare``: what became faster or slower between two tables, row by row and overall, from their stored samples.

A row is compared by the mean of the lower half of its block medians (``timings`` says why and how well it is known);
its spread is moderated over all rows of its table (Smyth 2004), and the errors of both sides and a process term for
each are joined by Welch and Satterthwaite's rule. With a threshold such as 5 %, the true change lies in one of three
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
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import stdtrit

from latbench.compare.statistics import CERTAIN, Floats, adjust, moderate, region_tests
from latbench.compare.timings import Integers, Timings, timings
from latbench.errors import ProvenanceConflictError, TableError, UsageError
from latbench.measure.statistics import PROCESS_TERM
from latbench.tables import LatencyTable, Provenance

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["SLOWER", "FASTER", "SAME", "UNSURE"]
VERDICTS: tuple[Verdict, ...] = ("SLOWER", "FASTER", "UNSURE", "SAME")  # by what a reader wants to see first

# A few blocks in two or three processes do not show tails thinner than this, however many rows are moderated: with no
# limit one table in five of a hundred rows, all changed by the threshold, gets a false claim (simulated).
MOST_DOF = 8
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
class Change:
    """One row in both tables. Latencies in ms, of its quieter half, NEW's at OLD's clock; `ratio` is new / old."""

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
    status = old.frame_of("status")["status"].to_numpy(object), new.frame_of("status")["status"].to_numpy(object)
    wanted = {identity: at for identity, at in before.items() if status[0][at] == "ok"}
    lost = [identity for identity in wanted if identity not in after or status[1][after[identity]] != "ok"]
    both = list(wanted.keys() - set(lost)) if lost else list(wanted)
    both.sort(key=wanted.__getitem__)
    sides = old.take([wanted[i] for i in both]), new.take([after[i] for i in both])
    one, two = (timings(side, clock_us) for side in sides)
    clocks = [side.frame_of("clock")["clock"].astype(object).to_numpy() for side in sides]
    same_clock = np.array([a == b or (a != a and b != b) for a, b in zip(*clocks, strict=True)], bool)
    timed = ~(np.isnan(one.value_ms) | np.isnan(two.value_ms))
    skipped = [
        f"{both[i][1]} {both[i][0]}: {_why_not(clocks[0][i], clocks[1][i], bool(same_clock[i]))}"
        for i in np.flatnonzero(~(timed & same_clock)).tolist()
    ]
    kept = np.flatnonzero(timed & same_clock)
    if not len(kept):
        raise TableError(_nothing_shared(old, new, skipped))
    rows = _changes(sides[0].take(kept), _taken(one, kept), _taken(two, kept), threshold, confidence)
    return Comparison(
        threshold=threshold,
        confidence=confidence,
        clock="the reference clock of OLD" if clock_us else "the clock that ran",
        rows=rows,
        overall=tuple(_overall(rows, confidence)),
        differs=tuple(differs),
        lost=tuple(f"{i[1]} {i[0]}: {_fate(new, after.get(i))}" for i in lost),
        failed=sum(identity in after for identity in lost),
        gained=sum(status[1][at] == "ok" and identity not in wanted for identity, at in after.items()),
        skipped=tuple(skipped),
    )


def _changes(
    table: LatencyTable, old: Timings, new: Timings, threshold: float, confidence: float
) -> tuple[Change, ...]:
    """A line for each row of `table`, in the order of what a reader wants to see first."""
    errors, dofs = zip(*(_error(side) for side in (old, new)), strict=True)
    total = errors[0] + errors[1] + old.process**2 + new.process**2
    with np.errstate(divide="ignore", invalid="ignore"):
        # Welch and Satterthwaite; the process term is known
        dof = total**2 / (errors[0] ** 2 / dofs[0] + errors[1] ** 2 / dofs[1])
    estimated = np.isfinite(dof) & (np.minimum(old.dof, new.dof) < CERTAIN)
    dof = np.where(estimated, np.minimum(dof, MOST_DOF), CERTAIN)
    log_ratio, error = np.log(new.value_ms / old.value_ms), np.sqrt(total)
    p_change, p_same = region_tests(log_ratio, error, dof, math.log1p(threshold))
    q_change, q_same = adjust(p_change), adjust(p_same)
    half = stdtrit(dof, (1 + confidence) / 2) * error
    low, ratio, high = np.exp(log_ratio - half), np.exp(log_ratio), np.exp(log_ratio + half)
    beyond = q_change <= 1 - confidence
    told = np.where(
        beyond, np.where(log_ratio > 0, "SLOWER", "FASTER"), np.where(q_same <= 1 - confidence, "SAME", "UNSURE")
    )
    order = np.lexsort((-np.abs(log_ratio), np.array([VERDICTS.index(one) for one in told.tolist()])))
    shown = table.frame_of("key", "kind", "context", "block_type", "site", "arch", "signature")
    texts = [shown[name].tolist() for name in ("key", "kind", "context")]
    names = _names(shown)
    figures = [a.tolist() for a in (old.value_ms, new.value_ms, ratio, low, high, q_change, q_same, told)]
    return tuple(
        Change(texts[0][i], texts[1][i], texts[2][i], names[i], *(column[i] for column in figures))
        for i in order.tolist()
    )


def _error(side: Timings) -> tuple[Floats, Floats]:
    """(N,) squared relative errors of one table's rows, moderated over all of them, and their degrees of freedom."""
    spread, dof = moderate(side.spread, side.dof)
    return side.share * spread, dof


def _taken(side: Timings, at: Integers) -> Timings:
    return Timings(*(getattr(side, one.name)[at] for one in fields(side)))


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


def _by_identity(table: LatencyTable) -> dict[tuple[str, str, str], int]:
    """Key, kind and context -> position, without the stubs, which are half of other rows."""
    frame = table.frame_of("key", "kind", "context")
    identities = zip(*(frame[name].tolist() for name in frame), strict=True)
    return {identity: i for i, identity in enumerate(identities) if identity[1] != "stub"}


def _names(frame: pd.DataFrame) -> list[str]:
    """What a reader knows each row by: its architecture, else its type and site, else its signature."""
    columns = (frame[name].astype(object).tolist() for name in ("arch", "block_type", "site", "signature"))
    return [
        ",".join(map(str, arch))
        if isinstance(arch, np.ndarray)
        else " at ".join(word for word in (block_type, site) if isinstance(word, str) and word) or signature[:80]
        for arch, block_type, site, signature in zip(*columns, strict=True)
    ]


def _fate(new: LatencyTable, at: int | None) -> str:
    """What became of a row that has no figure in NEW."""
    if at is None:
        return "not in NEW"
    row = next(new.take([at]).rows(samples=False))
    return " ".join(f"{row.status} while in {row.stage or 'the worker'}: {row.error or 'no message'}".split())


def _why_not(old_clock: object, new_clock: object, same_clock: bool) -> str:
    """Why two rows with figures cannot be compared."""
    if not same_clock:
        return f"timed on different clocks ({old_clock} / {new_clock})"
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
