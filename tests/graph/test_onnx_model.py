"""latbench.graph.onnx_model: files that are malformed, shapes that are open, folding against ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from latbench.errors import LatbenchError, ModelError, UsageError
from latbench.graph.onnx_model import fold_batch_norm, from_bytes, load, summarise

RNG = np.random.default_rng(0)
IR = {9: 4, 11: 6, 13: 7, 14: 7, 15: 8, 17: 8, 21: 10}
Shape = Sequence[int | str | None] | None


def floats(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def bn_values(channels: int, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}scale": RNG.uniform(0.5, 1.5, channels).astype(np.float32),
        f"{prefix}shift": floats(channels),
        f"{prefix}mean": floats(channels),
        f"{prefix}var": RNG.uniform(0.5, 2, channels).astype(np.float32),
    }


def node(op: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    domain = attributes.pop("domain", "")
    return helper.make_node(
        op, inputs.split(), output.split(), name=f"{op}_{output.split()[0]}", domain=domain, **attributes
    )


def bn(source: str, output: str, prefix: str = "", **attributes: Any) -> NodeProto:
    roles = " ".join(f"{prefix}{role}" for role in ("scale", "shift", "mean", "var"))
    return node("BatchNormalization", f"{source} {roles}", output, **attributes)


def make(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, Any],
    inputs: Mapping[str, Shape] = {"x": (2, 4, 9, 9)},
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    elem: int = TensorProto.FLOAT,
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, elem, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, elem, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR.get(opset, 8))


def run(model: ModelProto, seed: int = 0) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # ONNX Runtime folds BN itself
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds = {i.name: rng.normal(size=i.shape).astype(dtypes[i.type]) for i in session.get_inputs()}
    return list(session.run(None, feeds))


def max_relative_error(a: ModelProto, b: ModelProto) -> float:
    pairs = zip(run(a), run(b), strict=True)
    return max(float(np.abs(x.astype("f8") - y).max() / np.abs(x.astype("f8")).max()) for x, y in pairs)


def assert_folds(model: ModelProto, n: int = 1, tolerance: float = 1e-5) -> ModelProto:
    """All `n` batch norms are gone, the network is valid and computes what it did; gives the folded model."""
    model = from_bytes(model.SerializeToString())
    folded, report = fold_batch_norm(model)
    assert report.kept == ()
    assert len(report.folded) == n
    assert "BatchNormalization" not in ops(folded)
    onnx.checker.check_model(folded, full_check=True)
    assert max_relative_error(model, folded) < tolerance
    assert not unread(folded)
    return folded


def reason_kept(model: ModelProto) -> str:
    """Why the only batch norm stays; the model computes what it did."""
    model = from_bytes(model.SerializeToString())
    folded, report = fold_batch_norm(model)
    ((_, reason),) = report.kept
    assert report.folded == ()
    assert max_relative_error(model, folded) == 0
    return reason


def ops(model: ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def unread(model: ModelProto) -> set[str]:
    return {t.name for t in model.graph.initializer} - {name for n in model.graph.node for name in n.input}


CONV = {"w": floats(6, 4, 3, 3), **bn_values(6)}


# ── folding ──────────────────────────────────────────────────────────────────

CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int, dict[str, Any]]] = {
    # op, input, weight, output channels, attributes
    "plain": ("Conv", (2, 4, 9, 9), (6, 4, 3, 3), 6, {}),
    "padded": ("Conv", (2, 4, 9, 9), (6, 4, 3, 3), 6, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "grouped": ("Conv", (2, 4, 9, 9), (6, 2, 3, 3), 6, {"group": 2}),
    "depthwise": ("Conv", (2, 4, 9, 9), (8, 1, 3, 3), 8, {"group": 4}),
    "1d": ("Conv", (2, 4, 9), (6, 4, 3), 6, {}),
    "3d": ("Conv", (2, 4, 5, 5, 5), (6, 4, 3, 3, 3), 6, {}),
    "transposed": ("ConvTranspose", (2, 4, 9, 9), (4, 6, 3, 3), 6, {"strides": [2, 2]}),
    "transposed grouped": ("ConvTranspose", (2, 4, 9, 9), (4, 3, 3, 3), 6, {"group": 2}),
    "transposed depthwise": ("ConvTranspose", (2, 4, 9, 9), (4, 1, 2, 2), 4, {"group": 4}),
    "transposed 1d": ("ConvTranspose", (2, 4, 9), (4, 3, 3), 6, {"group": 2}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_folded_convolution_computes_the_same(case: str, bias: bool, opset: int) -> None:
    op, x, w, channels, attributes = CONVOLUTIONS[case]
    weights = {"w": floats(*w), **bn_values(channels), **({"b": floats(channels)} if bias else {})}
    layer = node(op, "x w b" if bias else "x w", "h", **attributes)
    folded = assert_folds(make([layer, bn("h", "y", epsilon=1e-3)], weights, {"x": x}, opset=opset))
    assert ops(folded) == [op]
    assert len(folded.graph.initializer) == 2


@pytest.mark.parametrize("bias_shape", [None, (), (1,), (5,), (1, 5), (1, 1)])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("scalars", [{}, {"alpha": 0.5, "beta": 2.0}])
def test_folded_gemm_computes_the_same(
    bias_shape: tuple[int, ...] | None, trans_b: int, scalars: dict[str, float]
) -> None:
    weights = {"w": floats(*((5, 4) if trans_b else (4, 5))), **bn_values(5)}
    if bias_shape is not None:
        weights["b"] = floats(*bias_shape)
    layer = node("Gemm", "x w" if bias_shape is None else "x w b", "h", transB=trans_b, **scalars)
    assert ops(assert_folds(make([layer, bn("h", "y")], weights, {"x": (3, 4)}))) == ["Gemm"]


def test_folded_transposed_gemm_computes_the_same() -> None:
    layer = node("Gemm", "x w b", "h", transA=1)
    assert_folds(make([layer, bn("h", "y")], {"w": floats(4, 5), "b": floats(5), **bn_values(5)}, {"x": (4, 3)}))


def test_folded_matmul_becomes_matmul_and_add() -> None:
    layers = [node("MatMul", "x w", "h"), bn("h", "y")]
    folded = assert_folds(make(layers, {"w": floats(4, 5), **bn_values(5)}, {"x": (3, 4)}))
    assert ops(folded) == ["MatMul", "Add"]


@pytest.mark.parametrize("order", ["h b", "b h"])
@pytest.mark.parametrize("bias_shape", [(), (5,), (1, 5)])
def test_folded_matmul_and_add_keeps_one_add(order: str, bias_shape: tuple[int, ...]) -> None:
    layers = [node("MatMul", "x w", "h"), node("Add", order, "a"), bn("a", "y")]
    weights = {"w": floats(4, 5), "b": floats(*bias_shape), **bn_values(5)}
    assert ops(assert_folds(make(layers, weights, {"x": (3, 4)}))) == ["MatMul", "Add"]


@pytest.mark.parametrize("bias_shape", [(), (6, 1, 1), (1, 6, 1, 1), (1, 1, 1)])
def test_folded_convolution_swallows_an_added_bias(bias_shape: tuple[int, ...]) -> None:
    layers = [node("Conv", "x w", "h"), node("Add", "h b", "a"), bn("a", "y")]
    assert ops(assert_folds(make(layers, {"b": floats(*bias_shape), **CONV}))) == ["Conv"]


def test_two_batch_norms_in_a_row_fold() -> None:
    layers = [node("Conv", "x w", "h"), bn("h", "i"), bn("i", "y", "second_")]
    assert ops(assert_folds(make(layers, {**CONV, **bn_values(6, "second_")}), n=2)) == ["Conv"]
    layers[0] = node("MatMul", "x w", "h")
    weights = {"w": floats(4, 6), **bn_values(6), **bn_values(6, "second_")}
    assert ops(assert_folds(make(layers, weights, {"x": (3, 4)}), n=2)) == ["MatMul", "Add"]


def test_shared_weight_is_copied() -> None:
    layers = [node("Conv", "x w", "h"), bn("h", "y"), node("Conv", "x w", "z")]
    folded = assert_folds(make(layers, CONV, outputs=("y", "z")))
    kept = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}["w"]
    np.testing.assert_array_equal(kept, CONV["w"])


def test_shared_weight_folds_into_each_reader() -> None:
    layers = [node("Conv", "x w", "h"), bn("h", "y"), node("Conv", "x w", "i"), bn("i", "z", "second_")]
    assert_folds(make(layers, {**CONV, **bn_values(6, "second_")}, outputs=("y", "z")), n=2)


def test_constants_behind_nodes_fold() -> None:
    constants = [node("Constant", "", name, value=numpy_helper.from_array(CONV[name])) for name in ("w", "mean")]
    aliases = [node("Identity", "stored_var", "i"), node("Identity", "i", "var")]
    weights = {"scale": CONV["scale"], "shift": CONV["shift"], "stored_var": CONV["var"]}
    folded = assert_folds(make([*constants, *aliases, node("Conv", "x w", "h"), bn("h", "y")], weights))
    assert ops(folded) == ["Conv"]


def test_transposed_weight_folds() -> None:
    layers = [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "h"), bn("h", "y")]
    assert ops(assert_folds(make(layers, {"w": floats(5, 4), **bn_values(5)}, {"x": (3, 4)}))) == ["MatMul", "Add"]


def test_float16_is_computed_wide_and_stored_narrow() -> None:
    values = {k: v.astype(np.float16) for k, v in CONV.items()}
    model = make([node("Conv", "x w", "h"), bn("h", "y")], values, elem=TensorProto.FLOAT16)
    folded = assert_folds(model, tolerance=5e-3)
    assert {t.data_type for t in folded.graph.initializer} == {TensorProto.FLOAT16}
    weight = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}[folded.graph.node[0].input[1]]
    wide = {k: v.astype(np.float64) for k, v in values.items()}
    exact = wide["w"] * (wide["scale"] / np.sqrt(wide["var"] + 1e-5)).reshape(-1, 1, 1, 1)
    assert np.abs(weight - exact).max() <= np.abs(exact).max() * 2**-11  # half a unit in the last place


def test_float16_overflow_is_refused() -> None:
    values = {k: v.astype(np.float16) for k, v in {**CONV, "w": CONV["w"] * 0 + 60000}.items()}
    values["scale"] = np.full(6, 8, np.float16)
    model = from_bytes(
        make([node("Conv", "x w", "h"), bn("h", "y")], values, elem=TensorProto.FLOAT16).SerializeToString()
    )
    _, report = fold_batch_norm(model)
    assert "overflow float16" in report.kept[0][1]


def test_the_model_given_is_left_as_it_was() -> None:
    model = from_bytes(make([node("Conv", "x w", "h"), bn("h", "y")], CONV).SerializeToString())
    before = model.SerializeToString(deterministic=True)
    fold_batch_norm(model)
    assert model.SerializeToString(deterministic=True) == before


def test_report_names_batch_norm_and_layer() -> None:
    model = from_bytes(make([node("Conv", "x w", "h"), bn("h", "y")], CONV).SerializeToString())
    assert fold_batch_norm(model)[1].folded == (("BatchNormalization_y", "Conv_h"),)
    for n in model.graph.node:
        n.ClearField("name")
    assert fold_batch_norm(model)[1].folded == (("y", "h"),)


REFUSALS: dict[str, tuple[str, ModelProto]] = {
    "read elsewhere": (
        "read by other nodes",
        make([node("Conv", "x w", "h"), bn("h", "i"), node("Add", "h i", "y")], CONV),
    ),
    "graph output": ("graph output", make([node("Conv", "x w", "h"), bn("h", "y")], CONV, outputs=("h", "y"))),
    "variable weight": (
        "weight of Conv Conv_h is not constant",
        make([node("Conv", "x w", "h"), bn("h", "y")], bn_values(6), {"x": (2, 4, 9, 9), "w": (6, 4, 3, 3)}),
    ),
    "variable bias": (
        "bias b is not constant",
        make([node("Conv", "x w b", "h"), bn("h", "y")], CONV, {"x": (2, 4, 9, 9), "b": (6,)}),
    ),
    "variable statistics": (
        "mean is not constant",
        make(
            [node("Conv", "x w", "h"), bn("h", "y")],
            {k: v for k, v in CONV.items() if k != "mean"},
            {"x": (2, 4, 9, 9), "mean": (6,)},
        ),
    ),
    "first of all": ("reads the input x", make([bn("x", "h"), node("Conv", "h w", "y")], {**CONV, **bn_values(4)})),
    "before the layer": (
        "comes from Relu",
        make([node("Relu", "x", "r"), bn("r", "h"), node("Conv", "h w", "y")], {**CONV, **bn_values(4)}),
    ),
    "residual": (
        "comes from Add",
        make([node("Conv", "x w", "h"), node("Add", "h h", "a"), bn("a", "y")], CONV),
    ),
    "bias per pixel": (
        "not one value per channel",
        make([node("Conv", "x w", "h"), node("Add", "h b", "a"), bn("a", "y")], {**CONV, "b": floats(7, 7)}),
    ),
    "bias per row": (
        "not one value per channel",
        make(
            [node("Gemm", "x w b", "h"), bn("h", "y")],
            {"w": floats(4, 5), "b": floats(3, 1), **bn_values(5)},
            {"x": (3, 4)},
        ),
    ),
    "matmul of sequences": (
        "MatMul_h is not known to be",
        make([node("MatMul", "x w", "h"), bn("h", "y")], {"w": floats(4, 5), **bn_values(7)}, {"x": (3, 7, 4)}),
    ),
    "matmul from the left": (
        "weight of MatMul MatMul_h is not constant",
        make([node("MatMul", "w x", "h"), bn("h", "y")], {"w": floats(3, 4), **bn_values(5)}, {"x": (4, 5)}),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_fold_is_kept_with_a_reason(case: str) -> None:
    reason, model = REFUSALS[case]
    assert reason in reason_kept(model)


TRAINING = {
    "training_mode": make([node("Conv", "x w", "h"), bn("h", "y m v", training_mode=1)], CONV),
    "opset 9, five outputs": make([node("Conv", "x w", "h"), bn("h", "y m v sm sv")], CONV, opset=9),
    "opset 13, five outputs": make([node("Conv", "x w", "h"), bn("h", "y m v sm sv")], CONV, opset=13),
    "opset 6 by default": make([node("Conv", "x w", "h"), bn("h", "y")], CONV, opset=6),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_mode_is_refused(case: str) -> None:
    model = from_bytes(TRAINING[case].SerializeToString())
    with pytest.raises(ModelError, match=r"^BatchNormalization_y .*eval mode$"):
        fold_batch_norm(model)


def branch_model(op: str) -> ModelProto:
    """An If (or Loop) whose body reads the main graph's convolution and holds a batch norm of its own."""
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    body = helper.make_graph([bn("h", "o")], "then", [], [out])
    other = helper.make_graph([node("Relu", "h", "o2")], "else", [], [helper.make_tensor_value_info("o2", 1, None)])
    if op == "If":
        last = node("If", "flag", "y", then_branch=body, else_branch=other)
    else:
        i, keep = (helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("keep", 9)))
        state = helper.make_tensor_value_info("s", TensorProto.FLOAT, None)
        inside = [node("Identity", "keep", "keep2"), bn("s", "o")]
        loop = helper.make_graph(inside, "body", [i, keep, state], [helper.make_tensor_value_info("keep2", 9, []), out])
        last = node("Loop", "trips flag h", "y", body=loop)
    constants = {"flag": np.array(True), "trips": np.array(2, np.int64)}
    used = {k: v for k, v in constants.items() if op == "Loop" or k == "flag"}
    model = make([node("Conv", "x w", "c"), bn("c", "h"), last], {**CONV, **used})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 6, 7, 7)))
    return model


