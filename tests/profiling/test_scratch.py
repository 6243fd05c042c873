"""Temporary folders: the next run removes what a killed one left, and nobody's who still lives."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latbench.profiling.scratch import GRACE_S, PREFIX, scratch

HOLDER = """
import sys, time
from latbench.profiling.scratch import scratch
with scratch() as folder:
    (folder / "model.onnx").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def age(folder: Path) -> None:
    past = folder.stat().st_mtime - 2 * GRACE_S
    os.utime(folder, (past, past))


def test_a_folder_lives_as_long_as_its_context(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), scratch() as folder:
        (folder / "model.onnx").write_text("x")
        assert folder.parent == tmp_path
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_run_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        age(folder)
        with scratch():
            assert folder.exists()
        holder.kill()
        holder.wait()
        with scratch():
            assert not folder.exists()


def test_a_folder_just_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}new").mkdir()
    with scratch():
        assert (tmp_path / f"{PREFIX}new").exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    for path in (tmp_path / "latbench-other", kept / "file"):
        path.mkdir()
        age(path)
    (tmp_path / f"{PREFIX}link").symlink_to(kept)
    (tmp_path / f"{PREFIX}file").write_text("")
    age(tmp_path / f"{PREFIX}file")
    age(kept)
    with scratch():
        assert (kept / "file").exists()
        assert (tmp_path / "latbench-other").exists()
        assert (tmp_path / f"{PREFIX}file").exists()
