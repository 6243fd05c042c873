"""Temporary folders: that of a killed run is removed at once, or by the next run, and nobody's who still lives."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from latbench.errors import MeasurementError
from latbench.files import locked
from latbench.profiling.scratch import PREFIX, room_bytes, scratch

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


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a folder, and the folder."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def heirs(folder: Path) -> list[int]:
    """Pids of the shells that wait to remove it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (path / "cmdline").read_bytes().split(b"\0")
            if argv[0] == b"/bin/sh" and str(folder).encode() in argv:
                found.append(int(path.name))
    return found


def heir(folder: Path) -> int:
    """Pid of the shell that waits to remove it, once it heeds no signal."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        for pid in heirs(folder):
            ignored = int(Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0], 16)
            if ignored & 1 << signal.SIGTERM - 1:
                return pid
        time.sleep(0.01)
    raise AssertionError(f"no shell waits for {folder}")


def gone(folder: Path) -> bool:
    end = time.monotonic() + 5
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not folder.exists()


def test_a_folder_lives_as_long_as_its_context(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), scratch() as folder:
        (folder / "model.onnx").write_text("x")
        assert folder.parent == tmp_path
        pid = heir(folder)
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{pid}").exists()


def test_the_folder_of_a_killed_run_goes_at_once(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = holder
    with scratch():
        assert (folder / "model.onnx").exists(), "a living run's folder is left alone"
    process.send_signal(signal.SIGKILL)
    assert gone(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_removes_it_outlives_what_ends_the_run(holder: tuple[subprocess.Popen[str], Path], number: int) -> None:
    """A service manager that stops a run signals all of its processes."""
    process, folder = holder
    pid = heir(folder)
    os.kill(pid, number)
    process.kill()
    assert gone(folder)


def test_where_all_were_killed_the_next_run_removes_it(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = holder
    for pid in heirs(folder):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()
    assert folder.exists()
    with scratch():
        assert not folder.exists()


def test_neither_clocks_nor_ages_tell_whose_a_folder_is(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], Path]
) -> None:
    living, dead = holder[1], tmp_path / f"{PREFIX}dead"
    dead.mkdir()
    for folder, days in ((living, -400), (dead, 400)):
        os.utime(folder, (time.time() + 86400 * days,) * 2)
    with scratch():
        assert living.exists()
        assert not dead.exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    for path in (tmp_path / "latbench-other", kept / "file"):
        path.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(kept)
    (tmp_path / f"{PREFIX}file").write_text("")
    with scratch():
        assert (kept / "file").exists()
        assert (tmp_path / "latbench-other").exists()
        assert (tmp_path / f"{PREFIX}file").exists()


def test_no_folder_for_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(MeasurementError, match=r"cannot make a temporary folder: .*set TMPDIR"), scratch():
        pass


def test_an_interrupt_while_it_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(lock: int, folder: Path) -> bool:
        assert folder.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("latbench.profiling.scratch.locked", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch():
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_that_another_run_sweeps_as_it_is_made_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def swept(lock: int, folder: Path) -> bool:
        folder.rmdir()
        monkeypatch.setattr("latbench.profiling.scratch.locked", locked)
        return locked(lock, folder)

    monkeypatch.setattr("latbench.profiling.scratch.locked", swept)
    with scratch() as folder:
        assert list(folder.parent.iterdir()) == [folder]
    assert not folder.exists()


def test_what_memory_has_no_room_for_goes_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR")
    with scratch(1 << 60) as folder:
        assert folder.parent == tmp_path
    assert 0 < room_bytes() < 1 << 60
