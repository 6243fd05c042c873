"""A ``MeasuredOracle`` on a target of this machine: its memory is a table file like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from latbench.errors import MissingEntryError
from latbench.graph.ir import Graph
from latbench.oracle.lut import Measure
from latbench.oracle.measured import MeasuredOracle
from latbench.profiling.profile import Target, profile
from latbench.profiling.session import Reporter
from latbench.spaces.base import Arch, SearchSpace
from latbench.tables import LatencyTable


def measured_oracle(
    space: SearchSpace, target: Target, out: Path, *, reporter: Reporter | None = None
) -> MeasuredOracle:
    """Measures what it is asked and `out` does not hold, and writes it there.

    Raises ProvenanceConflictError (on the first measurement) where `out` was made under other conditions.
    """

    def measure(archs: Sequence[Arch]) -> LatencyTable:
        return profile(space, target, out, networks=archs, blocks=False, reporter=reporter).table

    held = LatencyTable.read(out) if out.exists() else None
    return MeasuredOracle(space, measure, held=held, max_support=64)


def measure_blocks(space: SearchSpace, target: Target, out: Path, *, reporter: Reporter | None = None) -> Measure:
    """For ``LutOracle.fit(missing="measure")``: profiles the blocks that `out` lacks into it."""

    def measure(blocks: Sequence[Graph]) -> Mapping[str, float]:
        table = profile(space, target, out, reporter=reporter).table
        for block in blocks:
            if block.key not in table:
                raise MissingEntryError(str(table.missing_entry(block.key, block.signature)))
        return {block.key: table[block.key] for block in blocks}

    return measure
