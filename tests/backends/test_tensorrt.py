"""TensorRT: its options, and why it is absent, told without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from latbench.backends import cuda, tensorrt
from latbench.backends.base import Scalar
from latbench.backends.tensorrt import TensorRTBackend
from latbench.errors import BackendUnavailableError, UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lunch": "graph"}, r"no option 'lunch' \(it has: device, threads"),
        ({"launch": "fast"}, "launch must be graph or eager, got 'fast'"),
        ({"typing": "strict"}, "typing must be auto or weak or strong"),
        ({"external_tactics": True}, "external_tactics must be auto or on or off, got True"),
        ({"device": -1}, "device must be a whole number from 0"),
        ({"device": True}, "device must be a whole number"),
        ({"optimisation_level": 9}, "from 0 to 5, got 9"),
        ({"tf32": "yes"}, "tf32 must be true or false, got 'yes'"),
        ({"timing_cache": ""}, "timing_cache must be auto, off or a file"),
    ],
)
def test_options_are_checked_without_tensorrt(options: dict[str, Scalar], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TensorRTBackend(options)


def test_absence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"run: pip install 'latbench\[tensorrt\]'.*worker_python"):
        TensorRTBackend.available()


@pytest.mark.parametrize(
    ("version", "gpus", "words"),
    [
        ("10.13.3", [("TITAN Xp", (6, 1))], r"10\.13\.3 does not run on TITAN Xp .*pip install 'tensorrt==8\.6"),
        ("8.6.1", [], r"tensorrt 8\.6\.1 is installed, but .*nvidia-smi"),
        ("8.6.1", [("TITAN Xp", (6, 1))], ""),
        ("10.13.3", [("TITAN Xp", (6, 1)), ("H100", (9, 0))], ""),
    ],
)
def test_absence_is_explained_by_version_and_device(
    version: str, gpus: list[tuple[str, tuple[int, int]]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> tuple[cuda.CudaDevice, ...]:
        if not gpus:
            raise BackendUnavailableError("no NVIDIA driver here; look with: nvidia-smi")
        return tuple(cuda.CudaDevice(*gpu) for gpu in gpus)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(tensorrt, "installed_version", lambda: version)
    monkeypatch.setattr(cuda, "devices", found)
    if not words:
        TensorRTBackend.available()
        return
    with pytest.raises(BackendUnavailableError, match=words) as caught:
        TensorRTBackend.available()
    assert "\n" not in str(caught.value)
