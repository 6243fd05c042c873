"""What the formats share: the file and what is known of it, checked numbers, rows of blocks and networks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from latbench.errors import TableError, UsageError, shown
from latbench.graph.ir import Graph
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, SearchSpace, Site
from latbench.tables import Row

MAX_BYTES = 256 * 2**20  # of any file: the largest public table is 20 MiB
MAX_JSON = 32 * 2**20  # letters of one JSON value: two are a list of 64 bytes in memory
MAX_MS = 1e9  # of one inference, 11 days: beyond it a figure is damage, and squares of it leave the floats

_TO_MS: Mapping[str, Callable[[float], float]] = {  # divisions, not products: 0.001 is no binary fraction
    "ms": lambda value: value,
    "us": lambda value: value / 1000,
    "s": lambda value: value * 1000,
}
UNITS = tuple(_TO_MS)


@dataclass(frozen=True)
class Source:
    """A file of figures, and what is known of how they were made."""

    path: Path
    device: str = "unknown"  # name of a device profile, or the user's own word
    device_name: str = "unknown"
    framework: str = "unknown"
    versions: Mapping[str, str] | None = None
    command: str = ""

    @cached_property
    def data(self) -> bytes:
        """The file's bytes. Raises TableError where it cannot be read or exceeds ``MAX_BYTES``."""
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise TableError(f"{self.path} is larger than {MAX_BYTES >> 20} MiB: no published table is")
            data = self.path.read_bytes()
        except OSError as error:
            raise TableError(f"cannot read {self.path}: {error.strerror}; check the path") from None
        if not data:
            raise TableError(f"{self.path} is empty")
        return data

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def text(self) -> str:
        """The file as UTF-8. Raises TableError where it is something else."""
        try:
            return self.data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TableError(f"{self.path} is no text: byte {error.start} is not UTF-8") from None

    def wrong(self, where: str, why: str) -> TableError:
        """What to raise about one place of the file."""
        return TableError(f"{self.path}: {where}: {why}; nothing was imported")

    def provenance(self, space: SearchSpace | None, file_format: str, **facts: Any) -> Provenance:
        """Of a table made from this file. `facts`: further conditions, JSON values."""
        return Provenance(
            device=self.device,
            device_name=self.device_name,
            backend=self.framework,
            versions=dict(self.versions or {}),
            space=space.name if space else "",
            settings=space.settings() if space else {},
            policy={"imported": file_format, **facts},
            command=self.command,
            finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            parents=(self.sha256,),
        )


def to_ms(source: Source, value: Any, unit: str, where: str, *, zero: bool = False) -> float:
    """`value` in ms. Raises TableError, naming `where`, unless it is a positive (`zero`: or no) finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise source.wrong(where, f"{shown(value)} is no number")
    try:
        ms = _TO_MS[unit](float(value))
    except OverflowError:
        ms = math.inf
    if not math.isfinite(ms) or ms < 0 or (ms == 0 and not zero) or ms > MAX_MS:
        least = "no less than" if zero else "above"
        raise source.wrong(where, f"a latency of {ms} ms: it must be finite, {least} 0, and no more than {MAX_MS:g}")
    return ms


def known_unit(unit: str | None, hint: str = "") -> str:
    """The unit that was given, or that a column's name holds (``latency_ms_1080ti``). Raises UsageError."""
    named = [part for part in hint.lower().split("_") if part in ("ms", "us")]
    if unit is not None and unit not in UNITS:
        raise UsageError(f"unknown unit {shown(unit)}: {', '.join(UNITS)}")
    if unit is not None and named and named[0] != unit:
        raise UsageError(f"--unit {unit}, but the column is called {hint}")
    if unit is None and not named:
        raise UsageError("the file does not say its unit: add --unit ms, --unit us or --unit s")
    return unit or named[0]


def unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=...)``: refuses what JSON lets pass, a name that repeats."""
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"{shown(name)} appears twice")
        out[name] = value
    return out


def parse_json(source: Source, text: str, where: str) -> Any:
    """One JSON value. Raises TableError, naming `where`."""
    if len(text) > MAX_JSON:
        raise source.wrong(where, f"larger than {MAX_JSON >> 20} MiB: no published table is")
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise source.wrong(where, f"not JSON, or cut off ({why})") from None


def json_lines(source: Source) -> Iterator[tuple[str, Any]]:
    """("line 3", value) of a file with one JSON value a line; blank lines are passed over."""
    for i, line in enumerate(source.text.splitlines(), 1):
        if line.strip():
            yield f"line {i}", parse_json(source, line, f"line {i}")


def block_row(graph: Graph, space: SearchSpace, site: Site, latency_ms: float, **more: Any) -> Row:
    """A block's row."""
    known = {"space": space.name, "site": site.name, "block_type": site.block_type, "origin": "imported"}
    return Row.of(graph, "block", latency_ms=latency_ms, **{**known, **more})


def network_rows(source: Source, space: SearchSpace, measured: Iterable[tuple[str, Arch, float]]) -> list[Row]:
    """(where, architecture, ms) in measuring order -> rows. Raises TableError where an architecture repeats.

    Several architectures may spell one graph: NAS-Bench-201 cells with different edges that reach no output. Frameworks
    that run eagerly execute those edges, and the published figures of one graph differ by up to 2.2 times. So each
    spelling keeps its row: the first without idle parts has the graph's key, the others have ``key~ARCH``, and no
    figure stands for a graph that was not what ran. Cost: building a network's graph, 1 to 2 ms each.
    """
    rows: dict[str, Row] = {}
    seen: dict[Arch, str] = {}
    for order, (where, arch, ms) in enumerate(measured):
        if arch in seen:
            raise source.wrong(where, f"the architecture of {seen[arch]} once more")
        seen[arch] = where
        try:
            graph = space.network(arch)
        except UsageError as error:
            raise source.wrong(where, str(error)) from None
        is_graph = graph.key not in rows and space.canonical(arch) == arch
        key = graph.key if is_graph else f"{graph.key}~{space.format_arch(arch)}"
        known = {"space": space.name, "block_type": "network", "arch": arch, "order": order, "origin": "imported"}
        rows[key] = Row.of(graph, "network", key=key, latency_ms=ms, **known)
    if not rows:
        raise source.wrong("all of it", "holds no measurement")
    return list(rows.values())