@pytest.mark.parametrize("op", ["If", "Loop"])
def test_branches_and_loops_pass(op: str) -> None:
    model = from_bytes(branch_model(op).SerializeToString())
    folded, report = fold_batch_norm(model)
    assert report.folded == (("BatchNormalization_h", "Conv_c"),)
    assert report.kept == (("BatchNormalization_o", f"inside a branch or loop of {op}_y"),)
    onnx.checker.check_model(folded)
    assert max_relative_error(model, folded) < 1e-5
    assert summarise(folded).macs == 2 * 6 * 7 * 7 * 36  # the body multiplies no matrices


# ── reading ──────────────────────────────────────────────────────────────────


def simple(**kwargs: Any) -> ModelProto:
    return make([node("Conv", "x w", "y")], {"w": CONV["w"]}, **kwargs)


def refusal(model: ModelProto, **kwargs: Any) -> str:
    with pytest.raises(ModelError) as caught:
        from_bytes(model.SerializeToString(), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello, this is a text file\n", "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(range(256)), "not an ONNX model"),
        (b"\x08\x08", "holds no graph"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="is a directory"):
        load(tmp_path)
    with pytest.raises(ModelError, match="not a regular file"):
        load("/dev/null")
    with pytest.raises(ModelError, match="cannot be read"):
        load("nul\0.onnx")


