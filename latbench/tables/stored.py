"""The parquet file of a table: what is refused, how it is written, and tables too large to be read whole.

One file holds row groups of ``Row`` columns; its key-value metadata holds one JSON text under ``latbench``:
``{"schema": 1, "provenance": {...}, "notes": {...}}``. Footer and pages carry checksums: the footer's is verified on
opening, a page's where it is read, at once in a file of less than 64 MiB of columns, else column by column, and the
samples row group by row group, as they are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latbench import parquet
from latbench.errors import SchemaMismatchError, TableError
from latbench.files import replace_file, why_not
from latbench.seals import BrokenSealError, check_parquet, seal_parquet
from latbench.signatures import shorten
from latbench.tables.columns import Columns, InMemory, Positions, pick
from latbench.tables.rows import JUDGED, SCHEMA, check, check_identities

SCHEMA_VERSION = 1  # raised when a column changes its meaning or goes; an added optional column reads as null
GROUP_ROWS = 8192  # of a row group: 10 MB with its samples
READ_WHOLE_BYTES = 64 << 20  # of columns, uncompressed: beyond it they stay in the file until they are asked for
FEW_VALUES = 1 << 26  # of all columns: half a GiB of numbers
VALUES_PER_BYTE = 16  # of a file with more: a million rows of a simulated device have less than 1
_METADATA = b"latbench"


class Stored:
    """The columns of a large file. What was read of the figures is kept, of the samples the last row group."""

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self._path, self._file = path, file
        meta = file.metadata
        self._ends = np.cumsum([meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
        self._held: dict[str, pa.ChunkedArray] = {}
        self._group: tuple[int, frozenset[str], pa.Table] | None = None
        self._hold((*JUDGED, "latency_ms", "latency_ref_ms"))
        check_identities(self._judged({}))

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column whole. Raises as ``read`` where it is damaged."""
        if name not in self._held:
            self._hold((name,))
        return self._held[name]

    def rows(self, names: Sequence[str], at: Positions) -> pa.Table:
        """Some rows of some columns. Raises as ``read`` where they are damaged."""
        groups = np.searchsorted(self._ends, at, side="right")
        order = np.argsort(groups, kind="stable")
        pieces = []
        for group in np.unique(groups).tolist():
            first = int(self._ends[group - 1]) if group else 0
            pieces.append(pick(self._row_group(group, first, names), at[groups == group] - first))
        data = pa.concat_tables(pieces) if pieces else self._row_group(0, 0, names).slice(0, 0)
        return data if len(pieces) < 2 else data.take(pa.array(np.argsort(order)))

    def _hold(self, names: Sequence[str]) -> None:
        with told(self._path):
            wanted = list(dict.fromkeys(("key", *names)))  # with a column that is there, so that rows are counted
            data = conform(self._path, self._file.read(columns=wanted), wanted).combine_chunks()
            held = {name: data[name] for name in names}
            check(self._judged(held))
            self._held |= held

    def _judged(self, more: Mapping[str, pa.ChunkedArray]) -> pa.Table:
        """Columns with those that they are checked against."""
        columns = {**{name: self._held[name] for name in JUDGED if name in self._held}, **more}
        return pa.Table.from_arrays(list(columns.values()), schema=pa.schema([SCHEMA.field(name) for name in columns]))

    def _row_group(self, group: int, first: int, names: Sequence[str]) -> pa.Table:
        wanted = list(dict.fromkeys((*JUDGED, *names)))
        if self._group is None or self._group[:2] != (group, frozenset(names)):
            with told(self._path):
                data = conform(self._path, self._file.read_row_group(group, wanted), wanted).combine_chunks()
                check(data, first)
            self._group = group, frozenset(names), data
        return self._group[2].select(list(names))


