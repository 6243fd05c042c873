"""The page: one HTML file that needs no network, ``report.parquet`` and the pictures for papers beside it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from latbench import __version__
from latbench.errors import UsageError
from latbench.report.parts import Grid, Section
from latbench.report.render import CONFIG, FONT, THEMES, draw, runtime, save, themed

_DIGITS = 5  # significant, of figures in the page; report.parquet has all


def write_page(path: Path, title: str, sections: Sequence[Section], *, pictures: bool = True) -> list[Path]:
    """Writes the page and, with `pictures`, a folder of PNG and SVG files; what the tables show as a parquet file.

    Beside ``report.html``: ``report.parquet`` and ``report_pictures/``. Gives the files and folders written. Raises
    UsageError where jinja2, altair or vl-convert is missing, TableError where a file cannot be written.
    """
    save(path, page(title, sections).encode())
    written = [path]
    if rows := _all_rows(sections):
        beside, buffer = path.with_suffix(".parquet"), io.BytesIO()
        pd.concat(rows, ignore_index=True).to_parquet(buffer, index=False)
        save(beside, buffer.getvalue())
        written.append(beside)
    if pictures and any(section.pictures for section in sections):
        folder = path.with_name(f"{path.stem}_pictures")
        folder.mkdir(exist_ok=True)
        grids = {grid.name: grid.frame for section in sections for grid in section.grids}
        for section in sections:
            for picture in section.pictures:
                draw(picture, folder, grids)
        written.append(folder)
    return written


def page(title: str, sections: Sequence[Section]) -> str:
    """The page's text. Raises UsageError where jinja2, altair or vl-convert is missing."""
    try:
        import jinja2
    except ImportError:
        raise UsageError("reports need jinja2: pip install 'latbench[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["colours"] = lambda svg: themed(svg, "page")
    data = {
        "themes": THEMES,
        "config": CONFIG,
        "specs": {p.name: p.spec for section in sections for p in section.pictures if p.spec is not None},
        "grids": {grid.name: _columnar(grid) for section in sections for grid in section.grids},
    }
    numbers = {p.name: i for i, p in enumerate((p for section in sections for p in section.pictures), 1)}
    text: str = environment.get_template("page.html").render(
        title=title,
        sections=sections,
        numbers=numbers,
        version=__version__,
        font=FONT,
        themes=THEMES,
        style=_asset("page.css"),
        script=_asset("page.js"),
        runtime=runtime() if data["specs"] else "",
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )
    return text


def _asset(name: str) -> str:
    return (resources.files("latbench.report") / "templates" / name).read_text(encoding="utf-8")


def _columnar(grid: Grid) -> dict[str, Any]:
    """Headings, forms, and the values by column: the smallest JSON that keeps five digits."""
    shown = {column.field for column in grid.columns}
    frame = grid.frame
    return {
        "columns": [{"field": c.field, "title": c.title, "form": c.form} for c in grid.columns],
        "values": {name: _values(frame[name]) for name in [*shown, *(n for n in frame if n not in shown)]},
    }


def _values(column: pd.Series[Any]) -> list[Any]:
    if column.dtype.kind == "f":
        return [_short(value) for value in column.tolist()]
    return [None if value is None or value != value else value for value in column.tolist()]


def _short(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _all_rows(sections: Sequence[Section]) -> list[pd.DataFrame]:
    """What the tables show, every digit; `section` and `table` say which."""
    return [
        grid.frame.assign(section=section.title, table=grid.title)
        for section in sections
        for grid in section.grids
        if len(grid.frame)
    ]
