"""``latbench predict``: what a model, or a table, says of architectures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.model import kind_of_file, read_oracle
from latbench.cli.values import PERCENT, format_ms
from latbench.errors import UsageError

if TYPE_CHECKING:
    from latbench.oracle.base import Model


@click.command("predict")
@click.argument("path", metavar="MODEL|TABLE", type=click.Path(path_type=Path))
@click.argument("texts", metavar="ARCH...", nargs=-1, required=True)
@click.option("--confidence", type=PERCENT, default="90%", show_default=True, help="Of the interval.")
@click.option(
    "--missing",
    type=click.Choice(["error", "interpolate"]),
    default="error",
    show_default=True,
    help="Where a block has no entry: refuse, or take the widths on both sides of it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: Path, texts: tuple[str, ...], confidence: float, missing: str, as_json: bool) -> None:
    """What MODEL says of architectures; a TABLE answers as in a search: by sums of its blocks, corrected by what
    networks and chains of blocks it holds.

    ARCH is option indices (0,3,5,...), random:SEED, or a published name of the space.
    """
    import numpy as np

    if not 0 < confidence < 1:
        raise UsageError(f"--confidence must lie between 0% and 100%, got {confidence:.0%}")
    oracle = _oracle(path, missing)
    parsed = [oracle.space.parse_arch(text) for text in texts]
    archs = np.array(parsed, np.int64)
    latencies, interval = oracle.latencies(archs), oracle.interval(archs, confidence)
    answers = []
    for i, (text, arch) in enumerate(zip(texts, parsed, strict=True)):
        ends = (None, None) if interval is None else (float(interval[0][i]), float(interval[1][i]))
        answers.append(
            {
                "name": text,
                "arch": list(arch),
                "latency_ms": float(latencies[i]),
                "low_ms": ends[0],
                "high_ms": ends[1],
                "sources": dict(oracle.sources(arch)),
            }
        )
    if as_json:
        head = {"file": str(path), "oracle": oracle.name, "space": oracle.space.name, "confidence": confidence}
        click.echo(json.dumps({**head, "device": oracle.provenance.device_name, "predictions": answers}))
    else:
        _print(oracle, answers, confidence)


def _oracle(path: Path, missing: str) -> Model:
    """What answers: the model in `path`, or the table's default oracle, as in a search."""
    from latbench.oracle.factors import FactorOracle
    from latbench.oracle.lut import interpolate

    oracle = read_oracle(path, missing)
    if missing == "interpolate" and kind_of_file(path) == "model" and isinstance(oracle, FactorOracle):
        return replace(oracle, factors=tuple(interpolate(oracle.space, f) for f in oracle.factors))
    return oracle


def _print(oracle: Model, answers: list[dict[str, Any]], confidence: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    simulated = all("simulated" in answer["sources"] for answer in answers)
    on = f"{oracle.provenance.device_name}{' (simulated)' if simulated else ''}"
    console.print(f"{oracle.space.name} on {on}, predicted by {oracle.name}")
    view = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    view.add_column("architecture", overflow="fold")
    view.add_column("latency", justify="right", no_wrap=True)
    has_interval = answers[0]["low_ms"] is not None
    if has_interval:
        view.add_column(f"{100 * confidence:g} % interval", justify="right", no_wrap=True)
    view.add_column("from", overflow="fold")
    for answer in answers:
        ends = [f"{format_ms(answer['low_ms'])} to {format_ms(answer['high_ms'])}"] if has_interval else []
        view.add_row(_named(answer), format_ms(answer["latency_ms"]), *ends, _sources(answer["sources"]))
    console.print(view)


def _named(answer: Mapping[str, Any]) -> str:
    """As typed; a name with the indices that it stands for."""
    indices = ",".join(map(str, answer["arch"]))
    return indices if answer["name"].replace(" ", "") == indices else f"{answer['name']} = {indices}"


def _sources(counts: Mapping[str, int]) -> str:
    """ "29 measured, 1 interpolated": the terms of the answer by where they come from, the most trustworthy first."""
    from latbench.oracle.base import SOURCES

    return ", ".join(f"{counts[source]} {source}" for source in SOURCES if counts.get(source))