def read(path: Path) -> tuple[Columns, dict[str, Any]]:
    """The columns of a file and its metadata. Raises SchemaMismatchError, TableError: ``LatencyTable.read``."""
    with told(path):
        sealed = _look(path)
        file = pq.ParquetFile(path, page_checksum_verification=True)
        meta = _metadata(path, file.schema_arrow.metadata or {})
        conform(path, file.schema_arrow.empty_table())
        limit = max(FEW_VALUES, VALUES_PER_BYTE * path.stat().st_size)
        rows, groups = file.metadata.num_rows, [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        n = rows * file.metadata.num_columns if sealed else parquet.count(file, limit)
        if n > limit:
            raise SchemaMismatchError(f"{path} claims {n} values in {path.stat().st_size} bytes: it is no table")
        if sum(group.total_byte_size for group in groups) > READ_WHOLE_BYTES:
            return Columns((Stored(path, file),)), meta
        with file:
            data = conform(path, file.read())
        check(data)
        check_identities(data)
        return Columns((InMemory(data),)), meta


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What goes wrong in a file, in one line that names it."""
    try:
        yield
    except OSError as error:  # also what pyarrow raises on damaged pages
        if error.errno is None:
            raise SchemaMismatchError(f"{path} is damaged: {_one_line(error)}; restore or make it again") from None
        raise TableError(f"cannot read {path}: {error.strerror}; check the path, or make the table first") from None
    except (pa.ArrowException, KeyError, TypeError, AttributeError) as error:
        raise SchemaMismatchError(f"{path} is damaged: {_one_line(error)}; restore or make it again") from None
    except SchemaMismatchError:
        raise
    except TableError as error:
        raise error if str(error).startswith(str(path)) else TableError(f"{path}: {error}") from None


def write(path: Path, columns: Columns, provenance: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Atomic: ``LatencyTable.write``."""
    meta = {"schema": SCHEMA_VERSION, "provenance": provenance, "notes": notes}
    schema = SCHEMA.with_metadata({_METADATA: json.dumps(meta, allow_nan=False)})

    def fill(file: IO[bytes]) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for data in columns.batches(SCHEMA.names, GROUP_ROWS):
                writer.write_table(data.combine_chunks().replace_schema_metadata(schema.metadata))
        seal_parquet(file)

    try:
        replace_file(path, fill)
    except pa.ArrowException as error:
        raise TableError(why_not(OSError(_one_line(error)), path)) from None
    except OSError as error:
        raise TableError(why_not(error, path)) from None


def _look(path: Path) -> bool:
    """Whether its footer has a checksum. Raises SchemaMismatchError where that does not fit, and with what `path` is,
    where it is plainly no parquet file; OSError as ``open`` does."""
    sealed = False
    if path.is_dir():
        raise SchemaMismatchError(f"{path} is a directory, not a latency table: give the .parquet file itself")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(4)
        file.seek(max(size - 4, 0))
        tail = file.read(4)
        try:
            if head == tail == b"PAR1":
                sealed = check_parquet(file)
        except BrokenSealError as error:
            raise SchemaMismatchError(f"{path}: {error}; restore it or make it again") from None
    if not size:
        raise SchemaMismatchError(f"{path} is empty: restore it or make it again")
    if head != b"PAR1":
        raise SchemaMismatchError(
            f"{path} is no parquet file, so no latency table (imports: latbench import FORMAT PATH)"
        )
    if tail != b"PAR1" or size < 12:
        raise SchemaMismatchError(f"{path} is truncated ({size} bytes): restore it or make it again")
    return sealed


def _metadata(path: Path, metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    try:
        meta = json.loads(metadata[_METADATA])
        version = meta["schema"]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise SchemaMismatchError(
            f"{path} is a parquet file, but no latency table: latbench did not write it"
        ) from None
    if version != SCHEMA_VERSION:
        mend = "upgrade latbench" if isinstance(version, int) and version > SCHEMA_VERSION else "make the table again"
        raise SchemaMismatchError(f"{path} has table schema {version}, this latbench reads {SCHEMA_VERSION}: {mend}")
    return dict(meta)


def conform(path: Path, data: pa.Table, names: Sequence[str] = SCHEMA.names) -> pa.Table:
    """The columns `names` of Row in their order; optional ones that an older latbench did not write are null."""
    schema = pa.schema([SCHEMA.field(name) for name in names])
    unknown = sorted(set(data.column_names) - set(names))
    wrong = [
        f.name
        for f in schema
        if (data.schema.field(f.name).type != f.type if f.name in data.column_names else not f.nullable)
    ]
    if unknown or wrong:
        what = "; ".join(f"{name} is unknown" for name in unknown) or f"missing or of another type: {', '.join(wrong)}"
        raise SchemaMismatchError(f"{path}: its columns are not those of table schema {SCHEMA_VERSION} ({what})")
    columns = [data[f.name] if f.name in data.column_names else pa.nulls(data.num_rows, f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _one_line(error: BaseException) -> str:
    return shorten(str(error)) or type(error).__name__
