"""``latbench compare``: what became faster or slower between two tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latbench.cli.model import Shown, print_facts, print_rows
from latbench.cli.values import PERCENT, format_ms
from latbench.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from latbench.compare import Change, Comparison

REGRESSION = 3  # exit status
_N_ROWS = 20
_STYLES = {"SLOWER": "red", "FASTER": "green", "UNSURE": "yellow", "SAME": ""}
_COLUMNS = (
    Shown("verdict"),
    Shown("change", right=True),
    Shown("interval", rank=1, right=True),
    Shown("old", rank=3, right=True),
    Shown("key", rank=2),
    Shown("row", least=8),
)
_ACROSS = ("versions", "backend", "device", "environment", "policy", "space")


@click.command("compare")
@click.argument("old_path", metavar="OLD", type=click.Path(path_type=Path))
@click.argument("new_path", metavar="NEW", type=click.Path(path_type=Path))
@click.option(
    "--threshold", type=PERCENT, default="5%", show_default=True, help="Changes up to this are none, either way."
)
@click.option("--confidence", type=PERCENT, default="95%", show_default=True, help="Of intervals and verdicts.")
@click.option(
    "--across",
    multiple=True,
    type=click.Choice(_ACROSS),
    help="What may differ between the tables because it is what you compare; may be given several times.",
)
@click.option("--limit", type=click.IntRange(0), default=_N_ROWS, show_default=True, help="Rows to print.")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write it: .html, .md or .json; may be given several times.",
)
@click.option("--markdown", is_flag=True, help="Print GitHub-flavoured Markdown, for a pull request.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every row included.")
def command(
    old_path: Path,
    new_path: Path,
    threshold: float,
    confidence: float,
    across: tuple[str, ...],
    limit: int,
    outputs: tuple[Path, ...],
    markdown: bool,
    as_json: bool,
) -> int:
    """Which rows of NEW are SLOWER or FASTER than those of OLD, which are the SAME, and of which the samples cannot
    tell (UNSURE).

    A change counts where it surely exceeds the threshold, however many rows are looked at. Ends with status 3 where a
    row, or the mean of all, is slower; 2 where a row of OLD failed in NEW.
    """
    from latbench.compare import compare
    from latbench.report import comparison_section
    from latbench.tables import LatencyTable

    if markdown and as_json:
        raise UsageError("give --markdown or --json, not both; -o FILE.json writes the other one beside")
    for path in outputs:
        if path.suffix not in (".html", ".md", ".json"):
            raise UsageError(f"cannot write a comparison into {path}: its name must end in .html, .md or .json")
    old, new = LatencyTable.read(old_path), LatencyTable.read(new_path)
    found = compare(old, new, threshold=threshold, confidence=confidence, across=across)
    for path in outputs:
        _write(path, found, str(old_path), str(new_path))
    if as_json:
        click.echo(json.dumps({"old": str(old_path), "new": str(new_path), **found.to_dict()}))
    elif markdown:
        click.echo(comparison_section.markdown(found, str(old_path), str(new_path)), nl=False)
    else:
        _print(found, old_path, new_path, limit)
    if found.regressed:
        return REGRESSION
    return 2 if found.failed else 0


def _write(path: Path, found: Comparison, old: str, new: str) -> None:
    from latbench.report.comparison_section import comparison_section, markdown
    from latbench.report.page import write_page
    from latbench.report.render import save

    if path.suffix == ".html":
        section = comparison_section(found, old, new)
        write_page(path, section.title, [section], pictures=False)
        return
    text = (
        markdown(found, old, new) if path.suffix == ".md" else json.dumps({"old": old, "new": new, **found.to_dict()})
    )
    save(path, text.encode())


def _print(found: Comparison, old: Path, new: Path, limit: int) -> None:
    from rich.console import Console

    from latbench.report.comparison_section import summary

    console = Console(highlight=False, markup=False)
    verdicts, *means = summary(found)
    facts = [
        ("old", str(old)),
        ("new", f"{new}, at {found.clock}"),
        *(("differs", text) for text in found.differs),
        ("rows", verdicts),
        *(("mean", text) for text in means),
        *(("lost", text) for text in found.lost[:5]),
        ("", f"and {len(found.lost) - 5} more" if len(found.lost) > 5 else ""),
        ("skipped", f"{len(found.skipped)} rows: {found.skipped[0]}" if found.skipped else ""),
    ]
    print_facts(console, facts)
    telling = [row for row in found.rows if row.verdict != "SAME"][:limit]
    if telling:
        console.print()
        print_rows(console, _COLUMNS, [_cells(row) for row in telling])
    n_left = sum(row.verdict != "SAME" for row in found.rows) - len(telling)
    if n_left:
        console.print(f"{n_left} more that are not SAME; all: --limit N, --json, or -o FILE.html")


def _cells(row: Change) -> list[Text | str]:
    from rich.text import Text

    change, low, high = (f"{100 * (value - 1):+.1f}" for value in (row.ratio, row.low, row.high))
    verdict = Text(row.verdict, style=_STYLES[row.verdict])
    return [verdict, f"{change} %", f"{low} to {high} %", format_ms(row.old_ms), row.key, row.name]
