"""OpenVINO by the laws of every back-end, and its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from onnx_models import custom_operator

from latbench.backends.openvino import OpenVinoBackend
from latbench.errors import MeasurementError, UsageError
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import random_weights
from latbench.profiling.session import CANARY
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.testing import BackendConformance

pytest.importorskip("openvino", reason="pip install 'latbench[openvino]'")


class TestOpenVino(BackendConformance):
    backend = "openvino"


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": True}, {"precision": "f64"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError):
        OpenVinoBackend(options)


def test_a_network_gives_what_the_graph_means_and_its_layers(tmp_path):
    network = MobileNetV1Space(resolution=32).network((0,) * 14)
    path = tmp_path / "network.onnx"
    path.write_bytes(to_onnx(network, random_weights(network, 0)))
    with OpenVinoBackend({}).load(path) as runner:
        assert runner.sample(1) > 0
        layers = runner.layers()
    assert layers is not None
    assert sum("onv" in layer.op for layer in layers) >= 14  # a depthwise convolution may be fused into the one before


def test_a_custom_operator_is_named(tmp_path):
    path = custom_operator(tmp_path / "custom.onnx")
    with pytest.raises(MeasurementError, match="MyOp"), OpenVinoBackend({}).load(path):
        pass


def test_it_imports_no_other_framework():
    code = (
        "import sys; from latbench.backends.openvino import OpenVinoBackend; OpenVinoBackend({});"
        "print(*({'torch', 'onnx', 'pyarrow', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_inputs_are_noise(tmp_path):
    network = MobileNetV1Space(resolution=32).network((0,) * 14)
    path = tmp_path / "network.onnx"
    path.write_bytes(to_onnx(network, random_weights(network, 0)))
    with OpenVinoBackend({}).load(path) as runner:
        assert 0.9 < float(np.std(runner._inputs[0])) < 1.1


def test_a_process_that_used_it_twice_survives_a_signal(tmp_path):
    # Two cores that ended out of order left a freed signal stack behind: the next SIGCHLD was a segmentation fault.
    CANARY.write(tmp_path / "model.onnx", "onnx", 0)
    program = """
import signal, subprocess, sys
from pathlib import Path
from latbench.backends.openvino import OpenVinoBackend

first, second = OpenVinoBackend({}), OpenVinoBackend({})
with first.load(Path(sys.argv[1])), second.load(Path(sys.argv[1])):
    pass
del first, second
signal.signal(signal.SIGCHLD, lambda *_: print("told"))
subprocess.run([sys.executable, "-c", ""])
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=False
    )
    assert (run.returncode, set(run.stdout.split())) == (0, {"told"}), run.stderr
