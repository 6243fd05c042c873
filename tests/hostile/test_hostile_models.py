"""ONNX files made to hurt: each is refused with its reason, within a second and without much memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from contract import bounded
from networks import make
from onnx import ModelProto, TensorProto, helper

from latbench.errors import ModelError
from latbench.graph import onnx_limits
from latbench.graph.onnx_limits import MAX_NODES
from latbench.graph.onnx_model import fold_batch_norm, from_bytes, load, summarise

node = helper.make_node


@pytest.fixture(autouse=True)
def little_room() -> Iterator[None]:
    with bounded(30, 1 << 30):
        yield


def refused(data: bytes) -> str:
    with pytest.raises(ModelError) as caught:
        from_bytes(data)
    return str(caught.value)


def relu(**inputs: Any) -> ModelProto:
    return make([node("Relu", ["x"], ["y"])], {}, inputs or {"x": (1, 3)})


# ---- weights in other files -----------------------------------------------------------------------------------------


def outside(folder: Path, dims: Sequence[int] = (2, 3), **entries: str) -> Path:
    """A model whose weight lies where the entries say."""
    model = make([node("MatMul", ["x", "w"], ["y"])], {"w": np.zeros((2, 3), "f4")}, {"x": (1, 2)})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.data", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder beside a secret, with links out of it, a pipe and 100 GiB of holes."""
    found = tmp_path / "model"
    (found / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(24))
    (found / "w.data").write_bytes(bytes(24))
    (found / "link").symlink_to("../secret")
    (found / "out").symlink_to("..")
    (found / "loop").symlink_to("loop")
    os.mkfifo(found / "pipe")
    with (found / "sparse").open("wb") as file:
        file.truncate(100 << 30)
    return found


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"location": "../secret"}, "outside the model's folder"),
        ({"location": "sub/../../secret"}, "outside the model's folder"),
        ({"location": "link"}, "outside the model's folder"),
        ({"location": "out/secret"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "/dev/zero"}, "outside the model's folder"),
        ({"location": "loop"}, "which is not there|[Ll]oop|symbolic links"),
        ({"location": "pipe"}, "which is not there"),
        ({"location": "."}, "which is not there"),
        ({"location": ""}, "which is not there"),
        ({"location": "a" * 5000}, "name too long"),
        ({"offset": "-4"}, "a part is missing"),
        ({"offset": str(2**70)}, "a part is missing"),
        ({"offset": "9" * 5000}, "offset or length is malformed"),
        ({"length": "-24"}, "its shape has 24"),
        ({"length": str(2**62)}, "its shape has 24"),
        ({"length": "12"}, "12 bytes of it, and its shape has 24"),
        ({"location": "sparse", "length": str(90 << 30)}, "its shape has 24"),
    ],
)
def test_weights_elsewhere(folder: Path, entries: dict[str, str], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        load(outside(folder, **entries))


@pytest.mark.parametrize("dims", [[2**31, 2**31], [2**62, 4], [90 << 28]])
def test_a_weight_that_claims_the_holes_of_a_sparse_file(folder: Path, dims: list[int]) -> None:
    with pytest.raises(ModelError, match="larger than 2 GiB"):
        load(outside(folder, dims, location="sparse"))


# ---- weights and shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [[2**40, 2**40], [2**63 - 1], [2**32, 2**32, 0, 1], [7], [-1, -6], [1] * 500])
def test_dimensions_that_the_data_does_not_have(dims: list[int]) -> None:
    model = make([node("MatMul", ["x", "w"], ["y"])], {"w": np.zeros((2, 3), "f4")}, {"x": (1, 2)})
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    assert "weight 'w'" in refused(model.SerializeToString())


def chain(*steps: onnx.NodeProto, **numbers: Any) -> ModelProto:
    """Shape arithmetic on constants, which reading a model evaluates."""
    weights = {name: np.asarray(value) for name, value in numbers.items()}
    return make([*steps, node("Relu", ["x"], ["y"])], weights, {"x": (1, 3)})


BOMBS: dict[str, Callable[[], ModelProto]] = {
    "ConstantOfShape": lambda: chain(node("ConstantOfShape", ["s"], ["c"]), s=[2**20, 2**20]),
    "ConstantOfShape of 2^62": lambda: chain(node("ConstantOfShape", ["s"], ["c"]), s=[2**62]),
    "Expand": lambda: chain(node("Expand", ["v", "s"], ["c"]), v=[1], s=[2**31, 2**31]),
    "Range": lambda: chain(node("Range", ["a", "b", "d"], ["c"]), a=np.int64(0), b=np.int64(2**62), d=np.int64(1)),
    "Range of steps of 0": lambda: chain(
        node("Range", ["a", "b", "d"], ["c"]), a=np.int64(0), b=np.int64(9), d=np.int64(0)
    ),
    "doubled 60 times": lambda: chain(
        *(node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(60)), c0=[1, 2, 3]
    ),
    "multiplied beyond 64 bits": lambda: chain(
        *(node("Mul", [f"c{i}", f"c{i}"], [f"c{i + 1}"]) for i in range(60)), c0=[2**40]
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_constants_that_grow_are_left_alone(case: str) -> None:
    """They are valid models: nothing is refused, and nothing is made of them."""
    model = from_bytes(BOMBS[case]().SerializeToString())
    assert summarise(fold_batch_norm(model)[0]).macs == 0


# ---- nodes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "reason"), [(MAX_NODES, f"more than {MAX_NODES} nodes"), (10**6, "entries: no network")])
def test_a_million_nodes(n: int, reason: str) -> None:
    model = relu()
    text = node("Relu", ["x"], ["y"]).SerializeToString()
    whole = model.SerializeToString() + field(7, field(1, text) * n)  # protobuf merges the second graph
    assert reason in refused(whole)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of protobuf."""
    length, size = len(content), b""
    while length > 0x7F:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


@pytest.mark.parametrize("number", [1, 5, 11, 13])  # nodes, initializers, inputs, value infos
def test_empty_messages_by_the_million(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_limits, "MAX_FIELDS", 200_000)  # in a second
    assert "entries: no network has" in refused(field(7, field(number, b"") * 5_000_000))


def test_branches_within_branches_without_end() -> None:
    inner = b""
    for _ in range(60):
        inner = field(1, field(5, field(6, inner)))  # graph.node.attribute.g
    assert "nests messages deeper" in refused(relu().SerializeToString() + field(7, inner))


def test_a_graph_that_feeds_itself() -> None:
    model = make(
        [node("Add", ["x", "b"], ["a"]), node("Identity", ["a"], ["b"]), node("Relu", ["b"], ["y"])], {}, {"x": (1,)}
    )
    assert "not a valid ONNX model" in refused(model.SerializeToString())


def with_functions(calls: dict[str, list[str]]) -> ModelProto:
    """Functions by name, each the ones that it calls in turn."""
    model = make([node("f0", ["x"], ["y"], domain="own")], {}, {"x": (1, 3)})
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.opset_import.append(opsets[1])
    for name, called in calls.items():
        names = ["a", *(f"t{i}" for i in range(len(called) - 1)), "z"]
        body = [node(c, [names[i]], [names[i + 1]], domain="own" if c in calls else "") for i, c in enumerate(called)]
        model.functions.append(helper.make_function("own", name, ["a"], ["z"], body, opsets))
    return model


def test_functions_that_double_forty_times() -> None:
    calls = {f"f{i}": [f"f{i + 1}"] * 2 for i in range(40)}
    model = with_functions({**calls, "f40": ["Relu"]})
    assert f"more than {MAX_NODES} nodes" in refused(model.SerializeToString())


@pytest.mark.parametrize("calls", [{"f0": ["f0"]}, {"f0": ["f1"], "f1": ["f2"], "f2": ["Relu", "f1"]}])
def test_functions_that_call_themselves(calls: dict[str, list[str]]) -> None:
    assert "calls itself" in refused(with_functions(calls).SerializeToString())


def test_ten_functions_deep_is_fine() -> None:
    calls = {f"f{i}": [f"f{i + 1}"] * 2 for i in range(9)}
    model = from_bytes(with_functions({**calls, "f9": ["Relu"]}).SerializeToString())
    assert summarise(model).n_by_op == {"Relu": 2**9}


def test_constants_behind_thousands_of_wires() -> None:
    n = 2_000
    wires = [node("Identity", [f"s{i}"], [f"s{i + 1}"]) for i in range(n)]
    values = {name: np.ones(3, "f4") for name in ("s0", "shift", "mean", "var")}
    layers = [
        node("MatMul", ["x", "w"], ["h"]),
        node("BatchNormalization", ["h", f"s{n}", "shift", "mean", "var"], ["y"]),
    ]
    model = from_bytes(
        make([*wires, *layers], {"w": np.ones((2, 3), "f4"), **values}, {"x": (4, 2)}).SerializeToString()
    )
    folded, report = fold_batch_norm(model)
    assert report.kept[0][1] == "its scale is not constant"
    assert summarise(folded).macs == 24


def test_operators_of_others_are_named_and_not_looked_for() -> None:
    model = make([node("Run", ["x"], ["y"], domain="os.system")], {}, {"x": (1,)})
    model.opset_import.append(helper.make_opsetid("os.system", 1))
    assert "custom operator, Run of domain 'os.system'" in refused(model.SerializeToString())


def test_a_file_of_more_than_two_gib(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ModelError, match="larger than 2 GiB"):
        load(path)


def test_names_that_would_drive_a_terminal(tmp_path: Path) -> None:
    model = relu()
    model.graph.node[0].name = "\x1b]0;owned\x07\x1b[2J"
    assert "not printable" in refused(model.SerializeToString())
