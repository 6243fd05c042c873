"""ONNX models that runtimes refuse."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def custom_operator(path: Path) -> Path:
    """A model whose one operator, MyOp of my.domain, no runtime has."""
    node = helper.make_node("MyOp", ["x"], ["y"], domain="my.domain")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("my.domain", 1)]), path)
    return path
