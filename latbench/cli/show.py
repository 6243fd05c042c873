"""``latbench show``: what a table or a fitted model holds, under which conditions, how noisy or how far off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.model import kind_of_file, read_model, validation_in_words
from latbench.cli.values import format_count, format_ms
from latbench.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from latbench.oracle.store import StoredModel
    from latbench.tables import LatencyTable, Row

_SAMPLES = ("samples_ms", "block_sizes", "block_run", "block_flags", "probes_us", "probe_at")
_N_ROWS = 20  # shown in a terminal unless --limit says otherwise


@click.command("show")
@click.argument("path", metavar="TABLE|MODEL")
@click.argument("key", required=False)
@click.option("--sort", metavar="COLUMN", help="Order of the rows: numbers from the largest, texts from A.")
@click.option("--kind", type=click.Choice(["block", "network", "stub"]), help="Only rows of this kind.")
@click.option("--status", type=click.Choice(["ok", "error", "timeout"]), help="Only rows that ended so.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help=f"Rows to show [{_N_ROWS}; with --json: all].")
@click.option("--plot", metavar="FILE", help="Also draw the table into a .png, .svg or .pdf file.")
@click.option(
    "--command", "want_command", is_flag=True, help="Print the command that measures KEY, or the table, again."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with KEY, raw samples included.")
def command(
    path: str,
    key: str | None,
    sort: str | None,
    kind: str | None,
    status: str | None,
    limit: int | None,
    plot: str | None,
    want_command: bool,
    as_json: bool,
) -> None:
    """What TABLE holds; with KEY, or the first digits of one, every column of that row.

    Latencies are at the session's reference clock where the device has a clock probe. Of a fitted MODEL: what it was
    fitted to and how far off it is.
    """
    from latbench.tables import LatencyTable

    if kind_of_file(Path(path)) == "model":
        if key or plot or sort or kind or status or limit is not None:
            raise UsageError(
                f"{path} is a fitted model, which has no rows to choose from: give only --command or --json"
            )
        _show_model(path, want_command, as_json)
        return

    table = LatencyTable.read(path)
    chosen = _choose(table, key or "", sort, kind, status)
    keys = sorted(set(chosen.frame["key"]))
    if key and not keys:
        if table.frame["key"].str.startswith(key).any():
            raise UsageError(f"{path} has {key}, but not with the --kind and --status given: leave them out")
        raise table.missing_entry(key)
    if want_command:
        _print_command(table, path, key, keys, as_json)
        return
    if plot:
        from latbench.report import plot_table

        plot_table(table, plot)
    if as_json:
        shown = chosen if limit is None else chosen.take(range(min(limit, len(chosen))))
        rows = [_plain(row, samples=key is not None) for row in shown.rows()]
        click.echo(json.dumps({**summary(table), "rows": rows}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if key and len(keys) == 1:
        for i, row in enumerate(chosen.rows()):
            console.print(*([""] if i else []), _detail(row), sep="\n")
    else:
        _print_summary(console, summary(table))
        n = min(_N_ROWS if limit is None else limit, len(chosen))
        if n:
            console.print()
            console.print(_row_table(chosen.take(range(n))))
        if n < len(chosen):
            console.print(f"{n} of {len(chosen)} rows; more: --limit N, --sort COLUMN, --kind, --status, or --json")
    if plot:
        console.print(f"picture: {plot}", soft_wrap=True)


def summary(table: LatencyTable) -> dict[str, Any]:
    """What a table says of itself, in JSON values: conditions, counts, noise, failures by reason, notes."""
    import numpy as np

    from latbench import report

    frame, provenance = table.frame, table.provenance
    noise = report.noise(frame)
    failed = frame[frame["status"] != "ok"].astype({"stage": object, "error": object})
    reasons = failed["status"] + failed["stage"].map(lambda s: f" while in {s}" if isinstance(s, str) else "")
    reasons += failed["error"].map(lambda e: f": {' '.join(e.split())}" if isinstance(e, str) else "")
    warnings = frame["warnings"].explode().dropna()
    kinds = ["kind", "context", "status", "origin"]
    counts = frame.groupby(kinds).size().reset_index(name="n").sort_values("n", ascending=False, kind="stable")
    return {
        "provenance": provenance.to_dict(),
        "env_id": provenance.env_id,
        "policy_id": provenance.policy_id,
        "conditions": report.conditions(provenance),
        "n_rows": len(table),
        "counts": [dict(zip([*kinds, "n"], line, strict=True)) for line in counts.to_numpy(object).tolist()],
        "noise": {"median": float(np.median(noise)), "p95": float(np.quantile(noise, 0.95))} if len(noise) else None,
        "failures": {str(reason): int(n) for reason, n in reasons.value_counts().items()},
        "warnings": {str(name): int(n) for name, n in warnings.value_counts().items()},
        "notes": dict(table.notes),
    }


def _choose(table: LatencyTable, key: str, sort: str | None, kind: str | None, status: str | None) -> LatencyTable:
    """The rows asked for, in the order asked for."""
    chosen = table.select(kind=kind, status=status)
    frame = chosen.frame.reset_index(drop=True)
    columns = [name for name in frame.columns if name not in ("arch", "stubs", "warnings")]
    if sort is not None and sort not in columns:
        raise UsageError(f"--sort {sort}: no such column; there are {', '.join(columns)}")
    found = frame[frame["key"].str.startswith(key)]
    if sort is not None:
        is_number = found[sort].dtype.kind in "if"
        found = found.sort_values(sort, ascending=not is_number, kind="stable", na_position="last")
    return chosen.take(found.index.to_numpy())


def _print_command(table: LatencyTable, path: str, key: str | None, keys: list[str], as_json: bool) -> None:
    _need_command(table.provenance.command, path)
    if key and len(keys) > 1:
        raise UsageError(f"{len(keys)} keys begin with {key}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")
    text = table.provenance.remeasure_command(keys[0]) if key else table.provenance.command
    click.echo(json.dumps({"command": text}) if as_json else text)


def _need_command(text: str, path: str) -> None:
    if not text:
        raise UsageError(f"{path} does not say which command made it")


def _show_model(path: str, want_command: bool, as_json: bool) -> None:
    stored = read_model(Path(path))
    if want_command:
        text = str(stored.notes.get("command", ""))
        _need_command(text, path)
        click.echo(json.dumps({"command": text}) if as_json else text)
    elif as_json:
        click.echo(json.dumps(model_summary(stored), indent=2, ensure_ascii=False))
    else:
        _print_model(stored)


def model_summary(stored: StoredModel) -> dict[str, Any]:
    """What a model says of itself, in JSON values: its kind, conditions of its table, notes with its validation."""
    from latbench import report

    provenance = stored.oracle.provenance
    return {
        "oracle": stored.oracle.name,
        "unit": stored.oracle.unit,
        "provenance": provenance.to_dict(),
        "env_id": provenance.env_id,
        "policy_id": provenance.policy_id,
        "conditions": report.conditions(provenance),
        "notes": dict(stored.notes),
    }


def _print_model(stored: StoredModel) -> None:
    """One fact a line, as of a table."""
    from rich.console import Console
    from rich.table import Table

    facts, notes = model_summary(stored), stored.notes
    p = facts["provenance"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    counts = [f"{notes[key]} {key[2:]}" for key in ("n_blocks", "n_networks") if key in notes]
    lines = [
        ("model", stored.oracle.name + "".join(f", {k}={v}" for k, v in notes.get("options", {}).items())),
        ("device", f"{p['device']}: {p['device_name']}"),
        ("space", p["space"]),
        ("conditions", facts["conditions"]),
        ("ids", f"environment {facts['env_id']}, policy {facts['policy_id']}"),
        ("fitted to", " and ".join(counts) + (f" of {notes['table']['path']}" if "table" in notes else "")),
        *(("source", source["path"]) for source in notes.get("sources", ())),
        ("fitted", notes.get("fitted_at", "")),
        *validation_in_words(notes),
        ("command", notes.get("command", "")),
    ]
    for name, text in lines:
        if text:
            grid.add_row(name, text)
    Console(highlight=False, markup=False).print(grid)


def _plain(row: Row, *, samples: bool) -> dict[str, Any]:
    from dataclasses import asdict

    return {name: value for name, value in asdict(row).items() if samples or name not in _SAMPLES}


def _print_summary(console: Console, facts: dict[str, Any]) -> None:
    """One fact a line, names in a column of their own."""
    from rich.table import Table

    p, notes = facts["provenance"], facts["notes"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")

    def say(name: str, text: str) -> None:
        if text:
            grid.add_row(name, text)

    say("device", f"{p['device']}: {p['device_name']}")
    say("space", p["space"])
    say("conditions", facts["conditions"])
    say("ids", f"environment {facts['env_id']}, policy {facts['policy_id']}")
    for c in facts["counts"]:
        what = f"{c['kind']}s" + (" in a sandwich" if c["context"] == "sandwich" else "")
        ended = "" if c["status"] == "ok" else f", {c['status']}"
        say("rows" if c is facts["counts"][0] else "", f"{c['n']} {what}, {c['origin']}{ended}")
    if facts["noise"]:
        say("noise", "median {median:.2%}, 95th percentile {p95:.2%} (half the interval)".format(**facts["noise"]))
    for i, (reason, n) in enumerate(list(facts["failures"].items())[:8]):
        say("" if i else "failed", f"{n} x {reason}")
    say("warnings", ", ".join(f"{n} x {name}" for name, n in facts["warnings"].items()))
    say("sums", _additivity(notes.get("additivity") or {}))
    say("mixed", "; ".join(notes.get("mixed", ())))
    say("command", p["command"])
    console.print(grid)


def _additivity(figures: dict[str, Any]) -> str:
    """Sums of blocks against measured networks, in words."""
    parts = [f"{len(figures['measured_ms'])} networks"] if "measured_ms" in figures else []
    forms = {"mape": "mean error {:.2%}", "bias": "bias {:+.2%}", "spearman": "Spearman {:.4f}"}
    parts += [form.format(figures[name]) for name, form in forms.items() if figures.get(name) is not None]
    return ", ".join(parts) + " (sum of blocks against the network measured)" if parts else ""


def _row_table(table: LatencyTable) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    view.add_column("key", no_wrap=True, min_width=16)
    view.add_column("kind", no_wrap=True)
    view.add_column("block", no_wrap=True, overflow="ellipsis", ratio=1)
    view.add_column("MACs", justify="right", no_wrap=True)
    view.add_column("latency", justify="right", no_wrap=True)
    view.add_column("remarks", no_wrap=True, overflow="ellipsis", ratio=2)
    for row in table.rows():
        remarks = " ".join(", ".join(row.warnings).split())
        if row.status != "ok":
            remarks = " ".join(f"{row.status} {row.stage or ''} {row.error or ''}".split())
        arch = "" if row.arch is None else ",".join(map(str, row.arch))
        macs = "" if row.macs is None else format_count(row.macs)
        texts = (row.key, row.kind, row.block_type or arch, macs, _latency(row), remarks)
        view.add_row(*map(Text, texts))
    return view


def _latency(row: Row) -> str:
    ms = row.latency_ms if row.latency_ref_ms is None else row.latency_ref_ms
    if row.status != "ok" or ms is None:
        return "-"
    if row.ci_low_ms is None or row.ci_high_ms is None or not ms:
        return format_ms(ms)
    return format_ms(ms, (row.ci_high_ms - row.ci_low_ms) / 2 / abs(ms))


def _detail(row: Row) -> RenderableType:
    """Every column that is set; of the samples their number."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _plain(row, samples=False).items():
        if value is None or value == ():
            continue
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        grid.add_row(name, Text(f"{value:.6g}" if isinstance(value, float) and name != "started_at" else text))
    if row.samples_ms:
        grid.add_row("samples", f"{len(row.samples_ms)} kept (--json prints them)")
    return grid
