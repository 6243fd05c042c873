"""Accuracies that others trained for, as an evaluator: a parquet file with a row per architecture. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latbench.errors import TableError, UsageError, one_line
from latbench.spaces.base import Arch, SearchSpace

Unit = Literal["fraction", "percent"]
SPELLINGS = ("arch", "arch_str")  # columns of architectures: texts that the space reads, or lists of option indices
DEFAULT_COLUMN = "accuracy"


@dataclass(frozen=True)
class AccuracyTable:
    """Architecture -> accuracy in [0, 1], as the file spells it; else the canonical spelling's."""

    space: SearchSpace
    accuracies: Mapping[Arch, float]
    where: str  # file and column
    unit: Unit  # of the file

    @classmethod
    def named(cls, text: str, space: SearchSpace) -> AccuracyTable:
        """From "FILE", "FILE:COLUMN" or "FILE:COLUMN:percent" (or "fraction"); without a column, "accuracy"."""
        path, column, unit = text, DEFAULT_COLUMN, None
        rest, _, last = text.rpartition(":")
        if not _exists(path) and last in ("fraction", "percent"):
            path, unit = rest, last
            rest, _, last = path.rpartition(":")
        if not _exists(path) and rest:
            path, column = rest, last
        return cls.read(Path(path), space, column, unit)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path, space: SearchSpace, column: str, unit: Unit | None = None) -> AccuracyTable:
        """A column of a file. `unit` None: decided by the values (``unit_of``).

        Raises TableError, naming file, row and column, on what is no architecture of the space, stands twice, or is no
        accuracy.
        """
        spelled, values = _columns(path, column)
        where = f"{path}, column {column}"
        bad = ~np.isfinite(values) | (values < 0) | (values > 100)
        if bad.any():
            row = int(bad.argmax())
            raise TableError(f"{where}, row {row}: {values[row]:g} is no accuracy: 0 to 1, or 0 to 100 percent")
        decided = unit or unit_of(values, where)
        if decided == "fraction" and (values > 1).any():
            row = int((values > 1).argmax())
            raise TableError(f"{where}, row {row}: {values[row]:g} is no fraction; say {path}:{column}:percent")
        found: dict[Arch, float] = {}
        scale = 100.0 if decided == "percent" else 1.0
        for row, (text, value) in enumerate(zip(spelled, values.tolist(), strict=True)):
            try:
                arch = space.parse_arch(text) if isinstance(text, str) else tuple(int(index) for index in text)
                space.check(arch)
            except (TypeError, ValueError, UsageError) as error:
                raise TableError(f"{path}, row {row}: {error}") from None
            if found.setdefault(arch, value / scale) != value / scale:
                raise TableError(f"{where}, row {row}: {space.format_arch(arch)} stands there twice, unlike before")
        return cls(space, found, where, decided)

    def evaluate(self, arch: Arch) -> float:
        """As ``Evaluator``. Raises TableError, naming the architecture, where the table lacks it."""
        self.space.check(arch)
        found = self.accuracies.get(arch)
        if found is None:
            found = self.accuracies.get(self.space.canonical(arch))
        if found is None:
            raise TableError(
                f"{self.where} holds no accuracy of {self.space.name}:{self.space.format_arch(arch)} "
                f"({len(self.accuracies)} others): search a space that the table covers, or take another evaluator"
            )
        return found


def unit_of(values: NDArray[np.float64], where: str) -> Unit:
    """What values in [0, 100] are, where it can only be one.

    Above 1 they are percentages. Values between 0 and 1 among percentages may be those of failed trainings or a mixture
    of units, and a column whose best is below 0.02 could be either: TableError, asking for the unit.
    """
    if values.max() > 1:
        small = (values > 0) & (values < 1 - 1e-6)  # chance among 100 classes is 1 %, or 0.999999999
        if small.any():
            row = int(small.argmax())
            raise TableError(
                f"{where}: {values.max():g} is a percentage and row {row}, {values[row]:g}, could be a fraction: say "
                "which by :percent or :fraction behind the column"
            )
        return "percent"
    if values.max() < 0.02:
        raise TableError(
            f"{where}: its best is {values.max():g}, a poor fraction or a poor percentage: say which by :percent or "
            ":fraction behind the column"
        )
    return "fraction"


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _columns(path: Path, column: str) -> tuple[Sequence[Any], NDArray[np.float64]]:
    """Spelled architectures and their values. Raises TableError."""
    import pyarrow as pa

    from latbench import parquet

    try:
        table = parquet.read(path)
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read: {one_line(error)}") from None
    if table.num_rows == 0:
        raise TableError(f"{path} holds no row")
    spelling = next((name for name in SPELLINGS if name in table.column_names), None)
    if spelling is None:
        raise TableError(f"{path} has no column {' or '.join(SPELLINGS)}: {', '.join(table.column_names)}")
    numeric = [f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
    if column not in numeric:
        raise TableError(
            f"{path} has no column {column} of numbers: name one behind the file ({path}:COLUMN): {', '.join(numeric)}"
        )
    values = table[column].to_numpy().astype(np.float64)  # what is missing becomes NaN
    return table[spelling].to_pylist(), values
