"""Pairs of blocks of which one ought not to be slower than the other: what AOWS's fit is regularised with.

Berman et al. 2020, eq. 7: a block that differs from another in one size only, and is smaller in it, costs no more. The
released code (bermanmaxim/AOWS, 2b9efef) mixes up rows of equal input with rows of equal output width where the two
widths are the same number: of its 3,283 rows on mobilenet_v1 156 compare unrelated blocks, 85 a block with itself, and
156 are missing. Here there are the 3,198 right ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.graph.ir import Graph
from latbench.oracle.vocabulary import ABSENT, Integers, Vocabulary
from latbench.spaces.base import Scalar


def monotone_rows(vocabulary: Vocabulary, known: NDArray[np.bool_] | None = None) -> Integers:
    """(R, 2) block numbers (cheaper, dearer), each pair once, from two sources:

    * a numeric decision (a width, a kernel size, an expansion) with the other choices at the site held, where the
      larger option brings no fewer multiply-accumulates (groups, which save them, say nothing);
    * blocks of the same operators that read a smaller map.

    Consecutive ones of a line are paired, of the `known` blocks only, (P,), where that is given. Spaces whose options
    are names and whose blocks never recur at another size get none: (0, 2).
    """
    keep = np.ones(len(vocabulary.blocks), bool) if known is None else known
    pairs = dict.fromkeys((*_along_decisions(vocabulary, keep), *_along_map_sizes(vocabulary.blocks, keep)))
    return np.array(list(pairs), np.int64).reshape(-1, 2)


def _along_decisions(vocabulary: Vocabulary, keep: NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    space = vocabulary.space
    macs = [block.macs for block in vocabulary.blocks]
    for site, table in zip(space.sites, vocabulary.tables, strict=True):
        for axis, decision in enumerate(site.scope):
            order = _ascending(space.decisions[decision].options)
            if order is None:
                continue
            lines = np.moveaxis(table, axis, -1)[..., order].reshape(-1, len(order))
            for line in lines.tolist():
                numbers = [n for n in line if n != ABSENT and keep[n]]
                yield from ((a, b) for a, b in pairwise(numbers) if a != b and macs[a] <= macs[b])


def _along_map_sizes(blocks: Sequence[Graph], keep: NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    groups: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for number, block in enumerate(blocks):
        maps = [shape[2:] for _, shape in block.inputs]
        if keep[number] and all(len(sides) == 2 for sides in maps):
            channels = tuple(shape[:2] for _, shape in block.inputs)
            groups[channels, block.nodes].append((sum(math.prod(sides) for sides in maps), number))
    for group in groups.values():
        yield from ((a, b) for (size, a), (larger, b) in pairwise(sorted(group)) if size < larger)


def _ascending(options: Sequence[Scalar]) -> list[int] | None:
    """Positions of the options from small to large; None where they are not numbers."""
    if any(isinstance(option, bool | str) for option in options):
        return None
    return sorted(range(len(options)), key=lambda i: float(options[i]))
