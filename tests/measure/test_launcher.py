"""The local launcher against real workers that die, hang and shout, by a third-party back-end (faulty_backend.py)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from latbench.backends.base import Scalar
from latbench.errors import MeasurementError
from latbench.measure.base import Measurement, Request, SamplingPlan, WorkerSetup
from latbench.measure.launcher import DEATHS, LocalLauncher, cpus_for

SETUP = WorkerSetup("faulty_backend:FaultyBackend")
PLAN = SamplingPlan(runs=1, rounds=1, min_samples=50, load_limit_s=1, warmup_limit_s=1, measure_limit_s=1)
CALL = {"load": 0, "warmup": 1, "measure": 20}  # the first inference is warm-up; 50 samples are asked for

Requests = Callable[..., list[Request]]


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def launcher() -> Iterator[LocalLauncher]:
    with LocalLauncher(SETUP) as launcher:
        yield launcher


@pytest.fixture
def requests(tmp_path: Path) -> Requests:
    """One request per fault, each with its own artifact; {} is a model that works."""

    def make(*faults: dict[str, object], plan: SamplingPlan = PLAN) -> list[Request]:
        made = []
        for order, fault in enumerate(faults):
            path = tmp_path / f"{order}.json"
            path.write_text(json.dumps(fault))
            made.append(Request(f"k{order}", str(path), 0, 0, plan, order))
        return made

    return make


def statuses(measurements: list[Measurement]) -> list[str]:
    return [m.status for m in measurements]


def n_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_one_measurement_per_request_in_order(launcher: LocalLauncher, requests: Requests) -> None:
    asked = requests(*[{}] * 7)
    measured = list(launcher.measure(iter(asked)))
    assert [(m.key, m.run, m.round, m.order) for m in measured] == [(r.key, r.run, r.round, r.order) for r in asked]
    assert all(m.status == "ok" and m.samples_ms == (10.0,) * 50 for m in measured)


def test_no_request_needs_no_worker(launcher: LocalLauncher, workers: Callable[[int], list[int]]) -> None:
    assert list(launcher.measure([])) == []
    assert workers(os.getpid()) == []


def test_every_run_has_a_fresh_worker_and_only_one_lives(
    launcher: LocalLauncher, requests: Requests, workers: Callable[[int], list[int]]
) -> None:
    (one,) = requests({})
    asked = [Request(one.key, one.artifact, run, index, PLAN) for run in range(3) for index in range(3)]
    pids: dict[int, set[int]] = {}
    for measurement in launcher.measure(asked):
        living = workers(os.getpid())
        assert len(living) == 1
        pids.setdefault(measurement.run, set()).update(living)
    assert [len(of_run) for of_run in pids.values()] == [1, 1, 1]
    assert len(set.union(*pids.values())) == 3


@pytest.mark.parametrize("stage", CALL)
@pytest.mark.parametrize(("how", "signal_name"), [("kill", "SIGKILL"), ("segfault", "SIGSEGV")])
def test_a_worker_that_dies_once_costs_nothing(
    launcher: LocalLauncher, requests: Requests, tmp_path: Path, stage: str, how: str, signal_name: str
) -> None:
    once = {"how": how, "call": CALL[stage], "once": str(tmp_path / "struck")}
    assert statuses(list(launcher.measure(requests({}, once, {}, {})))) == ["ok"] * 4
    assert (tmp_path / "struck").exists()


@pytest.mark.parametrize("stage", CALL)
@pytest.mark.parametrize(
    ("how", "words"), [("kill", "signal SIGKILL"), ("segfault", "signal SIGSEGV"), ("exit", "exit 3")]
)
def test_a_model_that_kills_every_worker_costs_its_own_row_only(
    launcher: LocalLauncher, requests: Requests, stage: str, how: str, words: str
) -> None:
    measured = list(launcher.measure(requests({}, {"how": how, "call": CALL[stage]}, {}, {})))
    assert statuses(measured) == ["ok", "error", "ok", "ok"]
    assert (measured[1].stage, measured[1].error) == (stage, f"the worker died twice ({words})")


@pytest.mark.parametrize("stage", CALL)
def test_a_model_that_hangs_is_killed_at_its_limit(launcher: LocalLauncher, requests: Requests, stage: str) -> None:
    measured = list(launcher.measure(requests({}, {"how": "hang", "call": CALL[stage]}, {})))
    assert statuses(measured) == ["ok", "timeout", "ok"]
    assert measured[1].stage == stage
    assert measured[1].error == "no answer within 1 s; the worker was killed"


def test_each_stage_has_its_own_limit(launcher: LocalLauncher, requests: Requests) -> None:
    plan = SamplingPlan(runs=1, rounds=1, load_limit_s=60, warmup_limit_s=0.5, measure_limit_s=60)
    (measured,) = launcher.measure(requests({"how": "hang", "call": 1}, plan=plan))
    assert (measured.status, measured.stage) == ("timeout", "warmup")


@pytest.mark.parametrize("stage", CALL)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "RuntimeError: the kernel said no"),
        ("lookup", "KeyError: 'a bug of theirs'"),
        ("allocate", "MemoryError:"),
    ],
)
def test_an_exception_is_a_value_and_its_worker_lives_on(
    launcher: LocalLauncher, requests: Requests, workers: Callable[[int], list[int]], stage: str, how: str, words: str
) -> None:
    living = set()
    measured = []
    for measurement in launcher.measure(requests({}, {"how": how, "call": CALL[stage]}, {})):
        living.update(workers(os.getpid()))
        measured.append(measurement)
    assert statuses(measured) == ["ok", "error", "ok"]
    assert (measured[1].stage, measured[1].error) == (stage, words)
    assert len(living) == 1


@pytest.mark.parametrize("stage", CALL)
def test_what_a_runtime_prints_is_no_answer(launcher: LocalLauncher, requests: Requests, stage: str) -> None:
    assert statuses(list(launcher.measure(requests({"how": "flood", "call": CALL[stage]}, {})))) == ["ok", "ok"]


@pytest.mark.parametrize("how", ["babble", "number"])
@pytest.mark.parametrize("stage", CALL)
def test_a_worker_whose_answer_is_no_message_is_killed(
    launcher: LocalLauncher, requests: Requests, stage: str, how: str
) -> None:
    measured = list(launcher.measure(requests({}, {"how": how, "call": CALL[stage]}, {})))
    assert statuses(measured) == ["ok", "error", "ok"]
    assert measured[1].error == "the worker died twice (signal SIGKILL)"


def test_a_worker_that_died_while_it_stood_ready_costs_no_row(
    launcher: LocalLauncher, requests: Requests, tmp_path: Path
) -> None:
    launcher.prepare(3)
    launcher.start()
    for spare in launcher._spares:
        assert select.select([spare._read], [], [], 60)[0]  # it says that it is ready
        spare._process.kill()
        spare._process.wait()
    once = {"how": "kill", "call": 20, "once": str(tmp_path / "struck")}
    assert statuses(list(launcher.measure(requests(once, {})))) == ["ok", "ok"]
    assert (tmp_path / "struck").exists()
    assert not launcher._spares


def test_workers_that_never_begin_are_an_error(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalLauncher(SETUP) as launcher:
        send = launcher._send
        monkeypatch.setattr(launcher, "_send", lambda request: (launcher._worker._process.kill(), send(request)))
        (measured,) = launcher.measure(requests({}))
    assert (measured.status, measured.stage) == ("error", "load")
    assert measured.error == f"the worker died {DEATHS} times (signal SIGKILL)"


def test_the_last_line_printed_explains_a_death(launcher: LocalLauncher, requests: Requests) -> None:
    (measured,) = launcher.measure(requests({"how": "flood and die", "call": 1}))
    assert measured.error == "the worker died twice (signal SIGKILL: last words)"


def test_nothing_is_left_behind(requests: Requests, workers: Callable[[int], list[int]], tmp_path: Path) -> None:
    before = n_open_files()
    faults = [{"how": how, "call": call} for how in ("kill", "raise", "flood") for call in CALL.values()]
    with LocalLauncher(SETUP) as launcher:
        assert len(list(launcher.measure(requests({}, *faults, {})))) == 11
    with LocalLauncher(SETUP) as launcher:
        next(launcher.measure(requests({}, {})))  # and then no more, as when the parent's disk is full
    assert workers(os.getpid()) == []
    assert n_open_files() == before


def test_a_worker_that_cannot_start_says_why(requests: Requests) -> None:
    cases: list[tuple[str, dict[str, Scalar], str]] = [
        ("faulty_backend:FaultyBackend", {"refuse": "today"}, "exit 1: OSError|exit 1: today"),
        ("no_such_module:Backend", {}, "exit 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("latbench.backends.roofline:RooflineBackend", {"watts": 3}, "roofline has no option 'watts'"),
    ]
    for backend, options, why in cases:
        before = n_open_files()
        with (
            pytest.raises(MeasurementError, match=f"the worker did not start: {why}"),
            LocalLauncher(WorkerSetup(backend, options)) as launcher,
        ):
            list(launcher.measure(requests({})))
        assert n_open_files() == before


def test_the_layers_pass_fails_in_words(
    launcher: LocalLauncher, requests: Requests, workers: Callable[[int], list[int]]
) -> None:
    for how, why in [
        ("kill", r"died \(signal SIGKILL\)"),
        ("lookup", r"died \(exit 1: KeyError: 'a bug of theirs'\)"),
        ("hang", "did not end within 1 s"),
    ]:
        (request,) = requests({"how": how, "call": 5})
        with pytest.raises(MeasurementError, match=why):
            launcher.layers(Path(request.artifact), PLAN)
        assert workers(os.getpid()) == []
    (request,) = requests({})
    assert launcher.layers(Path(request.artifact), PLAN) is None


PARENT = """
import sys
from latbench.measure.base import Request, SamplingPlan, WorkerSetup
from latbench.measure.launcher import DEATHS, LocalLauncher
with LocalLauncher(WorkerSetup("faulty_backend:FaultyBackend")) as launcher:
    list(launcher.measure([Request("k", sys.argv[1], 0, 0, SamplingPlan())]))
