"""A worker on another interpreter: it sees latbench and its own packages, nothing of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latbench.errors import MeasurementError
from latbench.graph.ir import GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.ops import Linear
from latbench.graph.passes import random_weights
from latbench.interpreter import describe
from latbench.measure.base import Request, SamplingPlan, WorkerSetup
from latbench.measure.launcher import LocalLauncher

ROOT = Path(__file__).parents[2]
SPEC = "latbench.backends.onnxruntime:OnnxRuntimeBackend"
SPY = """
import json, os, sys
print(json.dumps({"problem": None, "versions": {"path": ":".join(sys.path), "env": " ".join(sorted(os.environ))},
                  "python": sys.version.split()[0]}))
"""


@pytest.fixture
def twin(tmp_path: Path) -> str:
    """This interpreter by another name: to the launcher, another one."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


def model(folder: Path) -> str:
    b = GraphBuilder()
    graph = b.build(b.add(Linear(8, 8), b.input("x", (1, 8)), name="fc"))
    (folder / "m.onnx").write_bytes(to_onnx(graph, random_weights(graph)))
    return str(folder / "m.onnx")


def test_it_measures_and_needs_no_folder(twin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rest := tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rest))
    plan = SamplingPlan(runs=1, rounds=1)
    with LocalLauncher(WorkerSetup(SPEC, {"threads": 1}), python=twin) as launcher:
        assert launcher.start()["python"] == sys.version.split()[0]
        assert list(rest.iterdir()) == []
        (measured,) = launcher.measure([Request("k", model(tmp_path), 0, 0, plan)])
    assert (measured.status, measured.error) == ("ok", None)
    assert list(rest.iterdir()) == []


def test_it_sees_latbench_and_none_of_our_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/this/interpreter")
    monkeypatch.setenv("VIRTUAL_ENV", "/of/this/interpreter")
    spy = tmp_path / "python"
    spy.write_text(f"#!/bin/sh\nexec \"{sys.executable}\" -c '{SPY}'\n")
    spy.chmod(0o755)
    said = describe(SPEC, str(spy))["versions"]
    assert "/of/this/interpreter" not in said["path"]
    assert str(ROOT) not in said["path"].split(":")[1:]  # the first is the current folder
    assert "VIRTUAL_ENV" not in said["env"].split()
    assert "PYTHONPATH" not in said["env"].split()


def test_our_own_interpreter_keeps_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    said = describe("faulty_backend:FaultyBackend")
    assert said["problem"] is None


def test_what_it_says_of_a_back_end() -> None:
    said = describe(SPEC)
    assert said["problem"] is None
    assert "onnxruntime" in said["versions"]
    assert said["python"] == sys.version.split()[0]
    missing = describe("no_such_module:Backend")
    assert missing["problem"] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_an_interpreter_that_cannot_run_it_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named numpy' >&2\nexit 1\n")
    broken.chmod(0o755)
    for python, words in (
        (str(broken), "cannot run latbench.measure: No module named numpy"),
        ("/no/python", "cannot be run"),
    ):
        with pytest.raises(MeasurementError, match=words) as caught:
            describe(SPEC, python)
        assert "\n" not in str(caught.value)


WORKER_MODULES = (
    "latbench.measure.worker, latbench.backends.tensorrt, latbench.backends.onnxruntime, latbench.backends.openvino"
)


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13"])
def test_the_workers_modules_are_understood_by_every_interpreter(version: str, tmp_path: Path) -> None:
    """Syntax and module level, with numpy stood in for: the interpreter itself need not have it."""
    python = interpreter(version)
    for name, text in (
        ("numpy/__init__.py", STAND_IN),
        ("numpy/typing.py", "from typing import Generic, TypeVar\nT = TypeVar('T')\nclass NDArray(Generic[T]): pass\n"),
    ):
        (tmp_path / "stand_in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stand_in" / name).write_text(text)
    (tmp_path / "latbench").symlink_to(ROOT / "latbench")
    environment = {
        "PYTHONPATH": f"{tmp_path}:{tmp_path / 'stand_in'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.environ["PATH"],
    }
    code = f"import {WORKER_MODULES}, sys; print(sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tuple(map(int, version.split("."))))


STAND_IN = """
class _Any:
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __rmul__(self, other): return self
    def __getitem__(self, key): return self
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Any()
"""


def interpreter(version: str) -> str:
    """A Python of that version on this machine: on the path, or among pyenv's."""
    candidates = [
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for python in filter(None, candidates):
        told = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if told.stdout.strip() == version:
            return python
    pytest.skip(f"no Python {version} on this machine")
