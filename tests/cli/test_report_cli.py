"""``latbench report``: a table, a model and a search in one page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from command_line import refused, run
from found import make_found

from latbench.oracle.lut import LutOracle
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable, Row
from searchers.testing import roofline_table

pytest.importorskip("vl_convert", reason="the report extra is not installed")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All blocks of a small space, and five networks 2 % slower than their sums."""
    blocks = roofline_table(MobileNetV1Space(resolution=32, levels=2, num_classes=10))
    oracle = LutOracle.fit(blocks)
    archs = [tuple(int(i == j) for j in range(14)) for i in range(5)]
    networks = [
        Row(f"n{i}", "network", "s", arch=arch, macs=10**7 + i, latency_ms=1.02 * oracle.latency(arch))
        for i, arch in enumerate(archs)
    ]
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    LatencyTable.from_rows([*blocks.rows(), *networks], blocks.provenance).write(path)
    return path


def test_a_table_a_model_and_a_search_make_one_page_with_its_pictures(table: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "m.npz", tmp_path / "out" / "r.html"
    out.parent.mkdir()
    assert run("fit", table, "--oracle", "lut", "-o", model).exit_code == 0
    folder = make_found(tmp_path / "run", LatencyTable.read(table))
    result = run("report", table, model, folder, "-o", out, "--title", "A & B", "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["written"] == [str(out), str(out.with_suffix(".parquet")), str(tmp_path / "out" / "r_pictures")]
    assert any("not measured yet" in text for text in told["missing"])
    text = out.read_text()
    assert "<h1>A &amp; B</h1>" in text
    assert text.count("<section ") == 3
    pictures = {path.name for path in (tmp_path / "out" / "r_pictures").iterdir()}
    assert {"part1-latency.png", "part1-latency.svg", "part2-predictions.svg", "part3-network.png"} <= pictures
    n_figures = text.count("<figcaption>")
    assert len(pictures) == 2 * n_figures
    rows = pd.read_parquet(out.with_suffix(".parquet"))
    assert (rows["table"] == "All rows").sum() == len(LatencyTable.read(table))


def test_without_pictures_only_the_page_and_its_rows_are_written(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    result = run("report", table, "-o", out, "--no-pictures")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"written: {out}\n" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "r.parquet"}


def test_what_is_no_table_model_or_search_is_one_line(table: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hello")
    out = tmp_path / "r.html"
    assert "no parquet file" in refused("report", tmp_path / "t.txt", "-o", out)
    assert "holds no search" in refused("report", tmp_path, "-o", out)
    assert "its name must end in .html" in refused("report", table, "-o", tmp_path / "r.pdf")
    assert "Missing argument" in refused("report", "-o", out)
    assert "cannot write" in refused("report", table, "-o", tmp_path / "t.txt" / "r.html")
    assert not out.exists()
