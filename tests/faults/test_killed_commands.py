"""Every command that does work, killed at random moments, through ``benchmarks/kills.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def killed(n: int, folder: Path, *more: str) -> list[dict[str, object]]:
    """The tallies of a campaign that was sound."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", str(n), "--json", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tallies: list[dict[str, object]] = json.loads(done.stdout)
    return tallies


def test_an_import_killed_again_and_again_is_whole_or_not_there(tmp_path: Path) -> None:
    (tally,) = killed(3, tmp_path, "--commands", "import")
    assert sum(tally["kills"].values()) == 3  # type: ignore[attr-defined]
    assert tally["rounds"]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")] == []  # torch's own


@pytest.mark.slow
def test_no_kill_of_any_command_costs_more_than_what_it_was_at(tmp_path: Path) -> None:
    tallies = killed(75, tmp_path)
    assert len(tallies) == 15
    for tally in tallies:
        assert sum(tally["kills"].values()) == 5  # type: ignore[attr-defined]
        assert tally["worst"] <= 5, "steps; a candidate whose training a search repeats has four"  # type: ignore[operator]
