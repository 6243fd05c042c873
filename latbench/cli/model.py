"""What commands share that print tables and models: telling one from the other, facts in lines, figures in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latbench.cli.values import format_ms
from latbench.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from latbench.oracle.base import Model
    from latbench.oracle.store import StoredModel

_MAGIC = {b"PAR1": "table", b"PK\x03\x04": "model"}  # parquet; npz


def kind_of_file(path: Path) -> str | None:
    """ "table" or "model" by the first bytes; None where it is neither, or cannot be read."""
    if not path.is_file():  # opening a pipe would wait for its writer
        return None
    try:
        with path.open("rb") as file:
            return _MAGIC.get(file.read(4))
    except OSError:
        return None


def read_model(path: Path) -> StoredModel:
    """The model in `path`. Raises UsageError where it is a table, else as ``store.load``."""
    from latbench.oracle import store

    if kind_of_file(path) == "table":
        raise UsageError(f"{path} is a table, not a fitted model: latbench fit {path} -o MODEL makes one of it")
    return store.load(path)


def read_oracle(path: Path, missing: str) -> Model:
    """The fitted model in `path`, or a table's sums, corrected by its networks and chains where it holds any.

    Raises TableError, UsageError.
    """
    from latbench import plugins
    from latbench.oracle.fitting import default_oracle
    from latbench.tables import LatencyTable

    if kind_of_file(path) == "model":
        return read_model(path).oracle
    table = LatencyTable.read(path)
    kind: type[Model] = plugins.load(
        "latbench.oracles", "calibrated" if default_oracle(table) == "calibrated" else "lut"
    )
    return kind.fit(table, missing=missing)


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """One fact a line, names in a column of their own; a fact without text is left out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts:
        if text:
            grid.add_row(name, Text(text))
    console.print(grid)


@dataclass(frozen=True)
class Shown:
    """One column of a terminal's table."""

    title: str
    rank: int = 0  # those of the highest rank go first where the terminal is narrow; 0 stays
    right: bool = False
    least: int | None = None  # letters that a text may be shortened to; None: never shortened


def print_rows(console: Console, columns: Sequence[Shown], rows: Sequence[Sequence[Text | str]]) -> None:
    """A table that fits the terminal: columns are left out by rank, then texts shortened. Figures stay whole."""
    from rich.table import Table
    from rich.text import Text

    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    natural = [max(len(c.title), *(row[i].cell_len for row in cells)) for i, c in enumerate(columns)]
    widths = fitting(columns, natural, console.width)
    view = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for i, width in widths.items():
        justify: Literal["left", "right"] = "right" if columns[i].right else "left"
        view.add_column(columns[i].title, justify=justify, no_wrap=True, overflow="ellipsis", width=width)
    for row in cells:
        view.add_row(*(row[i] for i in widths))
    console.print(view)


def fitting(columns: Sequence[Shown], natural: Sequence[int], room: int) -> dict[int, int]:
    """Which columns are shown -> how wide, in letters, two between columns; `natural` is what each one would like."""
    kept = list(range(len(columns)))

    def needed() -> int:
        return sum(min(columns[i].least or natural[i], natural[i]) + 2 for i in kept) - 2

    while needed() > room and any(columns[i].rank for i in kept):
        kept.remove(max(kept, key=lambda i: columns[i].rank))
    spare = room - needed()
    widths = {}
    for i in kept:
        least = min(columns[i].least or natural[i], natural[i])
        widths[i] = min(natural[i], least + max(spare, 0))
        spare -= widths[i] - least
    return widths


def figures_in_words(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each figure of a ``Validation`` as data."""
    f = figures
    ranks = [f"{name} {f[key]:.4f}" for name, key in (("Kendall", "kendall"), ("Spearman", "spearman")) if f[key]]
    words = [
        ("MAPE", f"{f['mape']:.2%}"),
        ("within", f"5 %: {f['within_5']:.1%} of networks, 10 %: {f['within_10']:.1%}"),
        ("bias", f"{f['bias']:+.2%}, RMSE {format_ms(f['rmse'])}"),
    ]
    if ranks:
        words.append(("rank", ", ".join(ranks)))
    if f["coverage"] is not None:
        held = f"holds {f['coverage']:.1%} of measurements, mean half-width {f['half_width']:.2%}"
        words.append((f"{f['confidence']:.0%} interval", held))
    else:
        words.append((f"{f['confidence']:.0%} interval", "none: too few networks in the fit to calibrate one"))
    if f["n_missing"]:
        words.append(("left out", f"{f['n_missing']} networks with a block that has no entry"))
    return words


def validation_in_words(notes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what a model's notes say of its validation."""
    from latbench.oracle.fitting import FEW

    validation = notes.get("validation")
    if validation is None:
        return [("validated", f"not: {notes.get('unvalidated', 'its notes hold no figures')}")]
    n = validation["n"]
    how = f"on {n} networks kept out of the fit (seed {validation['seed']})"
    if validation["method"] == "cross-validation":
        how = f"by {validation['folds']}-fold cross-validation over {n} networks, then fitted to all"
        if n < FEW:
            how += f": fewer than {FEW} are too few to keep some out"
    return [("validated", how), *figures_in_words(validation)]
