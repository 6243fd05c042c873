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
from pathlib import Path
from typing import Any

from latbench.errors import MeasurementError

# What a worker may see of the environment: the rest (OMP_*, KMP_*, MKL_*, LD_PRELOAD, ...) can move a number unseen.
ENVIRONMENT = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT"),
    *("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"),
)
START_LIMIT_S = 60.0


WORKER = "latbench.measure.worker"
# Another interpreter must not see our packages, compiled for ours: it is told where latbench lies, and no folder.
ELSEWHERE = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("latbench", {init!r}, submodule_search_locations=[{folder!r}])
sys.modules["latbench"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def command(python: str, *args: object) -> list[str]:
    """What runs a worker on an interpreter, with these arguments."""
    words = [WORKER, *map(str, args)]
    if python == sys.executable:
        return [python, "-m", *words]
    folder = Path(__file__).parent
    return [python, "-c", ELSEWHERE.format(init=str(folder / "__init__.py"), folder=str(folder)), *words]


def environment(python: str) -> dict[str, str]:
    """Allow-listed, and numpy's own thread pools out of the way: threads are the runtime's, set by its options."""
    kept = {k: v for k, v in os.environ.items() if k in ENVIRONMENT}
    if python == sys.executable:
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), kept.get("PYTHONPATH"))))
    else:
        for ours in ("PYTHONPATH", "VIRTUAL_ENV"):
            kept.pop(ours, None)
    return kept | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def describe(backend: str, python: str = sys.executable) -> dict[str, Any]:
    """What a back-end ("module:Class") says of itself in an interpreter: problem (None: it works), versions, python.

    Raises MeasurementError where the interpreter cannot run a worker.
    """
    words, seen = command(python, "--describe", backend), environment(python)
    try:
        run = subprocess.run(words, env=seen, capture_output=True, text=True, timeout=START_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeasurementError(f"the worker's interpreter {python} cannot be run: {error}") from error
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1]
        raise MeasurementError(f"the worker's interpreter {python} cannot run latbench.measure: {last[:500]}")
    said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return said
