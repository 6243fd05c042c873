"""``LatencyTable``: latency rows by graph key with the provenance they share, kept in one parquet file.

The file is one row group sequence of ``Row`` columns; its key-value metadata holds one JSON text under ``latbench``:
``{"schema": 1, "provenance": {...}, "notes": {...}}``. Pages carry checksums, which are verified on reading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from latbench.errors import MissingEntryError, ProvenanceConflictError, SchemaMismatchError, TableError
from latbench.files import replace_file, why_not
from latbench.graph.ir import Graph
from latbench.provenance import Provenance, canonical_json
from latbench.signatures import nearest, shorten

__all__ = ["SCHEMA_VERSION", "LatencyTable", "Provenance", "Row"]

SCHEMA_VERSION = 1  # raised when a column changes its meaning or goes; an added optional column reads as null
_METADATA = b"latbench"


@dataclass(frozen=True)
class Row:
    """One measured, fitted or imported graph, or the reason why there is no figure. Identity: (key, kind, context).

    A sandwich row's latency is the block's *increment* and may be negative; every other latency is a total.
    """

    key: str
    kind: Literal["block", "chain", "network", "stub"]
    signature: str
    context: Literal["sandwich", "isolated"] = "isolated"
    space: str | None = None
    site: str | None = None  # the first that uses it
    block_type: str | None = None
    arch: tuple[int, ...] | None = None  # of networks: one option index per decision
    macs: int | None = None
    n_params: int | None = None
    latency_ms: float | None = None  # median over runs, as measured
    latency_ref_ms: float | None = None  # at Provenance.clock_ref_us; None where the device has no probe
    ci_low_ms: float | None = None  # interval of latency_ref_ms, else of latency_ms
    ci_high_ms: float | None = None
    gross_ms: float | None = None  # as measured, stubs included
    gross_ref_ms: float | None = None
    stubs: tuple[str, ...] = ()  # keys of the stub rows half of which was subtracted
    mean_ms: float | None = None  # of the gross samples, as the next five
    std_ms: float | None = None
    min_ms: float | None = None
    p90_ms: float | None = None  # None below honest counts
    p99_ms: float | None = None
    n_samples: int | None = None
    n_blocks: int | None = None
    n_runs: int | None = None
    run_spread: float | None = None  # relative
    repeat: int | None = None  # inferences per sample
    clock: str | None = None  # host | cuda_event | model
    clock_probe_us: float | None = None
    cache_probe_us: float | None = None  # of the networks' blocks that count: measure.probe.CacheProbe
    order: int | None = None
    started_at: float | None = None  # Unix time, s
    stop_reason: str | None = None
    first_inference_ms: float | None = None
    load_ms: float | None = None
    wait_ms: float | None = None
    peak_memory_bytes: int | None = None
    status: Literal["ok", "error", "timeout"] = "ok"
    stage: str | None = None  # where it failed
    error: str | None = None
    warnings: tuple[str, ...] = ()
    conditions: str | None = None  # JSON: what back-end and device said of its blocks; numbers are medians over them
    origin: Literal["measured", "fitted", "imported", "simulated"] = "measured"
    samples_ms: tuple[float, ...] = ()  # all of them, per inference, as measured
    block_sizes: tuple[int, ...] = ()  # how samples_ms splits into blocks
    block_run: tuple[int, ...] = ()
    probes_us: tuple[float, ...] = ()  # clock probes before, amid and behind the samples of each block
    probe_at: tuple[int, ...] = ()  # samples of its block taken before each probe: 0 begins the next block's
    block_flags: tuple[
        str, ...
    ] = ()  # why a block was left out of the figures: "foreign_load", "drift", ...; "" if not

    @classmethod
    def of(cls, graph: Graph, kind: Literal["block", "chain", "network", "stub"], **fields: Any) -> Row:
        """A row of `graph`: its key, signature and counts; what else is known in `fields`."""
        counted = {"signature": graph.signature, "macs": graph.macs, "n_params": graph.n_params}
        return cls(**{"key": graph.key, "kind": kind, **counted, **fields})


_HINTS = get_type_hints(Row)
_SAMPLES = ("samples_ms", "block_sizes", "block_run", "probes_us", "probe_at", "block_flags")
_TOTALS = ("gross_ms", "gross_ref_ms", "mean_ms", "std_ms", "min_ms", "p90_ms", "p99_ms", "first_inference_ms")
_REF = ("latency_ref_ms", "gross_ref_ms")
_IDENTITY = ["key", "kind", "context"]


def _field(name: str, hint: Any) -> pa.Field:
    optional = NoneType in get_args(hint)
    (inner,) = (h for h in get_args(hint) if h is not NoneType) if optional else (hint,)
    arrow = {str: pa.string(), int: pa.int64(), float: pa.float64(), Literal: pa.string()}
    if get_origin(inner) is tuple:
        return pa.field(name, pa.list_(arrow[get_args(inner)[0]]), nullable=optional)
    return pa.field(name, arrow[get_origin(inner) or inner], nullable=optional)


_SCHEMA = pa.schema([_field(f.name, _HINTS[f.name]) for f in fields(Row)])
_CHOICES = {name: get_args(hint) for name, hint in _HINTS.items() if get_origin(hint) is Literal}


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Rows, the provenance they share, and notes (a JSON mapping: additivity figures, ...). A value.

    Raises TableError on construction, naming the row, where a value is not finite, a total is negative, an ok row has
    no latency, or two rows have one identity.
    """

    data: pa.Table  # columns as Row
    provenance: Provenance
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.data)
        try:
            canonical_json([self.provenance.to_dict(), self.notes])
        except (TypeError, ValueError) as error:
            raise TableError(f"provenance or notes cannot be kept as JSON: {error}") from None

    @classmethod
    def from_rows(
        cls, rows: Iterable[Row], provenance: Provenance, notes: Mapping[str, Any] | None = None
    ) -> LatencyTable:
        rows = list(rows)
        columns = [pa.array([getattr(row, f.name) for row in rows], f.type) for f in _SCHEMA]
        return cls(pa.Table.from_arrays(columns, schema=_SCHEMA), provenance, notes or {})

    def rows(self) -> Iterator[Row]:
        """The rows as values, samples included."""
        lists = [f.name for f in _SCHEMA if pa.types.is_list(f.type)]
        for batch in self.data.to_batches(max_chunksize=4096):
            for raw in batch.to_pylist():
                yield Row(**{**raw, **{name: tuple(raw[name]) for name in lists if raw[name] is not None}})

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One line per row, every column but the raw samples; a missing number is NaN. Shared: do not mutate."""
        frame: pd.DataFrame = self.data.drop_columns(list(_SAMPLES)).to_pandas()
        return frame

    def __len__(self) -> int:
        return int(self.data.num_rows)

    def select(self, *, kind: str | None = None, status: str | None = None, context: str | None = None) -> LatencyTable:
        """The rows that agree with every argument given."""
        keep = pa.array(np.ones(len(self), bool))
        for name, value in {"kind": kind, "status": status, "context": context}.items():
            if value is not None:
                keep = pc.and_(keep, pc.equal(self.data[name], value))
        return replace(self, data=self.data.filter(keep))

    def take(self, positions: Sequence[int] | NDArray[np.int64]) -> LatencyTable:
        """The rows at these positions, in their order."""
        return replace(self, data=self.data.take(pa.array(positions, pa.int64())))

    @cached_property
    def _latency(self) -> dict[str, float]:
        """Key -> ms of the ok rows; of several under one key a block before a chain, a network, a stub, and a sandwich
        before an isolated one."""
        frame = _with_ms(self.data).sort_values(["kind", "context"], ascending=[False, True], kind="stable")
        return dict(zip(frame["key"], frame["ms"].astype(float), strict=True))  # later ones win

    def __contains__(self, key: object) -> bool:
        """Whether an ok row has this key."""
        return key in self._latency

    def __getitem__(self, key: str) -> float:
        """ms, at the reference clock where the row has it; a sandwich row before an isolated one.

        Raises MissingEntryError, never gives a default.
        """
        try:
            return self._latency[key]
        except KeyError:
            raise self.missing_entry(key) from None

    def missing_entry(self, key: str, signature: str | None = None) -> MissingEntryError:
        """What to raise where `key` has no figure: why, the nearest entry (if the signature is known), what to run."""
        failed = self.data.filter(pc.and_(pc.equal(self.data["key"], key), pc.not_equal(self.data["status"], "ok")))
        name = f"{key} on {self.provenance.device_name}"
        if failed.num_rows:
            row = failed.slice(0, 1).to_pylist()[0]
            signature = signature or row["signature"]
            where = f" while in {row['stage']}" if row["stage"] else ""
            why = shorten(row["error"] or "no message")
            parts = [f"no latency for {name}: its row ended in {row['status']}{where}: {why}"]
        else:
            parts = [f"no entry for {name}"]
        if signature:
            parts[0] += f" [{shorten(signature)}]"
            ok = self.data.filter(pc.equal(self.data["status"], "ok"))
            if ok.num_rows:
                known = dict(zip(ok["key"].to_pylist(), ok["signature"].to_pylist(), strict=True))
                parts.append("nearest: {} ({})".format(*nearest(signature, known)))
        if self.provenance.command:
            parts.append(f"to measure it, run: {self.provenance.command}")
        return MissingEntryError("; ".join(parts))

    def networks(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(N, D) architectures and (N,) ms of the ok network rows that state one. Raises TableError where D varies."""
        data = self.data.filter(pc.and_(pc.equal(self.data["kind"], "network"), pc.is_valid(self.data["arch"])))
        frame = _with_ms(data)
        archs = [tuple(arch) for arch in frame["arch"]]
        if len({len(arch) for arch in archs}) > 1:
            raise TableError("its networks have architectures of different lengths: rows of several spaces")
        width = len(archs[0]) if archs else 0
        return np.array(archs, np.int64).reshape(len(archs), width), frame["ms"].to_numpy(np.float64)

    def blocks_ms(self) -> dict[str, float]:
        """Key -> ms of the ok block rows, as ``table[key]`` gives them."""
        return dict(self.select(kind="block")._latency)

    def merge(self, other: LatencyTable, *, force: bool = False) -> LatencyTable:
        """Both tables' rows; `other` is the later one.

        Of two rows of one identity an ok one wins, then the one of more samples, then `other`'s. Latencies of `other`
        at its own reference clock are restated at this table's. Raises ProvenanceConflictError, with every condition
        that differs, unless `force`: then the merged table keeps this provenance and lists them in notes["mixed"].
        """
        conflicts = self.provenance.conflicts(other.provenance)
        if conflicts and not force:
            raise ProvenanceConflictError(
                f"these tables were measured under different conditions (here / there): {'; '.join(conflicts)}; "
                "keep them apart, or measure one of them again"
            )
        mine, theirs = self.provenance, other.provenance
        data = pa.concat_tables([self.data, _at_clock(other.data, theirs.clock_ref_us, mine.clock_ref_us)])
        rank = data.select([*_IDENTITY, "status", "n_samples"]).to_pandas()
        rank["ok"] = rank["status"] == "ok"
        rank["n_samples"] = rank["n_samples"].fillna(0)
        winners = rank.sort_values(["ok", "n_samples"], kind="stable").drop_duplicates(_IDENTITY, keep="last")
        provenance = replace(
            mine,
            clock_ref_us=mine.clock_ref_us if mine.clock_ref_us is not None else theirs.clock_ref_us,
            started_at=min(filter(None, (mine.started_at, theirs.started_at)), default=""),
            finished_at=max(mine.finished_at, theirs.finished_at),
            parents=tuple(dict.fromkeys((*mine.parents, *theirs.parents))),
        )
        notes = {**self.notes, **other.notes}
        mixed = [*self.notes.get("mixed", ()), *other.notes.get("mixed", ()), *conflicts]
        if mixed:
            notes["mixed"] = list(dict.fromkeys(mixed))
        return LatencyTable(data.take(pa.array(np.sort(winners.index.to_numpy()))), provenance, notes)

    @classmethod
    def read(cls, path: Path | str) -> LatencyTable:
        """Raises SchemaMismatchError where the file is no table of this schema or is damaged, TableError where there is
        none."""
        path = Path(path)
        try:
            _look(path)
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                meta = _metadata(path, file.schema_arrow.metadata or {})
                data = file.read()
            return cls(_conform(path, data), Provenance.from_dict(meta["provenance"]), meta["notes"])
        except OSError as error:  # also what pyarrow raises on damaged pages
            if error.errno is None:
                raise SchemaMismatchError(f"{path} is damaged: {_one_line(error)}; restore or make it again") from None
            raise TableError(f"cannot read {path}: {error.strerror}; check the path, or make the table first") from None
        except (pa.ArrowException, KeyError, TypeError, AttributeError) as error:
            raise SchemaMismatchError(f"{path} is damaged: {_one_line(error)}; restore or make it again") from None
        except SchemaMismatchError:
            raise
        except TableError as error:
            raise TableError(f"{path}: {error}") from None

    def write(self, path: Path | str) -> None:
        """Atomic: a temporary file beside `path`, synced, renamed. Raises TableError; the old file is then intact."""
        path = Path(path)
        meta = {"schema": SCHEMA_VERSION, "provenance": self.provenance.to_dict(), "notes": self.notes}
        data = self.data.replace_schema_metadata({_METADATA: json.dumps(meta, allow_nan=False)})
        try:
            replace_file(path, lambda file: pq.write_table(data, file, compression="zstd", write_page_checksum=True))
        except pa.ArrowException as error:
            raise TableError(why_not(OSError(_one_line(error)), path)) from None
        except OSError as error:
            raise TableError(why_not(error, path)) from None


