"""Wall clocks that are set back and forth, by ten years an hour: deadlines, orders and rows know nothing of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from runs import KEYS, PROGRAM, ROOT, Profile

from latbench.tables import LatencyTable

# in the parent and, by a module that every interpreter imports at its start, in its workers
JUMPS = """
import itertools, time
_true, _n = time.time, itertools.count()
time.time = lambda: _true() + (-1) ** next(_n) * 3.15e8
"""


def test_a_clock_that_jumps_changes_no_row(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(JUMPS)
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")])}
    run = Profile(tmp_path, "--budget", "900s", env=environment, program=PROGRAM)
    run.wait_for(20)
    run.process.kill()
    run.end()
    before = run.records()
    assert len({record["started_at"] > 2e9 for record in before}) == 2, "the workers' clocks jump"
    orders = [record["order"] for record in before]
    assert orders == sorted(set(orders))
    status, _, err = (later := Profile(tmp_path, "--budget", "900s", env=environment)).end()
    assert (status, err) == (0, "")
    table = LatencyTable.read(later.table)
    assert set(table.frame["key"]) == KEYS
    assert set(table.frame["status"]) == {"ok"}
    assert list(run.tmp.iterdir()) == []


def test_a_budget_is_of_time_that_passes(tmp_path: Path) -> None:
    """Measured by the wall clock it would be over at once, or never."""
    (tmp_path / "sitecustomize.py").write_text(JUMPS)
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    run = Profile(tmp_path, "--budget", "1ms", "--json", env=environment)
    status, out, _ = run.end()
    assert status == 0
    told = json.loads(out)
    assert told["missing"] == told["wanted"] > 0
