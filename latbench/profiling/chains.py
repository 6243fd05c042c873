"""Chains of one block with ever more weights: what a network pays whose weights do not fit the last-level cache.

A block measured by itself, in context or not, finds its weights in the cache. In a network of more weights than the
cache keeps they come from memory each time, and sums of blocks fall short: by 4 to 9 % for the wider half of
MobileNets of 1 to 35 MB on a server core that has 16 MiB to itself. A chain of one block, measured like a network,
tells the excess per weight as the total grows, for every class of blocks that holds a good part of a space's weights:
blocks of many multiply-accumulates per weight hide the loads behind their arithmetic. ``oracle.capacity`` adds it to
the sums; nothing is fitted to networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from latbench.graph.ir import Graph, GraphBuilder
from latbench.spaces.base import FactoredSpace

FITS_BYTES = 8 << 20  # networks of fewer weights are taken to fit every cache: no chains
BASE_BYTES = (4 << 20, 8 << 20)  # totals at which a chain still fits
GROWTH = 1.25  # between the totals beyond
BLOCK_BYTES = 1 << 20  # what a chain's block weighs, best
MIN_SHARE = 0.05  # of a space's weights, below which a class of blocks is left out
SAMPLED = 101  # architectures


def chains(space: FactoredSpace) -> Iterator[tuple[Graph, int]]:
    """(block, how many of it) of every chain worth measuring; nothing where the space's networks are small."""
    largest, held = _weights(space)
    if largest <= FITS_BYTES:
        return
    totals = [*BASE_BYTES, *np.geomspace(10 << 20, largest, _steps(largest)).tolist()]
    whole = sum(held.values())
    for intensity, share in sorted(held.items()):
        block = _typical(space, intensity)
        if share < MIN_SHARE * whole or block is None:
            continue
        yield from ((block, n) for n in dict.fromkeys(max(1, round(total / _nbytes(block))) for total in totals))


def chain(block: Graph, n: int) -> Graph:
    """`n` of a block, each with weights of its own, one behind the other."""
    builder = GraphBuilder(block.dtype)
    ((name, shape),) = block.inputs
    x = builder.input(name, shape)
    for i in range(n):
        (x,) = builder.inline(block, x, prefix=f"link{i}")
    return builder.build(x)


def _steps(largest: int) -> int:
    return max(2, 1 + math.ceil(math.log(largest / (10 << 20)) / math.log(GROWTH))) if largest > 10 << 20 else 1


def _weights(space: FactoredSpace) -> tuple[int, dict[int, int]]:
    """Bytes of weights of the largest sampled network, and of all of them by class of their blocks."""
    rng = np.random.default_rng(0)
    largest, held = 0, dict[int, int]()
    for _ in range(SAMPLED):
        blocks = [block for block in space.blocks(space.sample(rng)) if block.n_params]
        largest = max(largest, sum(map(_nbytes, blocks)))
        for block in blocks:
            held[_class(block)] = held.get(_class(block), 0) + _nbytes(block)
    return largest, held


def _class(block: Graph) -> int:
    """Multiply-accumulates per weight, to the nearest power of two: its exponent."""
    return round(math.log2(max(block.macs, 1) / block.n_params))


def _nbytes(block: Graph) -> int:
    return block.n_params * np.dtype(block.dtype).itemsize


def _typical(space: FactoredSpace, intensity: int) -> Graph | None:
    """The block of this class nearest to BLOCK_BYTES that can follow itself."""
    fit = [
        block
        for block in space.all_blocks().values()
        if block.n_params and _class(block) == intensity and _follows_itself(block)
    ]
    return min(fit, key=lambda block: abs(math.log(_nbytes(block) / BLOCK_BYTES)), default=None)


def _follows_itself(block: Graph) -> bool:
    return len(block.inputs) == len(block.outputs) == 1 and block.inputs[0][1] == block.shapes[block.outputs[0]]
