"""``latbench bench``, in this process, on real ONNX Runtime where a figure is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from latbench.cli import cli
from latbench.tables import LatencyTable

SMALL = ["mobilenet_v1:narrowest", "--resolution", "32", "--set", "levels=2", "--set", "num_classes=10"]
QUICK = ["--device", "cpu", "--runs", "1", "--max-time", "50ms", "--ci", "50%"]


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli, ["bench", *(str(arg) for arg in args)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def save(path: Path, op: str, shape: tuple[Any, ...], domain: str = "") -> Path:
    node = helper.make_node(op, ["x"], ["y"], domain=domain)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), ir_version=8, opset_imports=opsets)
    onnx.save(model, str(path))
    return path


def test_a_measured_network_with_its_layers_and_its_row(tmp_path: Path) -> None:
    result = run(*SMALL, *QUICK, "-o", tmp_path / "t.parquet")
    assert (result.exit_code, result.stderr) == (0, "")
    for words in ("latency", "95 % interval", "at the reference clock", "27 folded", "slowest of", "GMAC/s"):
        assert words in result.stdout
    (row,) = LatencyTable.read(tmp_path / "t.parquet").rows()
    assert (row.kind, row.status, row.origin) == ("network", "ok", "measured")


def test_json_holds_the_row_the_layers_and_the_provenance() -> None:
    found = json.loads(run(*SMALL, *QUICK, "--json").stdout)
    assert found["ci_low_ms"] <= found["latency_ref_ms"] <= found["ci_high_ms"]
    assert found["arch"] == [0] * 14
    assert found["batch_norms"] == {"folded": 27, "kept": []}
    assert sum(layer["ms"] for layer in found["layers"]) > 0
    assert found["provenance"]["backend"] == "onnxruntime"
    assert "samples_ms" not in found


def test_a_simulated_latency_is_never_called_measured() -> None:
    result = run(*SMALL, "--backend", "roofline", "--device", "titanxp")
    assert result.exit_code == 0
    assert "simulated latency" in result.stdout
    assert "95 % interval" not in result.stdout
    assert json.loads(run(*SMALL, "--backend", "roofline", "--json").stdout)["origin"] == "simulated"


def test_layers_can_be_left_out() -> None:
    assert "slowest" not in run(*SMALL, *QUICK, "--layers", 0).stdout


def test_a_dynamic_input_takes_its_shape(tmp_path: Path) -> None:
    path = save(tmp_path / "dynamic.onnx", "Relu", ("n", 8))
    result = run(path, *QUICK)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "--shape" in result.stderr
    found = json.loads(run(path, *QUICK, "--json", "--shape", "x:4x8").stdout)
    assert found["status"] == "ok"


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "nothing of the kind": (["resnet"], "'resnet' is neither FILE.onnx"),
    "missing file": (["no_such.onnx"], "no_such.onnx: no such file"),
    "no model": (["{folder}/text.onnx"], "is not an ONNX model"),
    "empty file": (["{folder}/empty.onnx"], "is empty"),
    "folder": (["{folder}"], "is a directory"),
    "custom operator": (["{folder}/custom.onnx"], "my.domain"),
    "operator of no domain": (["{folder}/unknown.onnx"], "Frobnicate"),
    "dynamic shape": (["{folder}/dynamic.onnx"], "--shape"),
    "shape of no input": (["{folder}/dynamic.onnx", "--shape", "image:4x8"], "image"),
    "malformed shape": (["{folder}/dynamic.onnx", "--shape", "4by8"], "'4by8' is no shape"),
    "shape that does not fit": (["{folder}/dynamic.onnx", "--shape", "x:4x9"], "9"),
    "batch of a file": (["{folder}/good.onnx", "--batch", "2"], "an ONNX file has its own batch"),
    "unknown torchvision name": (["torchvision:resnet19"], "resnet19"),
    "arch too short": (["mobilenet_v1:0,1"], "14 option indices"),
    "arch out of range": (["mobilenet_v1:99" + ",0" * 13], "has no option 99"),
    "arch of words": (["mobilenet_v1:best"], "'best' is no architecture"),
    "seed of words": (["mobilenet_v1:random:x"], "takes a whole number"),
    "device": ([*SMALL, "--device", "toaster"], "unknown device"),
    "back-end": ([*SMALL, "--backend", "tensorflow"], "unknown back-end 'tensorflow'"),
    "dtype": ([*SMALL, "--dtype", "fp4"], "unknown dtype"),
    "time without a unit": ([*SMALL, "--max-time", "3"], "has no unit"),
    "no time": ([*SMALL, "--max-time", "0s"], "must be positive"),
    "interval": ([*SMALL, "--ci", "200%"], "more than 100%"),
    "setting": ([*SMALL, "--set", "levels=many"], "levels must be a whole number"),
    "option": ([*SMALL, "--option", "optimisation=most"], "optimisation must be all or"),
    "roofline of a file": (["{folder}/good.onnx", "--backend", "roofline"], "give SPACE:ARCH"),
}


@pytest.mark.parametrize(("args", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_status_1(args: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello, I am a model")
    (tmp_path / "empty.onnx").write_text("")
    save(tmp_path / "good.onnx", "Relu", (1, 8))
    save(tmp_path / "dynamic.onnx", "Relu", ("n", 8))
    save(tmp_path / "custom.onnx", "Frobnicate", (1, 8), "my.domain")
    save(tmp_path / "unknown.onnx", "Frobnicate", (1, 8))
    if "torchvision" in args[0]:
        pytest.importorskip("torchvision", reason="names of torchvision need it: pip install 'latbench[search]'")
    result = run(*(arg.format(folder=tmp_path) for arg in args))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_model_that_the_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, (1, 3))
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, (1, 3))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, str(tmp_path / "m.onnx"))
    result = run(tmp_path / "m.onnx", *QUICK, "-o", tmp_path / "t.parquet")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "m.onnx: error in load: 9 : NOT_IMPLEMENTED" in result.stderr


def test_an_absent_device_is_status_4() -> None:
    result = run(*SMALL, "--device", "titanxp")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)
