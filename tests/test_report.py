from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latbench.errors import TableError, UsageError
from latbench.report import conditions, noise, plot_table
from latbench.tables import LatencyTable, Provenance, Row

mpimg = pytest.importorskip("matplotlib.image", reason="the report extra is not installed")

PROVENANCE = Provenance(
    device="cpu",
    device_name="Xeon $x_1$ 50%",  # a device's name is text, not TeX
    backend="onnxruntime",
    versions={"onnxruntime": "1.20.0"},
    space="mobilenet_v1",
    settings={"batch": 1, "resolution": 224, "dtype": "float32"},
    options={"threads": 1},
    policy={"context": "sandwich"},
    finished_at="2026-01-02T03:04:05+00:00",
)


def blocks(n: int, *, types: int = 4, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    macs = (10 ** rng.uniform(5, 9, n)).astype(int)
    ms = macs / 10 ** rng.normal(7.5, 0.2, n)
    return [
        Row(
            f"b{i}", "block", f"s{i}", "sandwich", site=f"site{i % 9}", block_type=f"type {i % types}",
            macs=int(macs[i]), latency_ms=float(ms[i]), ci_low_ms=float(ms[i] * 0.99), ci_high_ms=float(ms[i] * 1.01),
            run_spread=0.01,
        )
        for i in range(n)
    ]  # fmt: skip


def failures(n: int) -> list[Row]:
    return [Row(f"f{i}", "block", f"f{i}", "sandwich", status="error", stage="load", error="refused") for i in range(n)]


ADDITIVITY = {"predicted_ms": [1.0, 2.1], "measured_ms": [1.0, 2.0], "mape": 0.025, "bias": 0.025, "spearman": 1.0}
FLAT = [replace(row, key=f"z{row.key}", latency_ms=-0.001, ci_low_ms=-0.002, ci_high_ms=0.0) for row in blocks(5)]
NETWORKS = [Row(f"n{i}", "network", f"n{i}", arch=(i,), macs=10**8 + i, latency_ms=3.0 + i) for i in range(5)]


@pytest.mark.parametrize(
    ("rows", "notes"),
    [
        (blocks(60) + FLAT + NETWORKS + failures(3), {"additivity": ADDITIVITY}),
        (blocks(1), {}),
        (FLAT[:1], {}),
        (NETWORKS[:1], {"additivity": {"predicted_ms": [1.0], "measured_ms": [1.0], "spearman": None}}),
        (failures(4), {}),
        ([], {}),
        ([replace(row, macs=None) for row in blocks(3)], {"additivity": {}}),
        ([replace(row, ci_low_ms=None, ci_high_ms=None, run_spread=None) for row in blocks(40, types=20)], {}),
        ([replace(row, ci_low_ms=row.latency_ms, ci_high_ms=row.latency_ms) for row in blocks(3)], {}),
        ([replace(row, latency_ms=0.5, macs=10**6, block_type=None) for row in blocks(3)], {}),
    ],
    ids=[
        "full",
        "one",
        "one flat",
        "one network",
        "failures",
        "empty",
        "no MACs",
        "many types",
        "no noise",
        "one point",
    ],
)
def test_any_table_has_a_picture_of_1200_by_700_pixels(tmp_path: Path, rows: list[Row], notes: dict[str, Any]) -> None:
    plot_table(LatencyTable.from_rows(rows, PROVENANCE, notes), tmp_path / "t.png")
    assert mpimg.imread(tmp_path / "t.png").shape == (700, 1200, 4)


def svg_texts(table: LatencyTable, path: Path, **more: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # texts stay texts
        plot_table(table, path, **more)
    return path.read_text()


def test_the_picture_says_what_it_cannot_draw(tmp_path: Path) -> None:
    rows = blocks(60) + FLAT + NETWORKS + failures(3) + [replace(blocks(1)[0], key="bare", macs=None)]
    table = LatencyTable.from_rows(rows, PROVENANCE, {"additivity": ADDITIVITY})
    text = svg_texts(table, tmp_path / "t.svg")
    for words in (
        "3 of 74 rows failed",
        "5 increments at or below 0",
        "1 without MACs, not drawn",
        "whole networks (5)",
        "onnxruntime 1.20.0, 1 thread, batch 1, 224 px, float32, sandwich, 2026-01-02",
        ">mobilenet_v1 on Xeon $x_1$ 50%<",
        "mean error 2.5 %",
        "Spearman 1.000",
        "GMAC/s",
    ):
        assert words in text, words
    assert "no row succeeded" in svg_texts(LatencyTable.from_rows(failures(2), PROVENANCE), tmp_path / "f.svg")
    assert "my own" in svg_texts(table, tmp_path / "own.svg", title="my own")
    both = [replace(r, context="isolated", block_type="stem") for r in blocks(3)] + blocks(3, types=1)
    assert "stem, isolated (3)" in svg_texts(LatencyTable.from_rows(both, PROVENANCE), tmp_path / "b.svg")
    simulated = LatencyTable.from_rows([replace(r, origin="simulated") for r in blocks(3)], PROVENANCE)
    assert "(simulated)" in svg_texts(simulated, tmp_path / "s.svg")


def test_thousands_of_rows_stay_a_small_vector_file(tmp_path: Path) -> None:
    plot_table(LatencyTable.from_rows(blocks(4_000), PROVENANCE), tmp_path / "t.pdf")
    assert (tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "t.pdf").stat().st_size < 1_000_000


def test_noise_is_half_the_interval_over_the_latency_at_the_reference_clock() -> None:
    rows = [
        Row("a", "block", "a", latency_ms=9.0, latency_ref_ms=2.0, ci_low_ms=1.9, ci_high_ms=2.1),
        Row("b", "block", "b", "sandwich", latency_ms=-0.5, ci_low_ms=-0.6, ci_high_ms=-0.4),
        Row("c", "block", "c", latency_ms=1.0),
        Row("d", "block", "d", latency_ms=0.0, ci_low_ms=0.0, ci_high_ms=0.0),
    ]
    assert noise(LatencyTable.from_rows(rows, PROVENANCE).frame) == pytest.approx([0.05, 0.2])


def test_conditions_leave_out_what_is_not_recorded() -> None:
    assert conditions(Provenance("x", "y", "imported")) == "imported"
    several = replace(PROVENANCE, options={"threads": 4}, finished_at="", started_at="2026-05-06T00:00:00")
    assert conditions(several).endswith("4 threads, batch 1, 224 px, float32, sandwich, 2026-05-06")


def test_a_file_that_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    table = LatencyTable.from_rows(blocks(1), PROVENANCE)
    for name in ("t.jpg", "t", "t.png.txt"):
        with pytest.raises(UsageError, match=r"must end in \.png, \.svg, \.pdf"):
            plot_table(table, tmp_path / name)
    with pytest.raises(TableError, match=r"cannot write the picture .*: No such file or directory"):
        plot_table(table, tmp_path / "absent" / "t.png")


def test_without_matplotlib_the_error_says_what_to_install_and_pyplot_is_never_loaded(tmp_path: Path) -> None:
    code = """
import sys
from latbench.errors import UsageError
from latbench.report import plot_table
from latbench.tables import LatencyTable, Provenance
assert not any(name.startswith("matplotlib") for name in sys.modules)
table = LatencyTable.from_rows([], Provenance("cpu", "Xeon", "onnxruntime"))
plot_table(table, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
try:
    plot_table(table, sys.argv[1])
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "t.png"], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "pictures need matplotlib: pip install 'latbench[report]'\n"
