"""The distinct blocks of a factored space, numbered, and which of them every choice at every site means.

What a least-squares fit has its unknowns from, what coverage is counted over and what designs are optimal for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latbench.graph.ir import Graph
from latbench.oracle.base import Archs, check_archs
from latbench.spaces.base import FactoredSpace

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Integers = NDArray[np.int64]
ABSENT = -1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """P blocks in order of first appearance, and per site an array over its scope's options of their numbers."""

    space: FactoredSpace
    blocks: tuple[Graph, ...]
    sites: tuple[str, ...]  # of each block, the first that uses it
    tables: tuple[Integers, ...]  # per site, (K_1, ..., K_s); ABSENT where nothing is built

    def occurrences(self, archs: Archs) -> Integers:
        """(N, D) option indices -> (N, S) block numbers, ABSENT where a site is skipped. Raises UsageError."""
        array = check_archs(self.space, archs)
        found = np.empty((len(array), len(self.tables)), np.int64)
        for s, (site, table) in enumerate(zip(self.space.sites, self.tables, strict=True)):
            found[:, s] = table[tuple(array[:, d] for d in site.scope)]
        return found

    def design(self, archs: Archs) -> csr_matrix[Any]:
        """(N, D) -> (N, P) sparse: how often each architecture uses each block."""
        from scipy.sparse import csr_matrix  # a tenth of a second that queries need not pay

        found = self.occurrences(archs)
        used = found != ABSENT
        starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
        columns = found[used]
        design = csr_matrix((np.ones(len(columns)), columns, starts), (len(found), len(self.blocks)))
        design.sum_duplicates()
        return design


@lru_cache(maxsize=4)
def vocabulary(space: FactoredSpace) -> Vocabulary:
    """Of a space; kept, because building a thousand graphs takes a tenth of a second."""
    numbers: dict[str, int] = {}
    blocks: list[Graph] = []
    sites: list[str] = []
    tables = []
    for site in space.sites:
        table = np.full([len(space.decisions[d].options) for d in site.scope], ABSENT, np.int64)
        for picks in np.ndindex(table.shape):
            block = space.block(site, picks)
            if block is None:
                continue
            number = numbers.setdefault(block.key, len(blocks))
            if number == len(blocks):
                blocks.append(block)
                sites.append(site.name)
            table[picks] = number
        tables.append(table)
    return Vocabulary(space, tuple(blocks), tuple(sites), tuple(tables))
