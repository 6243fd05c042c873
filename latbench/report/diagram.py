"""An architecture as a drawing: one box per stage of the network, and inside its cells, wired as its graph is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from latbench.graph.ir import Graph, Node
from latbench.graph.ops import Conv2d
from latbench.report.render import FONT
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace

MOST = 40  # boxes; beyond that stages are joined by the first two parts of their names
_WIDTH, _BOX, _GAP, _PAD, _LANE = 372, 36, 13, 6, 18  # pixels
_CELL = 5  # parts from which a stage that branches is drawn by itself; a residual block has fewer
_LETTER = 6.2  # pixels of one in a box
_NARROW = 170  # pixels below which a box has two lines


@dataclass(frozen=True)
class Stage:
    """Nodes of one network that stand together."""

    name: str
    choice: str  # the options taken there; inside a cell its operators
    shape: str  # of what it gives: "48x56x56"
    macs: int
    inputs: tuple[str, ...]  # names of the stages it reads


def stages(space: SearchSpace, arch: Arch) -> list[Stage]:
    """The stages of ``space.network(arch)`` in order: the space's sites, else parts of the nodes' names."""
    graph = space.network(arch)
    owner = _owners(space, graph)
    options = {d.name: str(d.options[i]) for d, i in zip(space.decisions, arch, strict=True)}
    found = []
    for stage in _grouped(graph, owner):
        own = [text for name, text in options.items() if name == stage.name or name.startswith(f"{stage.name}/")]
        found.append(Stage(stage.name, " ".join(own), stage.shape, stage.macs, stage.inputs))
    return found


def cells(space: SearchSpace, arch: Arch) -> list[tuple[str, list[Stage]]]:
    """(stage, what is inside) of each distinct stage that branches within, two at most; empty for chains of blocks."""
    graph = space.network(arch)
    owner = _owners(space, graph)
    found: dict[tuple[tuple[str, str], ...], tuple[str, list[Stage]]] = {}
    for name in dict.fromkeys(owner.values()):
        inside = {
            node.name: node.name[len(name) + 1 :].split("/")[0]
            for node in graph.nodes
            if owner[node.name] == name and node.name != name
        }
        parts = _grouped(graph, inside, outside=owner)
        names = set(inside.values())
        if len(names) >= _CELL and any(len(names & set(part.inputs)) > 1 for part in parts):
            found.setdefault(tuple((part.name, part.choice) for part in parts if part.choice), (name, parts))
    return list(found.values())[:2]


def drawing(found: Sequence[Stage]) -> str:
    """SVG, 372 pixels wide, which a phone shows at its size; shading is each stage's share of the most MACs."""
    layers = _layers(found)
    depth = {stage.name: i for i, layer in enumerate(layers) for stage in layer}
    most = max((stage.macs for stage in found), default=0) or 1
    wires = [(source, stage.name) for stage in found for source in stage.inputs]
    passing = [wire for wire in wires if depth[wire[1]] - depth[wire[0]] > 1]
    room = _WIDTH - 2 * _PAD - (_LANE if passing else 0)
    place: dict[str, tuple[float, float, float]] = {}  # name -> x, y, width
    for i, layer in enumerate(layers):
        width = (room - (len(layer) - 1) * _GAP) / len(layer)
        for j, stage in enumerate(layer):
            place[stage.name] = (_PAD + j * (width + _GAP), _PAD + i * (_BOX + _GAP), width)
    arrows = [
        _lane(place[a], place[b], room + _PAD, depth[a]) if (a, b) in passing else _arrow(place[a], place[b])
        for a, b in wires
    ]
    boxes = [_box(stage, place[stage.name], stage.macs / most) for stage in found]
    height = 2 * _PAD + len(layers) * (_BOX + _GAP) - _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="{escape(FONT)}" font-size="11" role="img" aria-label="The network, stage by stage">'
        + "".join([*arrows, *boxes])
        + "</svg>"
    )


def _owners(space: SearchSpace, graph: Graph) -> dict[str, str]:
    """Node -> stage: the longest site whose nodes are called so, else all parts of the name but the last."""
    sites = [site.name for site in space.sites] if isinstance(space, FactoredSpace) else []
    owner = {}
    for node in graph.nodes:
        held = [site for site in sites if node.name == site or node.name.startswith(f"{site}/")]
        owner[node.name] = max(held, key=len) if held else node.name.rpartition("/")[0] or node.name
    for n_parts in (2, 1):
        if len(set(owner.values())) > MOST:
            owner = {name: "/".join(stage.split("/")[:n_parts]) for name, stage in owner.items()}
    return owner


