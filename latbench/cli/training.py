"""What search, train and verify share: constraints from options, a searcher's settings, the bar of a run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latbench import host
from latbench.cli.values import Quantity
from latbench.errors import UsageError, shown

if TYPE_CHECKING:
    from latbench.oracle.base import Constraint

LOOK_S = 0.3  # at what else runs here
TAKEN = 0.25  # share of a core's time that others use, from which on it is no core for a thread of ours
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_count(text: str) -> float:
    """ "1.5M", "300k", "4231976" -> a number above zero. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKmMgG]?)\s*", text)
    count = float(match[1]) * _SCALE[match[2].lower()] if match else 0.0
    if not count:
        raise UsageError(f"{shown(text)} is no count above zero: write 1.5M, 300k or 4231976")
    return count


COUNT = Quantity("count", parse_count)  # float


def leave_busy_cores() -> None:
    """torch gets as many threads as cores are idle, where OMP_NUM_THREADS does not say how many, and a line tells.

    A thread on a core that others use is waited for in every operation: on two cores, beside one busy process, an epoch
    of InstaNAS on digits takes 125 s with two threads and 5 s with one (4.5 s with two on an idle machine).
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return
    threads, idle, quota = torch.get_num_threads(), host.idle_cores(LOOK_S), host.cpu_quota()
    room = min(math.inf if free is None else free for free in (idle, quota))
    if room + TAKEN >= threads:
        return
    chosen = max(1, int(room + TAKEN))
    torch.set_num_threads(chosen)
    if speaks():
        why = f"{room:.1f} cores are idle" if room == idle else f"this process is granted {room:g} CPUs"
        click.echo(f"{why}: training with {chosen} thread(s); set OMP_NUM_THREADS for another number", err=True)


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
