"""Files made to hurt, ONNX aside: each is refused with its reason, nothing of it is run, no gigabyte is taken."""

from __future__ import annotations

import bz2
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from contract import bounded
from keeping import npy, table
from onnx import helper
from searching import pictures, png

from latbench import devices, foreign, parquet
from latbench.errors import LatbenchError, SchemaMismatchError, TableError, UsageError
from latbench.graph.calibration import read_batches
from latbench.graph.ir import Graph
from latbench.graph.onnx_model import from_bytes
from latbench.importers import aows, arrays, ofa, plain_pickle, trtexec
from latbench.importers.base import Source
from latbench.oracle import store
from latbench.oracle.lut import LutOracle
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from searchers.accuracy_table import AccuracyTable
from searchers.instanas_variants import load_weights
from searchers.sources import open_data

MIB = 2**20


@pytest.fixture(autouse=True)
def little_room() -> Iterator[None]:
    with bounded(30, 1 << 30):
        yield


def refused(kind: type[LatbenchError], read: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        read()
    assert str(caught.value).isprintable()
    return str(caught.value)


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


# ---- pickles, wherever they may hide --------------------------------------------------------------------------------


def test_no_door_unpickles(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "file"
    evil = Evil(made)
    objects = np.array([evil], object)
    found = io.BytesIO()
    np.savez(found, latbench=objects, x=objects)
    whole = io.BytesIO()
    torch.save({"epoch": evil}, whole)
    model = from_bytes(_identity())
    doors: list[tuple[bytes, Callable[[], object]]] = [
        (pickle.dumps({"base": evil}), lambda: plain_pickle.loads(path.read_bytes(), "f")),
        (found.getvalue(), lambda: store.load(path)),
        (found.getvalue(), lambda: read_batches(path, model)),
        (npy(objects), lambda: read_batches(path, model)),
        (pickle.dumps(evil), lambda: read_batches(path, model)),
        (whole.getvalue(), lambda: load_weights(path, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))),
        (pickle.dumps(evil), lambda: load_weights(path, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))),
    ]
    for data, read in doors:
        path.write_bytes(data)
        with pytest.raises(LatbenchError):
            read()
        assert not made.exists()


def test_arrow_types_that_would_unpickle_do_not(tmp_path: Path) -> None:
    """pyarrow before 14 unpickled this extension type's name, ``arrow.py_extension_type``, on reading."""
    made, path = tmp_path / "made", tmp_path / "t.parquet"
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(made)),
    }
    schema = pa.schema([pa.field("arch", pa.string(), metadata=metadata), pa.field("accuracy", pa.float64())])
    pq.write_table(pa.Table.from_arrays([pa.array(["all_idnt"]), pa.array([0.5])], schema=schema), path)
    AccuracyTable.read(path, NASBench201Space(), "accuracy")
    refused(SchemaMismatchError, lambda: LatencyTable.read(path))
    refused(TableError, lambda: arrays.read(Source(path), "nasbench201", {}, "x_ms", None))
    assert not made.exists()


