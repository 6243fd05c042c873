"""Ranges of a network's activations over the user's data, for ``quantize``; and that data, read from files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from latbench import foreign
from latbench.errors import BackendUnavailableError, UsageError, one_line
from latbench.graph.onnx_shapes import dims
from latbench.graph.quantize import Range

Batch = Mapping[str, NDArray[Any]]  # by input
Run = Callable[[Batch], Mapping[str, NDArray[Any]]]  # one inference of an ``exposed`` model

MAX_BYTES = 2 * 2**30  # of a file of arrays: 3,500 images of 224 pixels; 500 are enough
MAX_PIXELS = 2**26  # of an image, as it lies there or resized: 200 MB; a few kilobytes of PNG can hold gigabytes
MAX_SAMPLES = 512  # of a folder's images, evenly spread; NVIDIA's guide: 500 are enough for convolutional networks
_BINS = 2048
_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# As torchvision prepares ImageNet: shorter side 256 for 224 pixels, the centre of it, these mean and deviation.
_RESIZE = 256 / 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def exposed(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """The model with these of its tensors as outputs too, inputs aside: what a caller runs to see them."""
    copy = ModelProto()
    copy.CopyFrom(model)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    copy.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names) if name not in known
    )
    return copy


def ranges(
    run: Run, batches: Sequence[Batch], names: Iterable[str], percentile: float | None = None
) -> dict[str, Range]:
    """Least and most that each tensor holds over the data; with `percentile`, without the tails beyond it.

    percentile: share of the values kept at either end, from a histogram of 2048 bins (a second pass over the data);
    0.9999 leaves out the largest and the smallest of 10,000. `run` gives the outputs of the ``exposed`` model.
    """
    names = tuple(dict.fromkeys(names))
    found = dict.fromkeys(names, (np.inf, -np.inf))
    for batch in batches:
        values = {**batch, **run(batch)}
        for name in names:
            low, high = found[name]
            found[name] = min(low, float(values[name].min())), max(high, float(values[name].max()))
    if percentile is None:
        return found
    counts = {name: np.zeros(_BINS, np.int64) for name in names}
    for batch in batches:
        values = {**batch, **run(batch)}
        for name in names:
            counts[name] += np.histogram(values[name], _BINS, found[name])[0]
    return {name: _without_tails(counts[name], found[name], percentile) for name in names}


def _without_tails(counts: NDArray[np.int64], extent: Range, percentile: float) -> Range:
    """The edges of the histogram's bins within which lies all but a share of 1 - `percentile` at either end."""
    edges = np.linspace(*extent, _BINS + 1)
    below = np.cumsum(counts) / counts.sum()
    first = int(np.searchsorted(below, 1 - percentile, side="right"))
    last = int(np.searchsorted(below, percentile, side="left"))
    return float(edges[min(first, last)]), float(edges[last + 1])


def read_batches(path: Path, model: ModelProto) -> list[Batch]:
    """Calibration data for a model: ``.npy`` (its one input), ``.npz`` (by input's name) or a folder of images.

    Arrays hold samples along their first axis; they are cut into the model's batches, the last one filled up with the
    first samples. Raises UsageError where data and model do not fit.
    """
    shapes = {value.name: tuple(n or 0 for n in dims(value) or ()) for value in model.graph.input}
    types = {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
    arrays = _images(path, shapes) if path.is_dir() else _arrays(path, list(shapes))
    if missing := shapes.keys() - arrays.keys():
        held = f"it holds {', '.join(arrays)}"
        raise UsageError(f"{path} has no array for input {sorted(missing)[0]!r} ({held}): name arrays as the inputs")
    n_samples = {len(arrays[name]) for name in shapes if arrays[name].ndim}
    if len(n_samples) != 1 or 0 in n_samples:
        raise UsageError(f"{path}: every input needs the same number of samples, at least one")
    (n,) = n_samples
    for name, shape in shapes.items():
        if arrays[name].shape[1:] != shape[1:]:
            given, wanted = ("x".join(map(str, one)) for one in (arrays[name].shape[1:], shape[1:]))
            raise UsageError(f"{path}: samples of input {name!r} are {given}, the model wants {wanted}")
    size = next(iter(shapes.values()))[0]
    picks = [np.arange(start, start + size) % n for start in range(0, n, size)]
    with np.errstate(over="ignore", invalid="ignore"):  # an infinity, which is refused below
        batches: list[Batch] = [
            {name: np.ascontiguousarray(arrays[name][pick], types[name]) for name in shapes} for pick in picks
        ]
    for name in shapes:
        if any(batch[name].dtype.kind == "f" and not np.isfinite(batch[name]).all() for batch in batches):
            raise UsageError(f"{path}: input {name!r} has values that are no finite {np.dtype(types[name]).name}")
    return batches


def _arrays(path: Path, inputs: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        data = foreign.read_bytes(path, MAX_BYTES)
        if data.startswith(b"PK"):
            arrays: dict[str, NDArray[Any]] = foreign.read_npz(data, MAX_BYTES)
        elif data and len(inputs) != 1:
            names = ", ".join(inputs)
            raise UsageError(f"{path} is one array, the model has inputs {names}: give .npz, arrays by name")
        else:
            arrays = {inputs[0]: foreign.read_npy(data)}
    except OSError as error:
        raise UsageError(
            f"calibration data is .npy, .npz or a folder of images; {path} cannot be read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise UsageError(f"calibration data is .npy, .npz or a folder of images; {path} is none: {error}") from None
    return {inputs[0]: arrays.popitem()[1]} if len(arrays) == len(inputs) == 1 else arrays


def _images(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """(N, 3, H, W), prepared as torchvision does for ImageNet."""
    (name, shape), *others = shapes.items()
    if others or len(shape) != 4 or shape[1] != 3:
        raise UsageError(
            f"a folder of images fits one input of shape Nx3xHxW, this model wants {dict(shapes)}: give .npz"
        )
    try:
        from PIL import Image
    except ImportError:
        raise BackendUnavailableError("reading images needs pillow; run: pip install pillow") from None
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())
    if not paths:
        raise UsageError(f"{folder} holds no image ({', '.join(_IMAGES)})")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MAX_SAMPLES).astype(int))]
    return {name: np.stack([_prepared(Image, path, shape[2], shape[3]) for path in paths])}


def _prepared(module: Any, path: Path, height: int, width: int) -> NDArray[np.float32]:
    """(3, height, width). `module` is PIL's Image."""
    try:
        with module.open(path) as file:
            scale = _RESIZE * max(height / file.height, width / file.width)
            size = (max(width, round(file.width * scale)), max(height, round(file.height * scale)))
            if max(file.width * file.height, size[0] * size[1]) > MAX_PIXELS:  # before they are unpacked
                raise ValueError(f"{file.width} x {file.height} pixels are too many")
            image = file.convert("RGB")
    except Exception as error:  # PIL's readers of damaged files raise whatever struct, zlib and arithmetic do
        raise UsageError(
            f"{path} is no image that can be read ({one_line(error)}): take it out of the folder"
        ) from None
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(image.resize(size).crop((left, top, left + width, top + height)), np.float32)  # (H, W, 3)
    prepared: NDArray[np.float32] = ((pixels / np.float32(255) - _MEAN) / _STD).transpose(2, 0, 1).astype(np.float32)
    return prepared
