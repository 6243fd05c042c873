"""The ONNX reader: models near valid ones, message by message, and weights that lie in other files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from contract import Parser
from google.protobuf.message import Message
from mutate import WORDS, damaged
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from latbench.graph.onnx_model import fold_batch_norm, from_bytes, load, summarise

INTEGERS = (0, 1, -1, 2, 7, 10, 16, 127, 255, 2**31 - 1, -(2**31), 2**32, 10**9, 2**62, 2**63 - 1, -(2**63))


def make(nodes: list[NodeProto], weights: dict[str, Any], inputs: dict[str, Any], opset: int = 17) -> ModelProto:
    """A model of float inputs whose output is "y"."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@cache
def models() -> tuple[ModelProto, ...]:
    """Convolutions with batch norms, products, shape arithmetic, branches and loops, functions, open shapes."""
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> Any:
        return rng.normal(size=shape).astype("f4")

    norm = {"scale": floats(6), "shift": floats(6), "mean": floats(6), "var": np.abs(floats(6)) + 1}
    node = helper.make_node
    bn = node("BatchNormalization", ["h", *norm], ["y"], "bn", epsilon=1e-3)
    conv = node("Conv", ["x", "w"], ["h"], "conv", group=1, pads=[1, 1, 1, 1])
    image = {"x": (2, 4, 9, 9)}
    plain = make([conv, bn], {"w": floats(6, 4, 3, 3), **norm}, image)
    open_ = make([conv, bn], {"w": floats(6, 4, 3, 3), **norm}, {"x": ("n", 4, None, 9)})
    added = [
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["m"]),
        node("Add", ["m", "b"], ["h"]),
    ]
    product = make([*added, bn], {"w": floats(6, 4), "b": floats(6), **norm}, {"x": (3, 4)})
    numbers = {k: np.array(v, np.int64) for k, v in {"zero": [0], "one": [1], "two": [2], "many": [2, 3]}.items()}
    arithmetic = [
        *(node("Shape", ["x"], ["s"]), node("Gather", ["s", "one"], ["c"]), node("Div", ["c", "two"], ["half"])),
        *(node("Slice", ["x", "zero", "half", "one"], ["part"]), node("ConstantOfShape", ["many"], ["made"])),
        *(node("Expand", ["made", "many"], ["wide"]), node("Range", ["r0", "r1", "r2"], ["range"])),
        *(
            node("Constant", [], ["k"], value=numpy_helper.from_array(floats(6, 2, 1, 1))),
            node("Conv", ["part", "k"], ["y"]),
        ),
    ]
    scalars = {f"r{i}": np.array(i, np.int64) for i in range(3)}
    shapes = make(arithmetic, {**numbers, **scalars}, image)
    inner = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    body = helper.make_graph([node("BatchNormalization", ["h", *norm], ["o"], "in")], "then", [], [inner])
    other = helper.make_graph([node("Relu", ["h"], ["o2"])], "else", [], [helper.make_tensor_value_info("o2", 1, None)])
    branch = node("If", ["flag"], ["y"], then_branch=body, else_branch=other)
    branches = make([conv, branch], {"w": floats(6, 4, 3, 3), "flag": np.array(True), **norm}, image)
    function = helper.make_function(
        "own", "F", ["a", "b"], ["d"], [node("Conv", ["a", "b"], ["d"])], [helper.make_opsetid("", 17)]
    )
    functions = make([node("F", ["x", "w"], ["y"], domain="own")], {"w": floats(6, 4, 1, 1)}, image)
    functions.functions.append(function)
    functions.opset_import.append(helper.make_opsetid("own", 1))
    quantised = make(
        [node("QuantizeLinear", ["x", "s"], ["q"]), node("DequantizeLinear", ["q", "s"], ["h"]), bn],
        {"s": np.float32(0.1), **norm}, {"x": (2, 6, 3, 3)}, 21,
    )  # fmt: skip
    return plain, open_, product, shapes, branches, functions, quantised


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                yield from _messages(inner)