def test_every_truncation_is_refused() -> None:
    data = make([node("Conv", "x w", "h"), bn("h", "y")], {**CONV, "w": floats(6, 4, 1, 1)}).SerializeToString()
    from_bytes(data)
    for length in range(len(data)):
        with pytest.raises(ModelError):
            from_bytes(data[:length])


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_bytes_never_give_a_traceback(data: st.DataObject) -> None:
    whole = bytearray(branch_model("If").SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd numbers in odd places
            model = from_bytes(bytes(whole))
            summarise(fold_batch_norm(model)[0])
    except LatbenchError:
        pass


def test_custom_and_unknown_operators_are_named() -> None:
    custom = make([node("Magic", "x", "y", domain="org.acme")], {})
    custom.opset_import.append(helper.make_opsetid("org.acme", 1))
    assert "'Magic_y' is a custom operator, Magic of domain 'org.acme'" in refusal(custom)
    assert "opset 17 has no operator Magic" in refusal(make([node("Magic", "x", "y")], {}))
    assert "opset 9 has no operator HardSwish" in refusal(make([node("HardSwish", "x", "y")], {}, opset=9))
    assert "no longer has the operator Upsample" in refusal(make([node("Upsample", "x s", "y")], {"s": floats(4)}))
    assert "pip install --upgrade onnx" in refusal(simple(opset=999))
    branch = branch_model("If")
    branch.graph.node[-1].attribute[0].g.node[0].domain = "org.acme"
    assert "org.acme" in refusal(branch)


def test_onnx_runtimes_own_operators_pass() -> None:
    model = make([node("FusedConv", "x w", "y", domain="com.microsoft", activation="Relu")], {"w": CONV["w"]})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    loaded = from_bytes(model.SerializeToString())
    assert summarise(loaded).n_by_op == {"com.microsoft.FusedConv": 1}
    assert summarise(loaded).macs is None  # no schema, hence no output shape
    loaded.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, (2, 6, 7, 7)))
    assert summarise(loaded).macs == 2 * 6 * 7 * 7 * 36


