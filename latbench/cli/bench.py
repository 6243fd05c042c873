"""``latbench bench``: one network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from statistics import median, stdev
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.values import DTYPE, DURATION, PERCENT, SHAPE, InputShape, format_bytes, format_count, format_ms
from latbench.errors import EnvironmentUnfitError, MeasurementError, UsageError

if TYPE_CHECKING:
    from latbench.profiling import Target
    from latbench.profiling.bench import Bench, Model
    from latbench.tables import Row


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
@click.option("--compare-backends", is_flag=True, help="On every back-end that works here; one table.")
@click.option(
    "--builds",
    type=click.IntRange(2),
    metavar="B",
    help="Build the model so often, without a timing cache, and tell how the builds differ.",
)
@click.option(
    "--lock-clocks",
    type=click.IntRange(1),
    metavar="MHZ",
    help="Hold the GPU's clock there while measuring, and free it again (needs root).",
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
    compare_backends: bool,
    builds: int | None,
    lock_clocks: int | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure one network: FILE.onnx, torchvision:NAME or SPACE:ARCH.

    ARCH is option indices (0,3,5,...), random:SEED, or a published name of the space.
    """
    from dataclasses import replace

    from latbench.cli.progress import Bar
    from latbench.cli.target import assignment, clock_held, target_of
    from latbench.measure.base import COLD_SWEEP_BYTES
    from latbench.profiling.bench import BENCH_PLAN, bench, read_model

    if compare_backends:
        alone_only = {"--backend": backend, "--option": options, "--builds": builds, "--output": output}
        _refuse_with_comparison({**alone_only, "--lock-clocks": lock_clocks})
    plan = replace(
        BENCH_PLAN,
        precision=ci,
        runs=builds or runs,
        sweep_bytes=COLD_SWEEP_BYTES if cache == "cold" else 0,
        max_time_s=max_time,
        min_time_s=min(BENCH_PLAN.min_time_s, max_time),
    )

    def target(name: str | None) -> Target:
        rest = {"clock_mhz": lock_clocks, "context": "isolated", "fold_bn": fold_bn != "off"}
        chosen, _ = target_of(device, name, dtype, threads, options, plan, **rest)
        if builds is None:
            return chosen
        fresh: Mapping[str, Any] = getattr(chosen.backend_class, "fresh_build", {})
        return replace(chosen, options={**chosen.options, **fresh})

    alone = None if compare_backends else target(backend)
    read = read_model(
        model,
        batch=batch,
        resolution=resolution,
        dtype=dtype,
        shapes={shape.name: shape.dims for shape in shapes},
        fold=fold_bn,
        settings=dict(assignment(text) for text in settings),
    )
    if alone is None:
        return _compare(read, target, as_json=as_json)
    with clock_held(alone), Bar(f"bench {read.name}") as bar:
        result = bench(read, alone, layers=layers > 0, reporter=bar)
    if output is not None:
        result.table.write(output)
    if result.row.status != "ok":
        raise MeasurementError(f"{read.name}: {result.row.status} in {result.row.stage}: {result.row.error}")
    if as_json:
        click.echo(json.dumps({**_plain(result), **({"builds": build_variance(result.row)} if builds else {})}))
    else:
        _print(result, layers, output)
        if builds:
            click.echo(_builds_line(build_variance(result.row)))
    return 0


def _compare(model: Model, target: Callable[[str], Target], *, as_json: bool) -> int:
    from latbench.cli import bench_backends

    found = bench_backends.standings(model, target)
    if as_json:
        click.echo(json.dumps(bench_backends.plain(model, found)))
    else:
        bench_backends.show(model, found)
    return 0 if any(one.latency_ms is not None for one in found) else EnvironmentUnfitError.exit_status


def _refuse_with_comparison(options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise UsageError(f"{name} is for one back-end: leave it out, or leave out --compare-backends")


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


def _builds_line(figures: Mapping[str, Any]) -> str:
    least, most = (format_ms(edge(figures["latency_ms"])) for edge in (min, max))
    return (
        f"{figures['n']} builds: {least} to {most} (as measured), spread {figures['spread']:.2%}, "
        f"standard deviation {figures['std'] or 0:.2%}"
    )


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
