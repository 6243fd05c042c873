"""``LutOracle``: sums of a table's block latencies, nothing fitted (Cai et al., once-for-all; Wan et al., FBNet)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.graph.ir import Graph
from latbench.oracle.base import SOURCES, Floats, space_of
from latbench.oracle.factors import MISSING, Factor, FactorOracle, site_factors
from latbench.spaces.base import FactoredSpace, SearchSpace
from latbench.tables import LatencyTable

INTERPOLATED = SOURCES.index("interpolated")
POLICIES = ("error", "interpolate", "measure")
Measure = Callable[[Sequence[Graph]], Mapping[str, float]]  # blocks -> key -> ms


@dataclass(frozen=True, eq=False)
class LutOracle(FactorOracle):
    """Options of ``fit``: `missing` says what an entry that the table lacks means.

    * "error" (default): asking for it raises MissingEntryError;
    * "interpolate": linear between the nearest entries on both sides along a numeric decision (a width), the mean over
      the decisions that allow it; an entry at the border of what is known still raises;
    * "measure": `measure(blocks)` is called once, for all that is missing.

    `context`: which rows to add up, "sandwich" or "isolated"; by default sandwich where the table has any.
    """

    name: ClassVar[str] = "lut"

    @classmethod
    def fit(
        cls,
        table: LatencyTable,
        *,
        missing: str = "error",
        context: str | None = None,
        measure: Measure | None = None,
    ) -> LutOracle:
        """Raises TableError where the table has no blocks of a factored space, UsageError on an unknown policy."""
        space = space_of(table.provenance)
        return cls(
            space, lookup(space, table, missing, context, measure), table.provenance, missing=_teller(space, table)
        )


def lookup(
    space: SearchSpace,
    table: LatencyTable,
    missing: str = "error",
    context: str | None = None,
    measure: Measure | None = None,
) -> tuple[Factor, ...]:
    """One factor per site, ms, from the table's block rows."""
    if missing not in POLICIES:
        raise UsageError(f"unknown policy {missing!r} for missing entries: {', '.join(POLICIES)}")
    if not isinstance(space, FactoredSpace):
        raise TableError(f"{space.name} does not factor into blocks, so a table of them cannot be summed; use learned")
    rows = table.select(kind="block", status="ok")
    contexts = set(rows.frame_of("context")["context"].unique())
    context = context or ("sandwich" if "sandwich" in contexts else "isolated")
    if context not in contexts:
        raise TableError(
            f"the table has no {context} block of {space.name}"
            + (f" (only {contexts.pop()})" if contexts else "")
            + "; profile the space's blocks first"
        )
    rows = rows.select(context=context)
    known = rows.blocks_ms()
    origins = rows.frame_of("key", "origin")
    origin = dict(zip(origins["key"].tolist(), map(SOURCES.index, origins["origin"].tolist()), strict=True))
    if missing == "measure":
        if measure is None:
            raise UsageError("missing='measure' needs something to measure with")
        wanted = [block for key, block in space.all_blocks().items() if key not in known]
        found = measure(wanted) if wanted else {}
        known = {**known, **found}
        origin |= dict.fromkeys(found, SOURCES.index("measured"))

    def entry(block: Graph | None) -> tuple[float, int]:
        if block is None:
            return 0.0, 0
        return (known[block.key], origin[block.key]) if block.key in known else (np.nan, MISSING)

    factors = site_factors(space, entry)
    return tuple(interpolate(space, f) for f in factors) if missing == "interpolate" else factors


def interpolate(space: SearchSpace, factor: Factor) -> Factor:
    """Fills missing entries that lie between two known ones along a numeric decision; `lookup` says how."""
    gaps = np.argwhere(np.isnan(factor.values))
    if not len(gaps) or factor.source is None:
        return factor
    values, source = factor.values.copy(), factor.source.copy()
    known = ~np.isnan(factor.values) & (factor.source != 0)  # an absent block is no end to interpolate from
    for gap in (tuple(int(i) for i in row) for row in gaps):
        found = [
            ms
            for axis, d in enumerate(factor.scope)
            if (ms := _between(space.decisions[d].options, factor.values, known, gap, axis)) is not None
        ]
        if found:
            values[gap], source[gap] = float(np.mean(found)), INTERPOLATED
    return replace(factor, values=values, source=source)


def _between(options: Sequence[Any], values: Floats, known: Any, gap: tuple[int, ...], axis: int) -> float | None:
    if any(isinstance(option, bool | str) for option in options):
        return None
    line: Any = (*gap[:axis], slice(None), *gap[axis + 1 :])
    x, at = np.array(options, np.float64), float(options[gap[axis]])
    ends = np.flatnonzero(known[line])
    if not (x[ends] < at).any() or not (x[ends] > at).any():
        return None
    ends = ends[np.argsort(x[ends])]
    return float(np.interp(at, x[ends], values[line][ends]))


def _teller(space: SearchSpace, table: LatencyTable) -> Callable[[Factor, tuple[int, ...]], MissingEntryError]:
    """What to raise for an entry: the table's own words about the block."""
    assert isinstance(space, FactoredSpace)
    sites = {site.name: site for site in space.sites}

    def tell(factor: Factor, picks: tuple[int, ...]) -> MissingEntryError:
        block = space.block(sites[factor.site], picks) if len(picks) == len(sites[factor.site].scope) else None
        if block is None:
            return MissingEntryError(f"no figure for {factor.site} of {space.name} in this table")
        return table.missing_entry(block.key, block.signature)

    return tell