def test_written_out_default_domain_passes() -> None:
    model = simple()
    model.graph.node[0].domain = model.opset_import[0].domain = "ai.onnx"
    assert summarise(from_bytes(model.SerializeToString())).n_by_op == {"Conv": 1}


def test_functions_are_inlined() -> None:
    body = [node("Conv", "a b", "c"), node("Relu", "c", "d")]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("org.acme", "ConvRelu", ["a", "b"], ["d"], body, opsets)
    model = make([node("ConvRelu", "x w", "y", domain="org.acme")], {"w": CONV["w"]})
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("org.acme", 1))
    assert ops(from_bytes(model.SerializeToString())) == ["Conv", "Relu"]


def test_models_without_inputs_or_nodes_are_refused() -> None:
    assert "no inputs" in refusal(make([node("Relu", "w", "y")], {"w": CONV["w"]}, {}))
    assert "computes nothing" in refusal(make([], {}, outputs=("x",)))
    sequence = simple()
    sequence.graph.input.append(helper.make_tensor_sequence_value_info("s", 1, None))
    assert "input 's' is not a tensor" in refusal(sequence)


def test_initializers_listed_as_inputs_are_constants() -> None:
    model = make([node("Conv", "x w", "h"), bn("h", "y")], CONV, opset=9)
    model.ir_version = 3
    model.graph.input.extend(helper.make_tensor_value_info(k, 1, v.shape) for k, v in CONV.items())
    assert [i.name for i in from_bytes(model.SerializeToString()).graph.input] == ["x"]
    assert_folds(model)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 6, 7, 7)))
    folded, _ = fold_batch_norm(model)  # also straight from a file
    onnx.checker.check_model(folded)


