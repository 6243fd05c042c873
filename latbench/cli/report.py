"""``latbench report``: one page that tells of tables, models and searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latbench.cli.model import kind_of_file
from latbench.errors import UsageError

if TYPE_CHECKING:
    from latbench.report.gather import Input


@click.command("report")
@click.argument("paths", metavar="TABLE|MODEL|DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
    help="The page; its parquet file and pictures are written beside it.",
)
@click.option("--title", help="Of the page; by default what was measured, on what.")
@click.option("--pictures/--no-pictures", default=True, help="PNG and SVG files of every picture, for papers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the files written, and what the page lacks.")
def command(paths: tuple[Path, ...], output: Path, title: str | None, pictures: bool, as_json: bool) -> None:
    """Write one HTML page about latency TABLEs, fitted MODELs and the folders (DIR) of searches.

    The page needs no network to be viewed. What cannot be told (no networks measured, a search that has not ended) is
    said on the page.
    """
    from rich.console import Console

    from latbench.report.gather import gather
    from latbench.report.page import write_page

    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"cannot write a page into {output}: its name must end in .html")
    given = [(str(path), _read(path)) for path in paths]
    with Console(stderr=True).status("writing the report"):
        sections = gather(given)
        written = write_page(output, title or sections[0].title, sections, pictures=pictures)
    missing = [text for section in sections for text in section.missing]
    if as_json:
        click.echo(json.dumps({"written": [str(path) for path in written], "missing": missing}))
        return
    for path in written:
        click.echo(f"written: {path}")
    for text in missing:
        click.echo(f"missing: {text}")


def _read(path: Path) -> Input:
    """A table, a model, or the folder of a search. Raises TableError where it is a file that is neither."""
    from latbench.oracle import store
    from latbench.tables import LatencyTable

    if path.is_dir():
        return path
    return store.load(path) if kind_of_file(path) == "model" else LatencyTable.read(path)
