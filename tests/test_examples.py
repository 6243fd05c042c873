"""Every example runs as a user would run it, on small spaces."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable
from searchers.testing import roofline_table

EXAMPLES = Path(__file__).parents[1] / "examples"
SPACE = MobileNetV1Space(resolution=32, levels=4, num_classes=10)


def run(*args: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """stdout of ``python ARGS``; anything on stderr, or another exit status than 0, fails."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env={**os.environ, **(env or {})}
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    roofline_table(SPACE).write(path)
    return path


def test_a_space_of_ones_own_is_profiled(tmp_path: Path) -> None:
    out = run(EXAMPLES / "profile_my_space.py", "--networks", 5, "-o", tmp_path / "t.parquet")
    assert out.startswith("256 networks from 30 blocks; ")
    assert "sums of blocks are 0.00% off 5 networks" in out
    assert len(LatencyTable.read(tmp_path / "t.parquet").select(kind="block", status="ok")) == 30


def test_a_back_end_of_ones_own_is_known_to_every_command(tmp_path: Path) -> None:
    project = EXAMPLES / "add_a_backend"
    point = re.search(r"^reference = .*$", (project / "pyproject.toml").read_text(), re.MULTILINE)
    assert point is not None
    info = tmp_path / "latbench_reference-1.0.dist-info"  # what pip install leaves
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: latbench-reference\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[latbench.backends]\n" + point[0].replace('"', "") + "\n")
    path = os.pathsep.join([str(project), str(tmp_path)])
    model = ["mobilenet_v1:narrowest", "--resolution", 8, "--runs", 1, "--max-time", "50ms"]
    out = run(
        "-c",
        "from latbench.cli import main; main()",
        "bench",
        *model,
        "--backend",
        "reference",
        env={"PYTHONPATH": path},
    )
    assert "reference" in out
    assert re.search(r"latency +[\d.]+ .?s", out)


def test_an_oracle_steers_a_training_loop_to_its_target(table: Path) -> None:
    pytest.importorskip("torch", reason="the search extra is not installed")
    low, high = (float(roofline_latency(name)) for name in ("narrowest", "widest"))
    target = 0.5 * (low + high)
    out = run(EXAMPLES / "train_with_oracle.py", table, "--target", target, "--steps", 150)
    found = re.search(r"latency ([\d.]+) ms", out)
    assert found is not None
    assert 0.8 * target <= float(found[1]) <= 1.1 * target


def test_widths_under_two_budgets_keep_both_and_use_one(table: Path) -> None:
    target = 0.5 * (roofline_latency("narrowest") + roofline_latency("widest"))
    out = run(EXAMPLES / "two_budgets.py", table, target, table, 10 * target)
    used = [float(text) for text in re.findall(r"([\d.]+) ms of", out)]
    assert len(used) == 2
    assert 0.97 * target <= used[0] <= target * (1 + 1e-4)  # as printed
    assert used[1] == used[0]


def roofline_latency(name: str) -> float:
    """ms of a published network by the table of ``roofline_table``."""
    from latbench.oracle.lut import LutOracle

    return LutOracle.fit(roofline_table(SPACE)).latency(SPACE.published[name])


def test_two_runtimes_are_compared_block_by_block(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    pytest.importorskip("vl_convert", reason="the report extra is not installed")
    out = run(
        EXAMPLES / "compare_runtimes.py", "onnxruntime", "openvino", "--resolution", 16, "--levels", 1,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert out.startswith("### latbench: ")
    assert "- differs: backend: onnxruntime / openvino" in out
    assert (tmp_path / "out" / "comparison.html").stat().st_size > 500_000
    assert (tmp_path / "out" / "comparison_pictures" / "comparison-changes.png").exists()


def test_every_example_is_listed_and_run() -> None:
    listed = set(re.findall(r"^\| `([\w./]+)` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    there = {path.name for path in EXAMPLES.glob("*.py")} | {"add_a_backend/"}
    assert listed == there
    tests = Path(__file__).read_text()
    assert all(name.strip("/") in tests for name in there)
