"""The clock probe and the wait clock against what this machine does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from latbench.measure import probe
from latbench.measure.probe import WaitClock, probe_us, timer_cost_ns

WAIT = WaitClock()  # holds its file open as long as the process lives


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock that goes on by the next number of the list at each reading."""
    steps: list[int] = []
    now = 0

    def read() -> int:
        nonlocal now
        now += steps.pop(0)
        return now

    monkeypatch.setattr(probe, "perf_counter_ns", read)
    return steps


def test_the_probe_is_the_best_of_its_tries_in_microseconds(clock: list[int]) -> None:
    clock += [0, 6000, 0, 5800, 0, 90_000, 0, 5900, 0, 6100]
    assert probe_us() == 5.8


def test_the_timer_costs_the_median_of_its_pairs(clock: list[int]) -> None:
    clock += [0, 40] * 400 + [0, 9000] * 101
    assert timer_cost_ns() == 40


def test_the_real_timer_costs_less_than_its_probe() -> None:
    assert 0 <= timer_cost_ns() < 1e3 * probe_us()


@pytest.mark.skipif(sys.platform != "linux", reason="schedstat is Linux's")
def test_waiting_never_runs_backwards_and_sleep_is_no_waiting() -> None:
    readings = [WAIT.ns() for _ in range(100)]
    assert readings == sorted(readings)
    assert readings[0] >= 0


@pytest.fixture
def one_cpu() -> Iterator[int]:
    """This process, and what it starts, on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield max(before)
    os.sched_setaffinity(0, before)


@pytest.mark.skipif(sys.platform != "linux", reason="schedstat is Linux's")
def test_another_process_on_this_core_is_seen_as_waiting(one_cpu: int) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as rival:
        try:
            before = WAIT.ns()
            for _ in range(3000):  # 10 ms each on a core of one's own
                if WAIT.ns() - before > 5_000_000:
                    break
                sum(range(300_000))
            else:
                pytest.fail("30 s of work beside a busy loop, and no wait")
        finally:
            rival.kill()
