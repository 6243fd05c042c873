"""``latbench profile`` killed at random moments: what was measured stays, and the table comes out whole."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from runs import KEYS, Profile, Workers, is_canary, soon

from latbench.profiling.scratch import PREFIX
from latbench.tables import LatencyTable


def kill_and_resume(folder: Path, n_kills: int, workers: Workers) -> None:
    rng = random.Random(0)
    known: list[dict[str, Any]] = []
    for kill in range(n_kills):
        run = Profile(folder)
        # at random moments of starting up, too; else somewhere in the next few measurements
        if kill % 5 == 0:
            time.sleep(rng.uniform(0.0, 0.8))
        else:
            run.wait_for(len(known) + rng.randint(1, 6))
            time.sleep(rng.uniform(0.0, 0.01))
        run.signal(signal.SIGKILL)
        run.end()
        assert run.leaves_nothing(workers)
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
    status, _, err = (last := Profile(folder)).end()
    assert (status, err) == (0, "")
    table = LatencyTable.read(last.table)
    assert set(table.frame["key"]) == KEYS
    assert set(table.frame["status"]) == {"ok"}
    in_table = {sample for row in table.rows() for sample in row.samples_ms}
    assert all(set(record["samples_ms"]) <= in_table for record in known if not is_canary(record))
    assert [path.name for path in last.table.parent.iterdir()] == [last.table.name]


def test_killed_again_and_again_it_ends_with_the_whole_table(tmp_path: Path, workers: Workers) -> None:
    kill_and_resume(tmp_path, 3, workers)


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_the_whole_table(tmp_path: Path, workers: Workers) -> None:
    kill_and_resume(tmp_path, 50, workers)


def test_the_temporary_files_of_a_killed_run_go_with_it(tmp_path: Path) -> None:
    run = Profile(tmp_path)
    run.wait_for(3)
    assert [path.name.startswith(PREFIX) for path in run.tmp.iterdir()] == [True]
    run.signal(signal.SIGKILL)
    run.end()
    assert soon(lambda: not list(run.tmp.iterdir()))


def test_a_worker_that_is_killed_at_any_moment_is_replaced(tmp_path: Path, workers: Workers) -> None:
    """The one that measures, and those that stand ready for the next run."""
    run = Profile(tmp_path)
    rng = random.Random(1)
    struck: set[int] = set()
    for n in (1, 10, 25, 45):
        run.wait_for(n)
        for pid in rng.sample(found := workers(run.pid), min(len(found), 2)):
            struck.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    status, _, err = run.end()
    assert (status, err) == (0, "")
    assert len(struck) >= 4
    table = LatencyTable.read(run.table)
    assert set(table.frame["key"]) == KEYS
    assert set(table.frame["status"]) == {"ok"}
