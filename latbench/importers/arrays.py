"""Latencies of networks as columns (HELP, HW-NAS-Bench, NAS-Bench-201): parquet or csv, a row a network.

Columns that describe the architecture have the names the space reads (``from_columns``); each further column is a set
of latencies on one device at one batch size. A row's position is kept as its measuring order.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from latbench import parquet
from latbench.errors import TableError, UsageError, one_line, shown
from latbench.importers.base import Source, known_unit, network_rows, to_ms
from latbench.spaces.base import Arch, SearchSpace
from latbench.spaces.fbnet import FBNetSpace
from latbench.spaces.nasbench201 import EDGES, NASBench201Space
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space
from latbench.tables import LatencyTable

Encoder = Callable[[Mapping[str, Any]], Arch]  # one row of the architecture's columns


def _nasbench201(row: Mapping[str, Any]) -> Arch:
    """Columns e0 to e5: the edges' operations, codes 0 to 4."""
    return tuple(int(row[f"e{i}"]) for i in range(len(EDGES)))


# space -> its class, its architecture columns, and what reads a row of them
LAYOUTS: Mapping[str, tuple[type[SearchSpace], tuple[str, ...], Encoder]] = MappingProxyType(
    {
        "fbnet": (FBNetSpace, tuple(f"op{i}" for i in range(22)), FBNetSpace.from_columns),
        "nasbench201": (NASBench201Space, tuple(f"e{i}" for i in range(len(EDGES))), _nasbench201),
        "ofa_mbv3": (
            OFAMobileNetV3Space,
            ("r", *(f"ks{i}" for i in range(20)), *(f"e{i}" for i in range(20))),
            OFAMobileNetV3Space.from_columns,
        ),
    }
)
MAX_CSV = 32 * 2**20  # bytes: a cell of two letters is 60 bytes in memory
MAX_COLUMNS = 10_000  # the widest published table has 80; each is an object of its own
_NOT_LATENCIES = re.compile(r"arch_index|macs|flops|params|d\d+", re.IGNORECASE)


def read(
    source: Source, space_name: str, settings: Mapping[str, Any], column: str | None, unit: str | None
) -> LatencyTable:
    """The table of one column. Raises UsageError on an unknown space, column or unit, TableError on the file's faults.

    A column called ``..._32`` may be of batch 32 or of a device that ends so (``silver_4114``): then `settings` must
    say the batch.
    """
    if space_name not in LAYOUTS:
        raise UsageError(f"--space {space_name or '(none)'}: arrays are read for {', '.join(LAYOUTS)}")
    space_class, arch_columns, encode = LAYOUTS[space_name]
    frame = _frame(source)
    missing = [name for name in arch_columns if name not in frame.columns]
    if missing:
        raise TableError(
            f"{source.path}: no column {missing[0]}: {space_name} needs {arch_columns[0]} to {arch_columns[-1]}"
        )
    others = [str(c) for c in frame.columns if c not in arch_columns and not _NOT_LATENCIES.fullmatch(str(c))]
    if column is None or column not in others:
        said = "add --column NAME" if column is None else f"no column {shown(column)} of latencies"
        raise UsageError(f"{source.path}: {said}: there are {', '.join(others) or 'none'}")
    unit = known_unit(unit, column)
    if "batch" not in settings and re.search(r"_\d+$", column):
        raise UsageError(f"is the number that {column} ends in its batch size? Say --batch N (--batch 1 if it is not)")
    space = space_class.from_settings(settings)
    codes = _whole(source, frame, arch_columns)

    def measured() -> Iterator[tuple[str, Arch, float]]:
        values = frame[column].tolist()
        for i, (row, value) in enumerate(zip(codes.tolist(), values, strict=True)):
            where = f"row {i}"
            try:
                arch = encode(dict(zip(arch_columns, row, strict=True)))
                space.check(arch)
            except UsageError as error:
                raise source.wrong(where, str(error)) from None
            yield where, arch, to_ms(source, value, unit, f"{where}, column {column}")

    provenance = source.provenance(space, "help", column=column, unit=unit)
    return LatencyTable.from_rows(network_rows(source, space, measured()), provenance)


def _frame(source: Source) -> pd.DataFrame:
    """The file's columns. Raises TableError where it is neither parquet nor csv, is damaged, or a name repeats."""
    if source.data.startswith(b"PAR1"):
        try:
            frame: pd.DataFrame = parquet.read(source.data).to_pandas(ignore_metadata=True)
            return frame
        except (ValueError, NotImplementedError) as error:  # NotImplementedError: types that pandas lacks
            raise TableError(f"{source.path} is damaged or cut off: {one_line(error)}") from None
    if source.path.suffix == ".parquet":
        raise TableError(f"{source.path} is no parquet file")
    return _csv(source)


def _csv(source: Source) -> pd.DataFrame:
    """Numbers as floats, to the last digit; what is none stays text."""
    if len(source.data) > MAX_CSV:
        raise TableError(f"{source.path} is larger than {MAX_CSV >> 20} MiB: no published table is; give parquet")
    reader = csv.reader(io.StringIO(source.text), strict=True)
    try:
        header, *lines = reader
    except (csv.Error, ValueError) as error:
        raise source.wrong(f"line {reader.line_num}", f"no csv: {error}") from None
    if len(header) > MAX_COLUMNS:
        raise source.wrong("the header", f"{len(header)} columns, more than {MAX_COLUMNS}: no published table has")
    repeated = [name for name, n in Counter(header).items() if n > 1]
    if repeated:
        raise source.wrong("the header", f"two columns are called {shown(repeated[0])}")
    for i, line in enumerate(lines):
        if len(line) != len(header):
            raise source.wrong(f"row {i}", f"{len(line)} cells, the header has {len(header)}: cut off?")
    frame: pd.DataFrame = pd.DataFrame({name: [_cell(line[j]) for line in lines] for j, name in enumerate(header)})
    return frame


def _cell(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _whole(source: Source, frame: pd.DataFrame, columns: tuple[str, ...]) -> Any:
    """(N, len(columns)) int64. Raises TableError, naming row and column, where a value is no whole number."""
    codes = np.empty((len(frame), len(columns)), np.int64)
    for j, name in enumerate(columns):
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        with np.errstate(invalid="ignore"):
            wrong = np.flatnonzero(~((values == np.floor(values)) & (np.abs(values) < 2**53)))  # NaN included
        if len(wrong):
            i = int(wrong[0])
            raise source.wrong(f"row {i}, column {name}", f"{shown(frame[name].tolist()[i])} is no whole number")
        codes[:, j] = values
    return codes
