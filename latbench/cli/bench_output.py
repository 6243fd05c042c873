"""What ``latbench bench`` says of a measured network: tables for people, plain data for ``--json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from statistics import median, stdev
from typing import TYPE_CHECKING, Any

from latbench.cli.values import format_bytes, format_count, format_ms

if TYPE_CHECKING:
    from latbench.profiling.bench import Bench, Model
    from latbench.profiling.throughput import Throughput
    from latbench.tables import Row

SATURATED = 1.5  # times the error that int8 itself costs


def plain(result: Bench) -> dict[str, Any]:
    """The result as data for ``--json``, without raw samples."""
    row = {k: v for k, v in asdict(result.row).items() if k not in ("samples_ms", "signature")}
    report = result.model.folded
    return {
        "model": result.model.name,
        **row,
        "batch_norms": {"folded": len(report.folded), "kept": [list(pair) for pair in report.kept]},
        "int8": asdict(result.model.int8) if result.model.int8 else None,
        "layers": result.layers,
        "provenance": result.table.provenance.to_dict(),
    }


def show(result: Bench, n_layers: int, output: Path | None) -> None:
    """Prints the figures and the `n_layers` slowest layers; `output` is the table written beside, if any."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    row, about = result.row, result.table.provenance
    assert row.latency_ms is not None  # its status is ok
    assert row.ci_low_ms is not None
    assert row.ci_high_ms is not None
    centre = row.latency_ref_ms if row.latency_ref_ms is not None else row.latency_ms
    half = (row.ci_high_ms - row.ci_low_ms) / 2 / centre
    word = "simulated latency" if row.origin == "simulated" else "latency"
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    threads = about.options.get("threads")
    runtime = about.versions.get(about.backend, "")
    on = f"{about.device_name}, {about.backend} {runtime}" + (f", {threads} thread(s)" if threads else "")
    facts.add_row("model", Text(result.model.name))
    facts.add_row("on", Text(on))
    interval = (
        ""
        if row.origin == "simulated"
        else f" (95 % interval; {row.n_samples} samples, {row.n_blocks} blocks, {row.n_runs} processes)"
    )
    facts.add_row(word, Text(format_ms(row.latency_ms, half) + interval))
    if row.latency_ref_ms is not None:
        facts.add_row("at the reference clock", format_ms(row.latency_ref_ms))
    spread = [f"min {format_ms(row.min_ms or 0)}"]
    for name, value, least in (("p90", row.p90_ms, 29), ("p99", row.p99_ms, 299)):
        spread.append(f"{name} {format_ms(value)}" if value is not None else f"{name} needs {least} samples")
    spread.append(f"between processes {row.run_spread or 0:.2%}")
    facts.add_row("spread", ", ".join(spread))
    facts.add_row(
        "first inference", f"{format_ms(row.first_inference_ms or 0)} after {format_ms(row.load_ms or 0)} of loading"
    )
    if row.macs:
        facts.add_row("MACs", f"{format_count(row.macs)} ({row.macs / row.latency_ms / 1e6:.1f} GMAC/s)")
    if row.n_params is not None:
        facts.add_row("parameters", f"{row.n_params:,} ({format_count(row.n_params)})")
    if row.peak_memory_bytes:
        facts.add_row("peak memory", f"{format_bytes(row.peak_memory_bytes)} (worker process, runtime included)")
    report = result.model.folded
    if report.folded or report.kept:
        kept = f", {len(report.kept)} kept: {report.kept[0][0]}: {report.kept[0][1]}" if report.kept else ""
        facts.add_row("batch norms", Text(f"{len(report.folded)} folded{kept}"))
    if result.model.int8 is not None:
        facts.add_row("int8", Text(_int8_line(result.model)))
    if row.conditions:
        said = json.loads(row.conditions).items()
        facts.add_row(
            "conditions", Text(", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in said))
        )
    if row.warnings:
        facts.add_row("warnings", ", ".join(row.warnings))
    console = Console(highlight=False)
    console.print(facts)
    if result.layers:
        _print_layers(console, result.layers, n_layers, Table)
    if output is not None:
        console.print(Text(f"row written to {output}"))


def _print_layers(console: Any, layers: list[dict[str, Any]], limit: int, table_class: Any) -> None:
    total = sum(layer["ms"] for layer in layers)
    table = table_class(
        title=f"slowest of {len(layers)} layers (a pass of its own: {format_ms(total)} in all)", title_justify="left"
    )
    for column, justify in (("layer", "left"), ("op", "left"), ("time", "right"), ("share", "right")):
        table.add_column(column, justify=justify, overflow="ellipsis", no_wrap=True)
    for layer in sorted(layers, key=lambda layer: -layer["ms"])[:limit]:
        share = layer["ms"] / total if total else 0.0
        table.add_row(layer["name"], layer["op"], format_ms(layer["ms"]), f"{share:.1%}")
    console.print(table)


def _int8_line(model: Model) -> str:
    report = model.int8
    assert report is not None
    how = "min-max" if report.percentile is None else f"{report.percentile:.4%} of the values at either end"
    here = report.error_here
    off = "" if here is None else f", with this processor's int8 kernels by {here:.2%}"
    if here is not None and here > SATURATED * report.error:
        off += ", more than int8 costs: so on x86 without VNNI, whose sums of 16 bits saturate; times hold"
    return (
        f"{report.n_tensors} activations calibrated on {report.n_samples} samples ({how}); "
        f"outputs change by {report.error:.2%} (RMS){off}"
    )


def plain_throughput(found: Throughput) -> dict[str, Any]:
    """For ``--json``."""
    return {"throughput": {**asdict(found), "versions": dict(found.versions), "options": dict(found.options)}}


def show_throughput(found: Throughput, model: Model) -> None:
    """Prints the figure."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    half = (found.high_per_s - found.low_per_s) / 2 / found.per_s
    threads = found.options.get("threads")
    facts.add_row("model", Text(found.model))
    runtime = f"{found.backend} {found.versions.get(found.backend, '')}"
    facts.add_row("on", Text(f"{found.device_name}, {runtime}, {found.streams} streams of {threads} thread(s)"))
    facts.add_row(
        "throughput",
        f"{found.per_s:.4g} inferences/s ± {half:.1%} (95 % interval; {found.n_samples} samples, "
        f"{found.n_runs} processes, between them {found.run_spread:.2%})",
    )
    facts.add_row("in flight", f"{format_ms(found.ms_in_flight)} an inference: no latency, {found.streams} run at once")
    if model.int8 is not None:
        facts.add_row("int8", Text(_int8_line(model)))
    if found.warnings:
        facts.add_row("warnings", ", ".join(found.warnings))
    Console(highlight=False).print(facts)


def build_variance(row: Row) -> dict[str, Any]:
    """How the builds of a row differ: every block of samples loads, and so builds, its model anew."""
    ends = list(accumulate(row.block_sizes))
    medians = [median(row.samples_ms[end - n : end]) for n, end in zip(row.block_sizes, ends, strict=True)]
    return {
        "n": len(medians),
        "latency_ms": medians,
        "median_ms": median(medians),
        "std": stdev(medians) / median(medians) if len(medians) > 1 else None,
        "spread": (max(medians) - min(medians)) / median(medians),
    }


def builds_line(figures: Mapping[str, Any]) -> str:
    """How far repeated builds of one engine are apart, in one line."""
    least, most = (format_ms(edge(figures["latency_ms"])) for edge in (min, max))
    return (
        f"{figures['n']} builds: {least} to {most} (as measured), spread {figures['spread']:.2%}, "
        f"standard deviation {figures['std'] or 0:.2%}"
    )
