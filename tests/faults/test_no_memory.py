"""Out of memory in the parent and in training: one line, files intact, and the same command goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from runs import KEYS, PROGRAM, Command, Profile, Workers, one_line

from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable
from searchers.results import read_result
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
SEARCH = ["search", "aows", "--table", "t.parquet", "--target", "100us", "--data", "digits", "--max-images", 160]
SEARCH += ["--batch-size", 32, "--epochs", 1, "--set", "adaptive=false"]
LIMIT = "import pathlib, resource; "
LIMIT += "size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize(); "
LIMIT += "resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20),) * 2); "

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")


def test_a_profile_without_memory_is_one_line_and_can_be_gone_on_with(tmp_path: Path, workers: Workers) -> None:
    """Whatever asks for more than there is: here, what puts the rows together."""
    wants = "import sys, latbench.profiling; p = sys.modules['latbench.profiling.profile']; "
    wants += "p._assemble = lambda *a: bytearray(1 << 60); "
    status, out, err = (run := Profile(tmp_path, program=wants + PROGRAM)).end()
    assert (status, out) == (1, "")
    assert "Error: out of memory; files are intact" in one_line(err)
    assert workers(run.pid) == []
    assert list(run.tmp.iterdir()) == []
    before = run.records()
    assert len(before) >= len(KEYS)
    status, _, err = (later := Profile(tmp_path)).end()
    assert (status, err) == (0, "")
    table = LatencyTable.read(later.table)
    samples = {sample for row in table.rows() for sample in row.samples_ms}
    assert sum(set(record["samples_ms"]) <= samples for record in before) >= len(KEYS), "nothing was measured again"


@pytest.mark.slow
def test_a_training_without_memory_is_one_line_and_can_be_gone_on_with(tmp_path: Path) -> None:
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    assert Command(tmp_path, *SEARCH, "-o", "whole", program=_program("")).end()[0] == 0
    # at the third step the process may grow no more, and the step wants what does not fit
    starves = "import searchers.aows as a, torch; s = a.sandwich; n = []; "
    starves += f"starve = lambda: exec({LIMIT!r}) or torch.ones(1 << 26); "
    starves += "a.sandwich = lambda *x: (n.append(1), len(n) == 3 and starve(), s(*x))[-1]; "
    status, out, err = Command(tmp_path, *SEARCH, "-o", "parts", program=_program(starves)).end()
    assert (status, out) == (1, "")
    assert "out of memory at 32 images a step: take a smaller --batch-size; checkpoints are intact" in one_line(err)
    assert Command(tmp_path, *SEARCH, "-o", "parts", program=_program("")).end()[0] == 0
    found, whole = read_result(tmp_path / "parts").result, read_result(tmp_path / "whole").result
    assert (found.arch, found.score, found.notes) == (whole.arch, whole.score, whole.notes)
    assert found.network.read_bytes() == whole.network.read_bytes()


def test_torch_without_memory_outside_a_step_is_one_line(tmp_path: Path) -> None:
    """Its CPU allocator raises a RuntimeError like any other."""
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    wants = "import searchers.aows as a, torch; a.inherit = lambda *x: torch.ones(1 << 50); "
    status, out, err = Command(tmp_path, *SEARCH, "-o", "found", program=_program(wants)).end()
    assert (status, out) == (1, "")
    assert one_line(err).startswith("Error: out of memory (")


def _program(before: str) -> str:
    """With a checkpoint after every step."""
    return (
        "import torch; torch.set_num_threads(1); import searchers.train as t; t.SAVE_EVERY_S = 0; " + before + PROGRAM
    )
