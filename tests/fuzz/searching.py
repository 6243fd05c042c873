"""Parsers of what searches read: results, look-ups, checkpoints, accuracies, images."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contract import Parser
from found import make_found
from importing import COLUMNS, Evil, of_file, parquet
from keeping import ARRAYS, npy, table
from mutate import damaged, json_text, text, tree
from PIL import Image

from latbench.graph.calibration import read_batches
from latbench.graph.onnx import to_onnx
from latbench.graph.onnx_model import from_bytes
from latbench.spaces.nasbench201 import NASBench201Space
from searchers.accuracy_table import AccuracyTable
from searchers.evaluators import Lookups
from searchers.options import from_settings
from searchers.random_search import RandomSearch
from searchers.results import HISTORY, NETWORK, RESULT, read_result
from searchers.sources import open_data
from searchers.train import Loop
from searchers.world import World

_CELLS = NASBench201Space()

# ---- results, look-ups, checkpoints ---------------------------------------------------------------------------------


@cache
def _found() -> dict[str, bytes]:
    """The files of a result folder."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "found").mkdir()
        (Path(folder) / "found" / NETWORK).write_bytes(b"onnx")
        made = make_found(Path(folder) / "found", table())
        return {path.name: path.read_bytes() for path in made.iterdir()}


def _result(rng: Random) -> dict[str, bytes]:
    files = {**_found(), NETWORK: b"onnx"}
    raw = json.loads(files[RESULT])
    raw.pop("crc32", None)
    if rng.random() < 0.8:
        files[RESULT] = json_text(rng, raw)
    if rng.random() < 0.2:
        files[HISTORY] = _history(rng)
    if rng.random() < 0.1:
        del files[rng.choice(list(files))]
    return files


def _read_found(case: dict[str, bytes], folder: Path) -> object:
    for old in folder.iterdir():
        old.unlink()
    for name, data in case.items():
        (folder / name).write_bytes(data)
    return read_result(folder)


def _history(rng: Random) -> bytes:
    columns: dict[str, Any] = {"epoch": [0, 1, 2], "loss": [1.0, 0.5, None], "arch": ["0,1"] * 3}
    if rng.random() < 0.5:
        columns[rng.choice(list(columns))] = rng.choice(COLUMNS)
    return parquet(rng, columns)


_IDENTITY = {"space": {"name": "nasbench201"}, "seed": 0}
_LOOKUPS = {"identity": _IDENTITY, "lookups": [[[3, 3, 3, 3, 3, 3], 0.9, 1.5], [[1, 1, 1, 1, 1, 1], 0.5, 0.1]]}


def _loop(folder: Path) -> Loop:
    part = torch.nn.Linear(2, 2)
    return Loop(folder, "weights", {"net": part}, identity=_IDENTITY, epochs=2, seed=0, world=World.here())


@cache
def _state() -> dict[str, Any]:
    net = torch.nn.Linear(2, 2).state_dict()
    identity = _loop(Path()).identity
    return {"identity": identity, "epoch": 1, "step": 0, "sums": {}, "history": [{"epoch": 0}], "parts": {"net": net}}


def _checkpoint(rng: Random) -> bytes:
    state: Any = tree(rng, {**_state(), "parts": {"net": dict(_state()["parts"]["net"])}})
    if rng.random() < 0.1:
        state = Evil()
    sink = io.BytesIO()
    if rng.random() < 0.1:
        pickle.dump(state, sink)
    else:
        torch.save(state, sink)
    return sink.getvalue() if rng.random() < 0.6 else damaged(rng, [sink.getvalue()])


def _resume(path: Path) -> object:
    return _loop(path.parent).resume()


# ---- accuracies -----------------------------------------------------------------------------------------------------

_SPELLED = ("3,0,3,1,0,1", "all_idnt", "|skip_connect~0|+|none~0|none~1|+|none~0|none~1|none~2|")


def _accuracies(rng: Random) -> bytes:
    spelled: Any = [text(rng, [each]) if rng.random() < 0.1 else each for each in _SPELLED]
    if rng.random() < 0.3:
        spelled = [[3, 0, 3, 1, 0, 1], [1] * 6, rng.choice(([2] * 6, [], [9] * 6, [-1] * 6, [2**62] * 6, None))]
    columns: dict[str, Any] = {rng.choice(("arch", "arch_str")): spelled, "accuracy": [0.9, 0.5, 0.25]}
    if rng.random() < 0.6:
        columns[rng.choice(list(columns))] = rng.choice(COLUMNS)
    columns = {
        k: [u.encode("utf-8", "replace").decode() if isinstance(u, str) else u for u in v] if isinstance(v, list) else v
        for k, v in columns.items()
    }
    return parquet(rng, columns)


def _named(case: str, folder: Path) -> object:
    pq.write_table(pa.table({"arch": list(_SPELLED), "accuracy": [0.9, 0.5, 0.25]}), folder / "a.parquet")
    return AccuracyTable.named(f"{folder}/{case}", _CELLS)


