"""The progress bar of long work: on stderr, silent where that is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A ``Reporter`` that draws: share of the estimated work, rows, time passed and left."""

    def __init__(self, title: str) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rows]} rows"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,  # the parent stays out of the way of the measurement
        )
        self._task = self._progress.add_task(title, total=None, rows="0")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, done_s: float, total_s: float, rows: int, n_rows: int) -> None:
        """As ``profiling.session.Reporter``."""
        self._progress.update(self._task, completed=done_s, total=total_s, rows=f"{rows}/{n_rows}")
