"""``latbench compare``: exit statuses, the four forms of its answer, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, run

from latbench.tables import LatencyTable

DATA = Path(__file__).parents[1] / "data"
OLD, NEW = DATA / "blocks200-first.parquet", DATA / "blocks200-second.parquet"


@pytest.fixture(scope="module")
def slower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NEW with 10 % added to every sample of 20 rows."""
    table = LatencyTable.read(NEW)
    chosen = set(np.random.default_rng(0).choice(len(table), 20, replace=False).tolist())
    rows = [
        replace(row, samples_ms=tuple(1.1 * s for s in row.samples_ms)) if i in chosen else row
        for i, row in enumerate(table.rows())
    ]
    path = tmp_path_factory.mktemp("slower") / "slower.parquet"
    LatencyTable.from_rows(rows, table.provenance).write(path)
    return path


def test_the_same_blocks_twice_end_with_status_0() -> None:
    result = run("compare", OLD, NEW)
    assert result.exit_code == 0
    assert "Of 200 rows 1 UNSURE, 199 SAME (threshold 5.0%)." in " ".join(result.stdout.split())
    assert result.stdout.count("UNSURE") == 2


def test_a_regression_ends_with_status_3_and_is_named(slower: Path) -> None:
    found = json.loads(run("compare", OLD, slower, "--json").stdout)
    named = [row for row in found["rows"] if row["verdict"] == "SLOWER"]
    assert len(named) >= 18
    assert found["regressed"]
    result = run("compare", OLD, slower, "--limit", 3)
    assert result.exit_code == 3
    assert result.stdout.count("SLOWER") == 4  # three rows, and the count
    assert named[0]["key"] in result.stdout
    assert f"{found['counts']['SLOWER'] + found['counts']['UNSURE'] - 3} more that are not SAME" in result.stdout
    assert run("compare", OLD, slower, "--threshold", "20%").exit_code == 0


def test_markdown_is_a_headline_a_summary_and_a_table(slower: Path) -> None:
    result = run("compare", OLD, slower, "--markdown")
    lines = result.stdout.splitlines()
    assert lines[0] == "### latbench: regression beyond 5.0%"
    at = lines.index("| verdict | row | change | 95 % interval | old | new |")
    assert lines[at + 1] == "|---|---|---:|---:|---:|---:|"
    assert all(line.count("|") == 7 for line in lines[at : at + 10])
    assert "<details><summary>" in result.stdout
    assert run("compare", OLD, NEW, "--markdown").stdout.startswith("### latbench: no change beyond 5.0%\n")


def test_it_is_written_in_every_form_beside(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="the report extra is not installed")
    outputs = [tmp_path / f"c.{suffix}" for suffix in ("html", "md", "json")]
    assert run("compare", OLD, NEW, *(word for path in outputs for word in ("-o", path))).exit_code == 0
    html, markdown, text = (path.read_text() for path in outputs)
    assert "blocks200-second.parquet against" in html
    assert markdown.startswith("### latbench")
    assert len(json.loads(text)["rows"]) == 200


@pytest.mark.parametrize("columns", [60, 100])
def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, slower: Path) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, run("compare", OLD, slower).stdout.splitlines())) <= columns


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    table = LatencyTable.read(NEW)
    other = tmp_path / "other.parquet"
    replace(table, provenance=replace(table.provenance, versions={"onnxruntime": "2"})).write(other)
    assert "say so: --across versions" in refused("compare", OLD, other)
    assert run("compare", OLD, other, "--across", "versions").exit_code == 0
    assert "its name must end in .html, .md or .json" in refused("compare", OLD, NEW, "-o", tmp_path / "c.txt")
    assert "not both" in refused("compare", OLD, NEW, "--json", "--markdown")
    assert "no percentage" in refused("compare", OLD, NEW, "--threshold", "five")


def test_a_row_that_fails_in_the_new_table_ends_with_status_2(tmp_path: Path) -> None:
    table = LatencyTable.read(OLD)
    first, *rest = table.rows()
    lost = replace(first, status="error", stage="load", error="refused", latency_ms=None, latency_ref_ms=None)
    path = tmp_path / "t.parquet"
    LatencyTable.from_rows([lost, *rest], table.provenance).write(path)
    result = run("compare", OLD, path)
    assert result.exit_code == 2
    assert "error while in load: refused" in result.stdout
