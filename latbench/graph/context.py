"""A block in context: between two thin 1x1 convolutions, as it stands in a network.

A block measured alone is not a block in a network: layouts change at its borders, caches are cold or warm, fusions
differ (sums of isolated blocks are 14-18 % off, in context 0.6-0.9 %; MEASUREMENT.md). So a block is measured as

    thin -> conv -> [block] -> conv -> thin

less half of each neighbour's *stub*, the two thin convolutions at that border alone. In a chain of blocks what is added
at the end of one is taken off at the start of the next: the sum over a network is exact in the stubs and holds the cost
of one call. A single increment is therefore known up to a term that its neighbour gives back.
"""

from __future__ import annotations

from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Conv2d, Linear, ReLU, Shape

THIN = 16  # channels: one SIMD block of the CPU runtimes' blocked layouts


def sandwich(block: Graph, *, first: bool = False, last: bool = False) -> Graph:
    """The block with a thin convolution before each distinct input shape and behind its output.

    `first`: the block reads the network's own input, nothing stands before it; `last`: likewise behind it.
    """
    builder = GraphBuilder(block.dtype)
    entries: dict[Shape, str] = {}
    names = []
    for name, shape in block.inputs:
        if first:
            names.append(builder.input(name, shape))
            continue
        if shape not in entries:
            entries[shape] = _enter(builder, shape, f"enter{len(entries)}")
        names.append(entries[shape])
    (output,) = builder.inline(block, *names, prefix="block")
    return builder.build(output if last else _leave(builder, output))


def stub(shape: Shape, dtype: DType) -> Graph:
    """The two thin convolutions that meet at a border of this shape, alone."""
    builder = GraphBuilder(dtype)
    return builder.build(_leave(builder, _enter(builder, shape, "enter")))


def borders(block: Graph, *, first: bool = False, last: bool = False) -> tuple[Shape, ...]:
    """Shapes at which a sandwich's stubs stand: half of each stub is subtracted."""
    before = () if first else tuple(dict.fromkeys(shape for _, shape in block.inputs))
    behind = () if last else (block.shapes[block.outputs[0]],)
    return before + behind


def _enter(builder: GraphBuilder, shape: Shape, name: str) -> str:
    if len(shape) == 2:
        x = builder.input(f"{name}/x", (shape[0], THIN))
        return builder.add(Linear(THIN, shape[1]), x, name=f"{name}/linear")
    x = builder.input(f"{name}/x", (shape[0], THIN, *shape[2:]))
    x = builder.add(Conv2d(THIN, shape[1], bias=True), x, name=f"{name}/conv")
    return builder.add(ReLU(), x, name=f"{name}/relu")


def _leave(builder: GraphBuilder, x: str) -> str:
    shape = builder.shape(x)
    if len(shape) == 2:
        return builder.add(Linear(shape[1], THIN), x, name="leave/linear")
    return builder.add(Conv2d(shape[1], THIN, bias=True), x, name="leave/conv")
