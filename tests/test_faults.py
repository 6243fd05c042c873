"""``latbench profile`` as its users run it, killed, interrupted, out of room; real processes, a small real space."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latbench.profiling.jobs import jobs_of
from latbench.profiling.scratch import GRACE_S, PREFIX
from latbench.profiling.session import CANARY
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable

ROOT = Path(__file__).parents[1]
SETTINGS = {"levels": 2, "min_width": 0.1, "max_width": 0.2, "num_classes": 10}
ARGS = ["profile", "--device", "cpu", "--space", "mobilenet_v1", "--resolution", "32", "--rounds", "1", "--ci", "20%"]
ARGS += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
KEYS = {job.row.key for job in jobs_of(MobileNetV1Space(resolution=32, **SETTINGS))}  # type: ignore[arg-type]
PROGRAM = "import sys; sys.argv[0] = 'latbench'; from latbench.cli import main; main()"

Workers = Callable[[int], list[int]]


class Run:
    """A ``latbench profile`` process whose table and temporary files stand in one folder."""

    def __init__(self, folder: Path, *more: str, program: str = PROGRAM, output: Path | None = None) -> None:
        (folder / "tmp").mkdir(exist_ok=True)
        (folder / "out").mkdir(exist_ok=True)
        self.table = output or folder / "out" / "t.parquet"
        self.spool = self.table.with_name(f"{self.table.name}.partial.jsonl")
        self.tmp = folder / "tmp"
        command = [sys.executable, "-c", program, *ARGS, "-o", str(self.table), *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp), "PYTHONWARNINGS": "error"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    def records(self) -> list[dict[str, Any]]:
        """Whole measurements in the spool."""
        if not self.spool.exists():
            return []
        lines = self.spool.read_bytes().split(b"\n")[:-1]
        return [record for record in map(json.loads, lines) if "key" in record]

    def wait_for(self, n: int) -> None:
        """Until n measurements are in the spool, or the process has ended."""
        while len(self.records()) < n and self.process.poll() is None:
            time.sleep(0.005)


def heed_interrupts() -> None:
    """Shells start background jobs with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def gone(pid: int, workers: Workers) -> bool:
    for _ in range(200):
        if not workers(pid):
            return True
        time.sleep(0.02)
    return False


def one_line(err: str) -> str:
    assert err.startswith("Error: "), err
    assert err.count("\n") == 1, err
    return err


def kill_and_resume(folder: Path, n_kills: int, workers: Workers) -> None:
    rng = random.Random(0)
    known: list[dict[str, Any]] = []
    for kill in range(n_kills):
        run = Run(folder)
        # at random moments of starting up, too; else somewhere in the next few measurements
        if kill % 5 == 0:
            time.sleep(rng.uniform(0.0, 0.8))
        else:
            run.wait_for(len(known) + rng.randint(1, 6))
            time.sleep(rng.uniform(0.0, 0.01))
        run.process.send_signal(signal.SIGKILL)
        run.end()
        assert gone(run.process.pid, workers)
        if run.table.exists() and not run.spool.exists():  # it had finished: begin again
            assert set(LatencyTable.read(run.table).frame["key"]) == KEYS
            run.table.unlink()
            known = []
            continue
        found = run.records()
        assert found[: len(known)] == known  # what was recorded stays, in its order
        visits = Counter((record["key"], record["run"], record["round"]) for record in found if not is_canary(record))
        assert max(visits.values(), default=1) == 1  # and is not taken again: a kill costs what it was at, no more
        known = found
        extra = {path.name for path in run.table.parent.iterdir()} - {run.table.name, run.spool.name}
        assert not extra
    status, _, err = (last := Run(folder)).end()
    assert (status, err) == (0, "")
    table = LatencyTable.read(last.table)
    assert set(table.frame["key"]) == KEYS
    assert set(table.frame["status"]) == {"ok"}
    in_table = {sample for row in table.rows() for sample in row.samples_ms}
    assert all(set(record["samples_ms"]) <= in_table for record in known if not is_canary(record))
    assert [path.name for path in last.table.parent.iterdir()] == [last.table.name]


def is_canary(record: dict[str, Any]) -> bool:
    return bool(record["key"] == CANARY.key)


def test_killed_again_and_again_it_ends_with_the_whole_table(tmp_path: Path, workers: Workers) -> None:
    kill_and_resume(tmp_path, 12, workers)


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_the_whole_table(tmp_path: Path, workers: Workers) -> None:
    kill_and_resume(tmp_path, 50, workers)


