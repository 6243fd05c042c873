"""Small ONNX models, run on ONNX Runtime, for the tests of ``latbench.graph.onnx_model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from latbench.graph.onnx_model import fold_batch_norm, from_bytes

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


def simple(**kwargs: Any) -> ModelProto:
    return make([node("Conv", "x w", "y")], {"w": CONV["w"]}, **kwargs)
