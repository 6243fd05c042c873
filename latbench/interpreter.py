"""The interpreter that a worker runs on: ours, or another one that has a runtime which does not fit ours.

A frozen TensorRT 8.6 for a TITAN Xp lives on an old Python; a current latbench drives a worker there. It needs numpy
and the runtime, Python 3.9 or later. An interpreter that wants variables of its own (PYTHONHOME, LD_LIBRARY_PATH) is
named by a script that sets them and ends in ``exec``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from latbench.errors import MeasurementError

# What a worker may see of the environment: the rest (OMP_*, KMP_*, MKL_*, LD_PRELOAD, ...) can move a number unseen.
ENVIRONMENT = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT"),
    *("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"),
)
START_LIMIT_S = 60.0


class Package:
    """What an interpreter needs to run a worker: its command, and an environment in which it finds latbench.

    Another interpreter must not see this one's packages, compiled for it: only latbench, through a link in a folder of
    its own, until ``remove``.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self.python = python
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        package = Path(__file__).parent
        if python == sys.executable:
            self._path = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="latbench-worker-")
            self._path = self._folder.name
            (Path(self._path) / package.name).symlink_to(package)

    def environment(self) -> dict[str, str]:
        """Allow-listed, and numpy's own thread pools out of the way: threads are the runtime's, set by its options."""
        kept = {k: v for k, v in os.environ.items() if k in ENVIRONMENT}
        if self._folder is not None:
            kept.pop("VIRTUAL_ENV", None)
        kept |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return {**kept, "PYTHONPATH": self._path}

    def remove(self) -> None:
        """Takes the link away."""
        if self._folder is not None:
            self._folder.cleanup()


def describe(backend: str, python: str = sys.executable) -> dict[str, Any]:
    """What a back-end ("module:Class") says of itself in an interpreter: problem (None: it works), versions, python.

    Raises MeasurementError where the interpreter cannot run a worker.
    """
    package = Package(python)
    command = [python, "-m", "latbench.measure.worker", "--describe", backend]
    try:
        run = subprocess.run(
            command, env=package.environment(), capture_output=True, text=True, timeout=START_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeasurementError(f"the worker's interpreter {python} cannot be run: {error}") from error
    finally:
        package.remove()
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1]
        raise MeasurementError(f"the worker's interpreter {python} cannot run latbench.measure: {last[:500]}")
    said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return said
