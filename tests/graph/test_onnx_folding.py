"""latbench.graph.onnx_model: batch norms folded, against ONNX Runtime; what stays, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper
from onnx_cases import (
    CONV,
    assert_folds,
    bn,
    bn_values,
    branch_model,
    floats,
    make,
    max_relative_error,
    node,
    ops,
    reason_kept,
)

from latbench.errors import ModelError
from latbench.graph.onnx_model import fold_batch_norm, from_bytes, summarise

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


@pytest.mark.parametrize("name", ["w", "var"])
def test_a_signalling_nan_is_only_a_nan(name: str) -> None:
    values = {k: v.copy() for k, v in CONV.items()}
    values[name].view(np.uint32).flat[0] = 0x7F800001
    model = from_bytes(make([node("Conv", "x w", "h"), bn("h", "y")], values).SerializeToString())
    folded, _ = fold_batch_norm(model)  # warnings are errors here
    assert folded


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


@pytest.mark.parametrize("op", ["If", "Loop"])
def test_branches_and_loops_pass(op: str) -> None:
    model = from_bytes(branch_model(op).SerializeToString())
    folded, report = fold_batch_norm(model)
    assert report.folded == (("BatchNormalization_h", "Conv_c"),)
    assert report.kept == (("BatchNormalization_o", f"inside a branch or loop of {op}_y"),)
    onnx.checker.check_model(folded)
    assert max_relative_error(model, folded) < 1e-5
    assert summarise(folded).macs == 2 * 6 * 7 * 7 * 36  # the body multiplies no matrices
