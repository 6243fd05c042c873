"""latbench.graph.onnx_model: keys, parameters, multiply-accumulates."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx_cases import (
    CONV,
    bn,
    branch_model,
    floats,
    make,
    node,
    simple,
)

from latbench.graph.onnx_model import fold_batch_norm, from_bytes, summarise

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
