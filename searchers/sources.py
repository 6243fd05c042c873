"""Where labelled images come from: scikit-learn's digits, folders, parquet files, data sets that torchvision reads."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError, one_line, shown
from searchers.base import DataSource

Indices = NDArray[np.int64]
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has them
MAX_PIXELS = 2**26  # of an image: 200 MB decoded; a few kilobytes of PNG can hold gigabytes of one colour
MAX_CLASSES = 2**20  # of a data set: ImageNet-21k has 21,841; a name is kept for each up to the largest label
TEST_SHARE = 0.2  # kept out of a source that has no test split of its own
FRIENDS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}
KINDS = "digits, folder:DIR, parquet:FILE, " + ", ".join(f"{name}:DIR" for name in FRIENDS)


def open_data(data: str | DataSource) -> DataSource:
    """The source that a text names; a source passes through. Raises UsageError on what is unknown, empty or damaged."""
    if not isinstance(data, str):
        return data
    kind, colon, where = data.partition(":")
    if kind == "digits" and not colon:
        return _digits()
    if not where or "\0" in where or kind not in ("folder", "parquet", *FRIENDS):
        raise UsageError(f"unknown data {shown(data)}: {KINDS}")
    try:
        if kind == "folder":
            return _folder(Path(where))
        return _parquet(Path(where)) if kind == "parquet" else _friend(kind, Path(where))
    except OSError as error:  # a path that is too long, or leads through what may not be read
        raise UsageError(f"{shown(data)}: {error.strerror or error}") from None


@dataclass(frozen=True)
class ArraySource:
    """Images in memory, files or encoded bytes: a ``DataSource``."""

    name: str
    classes: tuple[str, ...]
    images: dict[str, Sequence[Any]]  # split -> arrays (H, W) or (H, W, 3), bytes, or paths
    targets: dict[str, Indices]
    mirrored: bool = True

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            labels = self.targets[split]
            if len(labels) == 0 or len(labels) != len(self.images[split]):
                raise UsageError(f"{self.name}: {len(self.images[split])} {split} images and {len(labels)} labels")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                bad = int(np.flatnonzero((labels < 0) | (labels >= len(self.classes)))[0])
                raise UsageError(
                    f"{self.name}: label {labels[bad]} of {split} image {bad} is outside 0 to {len(self.classes) - 1}"
                )

    def labels(self, split: str) -> Indices:
        """(N,) of "train" or "test"."""
        return self.targets[split]

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """(H, W, 3). Raises UsageError, naming the image."""
        stored = self.images[split][index]
        if isinstance(stored, np.ndarray):
            return stored if stored.ndim == 3 else np.repeat(stored[:, :, None], 3, axis=2)
        from PIL import Image

        try:
            with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
                if image.width * image.height > MAX_PIXELS:  # before they are unpacked
                    raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # PIL's readers of damaged files raise whatever struct, zlib and arithmetic do
            which = f"image {index}" if isinstance(stored, bytes) else str(stored)
            raise UsageError(f"{self.name}: {split} {which} cannot be decoded: {one_line(error)}") from None


def _digits() -> ArraySource:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (Alpaydin, Kaynak 1998)."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ModuleNotFoundError:
        raise UsageError("the data `digits` come with scikit-learn. Run: pip install 'latbench[search]'") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in bunch.target_names)
    return _carve("digits", names, list(images), bunch.target.astype(np.int64), mirrored=False)


def _folder(root: Path) -> ArraySource:
    """DIR/train/CLASS/* and DIR/val (or test)/CLASS/*; or DIR/CLASS/*, of which a test split is kept out."""
    name = f"folder:{root}"
    if root.resolve() == root.resolve().parent:
        raise UsageError(f"{name} is the whole file system: give the folder of the images")
    test = next((root / sub for sub in ("test", "val") if (root / sub).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        classes, paths, labels = _class_folders(root)
        return _carve(name, classes, paths, labels)
    classes, paths, labels = _class_folders(root / "train")
    others, test_paths, test_labels = _class_folders(test)
    if others != classes:
        odd = sorted(set(others) ^ set(classes))
        raise UsageError(f"{name}: train and {test.name} have different classes: {', '.join(odd[:3])}")
    return ArraySource(name, classes, {"train": paths, "test": test_paths}, {"train": labels, "test": test_labels})


def _class_folders(root: Path) -> tuple[tuple[str, ...], list[str], Indices]:
    """As torchvision's ImageFolder, which walks a loop of links for ever and opens pipes."""
    try:
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise UsageError(f"folder:{root}: {error.strerror} (wanted: DIR/CLASS/image.png)") from None
    found = {name: _pictures(root / name) for name in classes}
    empty = [name for name, paths in found.items() if not paths]
    if empty or not classes:
        what = f"no image in the class folder {empty[0]}" if empty else "no class folder"
        raise UsageError(f"folder:{root}: {what} (wanted: DIR/CLASS/image.png)")
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    return tuple(classes), [path for paths in found.values() for path in paths], np.array(labels, np.int64)


def _pictures(folder: Path) -> list[str]:
    """Regular files with an image's ending, links followed, each folder once."""
    paths, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        found = Path(here).stat()
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        paths += [str(path) for name in names if (path := Path(here, name)).suffix.lower() in IMAGES and path.is_file()]
    return sorted(paths)


def _parquet(path: Path) -> ArraySource:
    """Columns `image` (bytes, or a struct with `bytes`), `label` (int, or text), and, if there, `split`."""
    import pyarrow as pa

    from latbench import parquet

    name = f"parquet:{path}"
    try:
        table = parquet.read(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {one_line(error)}") from None
    columns = table.column_names
    if missing := {"image", "label"} - set(columns):
        raise UsageError(f"{name} has no column {' or '.join(sorted(missing))}: {', '.join(columns)}")
    images = table["image"].combine_chunks()
    if pa.types.is_struct(images.type):
        if "bytes" not in [field.name for field in images.type]:
            raise UsageError(f"{name}: its column image holds {images.type}, without bytes")
        images = images.field("bytes")
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise UsageError(f"{name}: its column image holds {images.type}, not encoded images (PNG or JPEG bytes)")
    if not _labelled(table["label"].type):
        raise UsageError(f"{name}: its column label holds {table['label'].type}, neither whole numbers nor text")
    raw = table["label"].to_numpy()
    if table.num_rows == 0 or table["label"].null_count or images.null_count:
        raise UsageError(f"{name} holds no images, or rows without an image or a label")
    values = np.unique(raw)
    if raw.dtype.kind in "iu" and not 0 <= int(values[0]) <= int(values[-1]) < MAX_CLASSES:
        raise UsageError(f"{name}: labels from {values[0]} to {values[-1]}: number the classes from 0")
    if raw.dtype.kind in "iu":
        labels, classes = raw.astype(np.int64), tuple(str(i) for i in range(int(values[-1]) + 1))
    else:
        labels, classes = np.searchsorted(values, raw).astype(np.int64), tuple(str(value) for value in values)
    encoded = images.to_pylist()
    if "split" not in table.column_names:
        return _carve(name, classes, encoded, labels)
    if not (pa.types.is_string(table["split"].type) or pa.types.is_large_string(table["split"].type)):
        raise UsageError(f"{name}: its column split holds {table['split'].type}, not text: train or test")
    split = table["split"].to_numpy(zero_copy_only=False).astype(str)
    parts = {"train": split == "train", "test": split != "train"}
    return ArraySource(
        name,
        classes,
        {part: [encoded[i] for i in np.flatnonzero(mask)] for part, mask in parts.items()},
        {part: labels[mask] for part, mask in parts.items()},
    )


def _labelled(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _friend(kind: str, root: Path) -> ArraySource:
    """A data set that torchvision reads, as it lies in `root`; nothing is downloaded."""
    import torchvision

    dataset = getattr(torchvision.datasets, FRIENDS[kind])
    if (root / FRIENDS[kind] / "processed").exists():  # pickles, which torchvision prefers, and older ones just run
        raise UsageError(
            f"{kind}:{root} holds files of torchvision before 0.9: remove {root / FRIENDS[kind]}/processed"
        )
    try:  # CIFAR's files are pickles: torchvision opens those only that are the published ones, by their checksums
        train, test = dataset(str(root), train=True), dataset(str(root), train=False)
    except (RuntimeError, AssertionError, OSError, LookupError, TypeError, ValueError) as error:  # damaged idx files
        get = f"python -c \"from torchvision.datasets import {FRIENDS[kind]} as D; D('{root}', download=True)\""
        raise UsageError(f"{kind}:{root}: {' '.join(str(error).split())}; to fetch it, run: {get}") from None
    return ArraySource(
        f"{kind}:{root}",
        tuple(train.classes),
        {"train": list(np.asarray(train.data)), "test": list(np.asarray(test.data))},
        {"train": np.array(train.targets, np.int64), "test": np.array(test.targets, np.int64)},
        mirrored="mnist" not in kind,
    )


def _carve(
    name: str, classes: tuple[str, ...], images: Sequence[Any], labels: Indices, *, mirrored: bool = True
) -> ArraySource:
    """A source whose test split is the same for every seed."""
    train, test = split(labels, (1 - TEST_SHARE, TEST_SHARE), seed=0)
    return ArraySource(
        name,
        classes,
        {"train": [images[i] for i in train], "test": [images[i] for i in test]},
        {"train": labels[train], "test": labels[test]},
        mirrored,
    )


def split(labels: Indices, shares: Sequence[float], seed: int) -> list[Indices]:
    """Disjoint, ascending index sets holding these shares (sum <= 1) of every class, rounded to whole images."""
    rng = np.random.default_rng((seed, 0x5917))
    parts: list[list[Indices]] = [[np.zeros(0, np.int64)] for _ in shares]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum([0.0, *shares]) * len(members) + 1e-9).astype(int)
        for part, start, end in zip(parts, ends, ends[1:], strict=False):
            part.append(members[start:end])
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]
