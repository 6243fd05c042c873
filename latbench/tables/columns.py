"""``Columns``: the columns of a table, in memory or in the files they were read from, looked at through positions.

Choosing rows and joining two tables move positions alone; a column is brought together where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from latbench.tables.rows import SCHEMA

Positions = NDArray[np.int64]


class Part(Protocol):
    """Rows that lie together."""

    def __len__(self) -> int: ...

    def column(self, name: str) -> pa.ChunkedArray:
        """One column whole."""
        ...

    def rows(self, names: Sequence[str], at: Positions) -> pa.Table:
        """Some rows of some columns, in the order of `at`."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A part that is there."""

    data: pa.Table

    def __len__(self) -> int:
        return int(self.data.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        return self.data[name]

    def rows(self, names: Sequence[str], at: Positions) -> pa.Table:
        return pick(self.data.select(list(names)), at)


@dataclass(frozen=True)
class Columns:
    """The rows `at` (all where None) of the parts laid end to end; a `restated` column stands in for the parts' own."""

    parts: tuple[Part, ...]
    at: Positions | None = None
    restated: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.at is None else len(self.at)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column whole, (N,)."""
        if name in self.restated:
            return self.restated[name]
        chunks = [chunk for part in self.parts for chunk in part.column(name).chunks]
        whole = pa.chunked_array(chunks, SCHEMA.field(name).type)
        return whole if self.at is None else whole.take(pa.array(self.at))

    def table(self, names: Sequence[str]) -> pa.Table:
        """Some columns whole."""
        return pa.Table.from_arrays([self.column(n) for n in names], schema=pa.schema([SCHEMA.field(n) for n in names]))

    def batches(self, names: Sequence[str], size: int) -> Iterator[pa.Table]:
        """Some columns, `size` rows at a time: only these are brought together."""
        for start in range(0, len(self), size):
            yield self._rows(names, start, min(start + size, len(self)))

    def take(self, positions: Positions) -> Columns:
        """The rows at these positions, in their order."""
        at = positions if self.at is None else self.at[positions]
        wanted = pa.array(positions)
        return Columns(self.parts, at, {name: column.take(wanted) for name, column in self.restated.items()})

    def join(self, other: Columns, restated: Mapping[str, pa.ChunkedArray]) -> Columns:
        """These rows and behind them the other ones."""
        mine, theirs = (np.arange(len(c)) if c.at is None else c.at for c in (self, other))
        return Columns((*self.parts, *other.parts), np.concatenate([mine, theirs + self._starts[-1]]), restated)

    def _rows(self, names: Sequence[str], start: int, stop: int) -> pa.Table:
        at = np.arange(start, stop) if self.at is None else self.at[start:stop]
        part_of = np.searchsorted(self._starts, at, side="right") - 1
        order = np.argsort(part_of, kind="stable")
        pieces = [
            part.rows(names, at[part_of == i] - self._starts[i])
            for i, part in enumerate(self.parts)
            if (part_of == i).any()
        ]
        data = pieces[0] if len(pieces) == 1 else pa.concat_tables(pieces).take(pa.array(np.argsort(order)))
        for name in self.restated.keys() & set(names):
            at_name = data.schema.get_field_index(name)
            data = data.set_column(at_name, SCHEMA.field(name), self.restated[name].slice(start, stop - start))
        return data

    @cached_property
    def _starts(self) -> Positions:
        """(parts + 1,) position of each part's first row; the last one is the number of rows."""
        return np.cumsum([0, *map(len, self.parts)])


def pick(data: pa.Table, at: Positions) -> pa.Table:
    """The rows `at`; without a copy where they lie in one stretch."""
    if len(at) and at[-1] - at[0] + 1 == len(at) and (np.diff(at) == 1).all():
        return data.slice(int(at[0]), len(at))
    return data.take(pa.array(at, pa.int64()))


def ragged(column: pa.ChunkedArray) -> tuple[NDArray[Any], Positions]:
    """A list column -> its values end to end, and the (N + 1,) offsets of its rows. A missing list is empty."""
    lengths = np.asarray(column.combine_chunks().value_lengths().fill_null(0), np.int64)
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False), np.cumsum([0, *lengths])
