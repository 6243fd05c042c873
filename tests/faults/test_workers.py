"""Workers that hang, die or run out of memory in any stage: their rows say so, and the others are measured."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latbench.errors import MeasurementError
from latbench.measure.base import Measurement, Request, SamplingPlan, WorkerSetup
from latbench.measure.launcher import LocalLauncher

FAULTY = str(Path(__file__).parents[1] / "measure")  # faulty_backend.py
SETUP = WorkerSetup("faulty_backend:FaultyBackend")
PLAN = SamplingPlan(runs=1, rounds=1, min_samples=50, load_limit_s=1, warmup_limit_s=1, measure_limit_s=1)
CALL = {"load": 0, "warmup": 1, "measure": 20}  # the first inference is warm-up; 50 samples are asked for

Workers = Callable[[int], list[int]]


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", FAULTY)


@pytest.fixture
def launcher() -> Iterator[LocalLauncher]:
    with LocalLauncher(SETUP) as launcher:
        yield launcher


def measured(launcher: LocalLauncher, folder: Path, *faults: dict[str, Any]) -> list[Measurement]:
    requests = []
    for order, fault in enumerate(faults):
        path = folder / f"{order}.json"
        path.write_text(json.dumps(fault))
        requests.append(Request(f"k{order}", str(path), 0, 0, PLAN, order))
    return list(launcher.measure(requests))


@pytest.mark.parametrize("stage", CALL)
def test_a_worker_that_hangs_costs_its_row_only(launcher: LocalLauncher, tmp_path: Path, stage: str) -> None:
    found = measured(launcher, tmp_path, {}, {"how": "hang", "call": CALL[stage]}, {})
    assert [m.status for m in found] == ["ok", "timeout", "ok"]
    assert (found[1].stage, found[1].error) == (stage, "no answer within 1 s; the worker was killed")


@pytest.mark.parametrize("stage", CALL)
def test_a_worker_without_memory_costs_its_row_only(
    launcher: LocalLauncher, tmp_path: Path, stage: str, workers: Workers
) -> None:
    launcher.start()
    (pid,) = workers(os.getpid())
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    found = measured(launcher, tmp_path, {}, {"how": "allocate", "call": CALL[stage]}, {})
    assert [m.status for m in found] == ["ok", "error", "ok"]
    assert found[1].stage == stage
    assert "MemoryError" in (found[1].error or "")
    assert {m.pid for m in found} == {pid}


def test_workers_that_stand_ready_may_die(launcher: LocalLauncher, tmp_path: Path, workers: Workers) -> None:
    """As where the system ends processes for want of memory."""
    launcher.start()
    launcher.prepare(3)
    for pid in workers(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    found = measured(launcher, tmp_path, {}, {})
    launcher.prepare(2)
    assert [m.status for m in found] == ["ok", "ok"]


def test_a_worker_that_dies_as_often_as_it_starts_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dying_backend.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with LocalLauncher(replace(SETUP, backend="dying_backend:Backend")) as launcher:
        for _ in range(2):
            with pytest.raises(MeasurementError, match="the worker did not start: signal SIGKILL"):
                launcher.start()


def test_what_lets_no_worker_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr("tempfile.TemporaryFile", no_room)
    with (
        LocalLauncher(SETUP) as launcher,
        pytest.raises(MeasurementError, match="cannot start a worker: No usable temp"),
    ):
        launcher.start()
    with (
        LocalLauncher(SETUP, python="/no/such/python") as launcher,
        pytest.raises(MeasurementError, match="cannot start a worker"),
    ):
        launcher.start()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
