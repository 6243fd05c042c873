"""``Row``, the columns that rows make, and what no column may hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latbench.errors import TableError
from latbench.graph.ir import Graph


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
    latency_ms: float | None = None  # as measured, of the blocks that count: see measure.base.SamplingPlan
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
IDENTITY = ("key", "kind", "context")
JUDGED = (*IDENTITY, "status")  # what a column is checked against
SAMPLES = ("samples_ms", "block_sizes", "block_run", "probes_us", "probe_at", "block_flags")
_TOTALS = ("gross_ms", "gross_ref_ms", "mean_ms", "std_ms", "min_ms", "p90_ms", "p99_ms", "first_inference_ms")


def _field(name: str, hint: Any) -> pa.Field:
    optional = NoneType in get_args(hint)
    (inner,) = (h for h in get_args(hint) if h is not NoneType) if optional else (hint,)
    arrow = {str: pa.string(), int: pa.int64(), float: pa.float64(), Literal: pa.string()}
    if get_origin(inner) is tuple:
        return pa.field(name, pa.list_(arrow[get_args(inner)[0]]), nullable=optional)
    return pa.field(name, arrow[get_origin(inner) or inner], nullable=optional)


SCHEMA = pa.schema([_field(f.name, _HINTS[f.name]) for f in fields(Row)])
FIGURES = tuple(name for name in SCHEMA.names if name not in SAMPLES)
CHOICES = {name: get_args(hint) for name, hint in _HINTS.items() if get_origin(hint) is Literal}
_LISTS = tuple(f.name for f in SCHEMA if pa.types.is_list(f.type))


def to_rows(data: pa.Table) -> Iterator[Row]:
    """The rows of columns as values; a list column that is not there is empty."""
    lists = [name for name in _LISTS if name in data.column_names]
    for raw in data.to_pylist():
        yield Row(**{**raw, **{name: tuple(raw[name]) for name in lists if raw[name] is not None}})


def to_columns(rows: list[Row]) -> pa.Table:
    """Inverse of ``to_rows``."""
    columns = [pa.array([getattr(row, f.name) for row in rows], f.type) for f in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def identities(data: pa.Table) -> NDArray[np.int64]:
    """(N,) numbers, equal where key, kind and context are."""
    keys = pc.dictionary_encode(data["key"]).combine_chunks()
    codes = (keys.chunk(0) if isinstance(keys, pa.ChunkedArray) else keys).indices.to_numpy(zero_copy_only=False)
    codes = codes.astype(np.int64)
    for name in ("kind", "context"):
        known = pa.array(CHOICES[name])
        codes = codes * len(known) + pc.index_in(data[name], known).to_numpy()
    return np.asarray(codes, np.int64)


def check(data: pa.Table, first: int = 0) -> None:
    """Raises TableError, naming the row (the first one is number `first`), where a value of these columns cannot be.

    ``JUDGED`` must be among them: a value is not finite, a total is negative, an ok row has no latency.
    """

    def refuse(mask: Any, why: str) -> None:
        i = pc.index(pc.fill_null(mask, False), True).as_py()
        if i >= 0:
            key, kind, context = (data[name][i].as_py() for name in IDENTITY)
            raise TableError(f"row {first + i} ({kind} {key}, {context}): {why}")

    for column in data.schema:
        values = data[column.name]
        if not column.nullable:
            refuse(pc.is_null(values), f"{column.name} is missing")
        if column.name in CHOICES:
            known = CHOICES[column.name]
            refuse(pc.invert(pc.is_in(values, pa.array(known))), f"{column.name} is none of {', '.join(known)}")
        if pa.types.is_floating(column.type):
            refuse(pc.invert(pc.is_finite(values)), f"{column.name} is not a finite number")
        elif column.type == pa.list_(pa.float64()):
            finite = pc.is_finite(pc.list_flatten(values))
            if not pc.all(finite).as_py():  # which row it is costs more
                rows = pc.filter(pc.list_parent_indices(values), pc.invert(finite))
                numbers = pa.array(np.arange(data.num_rows))
                refuse(pc.is_in(numbers, rows), f"{column.name} holds a value that is not finite")
    names = set(data.column_names)
    if "latency_ms" in names:
        lacks = pc.and_(pc.equal(data["status"], "ok"), pc.is_null(data["latency_ms"]))
        refuse(lacks, "its status is ok, but it has no latency_ms")
    increment = pc.and_(pc.equal(data["kind"], "block"), pc.equal(data["context"], "sandwich"))
    for name in ("latency_ms", "latency_ref_ms"):
        if name in names:
            refuse(pc.and_not(pc.less(data[name], 0), increment), f"{name} is negative, and it is not an increment")
    for name in _TOTALS:
        if name in names:
            refuse(pc.less(data[name], 0), f"{name} is negative")


def check_identities(data: pa.Table) -> None:
    """Raises TableError where two rows have one identity."""
    found = identities(data)
    order = np.argsort(found, kind="stable")
    repeated = order[1:][np.diff(found[order]) == 0]
    if len(repeated):
        i = int(repeated.min())
        key, kind, context = (data[name][i].as_py() for name in IDENTITY)
        raise TableError(f"row {i} ({kind} {key}, {context}): a second row of this key, kind and context")