def _with_ms(data: pa.Table) -> pd.DataFrame:
    """key, kind, context, arch and ms (reference clock first) of the ok rows."""
    ms = pc.coalesce(data["latency_ref_ms"], data["latency_ms"])
    ok = data.select([*_IDENTITY, "arch"]).append_column("ms", ms).filter(pc.equal(data["status"], "ok"))
    frame: pd.DataFrame = ok.to_pandas()
    return frame


def _at_clock(data: pa.Table, source_us: float | None, target_us: float | None) -> pa.Table:
    """Reference latencies restated at another reference clock: a latency is proportional to the probe's time."""
    if source_us is None or target_us is None or source_us == target_us:
        return data
    scale = target_us / source_us
    at_reference = pc.is_valid(data["latency_ref_ms"])
    for name in (*_REF, "ci_low_ms", "ci_high_ms"):  # the interval is of latency_ref_ms where there is one
        values = pc.if_else(at_reference, pc.multiply(data[name], scale), data[name])
        data = data.set_column(data.schema.get_field_index(name), _SCHEMA.field(name), values)
    return data


def _check(data: pa.Table) -> None:
    def refuse(mask: Any, why: str) -> None:
        i = pc.index(pc.fill_null(mask, False), True).as_py()
        if i >= 0:
            key, kind, context = (data[name][i].as_py() for name in _IDENTITY)
            raise TableError(f"row {i} ({kind} {key}, {context}): {why}")

    for column in _SCHEMA:
        values = data[column.name]
        if not column.nullable:
            refuse(pc.is_null(values), f"{column.name} is missing")
        if column.name in _CHOICES:
            known = _CHOICES[column.name]
            refuse(pc.invert(pc.is_in(values, pa.array(known))), f"{column.name} is none of {', '.join(known)}")
        if pa.types.is_floating(column.type):
            refuse(pc.invert(pc.is_finite(values)), f"{column.name} is not a finite number")
        elif column.type == pa.list_(pa.float64()):
            bad = pc.invert(pc.is_finite(pc.list_flatten(values)))
            rows = pc.filter(pc.list_parent_indices(values), bad)
            refuse(
                pc.is_in(pa.array(np.arange(data.num_rows)), rows), f"{column.name} holds a value that is not finite"
            )
    refuse(
        pc.and_(pc.equal(data["status"], "ok"), pc.is_null(data["latency_ms"])),
        "its status is ok, but it has no latency_ms",
    )
    increment = pc.and_(pc.equal(data["kind"], "block"), pc.equal(data["context"], "sandwich"))
    for name in ("latency_ms", "latency_ref_ms"):
        refuse(pc.and_not(pc.less(data[name], 0), increment), f"{name} is negative, and it is not an increment")
    for name in _TOTALS:
        refuse(pc.less(data[name], 0), f"{name} is negative")
    repeated = data.select(_IDENTITY).to_pandas().duplicated().to_numpy()
    refuse(pa.array(repeated, pa.bool_()), "a second row of this key, kind and context")


