"""Chains of one block with ever more weights: what a network pays that does not fit the caches.

A block measured by itself, in context or not, finds its weights in the core's own cache, or in the last-level one. In
a network of more weights than a cache keeps they come from further away each time, and sums of blocks fall short: by
4 to 11 % for the wider half of MobileNets of 1 to 35 MB on a server core that has 16 MiB of the last level, by 16 %
for those of 0.5 to 3 MB at 32 pixels, which exceed the core's own megabyte. A chain of one block, measured like a
network, tells the excess per weight as the total grows, for every class of blocks that holds a good part of a space's
weights: blocks of many multiply-accumulates per weight hide the loads behind their arithmetic. Small blocks tell what
leaving the core's cache costs, larger ones what leaving the last level does. ``oracle.capacity`` adds it to the sums;
nothing is fitted to networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from latbench.graph.ir import Graph, GraphBuilder
from latbench.spaces.base import FactoredSpace

FITS_BYTES = 1 << 20  # networks of fewer weights are taken to fit every cache: no chains
# Totals of weights around what a core keeps to itself, the ratio between them, what a block of theirs weighs, best:
OWN_FIRST, OWN_LAST, OWN_GROWTH, OWN_BLOCK_BYTES = 384 << 10, 4 << 20, 1.5, 384 << 10  # smaller ones stream worse
# ... around what the last-level cache keeps: two that fit, then on to the largest network.
SHARED_FIT, SHARED_FIRST, SHARED_GROWTH = (4 << 20, 8 << 20), 10 << 20, 1.25
SHARED_BLOCK_BYTES = (1 << 20, 10 << 18)  # of a class's blocks the mean by weights, within these: larger stream better
MIN_SHARE = 0.05  # of a space's weights, below which a class of blocks is left out
SAMPLED = 101  # architectures


def chains(space: FactoredSpace) -> Iterator[tuple[Graph, int]]:
    """(block, how many of it) of every chain worth measuring; nothing where the space's networks are small."""
    largest, held, typical = _weights(space)
    if largest <= FITS_BYTES:
        return
    own = _totals(OWN_FIRST, min(OWN_LAST, largest), OWN_GROWTH)
    shared = [*SHARED_FIT, *_totals(SHARED_FIRST, largest, SHARED_GROWTH)] if largest > SHARED_FIRST else []
    low, high = SHARED_BLOCK_BYTES
    whole = sum(held.values())
    for intensity in sorted(intensity for intensity, share in held.items() if share >= MIN_SHARE * whole):
        found: dict[tuple[str, int], tuple[Graph, int]] = {}
        for nbytes, totals in ((OWN_BLOCK_BYTES, own), (min(max(low, typical[intensity]), high), shared)):
            if (block := _typical(space, intensity, nbytes)) is not None:
                numbers = [max(1, round(total / _nbytes(block))) for total in totals]
                found |= {(block.key, n): (block, n) for n in numbers}
        yield from found.values()


def chain(block: Graph, n: int) -> Graph:
    """`n` of a block, each with weights of its own, one behind the other."""
    builder = GraphBuilder(block.dtype)
    ((name, shape),) = block.inputs
    x = builder.input(name, shape)
    for i in range(n):
        (x,) = builder.inline(block, x, prefix=f"link{i}")
    return builder.build(x)


def _totals(first: int, last: int, growth: float) -> list[float]:
    """From `first` to `last` at equal ratios of at most `growth`; none where it ends before it begins."""
    if last <= first:
        return []
    n = 2 + math.floor(math.log(last / first) / math.log(growth))
    return [float(total) for total in np.geomspace(first, last, n)]


def _weights(space: FactoredSpace) -> tuple[int, dict[int, int], dict[int, int]]:
    """Bytes of weights: of the largest sampled network; by class of block, of all of them; of the block that the mean
    weight of a class is in."""
    rng = np.random.default_rng(0)
    largest, held, squares = 0, dict[int, int](), dict[int, int]()
    for _ in range(SAMPLED):
        blocks = [block for block in space.blocks(space.sample(rng)) if block.n_params]
        largest = max(largest, sum(map(_nbytes, blocks)))
        for block in blocks:
            held[_class(block)] = held.get(_class(block), 0) + _nbytes(block)
            squares[_class(block)] = squares.get(_class(block), 0) + _nbytes(block) ** 2
    return largest, held, {intensity: squares[intensity] // nbytes for intensity, nbytes in held.items()}


def _class(block: Graph) -> int:
    """Multiply-accumulates per weight, to the nearest power of two: its exponent."""
    return round(math.log2(max(block.macs, 1) / block.n_params))


def _nbytes(block: Graph) -> int:
    return block.n_params * np.dtype(block.dtype).itemsize


def _typical(space: FactoredSpace, intensity: int, nbytes: int) -> Graph | None:
    """The block of this class whose weights are nearest to `nbytes`, of those that can follow themselves."""
    fit = [
        block
        for block in space.all_blocks().values()
        if block.n_params and _class(block) == intensity and _follows_itself(block)
    ]
    return min(fit, key=lambda block: abs(math.log(_nbytes(block) / nbytes)), default=None)


def _follows_itself(block: Graph) -> bool:
    return len(block.inputs) == len(block.outputs) == 1 and block.inputs[0][1] == block.shapes[block.outputs[0]]