def test_the_temporary_files_of_a_killed_run_go_with_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.wait_for(3)
    run.process.kill()
    run.end()
    (left,) = run.tmp.iterdir()
    assert left.name.startswith(PREFIX)
    past = time.time() - 2 * GRACE_S
    os.utime(left, (past, past))
    status, _, _ = (later := Run(tmp_path)).end()
    assert status == 0
    assert list(later.tmp.iterdir()) == []


@pytest.mark.parametrize("n", [0, 5])
def test_an_interrupt_is_one_line_and_can_be_gone_on_from(tmp_path: Path, workers: Workers, n: int) -> None:
    run = Run(tmp_path)
    run.wait_for(1 + n)
    run.process.send_signal(signal.SIGINT)
    status, out, err = run.end()
    assert (status, out, err.strip()) == (130, "", "Error: interrupted")
    assert workers(run.process.pid) == []
    assert list(run.tmp.iterdir()) == []
    before = run.records()
    assert len(before) > n
    status, _, err = (later := Run(tmp_path)).end()
    assert (status, err) == (0, "")
    assert set(LatencyTable.read(later.table).frame["key"]) == KEYS


def test_a_second_run_on_one_table_is_refused(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.wait_for(1)
    status, out, err = Run(tmp_path).end()
    assert (status, out) == (1, "")
    assert f"another run (pid {first.process.pid}) is writing" in one_line(err)
    assert first.end()[0] == 0
    assert set(LatencyTable.read(first.table).frame["key"]) == KEYS


def test_no_room_for_a_model_is_one_line(tmp_path: Path, workers: Workers) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "  # less than a model
    status, out, err = (run := Run(tmp_path, program=limit + PROGRAM)).end()
    assert (status, out) == (1, "")
    assert "cannot write a model to" in one_line(err)
    assert workers(run.process.pid) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
def test_no_room_for_a_measurement_is_one_line_and_can_be_gone_on_from(tmp_path: Path, workers: Workers) -> None:
    run = Run(tmp_path)
    run.wait_for(5)
    nbytes = run.spool.stat().st_size + 500
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (nbytes, nbytes))
    status, out, err = run.end()
    assert (status, out) == (1, "")
    assert "nothing is lost, the measurements so far are kept" in one_line(err)
    assert workers(run.process.pid) == []
    before = run.records()
    assert len(before) >= 5
    status, _, err = (later := Run(tmp_path)).end()
    assert (status, err) == (0, "")
    table = LatencyTable.read(later.table)
    assert set(table.frame["key"]) == KEYS
    samples = {sample for row in table.rows() for sample in row.samples_ms}
    assert all(set(record["samples_ms"]) <= samples for record in before if not is_canary(record))


@pytest.fixture
def full_disk(tmp_path: Path) -> Any:
    """A file system of 300 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "latbench-test", str(folder)]
    try:
        mounted = os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs rights")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_elsewhen(tmp_path: Path, full_disk: Path) -> None:
    (full_disk / "other").write_bytes(bytes(260_000))
    out = full_disk / "t.parquet"
    status, _, err = (run := Run(tmp_path, output=out)).end()
    assert status == 1
    assert "No space left on device; nothing is lost" in one_line(err)
    assert not out.exists()
    before = run.records()
    assert before
    (full_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=30m", str(full_disk)], check=True)
    status, _, err = Run(tmp_path, output=out).end()
    assert (status, err) == (0, "")
    assert set(LatencyTable.read(out).frame["key"]) == KEYS
    assert [path.name for path in full_disk.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1 cut off in the mid", b"a,b\n1,2\n", bytes(range(256)) * 9])
def test_a_file_that_is_no_table_is_refused_and_kept(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "t.parquet").write_bytes(data)
    status, out, err = (run := Run(tmp_path)).end()
    assert (status, out) == (1, "")
    assert "t.parquet" in one_line(err)
    assert run.table.read_bytes() == data
    assert [path.name for path in run.table.parent.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/no/such/folder/t.parquet", "/no/such/folder is no directory: make it, or choose another -o"),
        ("/proc/t.parquet", "cannot open /proc/t.parquet.partial.jsonl"),
        ("/dev/null/t.parquet", "/dev/null is no directory"),
    ],
)
def test_an_output_that_cannot_be_is_one_line(tmp_path: Path, output: str, words: str) -> None:
    status, out, err = Run(tmp_path, output=Path(output)).end()
    assert (status, out) == (1, "")
    assert words in one_line(err)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    status, _, err = Run(tmp_path).end()
    assert status == 1
    assert "Permission denied" in one_line(err)
