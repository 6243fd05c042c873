"""Nothing grows while one process profiles on and on: benchmarks/soak.py, short, and what it would say of a leak."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cycles(soak: ModuleType, **growth: float) -> list[dict[str, float]]:
    """A hundred cycles over ten minutes; `growth` by the minute of some figures, relative or in counts."""
    return [
        {
            "minute": minute / 10,
            **{name: 1e8 * (1 + growth.get(name, 0.0) * minute / 10) for name in soak.MEMORY},
            **{name: 9 + int(growth.get(name, 0.0) * minute / 10) for name in soak.COUNTS},
        }
        for minute in range(1, 101)
    ]


def test_what_grows_is_told_from_what_does_not(soak: ModuleType) -> None:
    lines, flat = soak.judged(cycles(soak), settle=5)
    assert flat
    assert len(lines) == len(soak.MEMORY) + len(soak.COUNTS)
    for name in soak.MEMORY:
        assert not soak.judged(cycles(soak, **{name: 0.01}), settle=5)[1]  # 5 % in the five minutes that count
        assert soak.judged(cycles(soak, **{name: 0.001}), settle=5)[1]
    for name in soak.COUNTS:
        assert not soak.judged(cycles(soak, **{name: 0.3}), settle=5)[1]
    with pytest.raises(SystemExit, match="give more --minutes"):
        soak.judged(cycles(soak), settle=10)


@pytest.mark.slow
def test_two_minutes_of_profiling_leak_nothing() -> None:
    command = [sys.executable, str(SOAK), "--minutes", "2.5", "--settle", "1", "--limit", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "flat"
