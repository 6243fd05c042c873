"""From options to a target: the worker's interpreter, the GPU's number, the lock of its clock."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latbench import devices, host
from latbench.cli import target as module
from latbench.cli.target import clock_held, target_of
from latbench.errors import BackendUnavailableError, UsageError
from latbench.measure.base import SamplingPlan

PLAN = SamplingPlan()


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """This interpreter by another name, as the worker's of a device of this machine."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "d.toml").write_text(
        f'[here]\ntitle = "this one"\nkind = "cpu"\nmatch = [""]\nworker_python = "{wrapper}"\n'
        '[elsewhere]\ntitle = "that one"\nkind = "cpu"\nmatch = [""]\nworker_python = "/no/python"\n'
    )
    monkeypatch.setenv("LATBENCH_DEVICES", str(tmp_path / "d.toml"))
    return str(wrapper)


def test_a_profiles_interpreter_runs_its_worker(python: str) -> None:
    target, _ = target_of("here", None, None, 1, (), PLAN)
    assert target.python == python
    assert "onnxruntime" in target.versions()
    with target.launcher() as launcher:
        assert launcher.python == python
        assert launcher.start()["python"] == sys.version.split()[0]


def test_another_back_end_than_the_devices_runs_on_ours(python: str) -> None:
    target, _ = target_of("here", "roofline", None, 1, (), PLAN)
    assert target.python is None


@pytest.mark.usefixtures("python")
def test_an_interpreter_that_does_not_work_is_said_before_any_work() -> None:
    with pytest.raises(BackendUnavailableError, match="/no/python cannot be run"):
        target_of("elsewhere", None, None, 1, (), PLAN)


def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = devices.Gpu(1, "NVIDIA TITAN Xp", "535.1", "6.1")
    profile = devices.resolve("titanxp")
    machine = devices.Machine(host.read(), (gpu, gpu), (devices.Selection(profile, 1),))
    monkeypatch.setattr(devices, "detect", lambda *args, **kwargs: machine)
    monkeypatch.setattr("latbench.backends.tensorrt.TensorRTBackend.available", lambda: None)


def test_a_gpu_is_told_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch)
    target, _ = target_of("titanxp", "tensorrt", None, 1, (), PLAN)
    assert target.options == {"threads": 1, "device": 1}
    assert target_of("titanxp", "torch", None, 1, ("device=0",), PLAN)[0].options["device"] == 0


def test_the_clock_is_held_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch)
    calls: list[Any] = []
    nvml = SimpleNamespace(lock_clock=calls.append, free_clock=lambda: calls.append("free"))
    monkeypatch.setattr(module, "Nvml", lambda index: calls.append(f"GPU {index}") or nvml)
    target, _ = target_of("titanxp", "tensorrt", None, 1, (), PLAN, clock_mhz=1404)
    with clock_held(target):
        assert calls == ["GPU 1", 1404]
    assert calls == ["GPU 1", 1404, "free"]
    with clock_held(target_of("titanxp", "tensorrt", None, 1, (), PLAN)[0]):
        assert calls == ["GPU 1", 1404, "free"]


def test_a_cpus_clock_is_not_ours_to_hold() -> None:
    with pytest.raises(UsageError, match="holds a GPU's clock still; this CPU is none"):
        target_of("cpu", None, None, 1, (), PLAN, clock_mhz=1404)
