"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports numpy: on two cores that other work shares, threads of BLAS wait for each other for longer
# than they compute.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.fixture
def workers() -> Callable[[int], list[int]]:
    """Pids of the living measurement workers that a process started; they name their parent in their last argument."""

    def living(parent_pid: int) -> list[int]:
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                argv = (folder / "cmdline").read_bytes().split(b"\0")[:-1]
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has just gone
                continue
            if b"latbench.measure.worker" in argv and argv[-1] == str(parent_pid).encode() and state != "Z":
                pids.append(int(folder.name))
        return pids

    return living
