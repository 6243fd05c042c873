"""latbench.graph.onnx_model: files that are malformed, external data, shapes that are open."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from onnx_cases import (
    CONV,
    assert_folds,
    bn,
    branch_model,
    floats,
    make,
    max_relative_error,
    node,
    ops,
    run,
    simple,
)

from latbench.errors import LatbenchError, ModelError, UsageError
from latbench.graph.onnx_model import fold_batch_norm, from_bytes, load, summarise

# ── reading ──────────────────────────────────────────────────────────────────


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
