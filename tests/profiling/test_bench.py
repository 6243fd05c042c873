"""One network: from the words of the command line to a measured row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from latbench.errors import ModelError, UsageError
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import random_weights
from latbench.measure.base import SamplingPlan
from latbench.profiling import Target
from latbench.profiling.bench import bench, read_model
from latbench.profiling.jobs import GraphJob, OnnxJob
from latbench.spaces.mobilenet_v1 import MobileNetV1Space

SPACE = MobileNetV1Space(resolution=32, levels=2, max_width=0.75, num_classes=10)
SETTINGS = {"levels": 2, "max_width": 0.75, "num_classes": 10}
PLAN = SamplingPlan(block_s=0.002, min_time_s=0.001, precision=0.5, rounds=1, canary_every=0)
ROOFLINE = Target("cpu", "a made-up CPU", "roofline", {}, PLAN, context="isolated")
REAL = Target("cpu", "this CPU", "onnxruntime", {"threads": 1}, PLAN, context="isolated")


def narrowest(**rest: Any) -> Any:
    return read_model("mobilenet_v1:narrowest", resolution=32, settings=SETTINGS, **rest)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    network = SPACE.network(SPACE.published["narrowest"])
    path = tmp_path / "net.onnx"
    path.write_bytes(to_onnx(network, random_weights(network, 0)))
    return path


def test_an_arch_of_a_space_is_its_network_folded() -> None:
    model = narrowest()
    network = SPACE.network(SPACE.published["narrowest"])
    row = model.job.row
    assert (row.key, row.macs, row.n_params, row.arch) == (network.key, network.macs, network.n_params, (0,) * 14)
    assert isinstance(model.job, GraphJob)
    assert len(model.folded.folded) == 27
    assert len(model.job.graph.nodes) < len(network.nodes)
    unfolded = narrowest(fold="off")
    assert unfolded.job.key == network.key
    assert unfolded.folded.folded == ()


def test_a_file_is_summarised_and_folded(file: Path) -> None:
    model = read_model(str(file))
    assert isinstance(model.job, OnnxJob)
    ops = [node.op_type for node in onnx.load_from_string(model.job.data).graph.node]
    assert "BatchNormalization" not in ops
    assert len(model.folded.folded) == 27
    network = SPACE.network(SPACE.published["narrowest"])
    assert (model.job.row.macs, model.job.row.n_params) == (network.macs, network.n_params)
    assert "BatchNormalization" in [
        node.op_type
        for node in onnx.load_from_string(read_model(str(file), fold="off").job.data).graph.node  # type: ignore[attr-defined]
    ]


def test_a_batch_norm_that_stays_is_refused_where_all_must_go(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    names = ["x", "scale", "bias", "mean", "var"]
    bn = helper.make_node("BatchNormalization", names, ["y"], name="first")
    parts = [helper.make_tensor(n, TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]) for n in names[1:]]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 4, 4))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 3, 4, 4))
    model = helper.make_model(helper.make_graph([bn], "g", [x], [y], parts), ir_version=8)
    model.opset_import[0].version = 17
    onnx.save(model, str(tmp_path / "bn.onnx"))
    assert len(read_model(str(tmp_path / "bn.onnx")).folded.kept) == 1
    with pytest.raises(ModelError, match=r"batch norm .* cannot be folded: .*; --fold-bn auto leaves it in"):
        read_model(str(tmp_path / "bn.onnx"), fold="on")


@pytest.mark.parametrize(
    ("text", "rest", "words"),
    [
        ("mobilenet_v1:narrowest", {"shapes": {None: (1, 3, 32, 32)}}, "--shape is for ONNX files"),
        ("mobilenet_v1:0,1", {}, "14 option indices"),
        ("mobilenet_v1:narrowest", {"settings": {"depth": 3}}, "no setting 'depth'"),
        ("mobilenet_v1:narrowest", {"settings": {"levels": "two"}}, "levels must be a whole number, got 'two'"),
        ("mobilenet_v1:narrowest", {"settings": {"levels": True}}, "levels must be a whole number, got True"),
        ("mobilenet_v1:narrowest", {"settings": {"max_width": "wide"}}, "max_width must be a number, got 'wide'"),
        ("torchvision:resnet18", {"dtype": "float16"}, "in fp32"),
        ("torchvision:resnet18", {"settings": {"levels": 2}}, "--set is for SPACE:ARCH"),
        ("net.onnx", {"batch": 2}, "an ONNX file has its own batch"),
        ("neither", {}, "is neither FILE.onnx, torchvision:NAME nor SPACE:ARCH .*mobilenet_v1"),
        ("no_such_space:0,1", {}, "is neither"),
    ],
)
def test_words_that_do_not_fit_are_refused(text: str, rest: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_model(text, **rest)


def test_simulated_networks_and_layers_by_roofline() -> None:
    found = bench(narrowest(), ROOFLINE)
    assert found.row.origin == "simulated"
    assert found.row.latency_ms is not None
    assert found.layers is not None
    call_ms = 3e-3
    assert found.row.latency_ms == pytest.approx(call_ms + sum(layer["ms"] for layer in found.layers), rel=1e-5)
    assert found.table[found.row.key] == found.row.latency_ms


def test_an_onnx_file_has_no_roofline(file: Path) -> None:
    with pytest.raises(UsageError, match="give SPACE:ARCH"):
        bench(read_model(str(file)), ROOFLINE)


def test_a_file_and_its_arch_are_the_same_network(file: Path) -> None:
    one, other = bench(narrowest(), REAL), bench(read_model(str(file)), REAL, layers=False)
    assert one.row.status == other.row.status == "ok"
    assert one.row.macs == other.row.macs
    assert one.layers
    assert other.layers is None
    assert one.table.provenance.settings == SPACE.settings()
    assert other.table.provenance.space == ""


def test_a_failure_is_a_row_in_the_runtimes_words(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, (1, 3))
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, (1, 3))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, ir_version=8)
    model.opset_import[0].version = 17
    onnx.save(model, str(tmp_path / "m.onnx"))
    found = bench(read_model(str(tmp_path / "m.onnx")), REAL)
    assert (found.row.status, found.row.stage, found.layers) == ("error", "load", None)
    assert "Could not find an implementation for Relu" in (found.row.error or "")
