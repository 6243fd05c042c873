"""``latbench bench``: one network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.values import DTYPE, DURATION, PERCENT, SHAPE, InputShape, format_bytes, format_count, format_ms
from latbench.errors import MeasurementError

if TYPE_CHECKING:
    from latbench.profiling.bench import Bench


@click.command()
@click.argument("model")
@click.option("--device", default="auto", show_default=True, help="Profile name, `cpu`, or `auto`.")
@click.option("--backend", help="Back-end; default: the device's.")
@click.option("--batch", type=click.IntRange(1), help="For torchvision:NAME and SPACE:ARCH.")
@click.option("--resolution", type=click.IntRange(1), help="For torchvision:NAME and SPACE:ARCH.")
@click.option("--dtype", type=DTYPE, help="fp32 or fp16, for SPACE:ARCH.")
@click.option("--shape", "shapes", type=SHAPE, multiple=True, help="Of a dynamic input: input:1x3x224x224.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another setting of the space.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the runtime, on CPUs.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Another option of the back-end.")
@click.option(
    "--fold-bn",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Fold batch norms: what can be, all or refuse, none.",
)
@click.option("--ci", type=PERCENT, default="1%", show_default=True, help="Half-width of the interval to reach.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Worker processes.")
@click.option("--max-time", type=DURATION, default="20s", show_default=True, help="Of timed inference at most.")
@click.option(
    "--cache",
    type=click.Choice(["warm", "cold"]),
    default="warm",
    show_default=True,
    help="Back-to-back inferences, or each with the caches swept.",
)
@click.option(
    "--layers", type=click.IntRange(0), default=10, show_default=True, help="Slowest layers shown; 0: no pass."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the row as a table.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    device: str,
    backend: str | None,
    batch: int | None,
    resolution: int | None,
    dtype: Any,
    shapes: tuple[InputShape, ...],
    settings: tuple[str, ...],
    threads: int,
    options: tuple[str, ...],
    fold_bn: Any,
    ci: float,
    runs: int,
    max_time: float,
    cache: Any,
    layers: int,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure one network: FILE.onnx, torchvision:NAME or SPACE:ARCH.

    ARCH is option indices (0,3,5,...), random:SEED, or a published name of the space.
    """
    from dataclasses import replace

    from latbench.cli.progress import Bar
    from latbench.cli.target import assignment, target_of
    from latbench.measure.base import COLD_SWEEP_BYTES
    from latbench.profiling.bench import BENCH_PLAN, bench, read_model

    plan = replace(
        BENCH_PLAN,
        precision=ci,
        runs=runs,
        sweep_bytes=COLD_SWEEP_BYTES if cache == "cold" else 0,
        max_time_s=max_time,
        min_time_s=min(BENCH_PLAN.min_time_s, max_time),
    )
    target, _ = target_of(device, backend, dtype, threads, options, plan, context="isolated", fold_bn=fold_bn != "off")
    read = read_model(
        model,
        batch=batch,
        resolution=resolution,
        dtype=dtype,
        shapes={shape.name: shape.dims for shape in shapes},
        fold=fold_bn,
        settings=dict(assignment(text) for text in settings),
    )
    with Bar(f"bench {read.name}") as bar:
        result = bench(read, target, layers=layers > 0, reporter=bar)
    if output is not None:
        result.table.write(output)
    if result.row.status != "ok":
        raise MeasurementError(f"{read.name}: {result.row.status} in {result.row.stage}: {result.row.error}")
    if as_json:
        click.echo(json.dumps(_plain(result)))
    else:
        _print(result, layers, output)
    return 0


def _plain(result: Bench) -> dict[str, Any]:
    from dataclasses import asdict

    row = {k: v for k, v in asdict(result.row).items() if k not in ("samples_ms", "signature")}
    report = result.model.folded
    return {
        "model": result.model.name,
        **row,
        "batch_norms": {"folded": len(report.folded), "kept": [list(pair) for pair in report.kept]},
        "layers": result.layers,
        "provenance": result.table.provenance.to_dict(),
    }


def _print(result: Bench, n_layers: int, output: Path | None) -> None:
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
