"""AOWS's files (bermanmaxim/AOWS), both directions, one JSON value a line.

* samples: ``[[c_1, ..., c_14], ms]``, widths and the measured latency: networks of mobilenet_v1;
* model: ``[{"in_size": [h, w], "kernel_size": ..., "stride": ..., "dw": ..., "bias": ..., "in_channels": ...,
  "out_channels": ...}, ms]``, what its fit gave each block. Entries are defined up to a shift between neighbours only
  and may be 0: rows of origin "fitted".

The files' latencies are ms *per image*; a table's are per inference, so they are multiplied by the batch (the released
command line's default is 64) and divided by it on the way back: exact where the batch is a power of two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from latbench.errors import TableError, UsageError, shown
from latbench.files import replace_file, why_not
from latbench.graph.ir import Graph
from latbench.graph.ops import Conv2d, pair
from latbench.importers.base import Source, block_row, json_lines, network_rows, to_ms
from latbench.oracle.base import space_of
from latbench.spaces.base import Arch, Site
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable

BATCH = 64


@dataclass(frozen=True)
class Variable:
    """AOWS's name of a block: fields as in its model file."""

    in_size: tuple[int, int]  # of the input map; (1, 1) for the head, which it describes behind the pool
    kernel_size: int
    stride: int
    dw: bool  # depthwise separable
    bias: bool
    in_channels: int
    out_channels: int


def read(source: Source, settings: Mapping[str, Any]) -> LatencyTable:
    """Samples or model, whichever the first line is. `settings` of mobilenet_v1; batch 64 unless it is given."""
    space = MobileNetV1Space.from_settings({"batch": BATCH, **settings})
    lines = json_lines(source)
    first = next(lines, None)
    if first is None:
        raise TableError(f"{source.path} holds no line")
    _, value = first
    is_model = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return (_read_model if is_model else _read_samples)(source, space, chain([first], lines))


def _read_samples(source: Source, space: MobileNetV1Space, lines: Iterable[tuple[str, Any]]) -> LatencyTable:
    measured = ((where, _arch(source, space, widths, where), ms) for where, widths, ms in _pairs(source, space, lines))
    rows = network_rows(source, space, measured)
    return LatencyTable.from_rows(rows, source.provenance(space, "aows samples", unit="ms per image"))


def _read_model(source: Source, space: MobileNetV1Space, lines: Iterable[tuple[str, Any]]) -> LatencyTable:
    known = _variables(space)
    rows: dict[Variable, Any] = {}
    for where, raw, ms in _pairs(source, space, lines, zero=True):
        variable = _variable(source, raw, where)
        if variable not in known:
            raise source.wrong(where, f"{variable} is no block of {space.name} at resolution {space.resolution}")
        if variable in rows:
            raise source.wrong(where, f"{variable} appears twice")
        site, graph = known[variable]
        rows[variable] = block_row(graph, space, site, ms, origin="fitted")
    return LatencyTable.from_rows(rows.values(), source.provenance(space, "aows model", unit="ms per image"))


def write_samples(table: LatencyTable, path: Path) -> None:
    """The table's networks, in its order. Raises UsageError where they are none of mobilenet_v1, TableError."""
    space = _space(table)
    archs, latencies_ms = table.networks()
    if not len(archs):
        raise UsageError("the table holds no measured network, so there are no samples to write")
    widths = (list(space.widths(tuple(int(i) for i in arch))) for arch in archs)
    _write(path, ([w, ms / space.batch] for w, ms in zip(widths, latencies_ms.tolist(), strict=True)))


def write_model(table: LatencyTable, path: Path) -> None:
    """The table's blocks, in its order. Raises UsageError where they are none of mobilenet_v1, TableError."""
    space = _space(table)
    names = {graph.key: variable for variable, (_, graph) in _variables(space).items()}
    blocks = table.select(kind="block", status="ok")
    latency_ms = blocks.blocks_ms()
    keys = [key for key in dict.fromkeys(blocks.frame["key"]) if key in names]
    if not keys:
        raise UsageError("the table holds no block of mobilenet_v1, so there is no model to write")
    _write(path, ([asdict(names[key]), latency_ms[key] / space.batch] for key in keys))


def _pairs(
    source: Source, space: MobileNetV1Space, lines: Iterable[tuple[str, Any]], *, zero: bool = False
) -> Iterator[tuple[str, Any, float]]:
    """(where, first of the pair, ms per inference)."""
    for where, value in lines:
        if not isinstance(value, list) or len(value) != 2:
            raise source.wrong(where, "not [widths, ms] nor [block, ms]")
        yield where, value[0], to_ms(source, value[1], "ms", where, zero=zero) * space.batch


def _arch(source: Source, space: MobileNetV1Space, widths: Any, where: str) -> Arch:
    if not isinstance(widths, list) or len(widths) != len(space.candidates):
        raise source.wrong(where, f"wants {len(space.candidates)} widths")
    for i, (width, options) in enumerate(zip(widths, space.candidates, strict=True), 1):
        if type(width) is not int or width not in options:
            known = ", ".join(map(str, options))
            raise source.wrong(
                where, f"width {i} is {width if type(width) is int else shown(width)}, which is no candidate ({known})"
            )
    return tuple(options.index(width) for width, options in zip(widths, space.candidates, strict=True))


def _variable(source: Source, raw: Any, where: str) -> Variable:
    names = [field.name for field in fields(Variable)]
    if not isinstance(raw, dict) or sorted(raw) != sorted(names):
        raise source.wrong(where, f"a block has exactly the fields {', '.join(names)}")
    size = raw["in_size"]
    whole = [raw[name] for name in names if name not in ("in_size", "dw", "bias")]
    if (
        not isinstance(size, list)
        or len(size) != 2
        or any(type(n) is not int for n in (*size, *whole))
        or any(type(raw[name]) is not bool for name in ("dw", "bias"))
    ):
        raise source.wrong(where, "a field of the block has another type than AOWS writes")
    return Variable(**{**raw, "in_size": (size[0], size[1])})


def _variables(space: MobileNetV1Space) -> dict[Variable, tuple[Site, Graph]]:
    """AOWS's name -> the first site that has the block, and the block."""
    found: dict[Variable, tuple[Site, Graph]] = {}
    for site, _, graph in space.slots():
        (_, in_shape), *_ = graph.inputs
        out_channels = graph.shapes[graph.outputs[0]][1]
        first = graph.nodes[0].op
        if isinstance(first, Conv2d):
            size, (kernel_size, _), (stride, _) = in_shape[2:], pair(first.kernel_size), pair(first.stride)
            variable = Variable(
                (size[0], size[1]), kernel_size, stride, first.groups > 1, False, in_shape[1], out_channels
            )
        else:
            variable = Variable((1, 1), 1, 1, False, True, in_shape[1], out_channels)
        found.setdefault(variable, (site, graph))
    return found


def _space(table: LatencyTable) -> MobileNetV1Space:
    space = space_of(table.provenance)
    if not isinstance(space, MobileNetV1Space):
        raise UsageError(f"AOWS's files hold mobilenet_v1, the table {space.name}")
    return space


def _write(path: Path, values: Iterable[Any]) -> None:
    lines = [json.dumps(value).encode() + b"\n" for value in values]
    try:
        replace_file(path, lambda file: file.writelines(lines))
    except OSError as error:
        raise TableError(why_not(error, path)) from None