# ── external data ────────────────────────────────────────────────────────────


def save_external(path: Path, location: str = "m.data") -> ModelProto:
    model = make([node("Conv", "x w", "h"), bn("h", "y")], CONV)
    onnx.save_model(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    if location != "m.data":
        stored = onnx.load(path, load_external_data=False)
        for tensor in stored.graph.initializer:
            tensor.external_data[0].value = location
        path.write_bytes(stored.SerializeToString())
    return model


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    inside = make([node("Conv", "x w", "h"), bn("h", "y")], CONV)
    save_external(tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    assert max_relative_error(inside, loaded) == 0
    assert summarise(loaded).key == summarise(from_bytes(inside.SerializeToString())).key


def test_external_data_in_a_subfolder_is_read(tmp_path: Path) -> None:
    save_external(tmp_path / "m.onnx", "weights/m.data")
    (tmp_path / "weights").mkdir()
    (tmp_path / "m.data").rename(tmp_path / "weights/m.data")
    assert load(tmp_path / "m.onnx").graph.initializer[0].raw_data


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "link"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    (folder / "link").symlink_to("../secret")
    save_external(folder / "m.onnx", location)
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(folder / "m.onnx")


def test_external_data_missing_or_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_external(path)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:-1])
    with pytest.raises(ModelError, match="a part is missing"):
        load(path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match="which is not there"):
        load(path)
    with pytest.raises(ModelError, match="came without a folder"):
        from_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-8"), ("length", "-1"), ("offset", "x"), ("length", str(2**40))]
)
def test_malformed_external_data_is_refused(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_external(path)
    stored = onnx.load(path, load_external_data=False)
    for entry in stored.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(stored.SerializeToString())
    with pytest.raises(ModelError):
        load(path)


def test_wrong_amount_of_weight_data_is_refused() -> None:
    model = simple()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    refusal(model)


# ── shapes ───────────────────────────────────────────────────────────────────


def shape_of(model: ModelProto, which: str = "inputs") -> Any:
    return {info.name: info.shape for info in getattr(summarise(model), which)}


@pytest.mark.parametrize("key", [None, "x"])
def test_given_shape_settles_input_and_output(key: str | None) -> None:
    data = simple(inputs={"x": ("batch", 4, None, "width")}).SerializeToString()
    model = from_bytes(data, {key: (3, 4, 9, 11)})
    assert shape_of(model) == {"x": (3, 4, 9, 11)}
    assert shape_of(model, "outputs") == {"y": (3, 6, 7, 9)}
    assert run(model)[0].shape == (3, 6, 7, 9)


def test_open_shape_names_input_dimensions_and_flag() -> None:
    words = refusal(simple(inputs={"x": ("batch", 4, None, "width")}))
    assert "'x' of shape batchx4x?xwidth" in words
    assert "--shape x:1x4x224x224" in words
    assert "--shape x:1x4x9x9" in refusal(simple(inputs={"x": (-1, 4, 9, 9)}))
    assert "'x' of shape unknown" in refusal(simple(inputs={"x": None}))


def two_inputs() -> bytes:
    model = make([node("Add", "ids mask", "y")], {}, {"ids": ("b", "n"), "mask": ("b", "n")})
    return bytes(model.SerializeToString())


def test_a_symbol_given_once_settles_every_input() -> None:
    assert shape_of(from_bytes(two_inputs(), {"ids": (2, 7)})) == {"ids": (2, 7), "mask": (2, 7)}
    with pytest.raises(ModelError, match=r"--shape ids:1x128 --shape mask:1x128"):
        from_bytes(two_inputs())


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"idz": (2, 7)}, "did you mean ids"),
        ({None: (2, 7)}, "say whose shape"),
        ({"ids": (2, 7, 1)}, "has rank 3, the model wants bxn"),
        ({"ids": (2, 0)}, "below 1"),
        ({"ids": (2, 7), "mask": (2, 8)}, "makes n 8, and another dimension makes it 7"),
    ],
)
def test_shapes_that_do_not_fit_are_usage_errors(shapes: dict[str | None, tuple[int, ...]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        from_bytes(two_inputs(), shapes)


def test_given_shape_may_repeat_but_not_contradict_the_model() -> None:
    model = simple()
    model.graph.input.append(helper.make_tensor_value_info("w", 1, (6, 4, 3, 3)))  # an initializer
    data = model.SerializeToString()
    assert shape_of(from_bytes(data, {"x": (2, 4, 9, 9)})) == {"x": (2, 4, 9, 9)}
    with pytest.raises(UsageError, match="contradicts the model's 2x4x9x9"):
        from_bytes(data, {"x": (1, 4, 9, 9)})
    with pytest.raises(UsageError, match="given twice"):
        from_bytes(data, {"x": (2, 4, 9, 9), None: (2, 4, 9, 9)})
    with pytest.raises(UsageError, match="has no input 'w'; it has x"):
        from_bytes(data, {"w": (6, 4, 3, 3)})


def test_an_input_of_unknown_rank_takes_any_shape() -> None:
    model = from_bytes(simple(inputs={"x": None}).SerializeToString(), {"x": (1, 4, 5, 5)})
    assert shape_of(model, "outputs") == {"y": (1, 6, 3, 3)}


# ── counting ─────────────────────────────────────────────────────────────────


def test_key_ignores_who_wrote_the_model_and_sees_what_it_computes() -> None:
    model = from_bytes(make([node("Conv", "x w", "h"), bn("h", "y")], CONV).SerializeToString())
    key = summarise(model).key
    same = ModelProto()
    same.CopyFrom(model)
    same.producer_name, same.doc_string, same.ir_version, same.graph.name = "other", "text", 9, "other"
    same.graph.doc_string = same.graph.node[0].doc_string = same.graph.initializer[0].doc_string = "text"
    same.metadata_props.add(key="author", value="me")
    same.graph.value_info.append(helper.make_tensor_value_info("h", 1, None))
    assert summarise(same).key == key
    assert len(key) == 16
    other = ModelProto()
    other.CopyFrom(model)
    other.graph.initializer[0].raw_data = b"\0" * len(other.graph.initializer[0].raw_data)
    assert summarise(other).key != key
    assert summarise(fold_batch_norm(model)[0]).key != key


def test_parameters_are_counted_by_rule() -> None:
    model = make(
        [node("Conv", "x w", "h"), bn("h", "i"), node("Clip", "i low high", "y")],
        {
            **CONV,
            "low": np.float32(0),
            "high": np.float32(6),
            "unread": floats(100),
            "tied": floats(6),
        },
    )
    model.graph.node.insert(0, node("Identity", "tied", "mine"))
    model.graph.node.append(node("Mul", "y mine", "z"))
    assert summarise(model).n_params == 6 * 4 * 9 + 2 * 6 + 6


MACS: dict[str, tuple[int | None, ModelProto]] = {
    "conv": (2 * 6 * 7 * 7 * 36, simple()),
    "grouped": (2 * 6 * 9 * 9 * 2, make([node("Conv", "x w", "y", group=2)], {"w": floats(6, 2, 1, 1)})),
    "transposed": (2 * 4 * 9 * 9 * 3 * 9, make([node("ConvTranspose", "x w", "y")], {"w": floats(4, 3, 3, 3)})),
    "gemm": (3 * 4 * 5, make([node("Gemm", "x w", "y", transB=1)], {"w": floats(5, 4)}, {"x": (3, 4)})),
    "gemm, transA": (3 * 4 * 5, make([node("Gemm", "x w", "y", transA=1)], {"w": floats(4, 5)}, {"x": (4, 3)})),
    "matmul": (7 * 3 * 4 * 5, make([node("MatMul", "x w", "y")], {"w": floats(4, 5)}, {"x": (7, 3, 4)})),
    "matmul of vectors": (4, make([node("MatMul", "x w", "y")], {"w": floats(4)}, {"x": (4,)})),
    "none": (0, make([node("Relu", "x", "y")], {})),
    "einsum": (None, make([node("Einsum", "x w", "y", equation="ij,jk->ik")], {"w": floats(4, 5)}, {"x": (3, 4)})),
    "unknown shape": (
        None,
        make([node("NonZero", "x", "n"), node("Cast", "n", "f", to=1), node("MatMul", "w f", "y")], {"w": floats(4)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MACS)
def test_macs_are_exact_or_none(case: str) -> None:
    macs, model = MACS[case]
    assert summarise(model).macs == macs


def test_macs_in_a_branch_are_unknown() -> None:
    model = branch_model("If")
    model.graph.node[-1].attribute[0].g.node.insert(0, node("Conv", "h w2", "inner"))
    model.graph.initializer.append(numpy_helper.from_array(floats(6, 6, 1, 1), "w2"))
    assert summarise(model).macs is None


def test_shapes_are_known_through_shape_arithmetic() -> None:
    layers = [
        node("Shape", "x", "s"), node("Gather", "s one", "c"), node("Div", "c two", "half"),
        node("Slice", "x zero half one", "part"), node("Conv", "part w", "y"),
    ]  # fmt: skip
    numbers = {"zero": [0], "one": [1], "two": [2]}
    weights = {"w": floats(6, 2, 1, 1), **{k: np.array(v, np.int64) for k, v in numbers.items()}}
    assert summarise(make(layers, weights)).macs == 2 * 6 * 9 * 9 * 2


def test_summary_lists_inputs_outputs_and_operators() -> None:
    summary = summarise(from_bytes(make([node("Conv", "x w", "h"), bn("h", "y")], CONV).SerializeToString()))
    assert summary.inputs == (("x", (2, 4, 9, 9), "float32"),)
    assert summary.nodes == 2
    assert summary.opset == 17
    assert summary.n_by_op == {"BatchNormalization": 1, "Conv": 1}
