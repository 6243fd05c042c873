"""``latbench show``: what a table, a fitted model or a search's folder holds, under which conditions, how far off."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.model import Shown, kind_of_file, print_facts, print_rows, read_model
from latbench.cli.summaries import model_facts, model_summary, result_facts, table_facts, table_summary
from latbench.cli.values import format_count, format_ms, parse_duration, parse_latency
from latbench.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from latbench.tables import LatencyTable, Row

_SAMPLES = ("samples_ms", "block_sizes", "block_run", "block_flags", "probes_us", "probe_at")
_N_ROWS = 20  # shown in a terminal unless --limit says otherwise
_CONDITION = re.compile(r"(\w+)\s*(<=|>=|!=|<|>|=|~)\s*(.*)")
_COLUMNS = (
    Shown("key"),
    Shown("kind", rank=2),
    Shown("block", rank=1, least=10),
    Shown("MACs", rank=3, right=True),
    Shown("latency", right=True),
    Shown("remarks", rank=4, least=16),
)


@click.command("show")
@click.argument("path", metavar="TABLE|MODEL|DIR")
@click.argument("key", required=False)
@click.option("--sort", metavar="COLUMN", help="Order of the rows: numbers from the largest, texts from A.")
@click.option("--reverse", is_flag=True, help="The other way round: numbers from the smallest, texts from Z.")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Only rows such as latency_ms>0.5ms, macs<=1000000, block_type=stem, signature~Conv2d; several: all hold.",
)
@click.option("--kind", metavar="KIND", help="Only rows of this kind: block, network, stub, ...")
@click.option("--status", type=click.Choice(["ok", "error", "timeout"]), help="Only rows that ended so.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help=f"Rows to show [{_N_ROWS}; with --json: all].")
@click.option("--plot", metavar="FILE", help="Also draw the table into a .png, .svg or .pdf file.")
@click.option(
    "--command", "want_command", is_flag=True, help="Print the command that measures KEY, or the table, again."
)
@click.option("--cite", is_flag=True, help="Print one sentence for a paper: device, versions, policy, n, interval.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with KEY, raw samples included.")
def command(
    path: str,
    key: str | None,
    sort: str | None,
    reverse: bool,
    conditions: tuple[str, ...],
    kind: str | None,
    status: str | None,
    limit: int | None,
    plot: str | None,
    want_command: bool,
    cite: bool,
    as_json: bool,
) -> None:
    """What TABLE holds; with KEY, or the first digits of one, every column of that row.

    Latencies are at the session's reference clock where the device has a clock probe. Of a fitted MODEL: what it was
    fitted to and how far off it is. Of a search's DIR: what was found.
    """
    from latbench.tables import LatencyTable

    what = "search's folder" if Path(path, "result.json").is_file() else kind_of_file(Path(path))
    if what in ("model", "search's folder"):
        if key or plot or sort or reverse or conditions or kind or status or cite or limit is not None:
            what = f"fitted {what}" if what == "model" else what
            raise UsageError(f"{path} is a {what}, which has no rows to choose from: give only --command or --json")
        (_show_model if what == "model" else _show_result)(path, want_command, as_json)
        return

    table = LatencyTable.read(path)
    chosen = _choose(table, key or "", sort, reverse, conditions, kind, status)
    keys = sorted(chosen.frame_of("key")["key"].unique())
    if key and not keys:
        if table.frame_of("key")["key"].str.startswith(key).any():
            raise UsageError(f"{path} has {key}, but not with the --kind, --status and --where given: leave them out")
        raise table.missing_entry(key)
    if want_command:
        _print_command(table, path, key, keys, as_json)
    elif cite:
        _cite(chosen, as_json)
    else:
        _show_table(table, chosen, key, limit, plot, as_json)


def _show_table(
    table: LatencyTable, chosen: LatencyTable, key: str | None, limit: int | None, plot: str | None, as_json: bool
) -> None:
    """The summary of `table` and its `chosen` rows; of one row every column."""
    if plot:
        from latbench.report import plot_table

        plot_table(table, plot)
    if as_json:
        shown = chosen if limit is None else chosen.take(range(min(limit, len(chosen))))
        rows = [_plain(row, samples=key is not None) for row in shown.rows(samples=key is not None)]
        click.echo(json.dumps({**table_summary(table), "rows": rows}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if key and chosen.frame_of("key")["key"].nunique() == 1:
        for i, row in enumerate(chosen.rows()):
            if i:
                console.print()
            print_facts(console, _detail(row))
    else:
        print_facts(console, table_facts(table_summary(table)))
        n = min(_N_ROWS if limit is None else limit, len(chosen))
        if n:
            console.print()
            print_rows(console, _COLUMNS, [_cells(row) for row in chosen.take(range(n)).rows(samples=False)])
        if n < len(chosen):
            console.print(f"{n} of {len(chosen)} rows; more: --limit N, --sort COLUMN, --where CONDITION, or --json")
        elif not n and len(table):
            console.print("no row meets what was asked for")
    if plot:
        console.print(f"picture: {plot}", soft_wrap=True)


def _choose(
    table: LatencyTable,
    key: str,
    sort: str | None,
    reverse: bool,
    conditions: tuple[str, ...],
    kind: str | None,
    status: str | None,
) -> LatencyTable:
    """The rows asked for, in the order asked for."""
    from latbench.tables.rows import FIGURES

    if reverse and sort is None:
        raise UsageError("--reverse turns the order of --sort COLUMN: give that too")
    kinds = sorted(table.frame_of("kind")["kind"].unique()) if kind is not None else []
    if kinds and kind not in kinds:
        raise UsageError(f"--kind {kind}: no such rows; there are {', '.join(kinds)}")
    chosen = table.select(kind=kind, status=status)
    columns = [name for name in FIGURES if name not in ("arch", "stubs", "warnings")]
    if sort is not None and sort not in columns:
        raise UsageError(f"--sort {sort}: no such column; there are {', '.join(columns)}")
    asked = [_asked(condition, columns) for condition in conditions]
    frame = chosen.frame_of(*dict.fromkeys(["key", *(name for name, _, _ in asked), *([sort] if sort else [])]))
    found = frame[frame["key"].str.startswith(key)]
    for condition, (name, operator, text) in zip(conditions, asked, strict=True):
        found = found[_holds(found[name], operator, text, condition)]
    if sort is not None:
        is_number = found[sort].dtype.kind in "if"
        found = found.sort_values(sort, ascending=is_number == reverse, kind="stable", na_position="last")
    return chosen.take(found.index.to_numpy())


def _asked(condition: str, columns: list[str]) -> tuple[str, str, str]:
    """ "latency_ms>0.5ms" -> column, operator, value. Raises UsageError."""
    match = _CONDITION.fullmatch(condition.strip())
    if match is None:
        raise UsageError(f"--where {condition!r}: write COLUMN, one of < <= > >= = != ~, and a value")
    name, operator, text = match.groups()
    if name not in columns:
        raise UsageError(f"--where {name}: no such column; there are {', '.join(columns)}")
    return name, operator, text


def _holds(column: pd.Series[Any], operator: str, text: str, condition: str) -> pd.Series[bool]:
    """Which rows meet a condition. A row without the figure meets none but !=. Raises UsageError."""
    name = column.name
    is_number = column.dtype.kind in "if"
    if operator == "~" or not is_number:
        if operator not in ("~", "=", "!="):
            raise UsageError(f"--where {condition!r}: {name} holds texts, which take = != and ~ (contains)")
        words = column.astype(object).where(column.notna(), "").astype(str)
        equal: pd.Series[bool] = words.str.contains(text, regex=False) if operator == "~" else words == text
        return ~equal if operator == "!=" else equal
    value = _number(str(name), text, condition)
    compared = {"<": column.lt, "<=": column.le, ">": column.gt, ">=": column.ge, "=": column.eq, "!=": column.ne}
    held: pd.Series[bool] = compared[operator](value)
    return held


def _number(name: str, text: str, condition: str) -> float:
    """A number, or a duration with its unit where the column has one. Raises UsageError."""
    try:
        return float(text)
    except ValueError:
        pass
    if name.endswith("_ms"):
        return parse_latency(text)
    if name.endswith("_s"):
        return parse_duration(text)
    raise UsageError(f"--where {condition!r}: {text!r} is no number")


def _cite(table: LatencyTable, as_json: bool) -> None:
    from latbench.report.words import citation

    text = citation(table)
    click.echo(json.dumps({"citation": text}) if as_json else text)


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
    from rich.console import Console

    stored = read_model(Path(path))
    if want_command:
        text = str(stored.notes.get("command", ""))
        _need_command(text, path)
        click.echo(json.dumps({"command": text}) if as_json else text)
    elif as_json:
        click.echo(json.dumps(model_summary(stored), indent=2, ensure_ascii=False))
    else:
        print_facts(Console(highlight=False, markup=False), model_facts(stored))


def _show_result(path: str, want_command: bool, as_json: bool) -> None:
    from rich.console import Console

    if want_command:
        raise UsageError(f"{path} does not say which command made it; its result.json holds every setting")
    if as_json:
        click.echo(json.dumps(json.loads(Path(path, "result.json").read_text()), indent=2, ensure_ascii=False))
    else:
        print_facts(Console(highlight=False, markup=False), result_facts(Path(path)))


def _plain(row: Row, *, samples: bool) -> dict[str, Any]:
    from dataclasses import asdict

    return {name: value for name, value in asdict(row).items() if samples or name not in _SAMPLES}


def _cells(row: Row) -> list[str]:
    remarks = " ".join(", ".join(row.warnings).split())
    if row.status != "ok":
        remarks = " ".join(f"{row.status} {row.stage or ''} {row.error or ''}".split())
    arch = "" if row.arch is None else ",".join(map(str, row.arch))
    macs = "" if row.macs is None else format_count(row.macs)
    return [row.key, row.kind, row.block_type or arch, macs, _latency(row), remarks]


def _latency(row: Row) -> str:
    ms = row.latency_ms if row.latency_ref_ms is None else row.latency_ref_ms
    if row.status != "ok" or ms is None:
        return "-"
    if row.ci_low_ms is None or row.ci_high_ms is None or not ms:
        return format_ms(ms)
    return format_ms(ms, (row.ci_high_ms - row.ci_low_ms) / 2 / abs(ms))


def _detail(row: Row) -> list[tuple[str, str]]:
    """Every column that is set; of the samples their number."""
    facts = []
    for name, value in _plain(row, samples=False).items():
        if value is not None and value != ():
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            facts.append((name, f"{value:.6g}" if isinstance(value, float) and name != "started_at" else text))
    if row.samples_ms:
        facts.append(("samples", f"{len(row.samples_ms)} kept (--json prints them)"))
    return facts
