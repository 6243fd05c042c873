"""Images from anywhere: splits, batches, and what is wrong with them in one line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.base import Problem
from searchers.data import Batches, Splits, eval_transform, train_transform
from searchers.sources import ArraySource, open_data, split

COUNT = FactorOracle.counting(MobileNetV1Space(resolution=8, levels=1, num_classes=10), "macs")


def problem(data, tmp_path=Path(), **more):
    return Problem((Constraint(COUNT, 1e12),), data, tmp_path, **more)


def png(seed, size=(9, 7)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return pixels, buffer.getvalue()


def folder(root, names=("cat", "dog"), n=10, parts=("",)):
    for part in parts:
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                (root / part / name / f"{i}.png").write_bytes(png((label, i))[1])
    return f"folder:{root}"


def test_digits_are_the_real_ones():
    source = open_data("digits")
    assert len(source.labels("train")) + len(source.labels("test")) == 1797
    assert source.classes == tuple("0123456789")
    assert not source.mirrored
    image = source.image("train", 0)
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    assert image.max() > 200


def test_folders_with_and_without_a_test_split(tmp_path):
    source = open_data(folder(tmp_path / "one"))
    assert source.classes == ("cat", "dog")
    assert (np.bincount(source.labels("train")).tolist(), np.bincount(source.labels("test")).tolist()) == (
        [8, 8],
        [2, 2],
    )
    split_up = open_data(folder(tmp_path / "two", parts=("train", "val")))
    assert (len(split_up.labels("train")), len(split_up.labels("test"))) == (20, 20)
    np.testing.assert_array_equal(split_up.image("test", 13), png((1, 3))[0])


def test_parquet_of_bytes_or_structs(tmp_path):
    pixels, data = zip(*(png(i) for i in range(20)), strict=True)
    labels = [i % 3 for i in range(20)]
    plain = pa.table({"image": data, "label": labels, "split": ["train"] * 15 + ["test"] * 5})
    pq.write_table(plain, tmp_path / "plain.parquet")
    source = open_data(f"parquet:{tmp_path / 'plain.parquet'}")
    assert (len(source.labels("train")), source.labels("test").tolist()) == (15, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(source.image("test", 2), pixels[17])
    structs = pa.table({"image": [{"bytes": d, "path": "x"} for d in data], "label": [f"c{i}" for i in labels]})
    pq.write_table(structs, tmp_path / "structs.parquet")
    source = open_data(f"parquet:{tmp_path / 'structs.parquet'}")
    assert source.classes == ("c0", "c1", "c2")
    assert sorted(source.labels("test")) == [0, 1, 2]


def test_real_cifar(tmp_path):
    root = os.environ.get("LATBENCH_REFERENCE_DATA")
    if not root:
        pytest.skip("set LATBENCH_REFERENCE_DATA to the folder of reference data")
    source = open_data(f"parquet:{root}/cifar10.parquet")
    assert (len(source.labels("train")), len(source.labels("test")), len(source.classes)) == (50_000, 10_000, 10)
    assert source.image("train", 0).shape == (32, 32, 3)


def broken(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no image" / "cat").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"image": [b"x"], "label": [-1]}), tmp_path / "label.parquet")
    pq.write_table(pa.table({"image": [1], "label": [1]}), tmp_path / "type.parquet")
    split = {"image": [b"1", b"2"], "label": [0, 1], "split": [[1], [2]]}
    pq.write_table(pa.table(split), tmp_path / "split.parquet")
    (tmp_path / "noise.parquet").write_bytes(b"noise")
    return kind.replace("DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imagenet", "unknown data 'imagenet': digits, folder:DIR"),
        ("digits:DIR", "unknown data"),
        ("folder:DIR/none", "No such file"),
        ("folder:DIR/empty", "no class folder"),
        ("folder:DIR/no image", "no image in the class folder cat"),
        ("parquet:DIR/none.parquet", "cannot be read"),
        ("parquet:DIR/noise.parquet", "cannot be read"),
        ("parquet:DIR/columns.parquet", "no column image or label"),
        ("parquet:DIR/label.parquet", "label|too few|images"),
        ("parquet:DIR/type.parquet", "not encoded images"),
        ("parquet:DIR/split.parquet", "column split holds list<.*>, not text"),
        ("cifar10:DIR", "to fetch it, run: python -c"),
        ("folder:DIR/" + "x" * 5000, "File name too long"),
        ("mnist:DIR/" + "x" * 5000, "File name too long"),
        ("folder:DIR/a\0b", "unknown data"),
        ("folder:/", "whole file system"),
        ("folder://usr/..", "whole file system"),
    ],
)
def test_what_is_wrong_with_data_is_one_line(tmp_path, text, words):
    with pytest.raises(UsageError, match=words) as error:
        open_data(broken(tmp_path, text))
    assert "\n" not in str(error.value)


def damaged(root, workers):
    """Reads a folder with one damaged image."""
    data = folder(root)
    (root / "cat" / "3.png").write_bytes(b"\x89PNG but not for long")
    source = open_data(data)
    part = "train" if any("cat/3.png" in path for path in source.images["train"]) else "test"
    everything = np.arange(len(source.labels(part)))
    batches = Batches(source, part, everything, eval_transform(8), 4, shuffle=False, workers=workers)
    with pytest.raises(UsageError, match=r"cat/3\.png cannot be decoded"):
        list(batches.epoch(0))


def test_a_damaged_image_is_named(tmp_path):
    damaged(tmp_path, workers=0)


def test_a_damaged_image_is_named_from_a_worker(tmp_path):
    """In a process of its own: workers are forked, and this one holds the threads of every runtime tested before."""
    code = f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_data;"
    code += f"test_data.damaged(pathlib.Path({str(tmp_path)!r}), workers=2)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_labels_out_of_range_are_refused():
    images = {"train": [np.zeros((4, 4), np.uint8)] * 2, "test": [np.zeros((4, 4), np.uint8)]}
    with pytest.raises(UsageError, match="label 7 of train image 1 is outside 0 to 1"):
        ArraySource("mine", ("a", "b"), images, {"train": np.array([0, 7]), "test": np.array([0])})


def test_splits_are_disjoint_balanced_and_seeded():
    labels = np.repeat(np.arange(4), [10, 20, 30, 40])
    parts = split(labels, (0.7, 0.3), seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert np.bincount(labels[parts[0]]).tolist() == [7, 14, 21, 28]
    again, other = split(labels, (0.7, 0.3), seed=1), split(labels, (0.7, 0.3), seed=2)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    assert (parts[0] != other[0]).any()


def test_a_problem_s_splits(tmp_path):
    splits = Splits.of(problem("digits", max_images=200), 10)
    assert not set(splits.train) & set(splits.held_out)
    assert (len(splits.train) + len(splits.held_out), len(splits.held_out)) == (
        pytest.approx(200, abs=5),
        pytest.approx(40, abs=5),
    )
    assert len(Splits.of(problem("digits"), 10, held_out=0.0).held_out) == 0
    with pytest.raises(UsageError, match=r"10 classes.*--set num_classes=10"):
        Splits.of(problem("digits"), 9)
    with pytest.raises(UsageError, match="too few"):
        Splits.of(problem("digits", max_images=1), 10)


def test_a_problem_names_its_data_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert problem("digits").data_name == "digits"
    assert problem("folder:images").data_name == f"folder:{tmp_path.resolve() / 'images'}"


def batches(**changes):
    settings = {"batch_size": 16, "seed": 3, **changes}
    return Batches(open_data("digits"), "train", np.arange(100), train_transform(12, mirrored=False), **settings)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one CPU
def test_batches_depend_on_seed_and_epoch_only():
    first = [b.images for b in batches().epoch(4)]
    assert len(first) == len(batches()) == 6
    state = torch.get_rng_state()
    for twin in (batches().epoch(4), batches(workers=2).epoch(4)):
        assert all(torch.equal(a, b.images) for a, b in zip(first, twin, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "the generators of the step are left alone"
    rest = [b.images for b in batches().epoch(4, skip=2)]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], rest, strict=True))
    assert not torch.equal(first[0], next(iter(batches().epoch(5))).images)
    assert not torch.equal(first[0], next(iter(batches(seed=4).epoch(4))).images)


def test_processes_share_a_batch():
    whole = next(iter(batches(batch_size=8).epoch(0)))
    shares = [next(iter(batches(batch_size=4, rank=rank, n_ranks=2).epoch(0))) for rank in (0, 1)]
    assert torch.equal(whole.images[0::2], shares[0].images)
    assert torch.equal(whole.labels[1::2], shares[1].labels)


def test_evaluation_sees_every_image_once():
    source = open_data("digits")
    found = list(Batches(source, "test", np.arange(50), eval_transform(8), 16, shuffle=False).epoch(0))
    assert torch.cat([b.labels for b in found]).tolist() == source.labels("test")[:50].tolist()
    assert found[0].images.shape == (16, 3, 8, 8)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match=r"100 images do not fill one batch of 128.*--batch-size"):
        batches(batch_size=128)


def test_transforms_give_normalised_images_of_the_resolution():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    for transform in (train_transform(32), train_transform(96, jitter=0.4), eval_transform(32), eval_transform(96)):
        out = transform(image)
        assert out.shape[1:] in ((32, 32), (96, 96))
        assert out.dtype == torch.float32
        assert -3 < float(out.mean()) < 3