def test_old_mnist_caches_are_pickles_and_refused(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    assert "remove" in refused(UsageError, lambda: open_data(f"mnist:{tmp_path}"))
    assert not (tmp_path / "made").exists()


def test_cifars_pickles_are_opened_only_where_they_are_the_published_ones(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    assert "corrupted" in refused(UsageError, lambda: open_data(f"cifar10:{tmp_path}"))
    assert not (tmp_path / "made").exists()


PICKLES = {
    "empty lists": (b"]" * (5 * MIB) + b".", "larger than 4 MiB"),
    "marks": (b"(" * 100_000 + b"l" * 100_000 + b".", None),
    "a number of 2 GiB": (b"\x8b\xff\xff\xff\x7f.", "damaged"),
    "a text of 2^63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "damaged"),
    "a number of 5,000 digits": (b"L" + b"9" * 5000 + b"L\n.", "damaged"),
    "a class by extension code": (b"\x82\x01.", "it holds EXT1"),
    "an instance": (b"(ios\nsystem\n.", "it holds INST"),
    "a persistent id": (b"Pid\n.", "it holds PERSID"),
    "a state": (b"}}b.", "it holds BUILD"),
    "an object": (b"(cos\nsystem\no.", "refers to os.system"),
    "a new object": (b"cbuiltins\neval\n)\x81.", "refers to builtins.eval"),
    "a name by parts": (b"\x8c\x02os\x8c\x06system\x93.", "refers to os.system"),
    "a list of itself": (b"]q\x00h\x00a.", None),
    "a tuple of itself": (b"]q\x00(h\x00tq\x010h\x00h\x01a.", "it holds POP"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(case: str) -> None:
    data, reason = PICKLES[case]
    if reason is None:
        plain_pickle.loads(data, "f.pkl")  # plain data after all
    else:
        assert reason in refused(TableError, lambda: plain_pickle.loads(data, "f.pkl"))


# ---- archives of arrays ---------------------------------------------------------------------------------------------


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return sink.getvalue()


def npy_header(shape: str, descr: str = "'<f8'", version: bytes = b"\x01\x00") -> bytes:
    """An array that claims this shape, and holds nothing."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(text)) + text


def lying_bomb() -> bytes:
    """A GiB of zeros whose archive states 100 bytes."""
    whole = bytearray(archive({"latbench.npy": bytes(300 * MIB)}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = whole.index(signature) + offset
        whole[at : at + 4] = struct.pack("<I", 100)
    return bytes(whole)


MODELS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a zip bomb": (lambda: archive({f"{i}.npy": bytes(300 * MIB) for i in range(2)}), "more than 512 MiB"),
    "a zip bomb that lies": (lying_bomb, "not of the size|CRC|is no fitted model"),
    "a bomb in bzip2": (
        lambda: archive({"latbench.npy": bytes(MIB)}, zipfile.ZIP_BZIP2),
        "packed in a way that numpy does not write",
    ),
    "an array of 2^60": (
        lambda: archive({"latbench.npy": npy_header("(1152921504606846976,)")}),
        "of which the file holds 0",
    ),
    "an array beyond 64 bits": (
        lambda: archive({"latbench.npy": npy_header("(9999999999999999999999,)")}),
        "of which the file holds 0",
    ),
    "a negative shape": (lambda: archive({"latbench.npy": npy_header("(-1,)")}), "of which the file holds 0|damaged"),
    "a shape that computes": (lambda: archive({"latbench.npy": npy_header("(9**9**9,)")}), "damaged"),
    "a header nested without end": (lambda: archive({"latbench.npy": npy_header("(" * 5000)}), "damaged"),
    "a header of a MiB": (
        lambda: archive({"latbench.npy": npy_header(" " * MIB + "()", version=b"\x02\x00")}),
        "damaged",
    ),
    "objects": (lambda: archive({"latbench.npy": npy(np.array([{}], object))}), "only plain numbers"),
    "two of one name": (lambda: archive({"a.npy": npy(1.0)}) + b"", "no fitted model of latbench"),
    "no archive": (lambda: bz2.compress(b"x" * 100), "not a zip file"),
}


@pytest.mark.parametrize("case", MODELS)
def test_fitted_models(case: str, tmp_path: Path) -> None:
    make, reason = MODELS[case]
    (tmp_path / "m.npz").write_bytes(make())
    with pytest.raises(SchemaMismatchError, match=reason):
        store.load(tmp_path / "m.npz")


def test_a_model_that_claims_another_space_than_its_arrays(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    store.save(path, LutOracle.fit(table()))
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    head = np.lib.format.read_array(io.BytesIO(members["latbench.npy"])).tobytes().decode()
    for old, new, reason in (
        ('"levels":2', '"levels":1000000000', "levels must be at most"),
        ('"batch":1', '"batch":1000000000', "pixels"),
        ('"levels":2', '"levels":5', "wants shape"),
        ('"schema":1', '"schema":' + "9" * 4000, "has model schema a whole number of"),
        ('"schema":1', '"schema":' + "[" * 100_000, "no fitted model"),
    ):
        members["latbench.npy"] = npy(np.frombuffer(head.replace(old, new).encode(), np.uint8))
        path.write_bytes(archive(members))
        with pytest.raises(LatbenchError, match=reason):
            store.load(path)


# ---- texts ----------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, name: str, data: bytes) -> Source:
    (tmp_path / name).write_bytes(data)
    return Source(tmp_path / name)


LAUGHS = b"a: &a [x, x, x]\n" + b"".join(b"%c: &%c [*%c, *%c, *%c]\n" % (c + 1, c + 1, c, c, c) for c in range(97, 112))
TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "aliases that triple": (lambda p: ofa.read(written(p, "f", LAUGHS), {}, "ms"), "YAML's references"),
    "YAML that constructs": (
        lambda p: ofa.read(written(p, "f", b"a: !!python/object/apply:os.system ['true']"), {}, "ms"),
        "no YAML as once",
    ),
    "YAML nested without end": (lambda p: ofa.read(written(p, "f", b"[" * 50_000), {}, "ms"), "no YAML as once"),
    "YAML of 5 MiB": (lambda p: ofa.read(written(p, "f", b"a: 1\n" * MIB), {}, "ms"), "larger than 4 MiB"),
    "JSON nested without end": (lambda p: aows.read(written(p, "f", b"[" * 10**6), {}), "nested too deeply"),
    "JSON of 33 MiB": (
        lambda p: trtexec.read(written(p, "f", b"[" + b"[]," * (11 * MIB)), _row(), None, None),
        "larger than 32 MiB",
    ),
    "numbers of 5,000 digits": (lambda p: aows.read(written(p, "f", b"9" * 5000), {}), "not JSON"),
    "a million columns": (
        lambda p: arrays.read(
            written(p, "f.csv", b",".join(b"c%d" % i for i in range(10**6))), "nasbench201", {}, "x", None
        ),
        "1000000 columns",
    ),
    "a cell of 20 MiB": (
        lambda p: arrays.read(written(p, "f.csv", b"x" * (20 * MIB)), "nasbench201", {}, "x", None),
        "no csv",
    ),
    "a csv of 33 MiB": (
        lambda p: arrays.read(written(p, "f.csv", b"1," * (17 * MIB)), "nasbench201", {}, "x", None),
        "larger than 32 MiB",
    ),
    "a table of 300 MiB": (lambda p: aows.read(_hole(p / "f", 300 * MIB), {}), "larger than 256 MiB"),
    "a graph nested without end": (lambda p: Graph.from_json('{"nodes":' + "[" * 10**6), "nested too deeply"),
    "a device file of 2 MiB": (lambda p: devices.profiles(_hole(p / "d", 2 * MIB).path), "larger than 1 MiB"),
    "a device file without end": (lambda p: devices.profiles(Path("/dev/zero")), "no regular file"),
    "TOML nested without end": (
        lambda p: devices.profiles(written(p, "d", b"a = " + b"[" * 10**5).path),
        "recursion|nested",
    ),
}


def _hole(path: Path, nbytes: int) -> Source:
    with path.open("wb") as file:
        file.truncate(nbytes)
    return Source(path)


def _row() -> Row:
    return next(table().rows())


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, tmp_path: Path) -> None:
    read, reason = TEXTS[case]
    with pytest.raises(LatbenchError, match=reason):
        read(tmp_path)


# ---- parquet --------------------------------------------------------------------------------------------------------


def test_a_column_of_one_value_a_hundred_million_times(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    part = pa.table(
        {"arch": pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int8)), ["all_idnt"]).cast("string")}
    )
    part = part.append_column("accuracy", pa.array(np.full(10**6, 0.5)))
    with pq.ParquetWriter(path, part.schema, compression="zstd") as writer:
        for _ in range(40):
            writer.write_table(part)
    assert path.stat().st_size < MIB
    assert "claims 80000000 values" in refused(
        TableError, lambda: AccuracyTable.read(path, NASBench201Space(), "accuracy")
    )


def test_a_table_of_a_hundred_million_values_in_a_few_kilobytes(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table().write(path)
    one = pq.read_table(path).slice(0, 1)
    many = one.take(pa.array(np.zeros(10**5, np.int64)))
    with pq.ParquetWriter(path, many.schema, compression="zstd") as writer:
        for _ in range(20):
            writer.write_table(many)
    assert path.stat().st_size < MIB
    assert "values in" in refused(SchemaMismatchError, lambda: LatencyTable.read(path))


def test_a_footer_that_contradicts_itself_does_not_end_the_process(tmp_path: Path) -> None:
    """pyarrow 26 ends the process where a footer's figures contradict its schema and a column is asked for its own."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"arch": [0, 1, 2], "accuracy": [0.9, 0.5, 0.25]}), path)
    data = bytearray(path.read_bytes())
    optional = data.index(b"\x25\x02\x18\x08accuracy")
    data[optional + 1] = 0  # required now, though levels were counted
    path.write_bytes(bytes(data))
    code = (
        "import sys; from pathlib import Path; from latbench import parquet\n"
        "try: parquet.read(Path(sys.argv[1]))\nexcept ValueError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_a_text_of_a_megabyte_in_a_million_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array(["x" * MIB]))
    pq.write_table(pa.table({"arch": text}), path, store_schema=False)
    assert path.stat().st_size < MIB
    with pytest.raises(ValueError, match=r"column arch has \d+ bytes unpacked"):
        parquet.read(path)


# ---- images ---------------------------------------------------------------------------------------------------------


def pictured(folder: Path, name: str, data: bytes) -> Path:
    for each in (f"{c}/{i}.png" for c in "ab" for i in range(5)):
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).write_bytes(pictures()[0])
    (folder / name).write_bytes(data)
    return folder


def every(source: Any) -> list[Any]:
    return [source.image(part, i) for part in ("train", "test") for i in range(len(source.labels(part)))]


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (9_000, 9_000), (2**31 - 1, 2**31 - 1)])
def test_pictures_of_one_colour_and_gigabytes(tmp_path: Path, width: int, height: int) -> None:
    folder = pictured(tmp_path, "a/0.png", png(width, height, bytes(MIB)))
    assert "cannot be decoded" in refused(UsageError, lambda: every(open_data(f"folder:{folder}")))
    model = from_bytes(_identity((1, 3, 32, 32)))
    assert "no image that can be read" in refused(UsageError, lambda: read_batches(folder, model))


def test_a_picture_a_pixel_wide_is_not_blown_up(tmp_path: Path) -> None:
    folder = pictured(tmp_path, "a/0.png", png(1, 2**20, bytes(2 * 2**20)))
    model = from_bytes(_identity((1, 3, 224, 224)))
    assert "too many" in refused(UsageError, lambda: read_batches(folder, model))


def test_folders_that_link_to_themselves_and_pipes(tmp_path: Path) -> None:
    folder = pictured(tmp_path, "a/0.png", pictures()[0])
    for i in range(3):
        (folder / "a" / f"again{i}").symlink_to(".")
    os.mkfifo(folder / "a" / "pipe.png")
    assert len(every(open_data(f"folder:{folder}"))) == 10


def test_labels_from_nowhere(tmp_path: Path) -> None:
    for labels in ([0, 2**62], [-5, 1], [0, 2**40]):
        pq.write_table(pa.table({"image": [pictures()[0]] * 2, "label": labels}), tmp_path / "i.parquet")
        assert "number the classes from 0" in refused(UsageError, lambda: open_data(f"parquet:{tmp_path}/i.parquet"))


def _identity(shape: tuple[int, ...] = (1, 3, 8, 8)) -> bytes:
    from networks import make

    return make([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": shape}).SerializeToString()


# ---- foreign --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3), "f4")), np.array(True), np.zeros((0, 4))]
)
def test_plain_arrays_are_what_numpy_reads(array: Any) -> None:
    found = foreign.read_npy(npy(array))
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype
