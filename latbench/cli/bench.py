"""``latbench bench``: one network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from latbench.cli import measuring
from latbench.cli.values import DURATION, PERCENT, SHAPE, InputShape, Quantity, parse_dtype
from latbench.errors import EnvironmentUnfitError, MeasurementError, UsageError, shown

if TYPE_CHECKING:
    from latbench.graph.ir import DType
    from latbench.profiling import Target
    from latbench.profiling.bench import Model


def parse_precision(text: str) -> Literal["float32", "float16", "int8"]:
    """As ``parse_dtype``, and "int8". Raises UsageError."""
    if text.strip().lower() == "int8":
        return "int8"
    try:
        return parse_dtype(text)
    except UsageError:
        raise UsageError(f"unknown dtype {shown(text)}: fp32, fp16 or int8") from None


@click.command()
@click.argument("model")
@measuring.DEVICE
@measuring.BACKEND
@click.option("--batch", type=click.IntRange(1), help="For torchvision:NAME and SPACE:ARCH.")
@click.option("--resolution", type=click.IntRange(1), help="For torchvision:NAME and SPACE:ARCH.")
@click.option(
    "--dtype",
    type=Quantity("dtype", parse_precision),
    help="fp32 or fp16, for SPACE:ARCH; int8, for every fp32 model, with --calibration.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Data for int8: .npy, .npz (arrays named as the inputs, samples first) or a folder of images.",
)
@click.option(
    "--percentile", type=PERCENT, help="Of a tensor's values that int8 covers at either end (99.99%); default: all."
)
@click.option("--shape", "shapes", type=SHAPE, multiple=True, help="Of a dynamic input: input:1x3x224x224.")
@measuring.RUNTIME
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
@click.option("--throughput", is_flag=True, help="Inferences a second, several at once; no latency.")
@click.option(
    "--streams", type=click.IntRange(1), metavar="N", help="For --throughput: how many at once; default: the runtime's."
)
@click.option(
    "--load-limit", type=DURATION, help="Of loading or building the model; default: 2min, TensorRT's builds 30min."
)
@measuring.LOCK_CLOCKS
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the row as a table.")
@measuring.JSON
def command(
    model: str,
    device: str,
    backend: str | None,
    batch: int | None,
    resolution: int | None,
    dtype: Any,
    calibration: Path | None,
    percentile: float | None,
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
    throughput: bool,
    streams: int | None,
    load_limit: float | None,
    lock_clocks: int | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure one network: FILE.onnx, torchvision:NAME or SPACE:ARCH.

    ARCH is option indices (0,3,5,...), random:SEED, or a published name of the space.
    """
    from dataclasses import replace

    from latbench.cli import bench_output
    from latbench.cli.progress import Bar
    from latbench.cli.target import assignment, clock_held, target_of
    from latbench.measure.base import COLD_SWEEP_BYTES
    from latbench.profiling.bench import BENCH_PLAN, bench, read_model

    _refuse_unfit(dtype, calibration, percentile, streams, throughput)
    alone_only = {"--builds": builds, "--output": output}
    if compare_backends:
        given = {"--backend": backend, "--option": options, **alone_only, "--lock-clocks": lock_clocks}
        _refuse(given, "--compare-backends", "is for one back-end")
    if throughput:
        given = {"--compare-backends": compare_backends, **alone_only, "--cache": cache != "warm"}
        _refuse(given, "--throughput", "is for latencies")
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
        float_dtype: DType | None = "float32" if dtype == "int8" else dtype
        chosen, _ = target_of(device, name, float_dtype, threads, options, plan, **rest)
        if load_limit is not None:
            chosen = replace(chosen, plan=replace(chosen.plan, load_limit_s=load_limit))
        if builds is None:
            return chosen
        fresh: Mapping[str, Any] = getattr(chosen.backend_class, "fresh_build", {})
        return replace(chosen, options={**chosen.options, **fresh})

    alone = None if compare_backends else target(backend)
    read = read_model(
        model,
        batch=batch,
        resolution=resolution,
        dtype=None if dtype == "int8" else dtype,
        shapes={shape.name: shape.dims for shape in shapes},
        fold=fold_bn,
        settings=dict(assignment(text) for text in settings),
    )

    def fitted(target: Target) -> Model:
        """The model as the target's back-end is to run it."""
        return read if calibration is None else read.in_int8(target.backend_class, calibration, percentile)

    if alone is None:
        return _compare(read, fitted, target, as_json=as_json)
    chosen = fitted(alone)
    if throughput:
        return _throughput(chosen, alone, streams or 0, as_json=as_json)
    with clock_held(alone), Bar(f"bench {read.name}") as bar:
        result = bench(chosen, alone, layers=layers > 0, reporter=bar)
    if output is not None:
        result.table.write(output)
    if result.row.status != "ok":
        raise MeasurementError(f"{read.name}: {result.row.status} in {result.row.stage}: {result.row.error}")
    variance = bench_output.build_variance(result.row) if builds else None
    if as_json:
        click.echo(json.dumps({**bench_output.plain(result), **({"builds": variance} if variance else {})}))
    else:
        bench_output.show(result, layers, output)
        if variance:
            click.echo(bench_output.builds_line(variance))
    return 0


def _throughput(model: Model, target: Target, streams: int, *, as_json: bool) -> int:
    from latbench.cli import bench_output
    from latbench.cli.progress import Bar
    from latbench.cli.target import clock_held
    from latbench.profiling.throughput import throughput

    with clock_held(target), Bar(f"bench {model.name}") as bar:
        found = throughput(model, target, streams, reporter=bar)
    if as_json:
        click.echo(json.dumps(bench_output.plain_throughput(found)))
    else:
        bench_output.show_throughput(found, model)
    return 0


def _compare(model: Model, fitted: Callable[[Target], Model], target: Callable[[str], Target], *, as_json: bool) -> int:
    from latbench.cli import bench_backends

    found = bench_backends.standings(fitted, target)
    if as_json:
        click.echo(json.dumps(bench_backends.plain(model, found)))
    else:
        bench_backends.show(model, found)
    return 0 if any(one.latency_ms is not None for one in found) else EnvironmentUnfitError.exit_status


def _refuse(options: Mapping[str, object], beside: str, why: str) -> None:
    for name, value in options.items():
        if value:
            raise UsageError(f"{name} {why}: leave it out, or leave out {beside}")


def _refuse_unfit(
    dtype: str | None, calibration: Path | None, percentile: float | None, streams: int | None, throughput: bool
) -> None:
    """Options that need each other."""
    if dtype == "int8" and calibration is None:
        raise UsageError("--dtype int8 needs data to calibrate on: --calibration FILE (.npy, .npz, a folder of images)")
    if dtype != "int8" and (calibration is not None or percentile is not None):
        raise UsageError(f"--{'percentile' if calibration is None else 'calibration'} is for --dtype int8")
    if percentile is not None and not 0.5 < percentile < 1:
        raise UsageError(f"--percentile {percentile:.4%}: between 50% and 100%, such as 99.99%")
    if streams is not None and not throughput:
        raise UsageError("--streams is for --throughput")