# ---- images ---------------------------------------------------------------------------------------------------------


@cache
def pictures() -> tuple[bytes, ...]:
    """One small image in each format, mode and depth."""
    made = []
    for kind, mode in (
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "L"),
        ("WEBP", "RGBA"),
        ("BMP", "RGB"),
        ("PNG", "LA"),
    ):
        sink = io.BytesIO()
        Image.new(mode, (9, 7)).save(sink, kind)
        made.append(sink.getvalue())
    return tuple(made)


def png(width: int, height: int, data: bytes) -> bytes:
    """A grey image that claims this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _picture(rng: Random) -> bytes:
    if rng.random() < 0.1:
        size = rng.choice(((2**31 - 1, 2**31 - 1), (50_000, 50_000), (0, 5), (1, 2**20), (10_000, 10_000)))
        return png(*size, bytes(64))
    return damaged(rng, pictures()) if rng.random() < 0.7 else rng.choice(pictures())


def _image_rows(rng: Random) -> bytes:
    images: Any = [_picture(rng) if rng.random() < 0.2 else rng.choice(pictures()) for _ in range(6)]
    columns: dict[str, Any] = {
        "image": [{"bytes": image, "path": "a"} for image in images] if rng.random() < 0.3 else images,
        "label": rng.choice(([0, 1, 0, 1, 0, 1], ["a", "b"] * 3)),
    }
    if rng.random() < 0.5:
        columns["split"] = ["train"] * 4 + ["test"] * 2
    if rng.random() < 0.4:
        other = rng.choice(COLUMNS)
        column = pa.array(other) if isinstance(other, list) else other
        columns[rng.choice(list(columns))] = pa.concat_arrays([column, column])
    return parquet(rng, columns)


def _pixels(source: Any) -> object:
    return [source.image(part, i) for part in ("train", "test") for i in range(len(source.labels(part)))]


def _read_folder(case: bytes, folder: Path) -> object:
    for name in (f"{c}/{i}.png" for c in "ab" for i in range(1, 6)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pictures()[0])
    (folder / "a/1.png").write_bytes(case)
    return _pixels(open_data(f"folder:{folder}"))


@cache
def _model() -> Any:
    space = NASBench201Space(resolution=8, num_cells=1, channels=4)
    graph = space.network((3,) * 6)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype("f4") for name, shape in graph.weight_shapes().items()}
    return from_bytes(to_onnx(graph, weights))


def _calibration(rng: Random) -> tuple[str, bytes]:
    kind = rng.choice(("d.npy", "d.npz", "image"))
    if kind == "image":
        return kind, _picture(rng)
    good = np.zeros((2, 3, 8, 8), np.float32)
    array = npy(rng.choice((good, good, good.astype(np.float64), np.asfortranarray(good), *ARRAYS)))
    if kind == "d.npz":
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            for name in rng.choice((("x",), ("x", "y"), ("other",), ("../x",), ())):
                archive.writestr(f"{name}.npy", array)
        array = sink.getvalue()
    return kind, array if rng.random() < 0.5 else damaged(rng, [array])


def _calibrate(case: tuple[str, bytes], folder: Path) -> object:
    kind, data = case
    if kind == "image":
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / "1.png").write_bytes(data)
        return read_batches(folder / "images", _model())
    (folder / kind).write_bytes(data)
    return read_batches(folder / kind, _model())


def _options(case: Any, _: Path) -> object:
    return from_settings(RandomSearch, case if isinstance(case, dict) else {"evaluator": case})


PARSERS = (
    Parser("search result", _result, _read_found, gate=40),
    Parser(
        "look-ups",
        lambda rng: json_text(rng, _LOOKUPS),
        of_file("l.json", lambda path: Lookups(None, _CELLS, path=path, identity=_IDENTITY)),
    ),  # type: ignore[arg-type]
    Parser("checkpoint", _checkpoint, of_file("weights.ckpt", _resume)),
    Parser(
        "accuracy table", _accuracies, of_file("a.parquet", lambda path: AccuracyTable.read(path, _CELLS, "accuracy"))
    ),
    Parser("accuracy table's name", lambda rng: text(rng, ("a.parquet", "a.parquet:accuracy", "a:b:percent")), _named),
    Parser(
        "data",
        lambda rng: text(rng, ("digits", "folder:/nowhere", "parquet:x", "cifar10:/nowhere", "mnist:x")),
        lambda case, _: open_data(case),
    ),
    Parser(
        "images in parquet",
        _image_rows,
        of_file("i.parquet", lambda path: _pixels(open_data(f"parquet:{path}"))),
        gate=100,
    ),
    Parser("images in a folder", _picture, _read_folder, gate=40),
    Parser("calibration data", _calibration, _calibrate),
    Parser(
        "searcher's options",
        lambda rng: tree(rng, {"evaluations": 10, "evaluator": "train", "max_images": None}),
        _options,
    ),
)
