"""Ranges against numpy's, and calibration data in every form a user may give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from latbench.errors import UsageError
from latbench.graph.calibration import MAX_SAMPLES, exposed, ranges, read_batches


def model(**inputs: tuple[int, ...]) -> ModelProto:
    """The inputs' squares, each an output."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Mul", [name, name], [f"{name}_squared"]) for name in inputs]
    ins = [value(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    outs = [value(f"{name}_squared", TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    return helper.make_model(helper.make_graph(nodes, "g", ins, outs), ir_version=8)


def double(batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {"y": 2 * batch["x"]}


BATCHES = [{"x": np.random.default_rng(i).standard_normal((1, 5000)).astype(np.float32)} for i in range(6)]
EVERYTHING = np.concatenate([batch["x"].ravel() for batch in BATCHES])


def test_min_max_is_that_of_all_batches() -> None:
    found = ranges(double, BATCHES, ["x", "y"])
    assert found["x"] == (EVERYTHING.min(), EVERYTHING.max())
    assert found["y"] == (2 * EVERYTHING.min(), 2 * EVERYTHING.max())


@pytest.mark.parametrize("share", [0.9, 0.99, 0.999])
def test_a_percentile_is_numpys_to_within_a_bin(share: float) -> None:
    low, high = ranges(double, BATCHES, ["x"], share)["x"]
    bin_width = float(EVERYTHING.max() - EVERYTHING.min()) / 2048
    assert low == pytest.approx(np.quantile(EVERYTHING, 1 - share), abs=2 * bin_width)
    assert high == pytest.approx(np.quantile(EVERYTHING, share), abs=2 * bin_width)


def test_an_outlier_is_beyond_the_percentile_and_within_min_max() -> None:
    batches = [{"x": np.append(np.linspace(-1, 1, 9999), 1000.0)[None].astype(np.float32)}]
    assert ranges(double, batches, ["x"])["x"][1] == 1000
    assert ranges(double, batches, ["x"], 0.999)["x"][1] < 2


def test_a_constant_tensor_has_a_range() -> None:
    low, high = ranges(double, [{"x": np.full((1, 8), 3.0, np.float32)}], ["x"], 0.99)["x"]
    assert low <= 3 <= high


def test_exposed_tensors_are_outputs_once() -> None:
    made = exposed(model(x=(1, 2)), ["x", "x_squared", "x_squared"])
    assert [value.name for value in made.graph.output] == ["x_squared"]
    onnx.checker.check_model(made)


def test_an_array_is_cut_into_the_models_batches(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.arange(10, dtype=np.float64).reshape(5, 2))
    batches = read_batches(path, model(x=(2, 2)))
    assert [batch["x"].tolist() for batch in batches] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [0, 1]]]
    assert batches[0]["x"].dtype == np.float32


def test_arrays_go_to_inputs_by_name(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, b=np.ones((3, 4)), a=np.zeros((3, 2)))
    batches = read_batches(path, model(a=(1, 2), b=(1, 4)))
    assert len(batches) == 3
    assert (batches[0]["a"].shape, batches[0]["b"].shape) == ((1, 2), (1, 4))


def test_a_folder_of_images_is_prepared_as_for_imagenet(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="pip install pillow")
    (tmp_path / "cats").mkdir()
    image_module.new("RGB", (60, 40), (255, 0, 128)).save(tmp_path / "cats" / "a.png")
    image_module.new("L", (40, 60), 255).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no image")
    first, second = (batch["x"] for batch in read_batches(tmp_path, model(x=(1, 3, 32, 24))))
    assert first.shape == (1, 3, 32, 24)
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(first.mean((0, 2, 3)), white, rtol=1e-5)  # b.png: grey becomes three equal channels
    red = (np.array([1, 0, 128 / 255]) - [0.485, 0.456, 0.406]) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(second.mean((0, 2, 3)), red, rtol=1e-4)


def test_of_many_images_some_are_taken_from_all_over(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="pip install pillow")
    for i in range(MAX_SAMPLES + 8):
        image_module.new("RGB", (2, 2), (i % 256, i // 256, 0)).save(tmp_path / f"{i:04d}.bmp")
    batches = read_batches(tmp_path, model(x=(1, 3, 2, 2)))
    assert len(batches) == MAX_SAMPLES
    last = batches[-1]["x"][0, :, 0, 0] * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    assert np.rint(last[:2] * 255).tolist() == [(MAX_SAMPLES + 7) % 256, (MAX_SAMPLES + 7) // 256]


def saved(path: Path, array: NDArray[Any] | None = None, **arrays: NDArray[Any]) -> None:
    with path.open("wb") as file:
        if array is None:
            np.savez(file, **arrays)
        else:
            np.save(file, array)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "folder of images; .* cannot be read: No such file"),
        (lambda path: path.write_text("x"), "folder of images; .* is none"),
        (lambda path: path.mkdir(), "wants .*: give .npz"),
        (lambda path: saved(path, np.zeros((0, 2))), "same number of samples, at least one"),
        (lambda path: saved(path, np.array(3.0)), "same number of samples, at least one"),
        (lambda path: saved(path, np.zeros((4, 3))), r"samples of input 'x' are 3, the model wants 2"),
        (lambda path: saved(path, np.array([{}], object)), "is none"),
        (lambda path: saved(path, np.full((4, 2), 1e300)), "input 'x' has values that are no finite float32"),
        (lambda path: saved(path, np.full((4, 2), np.nan)), "input 'x' has values that are no finite float32"),
        (
            lambda path: saved(path, a=np.zeros((4, 2)), b=np.zeros((4, 2))),
            r"no array for input 'x' \(it",
        ),
    ],
)
def test_data_that_do_not_fit_are_one_line(write: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    write(path)
    with pytest.raises(UsageError, match=words) as caught:
        read_batches(path, model(x=(1, 2)))
    assert "\n" not in str(caught.value)


def test_one_array_for_two_inputs_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.zeros((4, 2)))
    with pytest.raises(UsageError, match="is one array, the model has inputs a, b"):
        read_batches(tmp_path / "data.npy", model(a=(1, 2), b=(1, 2)))


def test_an_empty_folder_says_what_it_looked_for(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="pip install pillow")
    with pytest.raises(UsageError, match=r"holds no image \(\.bmp, \.jpeg"):
        read_batches(tmp_path, model(x=(1, 3, 8, 8)))


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="pip install pillow")
    (tmp_path / "cat.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"cat\.png is no image that can be read"):
        read_batches(tmp_path, model(x=(1, 3, 8, 8)))
