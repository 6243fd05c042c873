"""From a chart's specification to what is seen: themes, the runtime that a page inlines, PNG and SVG files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import pandas as pd

from latbench.errors import TableError, UsageError
from latbench.files import replace_file, why_not
from latbench.report.parts import Picture
from latbench.report.style import COLOURS

# What ``@name`` in a chart or a drawing stands for. Okabe & Ito's palette; its blue and its brown lightened for dark.
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "ink": "#1c1e21", "quiet": "#5f656d", "guide": "#c3c7cc", "other": "#9aa0a6", "paper": "#ffffff",
        **{str(i): colour for i, colour in enumerate(COLOURS)},
    },
    "dark": {
        "ink": "#e6e8ea", "quiet": "#9ba1a8", "guide": "#4a5058", "other": "#7d848b", "paper": "#15171a",
        "0": "#4AA3DF", "1": "#E8793A", "2": "#2BB68F", "3": "#D794BC", "4": "#7CC6F0", "5": "#EBB23D",
        "6": "#B98274",
    },
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
CONFIG: dict[str, Any] = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "@quiet", "titleColor": "@quiet", "domainColor": "@guide", "tickColor": "@guide",
        "gridColor": "@guide", "gridOpacity": 0.45, "labelFontSize": 11, "titleFontSize": 11.5,
        "titleFontWeight": "normal", "labelFlush": False,
    },
    "legend": {
        "orient": "top", "labelColor": "@ink", "labelFontSize": 11.5, "symbolSize": 70, "symbolOpacity": 1,
        "columns": {"expr": "width < 420 ? 2 : 4"}, "labelLimit": 170,
    },
}  # fmt: skip
_PAPER_WIDTH = 620  # pixels of a PNG before it is doubled
_MISSING = "reports need vl-convert and altair: pip install 'latbench[report]'"
_TOKEN = re.compile(r'"@(\w+)"')  # a whole value: a name that only holds an @ stays


@cache  # bundling takes a second
def runtime() -> str:
    """The JavaScript that draws the charts: Vega, Vega-Lite and vega-embed, 0.9 MB. Raises UsageError without it."""
    try:
        import vl_convert
    except ImportError:
        raise UsageError(_MISSING) from None
    text: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return text.replace("</script", "<\\/script")


def themed(text: str, theme: str) -> str:
    """`text` (JSON or SVG) with every ``"@name"`` as the theme's colour; ``theme="page"``: as the page's variable."""
    colours = THEMES[theme] if theme in THEMES else {name: variable(name) for name in THEMES["light"]}
    return _TOKEN.sub(lambda match: f'"{colours[match[1]]}"' if match[1] in colours else match[0], text)


def variable(name: str) -> str:
    """How the page's style calls a colour: "var(--ink)"."""
    return f"var(--{'c' * name.isdigit()}{name})"


def draw(picture: Picture, folder: Path, datasets: Mapping[str, pd.DataFrame]) -> None:
    """``NAME.svg`` and ``NAME.png`` of a picture in `folder`, in light colours on a transparent ground.

    Raises UsageError where vl-convert is missing, TableError where a file cannot be written.
    """
    try:
        import vl_convert
    except ImportError:
        raise UsageError(_MISSING) from None
    if picture.svg is not None:
        svg = themed(picture.svg, "light")
    else:
        svg = vl_convert.vegalite_to_svg(_whole(picture, datasets))
    png = vl_convert.svg_to_png(svg, scale=2)
    save(folder / f"{picture.name}.svg", svg.encode())
    save(folder / f"{picture.name}.png", png)


def save(path: Path, data: bytes) -> None:
    """Atomic. Raises TableError in the system's words; the old file is then intact."""

    def put(file: IO[bytes]) -> None:
        file.write(data)

    try:
        replace_file(path, put)
    except OSError as error:
        raise TableError(why_not(error, path)) from None


def _whole(picture: Picture, datasets: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The specification by itself: colours, a width, and the rows that the page would give it."""
    text = json.dumps({**(picture.spec or {}), "config": CONFIG})
    spec: dict[str, Any] = json.loads(themed(text, "light"))
    used = {name: frame for name, frame in datasets.items() if json.dumps({"name": name}) in text}
    rows = {name: frame.to_json(orient="records", double_precision=12) for name, frame in used.items()}
    given = {name: json.loads(found) for name, found in rows.items()}
    return {**spec, "width": _PAPER_WIDTH, "background": "white", "datasets": {**spec.get("datasets", {}), **given}}
