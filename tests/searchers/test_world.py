"""Threads of a process that trains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

THREADS = """
import torch
from searchers.world import leave_busy_cores
torch.set_num_threads(max(2, torch.get_num_threads()))
told = leave_busy_cores()
print(torch.get_num_threads(), told)
"""


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """On every core a process that runs whenever nobody else does."""
    loop = "import os\nos.nice(19)\nwhile True: pass"
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in loops:
        process.kill()
        process.wait()


def threads_of_torch(**environment: str) -> tuple[int, str]:
    """Of a process that is about to train, and what it is to tell."""
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=kept | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    threads, told = done.stdout.strip().split(" ", 1)
    return int(threads), told


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
@pytest.mark.usefixtures("busy_machine")
def test_one_thread_where_every_core_is_taken() -> None:
    threads, told = threads_of_torch()
    assert threads == 1
    assert told.endswith("training with 1 thread(s); set OMP_NUM_THREADS for another number")


@pytest.mark.usefixtures("busy_machine")
def test_who_says_how_many_gets_as_many() -> None:
    assert threads_of_torch(OMP_NUM_THREADS="2") == (2, "None")