def _disturb(rng: Random, model: ModelProto) -> None:
    """One field of one message: another number, name, operator, order, or the field gone or doubled."""
    message: Any = rng.choice(list(_messages(model)))
    field = rng.choice(message.DESCRIPTOR.fields)
    values = getattr(message, field.name)
    repeated = hasattr(values, "extend")
    if field.message_type is not None:
        if not repeated:
            message.ClearField(field.name) if rng.random() < 0.5 else values.SetInParent()
        elif values and rng.random() < 0.5:
            values.add().CopyFrom(rng.choice(values))
        elif values:
            del values[rng.randrange(len(values))]
        return
    other = _scalar(rng, model, field)
    if not repeated:
        setattr(message, field.name, other)
    elif values and rng.random() < 0.7:
        values[rng.randrange(len(values))] = other
    elif values and rng.random() < 0.5:
        del values[rng.randrange(len(values)) :]
    else:
        values.extend([other] * rng.choice((1, 2, 20)))


def _scalar(rng: Random, model: ModelProto, field: Any) -> Any:
    if field.type == field.TYPE_STRING:
        names = [name for node in model.graph.node for name in (*node.input, *node.output, node.op_type)]
        word = (
            rng.choice(WORDS)
            if rng.random() < 0.3
            else rng.choice((*names, "Loop", "Scan", "Einsum", "Resize", "Constant", "Gemm"))
        )
        return word.encode("utf-8", "replace").decode()
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"\0" * 7, b"\xff" * 64, b"x" * 1000))
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if field.type == field.TYPE_ENUM:
        return rng.choice([v.number for v in field.enum_type.values])
    number = rng.choice(INTEGERS)
    return (
        max(-(2**31), min(2**31 - 1, number))
        if field.cpp_type == field.CPPTYPE_INT32
        else max(0, number)
        if field.cpp_type == field.CPPTYPE_UINT64
        else number
    )


def _model(rng: Random) -> tuple[bytes, dict[str | None, tuple[int, ...]]]:
    model = ModelProto()
    model.CopyFrom(rng.choice(models()))
    shape = rng.choice(((2, 4, 9, 9), (2, 4, 9, 9), (3, 4), (2**31, 4, 9, 9), (2**62, 4, 2**62, 9), (1,) * 200))
    shapes: dict[str | None, tuple[int, ...]] = {rng.choice(("x", None)): shape} if rng.random() < 0.3 else {}
    if rng.random() < 0.15:
        return damaged(rng, [model.SerializeToString()]), shapes
    for _ in range(rng.randrange(4)):
        _disturb(rng, model)
    return model.SerializeToString(), shapes


def _understood(case: tuple[bytes, dict[str | None, tuple[int, ...]]], _: Path) -> object:
    """As ``latbench bench`` reads a model."""
    data, shapes = case
    model = from_bytes(data, shapes)
    return summarise(model), summarise(fold_batch_norm(model)[0])


@cache
def _external() -> tuple[bytes, bytes]:
    model = ModelProto()
    model.CopyFrom(models()[0])
    data = b""
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        onnx.external_data_helper.set_external_data(tensor, "w.data", len(data), len(raw))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        data += raw
    return model.SerializeToString(), data


def _outside(rng: Random) -> bytes:
    model = ModelProto.FromString(_external()[0])
    for _ in range(rng.randrange(3)):
        tensor = rng.choice(model.graph.initializer)
        entry = rng.choice(tensor.external_data)
        if rng.random() < 0.7:
            words = (
                *map(str, INTEGERS),
                *WORDS,
                "../w.data",
                "/etc/passwd",
                "/dev/zero",
                "sub/../w.data",
                ".",
                "w.data/",
                "link",
            )
            entry.value = rng.choice(words).encode("utf-8", "replace").decode()
        elif rng.random() < 0.5:
            entry.key = rng.choice(("location", "offset", "length", "checksum", "basepath", ""))
        else:
            tensor.dims.extend([rng.choice(INTEGERS)])
    return model.SerializeToString()


def _beside(case: bytes, folder: Path) -> object:
    (folder / "w.data").write_bytes(_external()[1])
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("/etc/passwd")
    (folder / "m.onnx").write_bytes(case)
    return summarise(load(folder / "m.onnx"))


PARSERS = (
    Parser("ONNX model", _model, _understood),
    Parser("ONNX external data", _outside, _beside),
)
