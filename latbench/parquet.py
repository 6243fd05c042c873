"""Parquet files that others wrote: what they take in memory is known before it is taken.

A column of one value repeated is a few bytes in a file, however many rows it claims; a text of a megabyte that stands
in a million rows is there once.
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_VALUES = 2**26  # of all columns: half a GiB of numbers; NAS-Bench-201 with 30 devices has 600,000
MAX_BYTES = 2**31  # of texts and images: CIFAR-10 has 140 MB


def read(source: Path | bytes, columns: list[str] | None = None) -> pa.Table:
    """The table. Raises OSError where the file cannot be read; ValueError, in one line, where it is damaged or would
    not fit."""
    try:
        with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            flat = [name for name in _flat_texts(file.schema_arrow) if columns is None or name in columns]
            n = count(file, MAX_VALUES)
        if n > MAX_VALUES:
            raise ValueError(f"it claims {n} values, more than {MAX_VALUES}")
        with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source, read_dictionary=flat) as file:
            table = file.read(columns)
        for name in flat:
            table = table.set_column(table.schema.get_field_index(name), name, _decoded(table[name], name))
        table.validate(full=True)  # text that is UTF-8, lists within their bounds
        return table
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(_told(error)) from None
    except (pa.ArrowException, MemoryError, LookupError, TypeError, UnicodeError) as error:
        raise ValueError(f"it is damaged: {_told(error)}") from None


def count(file: pq.ParquetFile, limit: int) -> int:
    """Values of all columns, those of lists too; what stands once a row alone where that is beyond `limit`.

    Runs through the pages first, which raises OSError where the footer contradicts itself: pyarrow 26 ends the process
    where such a column is asked for its figures.
    """
    n: int = file.metadata.num_rows * file.metadata.num_columns
    if n > limit:
        return n
    file.scan_contents()
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return sum(group.column(i).num_values for group in groups for i in range(group.num_columns))


def _flat_texts(schema: pa.Schema) -> list[str]:
    """Columns of text or bytes that do not repeat their name."""
    kinds = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    names = schema.names
    return [f.name for f in schema if any(kind(f.type) for kind in kinds) and names.count(f.name) == 1]


def _decoded(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A column read as a dictionary, its texts in place of their numbers."""
    if not pa.types.is_dictionary(column.type):
        return column
    nbytes = 0
    for chunk in column.chunks:
        nbytes += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
    if nbytes > MAX_BYTES:
        raise ValueError(f"its column {name} has {nbytes} bytes unpacked, more than {MAX_BYTES >> 20} MiB")
    return column.cast(column.type.value_type)


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
