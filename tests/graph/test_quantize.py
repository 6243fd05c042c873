"""Q/DQ models: outputs near float32's on two runtimes, int8 kernels that really run, and what TensorRT demands."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from latbench.backends.onnxruntime import OnnxRuntimeBackend
from latbench.errors import ModelError
from latbench.graph import ops
from latbench.graph.blocks import inverted_residual, squeeze_excite
from latbench.graph.calibration import exposed, ranges
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import as_dtype, fold_structure, random_weights
from latbench.graph.quantize import Range, Scheme, quantised_tensors, quantize, scale_and_zero
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space

SCHEMES: tuple[Scheme, ...] = ("onnxruntime", "openvino", "tensorrt")
CPUINFO = Path("/proc/cpuinfo")
TOLERANCE = 0.05  # RMS of the change over the RMS of the outputs: random weights, min-max of 4 batches (seen: 0.04)


def saturates() -> bool:
    """Whether this processor's int8 kernels add pairs of products in 16 bits, as x86 without VNNI does: outputs of a
    right model are 5 to 30 % off then, on both runtimes."""
    if platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists():
        return False
    return "vnni" not in CPUINFO.read_text()


def residual() -> Graph:
    """Conv, two residual sums, a squeeze-and-excite gate, pooling and a classifier."""
    b = GraphBuilder()
    x = b.add(ops.Conv2d(3, 16, 3, padding=1, bias=True), b.input("x", (2, 3, 16, 16)), name="stem")
    x = b.add(ops.ReLU(), x, name="act")
    x = inverted_residual(b, x, 48, 16, name="mb")
    x = squeeze_excite(b, x, 4, name="se")
    x = b.add(ops.Add(), b.add(ops.Conv2d(16, 16, 1, bias=True), x, name="left"), x, name="sum")
    x = b.add(ops.Flatten(), b.add(ops.AdaptiveAvgPool2d(), x, name="pool"), name="flat")
    return fold_structure(b.build(b.add(ops.Linear(16, 10), x, name="fc")))


def networks() -> dict[str, Graph]:
    mobile, cells = MobileNetV1Space(resolution=32), NASBench201Space()
    return {
        "residual": residual(),
        "mobilenet": fold_structure(mobile.network(mobile.published["narrowest"])),
        "nasbench201": fold_structure(cells.network(cells.published["resnet"])),
    }


def model_of(graph: Graph) -> ModelProto:
    return onnx.load_from_string(to_onnx(graph, random_weights(graph)))


def batches_of(model: ModelProto, n: int = 4) -> list[dict[str, NDArray[Any]]]:
    rng = np.random.default_rng(0)
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
    return [{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for _ in range(n)]


def observed(model: ModelProto, scheme: Scheme, folder: Path) -> dict[str, Range]:
    names = quantised_tensors(model, scheme).values()
    path = folder / "exposed.onnx"
    path.write_bytes(exposed(model, names).SerializeToString())
    with OnnxRuntimeBackend({"optimisation": "none"}).load(path) as runner:
        return ranges(runner.outputs, batches_of(model), names)


def runner_of(name: str, path: Path) -> Any:
    if name == "onnxruntime":  # as it stands, Q/DQ pairs are computed in float32
        return OnnxRuntimeBackend({"optimisation": "none"} if saturates() else {}).load(path)
    if saturates():
        pytest.skip("int8 kernels of this processor saturate: no VNNI")
    pytest.importorskip("openvino", reason="pip install 'latbench[openvino]'")
    from latbench.backends.openvino import OpenVinoBackend

    return OpenVinoBackend({}).load(path)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("title", ["residual", "mobilenet", pytest.param("nasbench201", marks=pytest.mark.slow)])
def test_outputs_are_near_those_of_float32(title: str, scheme: Scheme, runtime: str, tmp_path: Path) -> None:
    model, outputs = model_of(networks()[title]), []
    quantised = quantize(model, observed(model, scheme, tmp_path), scheme)
    for made in (model, quantised):
        path = tmp_path / "model.onnx"
        path.write_bytes(made.SerializeToString())
        with runner_of(runtime, path) as runner:
            (found,) = runner.outputs(batches_of(model)[0]).values()
            outputs.append(found.astype(np.float64))
    exact, near = outputs
    error = np.sqrt(np.mean((near - exact) ** 2) / np.mean(exact**2))
    assert 0 < error < TOLERANCE


def test_onnx_runtime_runs_every_convolution_in_int8(tmp_path: Path) -> None:
    model = model_of(networks()["mobilenet"])
    path = tmp_path / "model.onnx"
    path.write_bytes(quantize(model, observed(model, "onnxruntime", tmp_path), "onnxruntime").SerializeToString())
    with OnnxRuntimeBackend({}).load(path) as runner:
        kernels = [layer.op for layer in runner.layers() or ()]
    assert kernels.count("QLinearConv") == sum(node.op_type == "Conv" for node in model.graph.node) == 27
    assert kernels.count("QGemm") == 1
    assert not {"Conv", "FusedConv", "Gemm"} & set(kernels)


def constants(model: ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_what_tensorrt_demands_holds(tmp_path: Path) -> None:
    """Zero points of 0, int8 throughout, weights behind a pair of their own, biases in float32."""
    for graph in networks().values():
        model = model_of(graph)
        quantised = quantize(model, observed(model, "tensorrt", tmp_path), "tensorrt")
        values, made = constants(quantised), {n.output[0]: n for n in quantised.graph.node}
        for node in quantised.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert values[node.input[2]].dtype == np.int8
                assert not values[node.input[2]].any()
            if node.op_type in ("Conv", "Gemm"):
                x, weight = made[node.input[0]], made[node.input[1]]
                assert x.op_type == weight.op_type == "DequantizeLinear"
                stored = made[weight.input[0]]
                assert stored.op_type == "QuantizeLinear"
                assert values[stored.input[0]].dtype == np.float32
                assert len(values[stored.input[1]]) == len(values[stored.input[0]]), "a scale per output channel"
                assert all(values[name].dtype == np.float32 for name in node.input[2:])


def test_for_tensorrt_a_sum_takes_the_convolution_before_it_as_it_is() -> None:
    model = model_of(residual())
    chosen = quantised_tensors(model, "tensorrt")
    (add,) = (node for node in model.graph.node if node.output[0] == "sum")
    left, right = add.input
    assert left not in chosen, "the sum is fused into this convolution"
    assert right in chosen
    assert left in quantised_tensors(model, "onnxruntime")


def test_moved_tensors_keep_their_scale() -> None:
    """A Flatten between pooling and classifier must not quantise twice."""
    chosen = quantised_tensors(model_of(residual()), "onnxruntime")
    assert chosen["flat"] == chosen["pool"] == "pool"


def test_a_network_is_quantised_as_onnxruntimes_own_tool_does(tmp_path: Path) -> None:
    tool = pytest.importorskip("onnxruntime.quantization")
    model = model_of(networks()["mobilenet"])
    source, theirs_path = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(model, str(source))

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.rest = iter(batches_of(model))

        def get_next(self) -> Any:
            return next(self.rest, None)

    kinds = {"activation_type": tool.QuantType.QUInt8, "weight_type": tool.QuantType.QInt8, "per_channel": True}
    tool.quantize_static(str(source), str(theirs_path), Reader(), quant_format=tool.QuantFormat.QDQ, **kinds)
    theirs = onnx.load(str(theirs_path))
    ours = quantize(model, observed(model, "onnxruntime", tmp_path), "onnxruntime")

    def by_tensor(quantised: ModelProto) -> dict[str, tuple[float, int]]:
        values = constants(quantised)
        pairs = (n for n in quantised.graph.node if n.op_type == "QuantizeLinear")
        return {n.input[0]: (float(values[n.input[1]]), int(values[n.input[2]])) for n in pairs}

    def weights(quantised: ModelProto) -> list[NDArray[Any]]:
        values, made = constants(quantised), {n.output[0]: n for n in quantised.graph.node}
        return [values[made[n.input[1]].input[0]] for n in quantised.graph.node if n.op_type == "Conv"]

    mine, other = by_tensor(ours), by_tensor(theirs)
    shared = mine.keys() & other.keys()
    assert len(shared) >= 28
    for name in shared:
        assert mine[name][0] == pytest.approx(other[name][0], rel=1e-4)
        assert abs(mine[name][1] - other[name][1]) <= 1
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize("extent", [(0.0, 6.0), (-1.5, 3.0), (-2.0, -1.0), (0.25, 0.5), (0.0, 0.0), (-1e-30, 1e30)])
def test_zero_is_hit_exactly_and_the_range_is_covered(extent: Range) -> None:
    for scheme in SCHEMES:
        scale, zero = scale_and_zero(extent, scheme)
        assert scale > 0
        low, high = (-127, 127) if scheme == "tensorrt" else (0, 255)
        assert low <= zero <= high
        edges = float(scale) * (np.array([low, high]) - int(zero))
        assert edges[0] <= extent[0] + scale / 2
        assert edges[1] >= extent[1] - scale / 2


def linear(
    weight: NDArray[Any], bias: NDArray[Any], *, opset: int = 17, dtype: int = TensorProto.FLOAT, **attributes: Any
) -> ModelProto:
    """x @ weight + bias, of one input of 4."""
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="fc", **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", dtype, [1, 4])],
        [value("y", dtype, [1, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def test_a_bias_far_beyond_its_weights_fits_32_bits() -> None:
    weight = np.array([[1, 0, 1e-12]] * 4, np.float32)
    model = linear(weight, np.array([1, 5, 1000], np.float32))
    quantised = quantize(model, {"x": (-1, 1)}, "onnxruntime")
    values = constants(quantised)
    (integers,) = (value for value in values.values() if value.dtype == np.int32 and value.any())
    node = next(n for n in quantised.graph.node if n.op_type == "DequantizeLinear" and "bias" in n.name)
    np.testing.assert_allclose(integers * values[node.input[1]].astype(float), [1, 5, 1000], rtol=1e-2)


def test_one_weight_of_two_layers_is_stored_once(tmp_path: Path) -> None:
    model = linear(np.ones((4, 4), np.float32), np.zeros(4, np.float32))
    second = helper.make_node("Gemm", ["y", "w"], ["z"], name="again")
    model.graph.node.append(second)
    model.graph.output[0].name = "z"
    quantised = quantize(model, {"x": (-1, 1), "y": (-4, 4)}, "tensorrt")
    assert sum(tensor.name.startswith("w") and tensor.dims[:] == [4, 4] for tensor in quantised.graph.initializer) == 1
    assert len({n.input[1] for n in quantised.graph.node if n.op_type == "Gemm"}) == 1


def test_the_model_given_stays_as_it_is(tmp_path: Path) -> None:
    model = model_of(residual())
    before = model.SerializeToString()
    quantize(model, observed(model, "onnxruntime", tmp_path), "onnxruntime")
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: linear(np.ones((4, 3), np.float32), np.zeros(3, np.float32), opset=11), "needs opset 13.* has 11"),
        (lambda: model_of(as_dtype(residual(), "float16")), "no float32 convolution or matrix product"),
        (lambda: linear(np.ones((4, 3), np.float32), np.zeros(3, np.float32), alpha=2.0), "no float32 convolution"),
        (
            lambda: quantize(linear(np.ones((4, 3), "f"), np.zeros(3, "f")), {"x": (0, 1)}, "tensorrt"),
            "quantised already",
        ),
    ],
)
def test_what_cannot_be_quantised_is_said(model: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        quantised_tensors(model(), "onnxruntime")


@pytest.mark.parametrize("found", [{}, {"x": (0.0, float("nan"))}, {"x": (float("inf"), float("-inf"))}])
def test_a_range_that_is_none_is_said(found: dict[str, Range]) -> None:
    with pytest.raises(ModelError, match="no finite range of 'x'"):
        quantize(linear(np.ones((4, 3), np.float32), np.zeros(3, np.float32)), found, "onnxruntime")
