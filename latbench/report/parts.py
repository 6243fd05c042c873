"""What a page is made of: sections of facts, pictures and tables. Values, drawn by ``page`` and ``render``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

Form = Literal["text", "word", "ms", "count", "percent", "number", "verdict", "ratio"]


@dataclass(frozen=True)
class Picture:
    """A chart (a Vega-Lite specification) or a drawing (SVG), with the sentence that says what to see in it."""

    name: str  # of its files: letters, digits, hyphens
    title: str
    caption: str
    spec: dict[str, Any] | None = None
    svg: str | None = None


@dataclass(frozen=True)
class Column:
    """One column of a table: the frame's field, its heading, how its values are written."""

    field: str
    title: str
    form: Form = "text"


@dataclass(frozen=True, eq=False)
class Grid:
    """A table that the reader sorts and filters; charts may draw the same rows by the grid's name."""

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    frame: pd.DataFrame = field(repr=False)


@dataclass(frozen=True)
class Section:
    """One table, model, search or comparison."""

    name: str  # anchor: letters, digits, hyphens
    kind: str  # "table", "model", "search", "comparison"
    title: str
    lead: str  # the answer in a sentence or two
    facts: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()  # what cannot be shown, and why
    pictures: tuple[Picture, ...] = ()
    grids: tuple[Grid, ...] = ()
