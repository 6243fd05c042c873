"""Once-for-all's look-up tables (mit-han-lab/once-for-all, ``latency_lookup_table.py``): YAML, a layer a key.

    expanded_conv-input:56x56x24-output:28x28x40-expand:96-kernel:5-stride:2-idskip:0-se:1-hs:0: {mean: 1.23, ...}

``expand`` is the number of mid channels, ``hs`` h-swish (else ReLU). Further keys are ``Conv`` (the stem), ``Conv_1``,
``AvgPool2D``, ``Conv_2`` and ``Logits``, which together are the space's head: its row is their sum. The files state no
unit. ProxylessNAS's tables, whose keys end at ``idskip``, count an expansion there and are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from latbench.errors import TableError, shown
from latbench.graph.ir import Graph
from latbench.importers.base import Source, block_row, known_unit, to_ms
from latbench.spaces.base import Site
from latbench.spaces.ofa_mbv3 import FEATURES, FINAL_WIDTH, OFAMobileNetV3Space
from latbench.tables import LatencyTable, Row

_SIDE = r"(\d+)x(\d+)x(\d+)"
_LAYER = re.compile(
    rf"expanded_conv-input:{_SIDE}-output:{_SIDE}-expand:(\d+)-kernel:(\d+)-stride:(\d+)-idskip:([01])-se:([01])-hs:([01])"
)
_OTHER = re.compile(rf"(Conv|Conv_1|AvgPool2D|Conv_2|Logits)-input:{_SIDE}-output:(\d+(?:x\d+x\d+)?)")
_REFERENCES = re.compile(r"[&*]")  # YAML's anchors and aliases: no layer's name has them, a bomb does
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there
MAX_DEPTH = 4  # of a mapping of layers to mappings: 2
MAX_BYTES = 4 * 2**20  # a table of one resolution is 0.1 MiB, and YAML takes 30 s for this


class _Strict(_LOADER):  # type: ignore[misc,valid-type]
    """Plain values only; refuses a key that repeats, where YAML libraries take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name, n in Counter(names).items():
            if n > 1:
                raise yaml.YAMLError(f"{name} appears twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read(source: Source, settings: Mapping[str, Any], unit: str | None) -> LatencyTable:
    """The table of ofa_mbv3 at one resolution. Raises TableError on the file's faults, UsageError without a unit.

    Layers that are no block of the space at this resolution (those of wider networks) are counted in the notes.
    """
    unit = known_unit(unit)
    space = OFAMobileNetV3Space.from_settings(settings)
    figures = _figures(source, unit)
    rows: dict[str, Row] = {}
    used: set[str] = set()
    for site, graph in _blocks(space):
        names = layers_of(site, graph)
        if graph.key not in rows and names and all(name in figures for name in names):
            more = {"warnings": ("sum_of_parts",)} if len(names) > 1 else {}
            rows[graph.key] = block_row(graph, space, site, sum(figures[name] for name in names), **more)
            used.update(names)
    if not rows:
        raise TableError(
            f"{source.path}: none of its {len(figures)} layers is a block of {space.name} at resolution "
            f"{space.resolution}: add --resolution N, the side that the table was made for"
        )
    provenance = source.provenance(space, "ofa", unit=unit)
    return LatencyTable.from_rows(rows.values(), provenance, {"left_out": len(figures.keys() - used)})


def layers_of(site: Site, graph: Graph) -> tuple[str, ...]:
    """The keys whose sum is this block; () where the format has none (a crop)."""
    (_, (_, channels, height, width)), *_ = graph.inputs
    shape = graph.shapes[graph.outputs[0]]
    start = f"-input:{height}x{width}x{channels}"
    if site.name == "stem":
        return (f"Conv{start}-output:{shape[2]}x{shape[3]}x{shape[1]}",)
    if site.name == "head":
        return (
            f"Conv_1{start}-output:{height}x{width}x{FINAL_WIDTH}",
            f"AvgPool2D-input:{height}x{width}x{FINAL_WIDTH}-output:1x1x{FINAL_WIDTH}",
            f"Conv_2-input:1x1x{FINAL_WIDTH}-output:1x1x{FEATURES}",
            f"Logits-input:1x1x{FEATURES}-output:{shape[1]}",
        )
    if site.name == "crop":
        return ()
    return (f"expanded_conv{start}-output:{shape[2]}x{shape[3]}x{shape[1]}-{_attributes(graph)}",)


def _attributes(graph: Graph) -> str:
    """The tail of an inverted residual's key, read from its graph."""
    (depthwise,) = (node.op for node in graph.nodes if getattr(node.op, "groups", 1) > 1)
    kinds = [type(node.op).__name__ for node in graph.nodes]
    return (
        f"expand:{depthwise.groups}-kernel:{depthwise.kernel_size}-stride:{depthwise.stride}"  # type: ignore[attr-defined]
        f"-idskip:{int('Add' in kinds)}-se:{int('Mul' in kinds)}-hs:{int('Hardswish' in kinds)}"
    )


def _blocks(space: OFAMobileNetV3Space) -> Iterator[tuple[Site, Graph]]:
    """Every block that a network of the largest side may have."""
    largest = len(space.decisions[0].options) - 1
    for site in space.sites:
        others = [range(len(space.decisions[d].options)) for d in site.scope[1:]]
        for pick in others[0] if others else (None,):
            graph = space.block(site, (largest,) if pick is None else (largest, pick))
            if graph is not None:
                yield site, graph


def _check_depth(source: Source) -> None:
    """Event by event: the loader recurses, and libyaml's overruns the C stack on 50,000 brackets."""
    depth = 0
    for event in yaml.parse(source.text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise TableError(f"{source.path} is no YAML as once-for-all writes it: nested deeper than {MAX_DEPTH}")


def _figures(source: Source, unit: str) -> dict[str, float]:
    """Key -> ms. Raises TableError on what is no such table."""
    if len(source.data) > MAX_BYTES:
        raise TableError(f"{source.path} is larger than {MAX_BYTES >> 20} MiB: no published table is")
    if found := _REFERENCES.search(source.text):
        raise TableError(f"{source.path} is refused: it holds {found[0]!r}, YAML's references, which no such table has")
    try:
        _check_depth(source)
        raw = yaml.load(source.text, _Strict)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise TableError(
            f"{source.path} is no YAML as once-for-all writes it: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(raw, dict) or not raw:
        raise TableError(f"{source.path} is no YAML mapping of layers: not a once-for-all table, or cut off")
    figures = {}
    for key, entry in raw.items():
        if not isinstance(key, str) or not (_LAYER.fullmatch(key) or _OTHER.fullmatch(key)):
            raise source.wrong(f"key {shown(key)}", "not a layer as once-for-all names it")
        if not isinstance(entry, dict) or "mean" not in entry:
            raise source.wrong(key, "has no mean latency")
        figures[key] = to_ms(source, entry["mean"], unit, key)
    return figures