"""


@pytest.mark.parametrize("call", CALL.values())
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends when it next reads its pipe")
def test_a_worker_dies_with_its_parent_even_inside_a_model_that_hangs(
    requests: Requests, workers: Callable[[int], list[int]], tmp_path: Path, call: int
) -> None:
    struck = tmp_path / "struck"
    plan = SamplingPlan()
    (request,) = requests({"how": "hang", "call": min(call, 3), "once": str(struck)}, plan=plan)
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, request.artifact], env={**os.environ, "PYTHONPATH": path}
    ) as parent:
        wait_until(struck.exists)
        (worker,) = workers(parent.pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        try:
            wait_until(lambda: workers(parent.pid) == [])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("30 s went by")


def test_cpus_are_the_last_ones_allowed() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert cpus_for(1) == (allowed[-1],)
    assert cpus_for(len(allowed)) == tuple(allowed)
    assert cpus_for(len(allowed) + 1) == ()


def test_a_fresh_request_gets_a_worker_that_has_loaded_nothing(launcher: LocalLauncher, requests: Requests) -> None:
    plain, alone, after, next_run = requests({}, {}, {}, {})
    asked = [plain, replace(alone, fresh=True), after, replace(next_run, run=1)]
    pids = [m.pid for m in launcher.measure(asked)]
    assert len(set(pids)) == 3
    assert pids[1] == pids[2]  # what follows in the same run may share it


def test_spare_workers_are_used_and_leave_nothing_behind(requests: Requests) -> None:
    before = n_open_files()
    with LocalLauncher(SETUP) as launcher:
        launcher.start()
        launcher.prepare(3)
        spares = [worker._process.pid for worker in launcher._spares]
        asked = [replace(one, run=run) for run, one in enumerate(requests({}, {}, {}))]
        pids = [m.pid for m in launcher.measure(asked)]
        assert pids[1:] == spares
        launcher.prepare(2)
        unused = [worker._process.pid for worker in launcher._spares]
    assert n_open_files() == before
    assert not any(Path(f"/proc/{pid}").exists() for pid in [*pids, *unused])
