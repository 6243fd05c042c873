"""``latbench import``: latencies that others published into a table."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.values import DTYPE, format_ms

if TYPE_CHECKING:
    from latbench.importers.base import Source
    from latbench.tables import LatencyTable

# What each format can be told beside the space's settings and the device.
TAKES: Mapping[str, tuple[str, ...]] = {
    "tfnas": (),
    "aows": (),
    "ofa": ("unit",),
    "help": ("space", "column", "unit"),
    "trtexec": ("model", "column"),
}


@click.command("import")
@click.argument("file_format", metavar="FORMAT", type=click.Choice(list(TAKES)))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The table to write.")
@click.option("--device", help="Name of a device profile, or your own word for what was measured.")
@click.option("--framework", help="What ran the networks: pytorch, tensorrt, tflite, ...")
@click.option("--batch", type=click.IntRange(1), help="Images per inference that the latencies are for.")
@click.option("--resolution", type=int, help="Pixels, square; default: the space's.")
@click.option("--dtype", type=DTYPE, help="fp32 or fp16; default: fp32.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another setting of the space.")
@click.option("--space", help="Of the networks (help): fbnet, nasbench201 or ofa_mbv3.")
@click.option("--column", help="Which latencies, where a file holds several (help, trtexec).")
@click.option("--unit", type=click.Choice(["ms", "us", "s"]), help="Of the latencies, where the file does not say.")
@click.option("--model", help="What trtexec ran: SPACE:ARCH or FILE.onnx.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    file_format: str,
    path: Path,
    output: Path,
    device: str | None,
    framework: str | None,
    batch: int | None,
    resolution: int | None,
    dtype: Any,
    settings: tuple[str, ...],
    space: str | None,
    column: str | None,
    unit: str | None,
    model: str | None,
    as_json: bool,
) -> int:
    """Turn published latencies in FORMAT into a table.

    \b
    tfnas    TF-NAS's pickle: blocks of tfnas, every width
    aows     AOWS's samples (networks of mobilenet_v1) or model (its blocks, fitted); batch 64 unless said
    ofa      once-for-all's YAML: blocks of ofa_mbv3 at one resolution
    help     a column of HELP's or NAS-Bench-201's arrays, parquet or csv: networks
    trtexec  trtexec --exportTimes: one network, all samples

    What the file does not say (unit, batch) is asked for; anything wrong in it is one line, and nothing is written.
    """
    from rich.console import Console

    from latbench.cli.target import assignment

    given = {"space": space, "column": column, "unit": unit, "model": model}
    for name, value in given.items():
        if value is not None and name not in TAKES[file_format]:
            raise click.UsageError(f"{file_format} takes no --{name}")
    chosen = {"batch": batch, "resolution": resolution, "dtype": dtype}
    chosen = {k: v for k, v in chosen.items() if v is not None} | dict(assignment(text) for text in settings)
    with Console(stderr=True).status(f"importing {path.name}"):  # silent where stderr is no terminal
        source = _source(path, device or (column if file_format == "help" else None), framework)
        table = _read(file_format, source, chosen, given)
        table.write(output)
    facts = _facts(table, output)
    click.echo(json.dumps(facts) if as_json else _told(facts))
    return 0


def _source(path: Path, device: str | None, framework: str | None) -> Source:
    """The file, with a device profile's title where the name is one's."""
    from latbench import devices
    from latbench.errors import UsageError
    from latbench.importers.base import Source

    command = shlex.join(["latbench", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "latbench" else ""
    source = Source(path, framework=framework or "unknown", command=command)
    if device is None:
        return source
    try:
        profile = devices.resolve(device)
    except UsageError:
        return replace(source, device=device, device_name=device)
    return replace(source, device=profile.name, device_name=profile.title)


def _read(
    file_format: str, source: Source, settings: Mapping[str, Any], given: Mapping[str, str | None]
) -> LatencyTable:
    if file_format == "tfnas":
        from latbench.importers import tfnas

        return tfnas.read(source, settings)
    if file_format == "aows":
        from latbench.importers import aows

        return aows.read(source, settings)
    if file_format == "ofa":
        from latbench.importers import ofa

        return ofa.read(source, settings, given["unit"])
    if file_format == "help":
        from latbench.importers import arrays

        return arrays.read(source, given["space"] or "", settings, given["column"], given["unit"])
    from latbench.importers import trtexec
    from latbench.profiling.bench import read_model

    if given["model"] is None:
        raise click.UsageError("the times do not say of which network: add --model SPACE:ARCH or --model FILE.onnx")
    others = {name: value for name, value in settings.items() if name not in ("batch", "resolution", "dtype")}
    model = read_model(
        given["model"],
        batch=settings.get("batch"),
        resolution=settings.get("resolution"),
        dtype=settings.get("dtype"),
        settings=others,
    )
    if source.framework == "unknown":
        source = replace(source, framework="tensorrt")
    return trtexec.read(source, model.job.row, model.space, given["column"])


def _facts(table: LatencyTable, output: Path) -> dict[str, Any]:
    latencies_ms = table.frame["latency_ms"]
    kinds = table.frame["kind"].value_counts()
    p = table.provenance
    return {
        "rows": len(table),
        **{f"{kind}s": int(n) for kind, n in kinds.items()},
        "device": p.device,
        "device_name": p.device_name,
        "framework": p.backend,
        "space": p.space,
        "settings": dict(p.settings),
        "min_ms": float(latencies_ms.min()),
        "max_ms": float(latencies_ms.max()),
        "notes": dict(table.notes),
        "output": str(output),
    }


def _told(facts: Mapping[str, Any]) -> str:
    counted = [(kind, facts[f"{kind}s"]) for kind in ("block", "network") if f"{kind}s" in facts]
    parts = [f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counted]
    batch = facts["settings"].get("batch")
    of = f" of {facts['space']}" if facts["space"] else ""
    lines = [
        f"{' and '.join(parts)}{of} on {facts['device_name']}, {facts['framework']}"
        + (f", batch {batch}" if batch else ""),
        f"{format_ms(facts['min_ms'])} to {format_ms(facts['max_ms'])} -> {facts['output']}",
    ]
    if facts["notes"].get("left_out"):
        lines.append(f"left out: {facts['notes']['left_out']} entries that are no block of {facts['space']}")
    return "\n".join(lines)