def _look(path: Path) -> None:
    """Raises SchemaMismatchError with what `path` is, where it is plainly no parquet file; OSError as ``open`` does."""
    if path.is_dir():
        raise SchemaMismatchError(f"{path} is a directory, not a latency table: give the .parquet file itself")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(4)
        file.seek(max(size - 4, 0))
        tail = file.read(4)
    if not size:
        raise SchemaMismatchError(f"{path} is empty: restore it or make it again")
    if head != b"PAR1":
        raise SchemaMismatchError(
            f"{path} is no parquet file, so no latency table (imports: latbench import FORMAT PATH)"
        )
    if tail != b"PAR1" or size < 12:
        raise SchemaMismatchError(f"{path} is truncated ({size} bytes): restore it or make it again")


def _metadata(path: Path, metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    try:
        meta = json.loads(metadata[_METADATA])
        version = meta["schema"]
    except (KeyError, ValueError, TypeError):
        raise SchemaMismatchError(
            f"{path} is a parquet file, but no latency table: latbench did not write it"
        ) from None
    if version != SCHEMA_VERSION:
        mend = "upgrade latbench" if isinstance(version, int) and version > SCHEMA_VERSION else "make the table again"
        raise SchemaMismatchError(f"{path} has table schema {version}, this latbench reads {SCHEMA_VERSION}: {mend}")
    return dict(meta)


def _conform(path: Path, data: pa.Table) -> pa.Table:
    """The columns of Row in their order; optional ones that an older latbench did not write are null."""
    unknown = sorted(set(data.column_names) - set(_SCHEMA.names))
    wrong = [
        f.name
        for f in _SCHEMA
        if (data.schema.field(f.name).type != f.type if f.name in data.column_names else not f.nullable)
    ]
    if unknown or wrong:
        what = "; ".join(f"{name} is unknown" for name in unknown) or f"missing or of another type: {', '.join(wrong)}"
        raise SchemaMismatchError(f"{path}: its columns are not those of table schema {SCHEMA_VERSION} ({what})")
    columns = [data[f.name] if f.name in data.column_names else pa.nulls(data.num_rows, f.type) for f in _SCHEMA]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _one_line(error: BaseException) -> str:
    return shorten(str(error)) or type(error).__name__
