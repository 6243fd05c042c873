"""``LatencyTable``: rows, the provenance they share, notes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latbench.errors import MissingEntryError, ProvenanceConflictError, TableError
from latbench.provenance import Provenance, canonical_json
from latbench.signatures import nearest, shorten
from latbench.tables import stored
from latbench.tables.columns import Columns, InMemory, ragged
from latbench.tables.rows import (
    FIGURES,
    IDENTITY,
    SCHEMA,
    Row,
    check,
    check_identities,
    identities,
    to_columns,
    to_rows,
)

if TYPE_CHECKING:
    import pandas as pd  # a third of a second that some programs need not pay: pyarrow imports it where a frame is made

_BATCH = 4096  # rows that are brought together at a time
_NEAR = 10_000  # rows among which the nearest entry is sought: of more, those of the most similar length
_REF = ("latency_ref_ms", "gross_ref_ms", "ci_low_ms", "ci_high_ms")  # the interval is of latency_ref_ms where it is
_LAST = {"kind": ("stub", "network", "chain", "block"), "context": ("isolated", "sandwich")}  # of one key the last wins


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Rows, the provenance they share, and notes (a JSON mapping: additivity figures, ...). A value.

    ``from_rows`` and ``read`` make one and raise TableError, naming the row, where a value is not finite, a total is
    negative, an ok row has no latency, or two rows have one identity.
    """

    columns: Columns
    provenance: Provenance
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            canonical_json([self.provenance.to_dict(), self.notes])
        except (TypeError, ValueError) as error:
            raise TableError(f"provenance or notes cannot be kept as JSON: {error}") from None

    @classmethod
    def from_rows(
        cls, rows: Iterable[Row], provenance: Provenance, notes: Mapping[str, Any] | None = None
    ) -> LatencyTable:
        """The rows, taken as they come: no more than a few thousand need be there at a time."""
        source, parts = iter(rows), []
        while some := list(islice(source, _BATCH)):
            parts.append(to_columns(some))
        data = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        check(data)
        check_identities(data)
        return cls(Columns((InMemory(data),)), provenance, notes or {})

    def rows(self, *, samples: bool = True) -> Iterator[Row]:
        """The rows as values; without `samples` the raw ones are left empty."""
        for batch in self.columns.batches(SCHEMA.names if samples else FIGURES, _BATCH):
            yield from to_rows(batch)

    @property
    def data(self) -> pa.Table:
        """Every row with every column, in memory."""
        return self.columns.table(SCHEMA.names)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One line per row, every column but the raw samples; a missing number is NaN. Shared: do not mutate."""
        return self.frame_of(*FIGURES)

    def frame_of(self, *names: str) -> pd.DataFrame:
        """``frame`` with these columns alone: of a large table only they are read."""
        frame: pd.DataFrame = self.columns.table(names).to_pandas()
        return frame

    def ragged(self, *names: str) -> Iterator[dict[str, tuple[NDArray[Any], NDArray[np.int64]]]]:
        """Of some thousand rows at a time, each list column as its values end to end and the (n + 1,) rows' offsets."""
        for batch in self.columns.batches(names, _BATCH):
            yield {name: ragged(batch[name]) for name in names}

    def __len__(self) -> int:
        return len(self.columns)

    def select(self, *, kind: str | None = None, status: str | None = None, context: str | None = None) -> LatencyTable:
        """The rows that agree with every argument given."""
        wanted = {"kind": kind, "status": status, "context": context}
        masks = [self._equals(name, value) for name, value in wanted.items() if value is not None]
        return self if not masks else self.take(np.flatnonzero(np.logical_and.reduce(masks)))

    def take(self, positions: Sequence[int] | NDArray[np.int64]) -> LatencyTable:
        """The rows at these positions, in their order."""
        return replace(self, columns=self.columns.take(np.asarray(positions, np.int64)))

    @cached_property
    def _latency(self) -> dict[str, float]:
        """Key -> ms of the ok rows; of several under one key a block before a chain, a network, a stub, and a sandwich
        before an isolated one."""
        keys, ms, *ranks = self._with_ms("key", "kind", "context")
        ranks = [
            pc.index_in(column, pa.array(_LAST[name])).to_numpy() for name, column in zip(_LAST, ranks, strict=True)
        ]
        order = np.lexsort(ranks[::-1])
        return dict(zip(keys.take(order).to_pylist(), ms.to_numpy()[order].tolist(), strict=True))  # later ones win

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
        failed = self.take(np.flatnonzero(self._equals("key", key) & ~self._equals("status", "ok")))
        name = f"{key} on {self.provenance.device_name}"
        if len(failed):
            row = next(failed.take([0]).rows(samples=False))
            signature = signature or row.signature
            where = f" while in {row.stage}" if row.stage else ""
            parts = [
                f"no latency for {name}: its row ended in {row.status}{where}: {shorten(row.error or 'no message')}"
            ]
        else:
            parts = [f"no entry for {name}"]
        if signature:
            parts[0] += f" [{shorten(signature)}]"
            known = self._like(signature)
            if known:
                parts.append("nearest: {} ({})".format(*nearest(signature, known)))
        if self.provenance.command:
            parts.append(f"to measure it, run: {self.provenance.command}")
        return MissingEntryError("; ".join(parts))

    def networks(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(N, D) architectures and (N,) ms of the ok network rows that state one. Raises TableError where D varies."""
        arch, ms = self.select(kind="network")._with_ms("arch")
        stated = pc.is_valid(arch)
        archs = [tuple(one) for one in arch.filter(stated).to_pylist()]
        if len({len(one) for one in archs}) > 1:
            raise TableError("its networks have architectures of different lengths: rows of several spaces")
        width = len(archs[0]) if archs else 0
        return np.array(archs, np.int64).reshape(len(archs), width), ms.filter(stated).to_numpy()

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
        restated = _at_clock(self.columns, other.columns, theirs.clock_ref_us, mine.clock_ref_us)
        columns = self.columns.join(other.columns, restated)
        rank = columns.table((*IDENTITY, "status", "n_samples"))
        ok = pc.equal(rank["status"], "ok").to_numpy()
        codes, n_samples = identities(rank), pc.fill_null(rank["n_samples"], 0).to_numpy()
        order = np.lexsort((n_samples, ok, codes))  # stable: the later one behind
        last = np.append(np.diff(codes[order]) != 0, True)[: len(order)]
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
        return LatencyTable(columns.take(np.sort(order[last])), provenance, notes)

    @classmethod
    def read(cls, path: Path | str) -> LatencyTable:
        """Raises SchemaMismatchError where the file is no table of this schema or is damaged, TableError where there is
        none. Of a large file (``stored``) columns stay where they are until they are asked for, and damage in them is
        told then."""
        path = Path(path)
        columns, meta = stored.read(path)
        with stored.told(path):
            return cls(columns, Provenance.from_dict(meta["provenance"]), meta["notes"])

    def write(self, path: Path | str) -> None:
        """Atomic: a temporary file beside `path`, synced, renamed. Raises TableError; the old file is then intact."""
        stored.write(Path(path), self.columns, self.provenance.to_dict(), self.notes)

    def _equals(self, name: str, value: str) -> NDArray[np.bool_]:
        """(N,) whether a column has this text."""
        return np.asarray(pc.fill_null(pc.equal(self.columns.column(name), value), False).to_numpy(), bool)

    def _with_ms(self, first: str, *more: str) -> list[Any]:
        """A column, the ms (reference clock first), more columns, of the ok rows."""
        ok = self._equals("status", "ok")
        names = (first, "latency_ref_ms", "latency_ms", *more)
        column, ref, raw, *others = (self.columns.column(name).filter(pa.array(ok)) for name in names)
        return [column, pc.coalesce(ref, raw), *others]

    def _like(self, signature: str) -> dict[str, str]:
        """Key -> signature of the ok rows."""
        ok = self.select(status="ok").columns
        if len(ok) > _NEAR:
            lengths = pc.utf8_length(ok.column("signature")).to_numpy()
            ok = ok.take(np.argsort(np.abs(lengths - len(signature)), kind="stable")[:_NEAR])
        return dict(zip(ok.column("key").to_pylist(), ok.column("signature").to_pylist(), strict=True))


def _at_clock(
    mine: Columns, theirs: Columns, source_us: float | None, target_us: float | None
) -> dict[str, pa.ChunkedArray]:
    """The reference latencies of both tables, those of `theirs` restated at the clock of `mine`: a latency is
    proportional to the probe's time. Empty where nothing changes."""
    restated = {*mine.restated, *theirs.restated}
    scale = 1.0
    if source_us is not None and target_us is not None and source_us != target_us:
        scale, restated = target_us / source_us, {*restated, *_REF}
    found = {}
    at_reference = pc.is_valid(theirs.column("latency_ref_ms")) if restated else None
    for name in restated:
        values = theirs.column(name)
        if scale != 1.0 and name in _REF:
            values = pc.if_else(at_reference, pc.multiply(values, scale), values)
        chunks = [*mine.column(name).chunks, *values.chunks]
        found[name] = pa.chunked_array(chunks, SCHEMA.field(name).type).combine_chunks()
    return {name: pa.chunked_array([a]) if isinstance(a, pa.Array) else a for name, a in found.items()}
