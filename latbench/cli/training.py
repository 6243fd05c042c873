"""What search, train and verify share: constraints from options, a searcher's settings, the bar of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latbench.cli.values import Quantity
from latbench.errors import UsageError, shown

if TYPE_CHECKING:
    from latbench.oracle.base import Constraint

_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_count(text: str) -> float:
    """ "1.5M", "300k", "4231976" -> a number above zero. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKmMgG]?)\s*", text)
    count = float(match[1]) * _SCALE[match[2].lower()] if match else 0.0
    if not count:
        raise UsageError(f"{shown(text)} is no count above zero: write 1.5M, 300k or 4231976")
    return count


COUNT = Quantity("count", parse_count)  # float


class TrainingBar:
    """A searcher's ``Reporter``: steps, latest figures and time on stderr, and a plot redrawn every epoch."""

    def __init__(self, title: str, plot: Path | None = None) -> None:
        console = Console(stderr=True)
        self._plot = plot
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not (console.is_terminal and speaks()),
            refresh_per_second=2,
        )
        self._task = self._progress.add_task(title, total=None, text="")

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, done: int, total: int, text: str) -> None:
        """As ``searchers.base.Reporter``."""
        self._progress.update(self._task, completed=done, total=total, text=text)

    def epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """As ``searchers.base.Reporter``."""
        if self._plot is not None:
            from searchers.plot import draw

            draw(self._plot, history)


def speaks() -> bool:
    """Whether this is the only process, or the first of those that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def constraints_of(
    tables: Sequence[Path],
    targets: Sequence[float],
    counts: Mapping[str, float | None],
    *,
    missing: str,
    confidence: float | None,
) -> tuple[Constraint, ...]:
    """One constraint per table and target, and one per count ("n_params", "macs"), of the first table's space."""
    from latbench.cli.model import read_oracle
    from latbench.oracle.base import Constraint
    from latbench.oracle.factors import FactorOracle
    from latbench.spaces.base import FactoredSpace

    if len(tables) != len(targets) or not tables:
        raise UsageError(f"every --table needs its --target: got {len(tables)} and {len(targets)}")
    found = [
        Constraint(read_oracle(path, missing), target, confidence) for path, target in zip(tables, targets, strict=True)
    ]
    space = found[0].oracle.space
    for what, budget in counts.items():
        if budget is not None:
            if not isinstance(space, FactoredSpace):
                raise UsageError(f"{space.name} does not factor into blocks, so its {what} cannot be bounded")
            found.append(Constraint(FactorOracle.counting(space, what), budget))
    return tuple(found)


def format_amount(value: float, unit: str) -> str:
    """ "4.21 ms", "1.50 M parameters"."""
    from latbench.cli.values import format_count, format_ms

    return format_ms(value) if unit == "ms" else f"{format_count(round(value))} {unit}"