def _grouped(graph: Graph, owner: Mapping[str, str], outside: Mapping[str, str] | None = None) -> list[Stage]:
    """The nodes that have an owner, by owner; with `outside`, what they read from elsewhere stands first."""
    names = list(dict.fromkeys(owner.values()))
    found, given = [], {}
    for name in names:
        nodes = [node for node in graph.nodes if owner.get(node.name) == name]
        inputs = set()
        for source in (source for node in nodes for source in node.inputs):
            if source in owner:
                inputs.add(owner[source])
            elif outside is not None and source in outside:
                inputs.add(f"from {outside[source]}")
                given[f"from {outside[source]}"] = _shape(graph, source)
        macs = sum(_macs(graph, node) for node in nodes)
        words = " ".join(filter(None, map(_word, nodes)))
        found.append(Stage(name, words, _shape(graph, nodes[-1].name), macs, tuple(sorted(inputs - {name}))))
    return [*(Stage(name, "", shape, 0, ()) for name, shape in given.items()), *found]


def _shape(graph: Graph, name: str) -> str:
    return "x".join(map(str, graph.shapes[name][1:]))


def _macs(graph: Graph, node: Node) -> int:
    return node.op.macs(*(graph.shapes[source] for source in node.inputs))


def _word(node: Node) -> str:
    """ "conv3", "dw5", "max3", "add"; "" for what a runtime fuses."""
    op, kernel = node.op, getattr(node.op, "kernel_size", None)
    size = "" if kernel is None else str(kernel[0] if isinstance(kernel, tuple) else kernel)
    if isinstance(op, Conv2d):
        return ("dw" if op.groups == op.in_channels > 1 else "conv") + size
    kind = type(op).__name__.removesuffix("2d")
    return {"MaxPool": f"max{size}", "AvgPool": f"avg{size}", "Add": "add", "Concat": "concat"}.get(kind, "")


def _layers(found: Sequence[Stage]) -> list[list[Stage]]:
    """Stages by the length of the longest way to them. Stages that feed each other follow their order."""
    depth: dict[str, int] = {}
    for stage in found:
        depth[stage.name] = 1 + max((depth[source] for source in stage.inputs if source in depth), default=-1)
    return [[stage for stage in found if depth[stage.name] == d] for d in range(max(depth.values(), default=-1) + 1)]


def _box(stage: Stage, at: tuple[float, float, float], share: float) -> str:
    x, y, width = at
    outline = f'x="{x:.1f}" y="{y:.1f}" height="{_BOX}" rx="4"'
    shade = f'<rect {outline} width="{share * width:.1f}" fill="@4" opacity="0.35"/>' if share else ""
    frame = f'<rect {outline} width="{width:.1f}" fill="none" stroke="@guide"/>'
    letters = int((width - 14) / _LETTER)
    if width < _NARROW:
        lines = _text(x + 7, y + 15, stage.name, letters, bold=True) + _text(x + 7, y + 28, stage.choice, letters)
    else:
        name = _cut(stage.name, letters - len(stage.shape) - 2)
        left = letters - len(stage.shape) - len(name) - 4
        lines = _text(x + 8, y + 22, name, letters, bold=True)
        if stage.choice and left >= 4:
            lines += _text(x + 8 + _LETTER * 1.12 * (len(name) + 1.5), y + 22, stage.choice, left)
        lines += _text(x + width - 8, y + 22, stage.shape, letters, end=True)
    return f'<rect {outline} width="{width:.1f}" fill="@paper"/>{shade}{frame}{lines}'


def _text(x: float, y: float, text: str, letters: int, *, bold: bool = False, end: bool = False) -> str:
    if not text:
        return ""
    style = ' font-weight="600" fill="@ink"' if bold else ' fill="@quiet"'
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}{anchor}>{escape(_cut(text, letters))}</text>'


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(letters - 1, 1)] + "…"


def _arrow(source: tuple[float, float, float], target: tuple[float, float, float]) -> str:
    """From the foot of one box to the head of one in the next layer."""
    x0, y0 = source[0] + source[2] / 2, source[1] + _BOX
    x1, y1 = target[0] + target[2] / 2, target[1]
    head = f"M{x1 - 3:.1f},{y1 - 5:.1f} L{x1:.1f},{y1:.1f} L{x1 + 3:.1f},{y1 - 5:.1f}"
    return f'<path d="M{x0:.1f},{y0:.1f} L{x1:.1f},{y1:.1f} {head}" fill="none" stroke="@other"/>'


def _lane(source: tuple[float, float, float], target: tuple[float, float, float], edge: float, depth: int) -> str:
    """Past other layers, beside the boxes; every second one a little further out."""
    x0, y0, x1, y1 = source[0] + source[2], source[1] + _BOX * 0.7, target[0] + target[2], target[1] + _BOX * 0.3
    lane = edge + 5 + 6 * (depth % 2)
    path = f"M{x0:.1f},{y0:.1f} H{lane:.1f} V{y1:.1f} H{x1:.1f}"
    head = f"M{x1 + 5:.1f},{y1 - 3:.1f} L{x1:.1f},{y1:.1f} L{x1 + 5:.1f},{y1 + 3:.1f}"
    return f'<path d="{path} {head}" fill="none" stroke="@other"/>'
