"""``latbench bench MODEL --compare-backends``: one network on every back-end that works here, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latbench import plugins
from latbench.cli.values import format_ms
from latbench.errors import LatbenchError

if TYPE_CHECKING:
    from latbench.profiling.bench import Bench, Model
    from latbench.profiling.profile import Target


@dataclass(frozen=True)
class Standing:
    """One back-end's figure, or why it has none."""

    backend: str
    bench: Bench | None
    reason: str | None
    latency_ms: float | None = None  # of all back-ends at one clock; as measured where a back-end has no probe
    half: float | None = None  # relative half-width of its interval


def standings(model: Callable[[Target], Model], target: Callable[[str], Target]) -> list[Standing]:
    """Quickest first, then those without a figure. `target` gives a back-end's, by its name; `model` what it runs.

    Each back-end's session states its latencies at the clock that it found; here all are stated at the first one's.
    Simulations are no competitors.
    """
    from latbench.profiling.bench import bench

    found: list[Standing] = []
    clock_us: float | None = None
    for name in plugins.names("latbench.backends"):
        try:
            chosen = target(name)
            if chosen.simulated:
                continue
            result = bench(model(chosen), chosen, layers=False)
        except LatbenchError as error:
            found.append(Standing(name, None, str(error)))
            continue
        row, own_us = result.row, result.table.provenance.clock_ref_us
        if row.status != "ok" or row.latency_ms is None or row.ci_low_ms is None or row.ci_high_ms is None:
            found.append(Standing(name, result, f"{row.status} in {row.stage}: {row.error}"))
            continue
        half = (row.ci_high_ms - row.ci_low_ms) / 2 / (row.latency_ref_ms or row.latency_ms)
        latency_ms = row.latency_ms
        if row.latency_ref_ms is not None and own_us is not None:
            clock_us = clock_us or own_us
            latency_ms = row.latency_ref_ms * clock_us / own_us
        found.append(Standing(name, result, None, latency_ms, half))
    return sorted(found, key=lambda one: (one.latency_ms is None, one.latency_ms or 0.0))


def plain(model: Model, found: list[Standing]) -> dict[str, Any]:
    """For ``--json``."""
    return {"model": model.name, "backends": [_plain(one) for one in found]}


def _plain(one: Standing) -> Mapping[str, Any]:
    if one.bench is None or one.latency_ms is None:
        return {"backend": one.backend, "status": "error", "reason": one.reason}
    row, about = one.bench.row, one.bench.table.provenance
    return {
        "backend": one.backend,
        "status": row.status,
        "latency_ms": one.latency_ms,
        "half_width": one.half,
        "as_measured_ms": row.latency_ms,
        "clock": row.clock,
        "load_ms": row.load_ms,
        "first_inference_ms": row.first_inference_ms,
        "peak_memory_bytes": row.peak_memory_bytes,
        "run_spread": row.run_spread,
        "warnings": list(row.warnings),
        "versions": dict(about.versions),
        "options": dict(about.options),
    }


def show(model: Model, found: list[Standing]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(title=model.name, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("back-end", "latency", "to the first", "clock", "loading", "first run", "version"):
        right = column in ("latency", "to the first", "loading", "first run")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "version")
    fastest = found[0].latency_ms if found else None
    for one in found:
        if one.bench is None or one.latency_ms is None or fastest is None:
            continue
        row, about = one.bench.row, one.bench.table.provenance
        table.add_row(
            one.backend,
            format_ms(one.latency_ms, one.half),
            f"{one.latency_ms / fastest:.2f}x",
            row.clock or "",
            format_ms(row.load_ms or 0),
            format_ms(row.first_inference_ms or 0),
            Text(about.versions.get(one.backend.partition("_")[0], "")),
        )
    console.print(table)
    for one in found:
        if one.latency_ms is None:
            console.print(Text(f"{one.backend}: {one.reason}", "dim"))
