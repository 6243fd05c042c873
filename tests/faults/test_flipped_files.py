"""Bit flips and truncation: a damaged file is refused in one line, or says what it said; never a wrong number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from latbench.errors import LatbenchError, TableError, UsageError
from latbench.oracle import store
from latbench.oracle.base import Constraint
from latbench.oracle.lut import LutOracle
from latbench.provenance import canonical_json
from latbench.seals import seal_json, seal_zip
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spool import Spool
from latbench.tables import LatencyTable
from searchers.aows import AOWS
from searchers.base import Problem
from searchers.evaluators import Lookups
from searchers.results import NETWORK, RESULT, check_network, read_history, read_result, write_history
from searchers.testing import roofline_table
from searchers.train import Loop
from searchers.world import World

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.2, levels=2, num_classes=10)
TABLE = roofline_table(SPACE)
N_FLIPS = 1500
HEADER = {"device": "cpu", "policy": {"runs": 2}}


def table(path: Path) -> Any:
    few = TABLE.take(range(3))
    few.write(path)

    def read(path: Path) -> Any:
        found = LatencyTable.read(path)
        return found.data.to_pylist(), found.provenance.to_dict(), dict(found.notes)

    return read


def model(path: Path) -> Any:
    store.save(path, LutOracle.fit(TABLE), {"n": 3})

    def read(path: Path) -> Any:
        found = store.load(path)
        arrays, meta = found.oracle.state()
        about = canonical_json([found.oracle.provenance.to_dict(), meta, dict(found.notes)])
        return about, {name: array.tobytes() for name, array in arrays.items()}

    return read


def checkpoint(path: Path) -> Any:
    net = torch.nn.Linear(3, 4)

    def loop() -> Loop:
        return Loop(
            path.parent,
            "f",
            {"net": net},
            identity={"a": 1},
            epochs=3,
            seed=0,
            world=World(torch.device("cpu")),
        )

    loop()._save_sometimes({"loss": 1.5}, at_once=True)
    loop().path.rename(path)

    def read(path: Path) -> Any:
        path.rename(path.with_name("f.ckpt"))
        try:
            torch.nn.init.zeros_(net.weight)
            (again := loop()).resume()
        finally:
            path.with_name("f.ckpt").rename(path)
        weights = [tensor.numpy().tobytes() for tensor in net.state_dict().values()]
        return again.epoch, again.step, again.sums, again.history, weights

    return read


def history(path: Path) -> Any:
    write_history(path, [{"epoch": i, "loss": 1.0 / (i + 1), "arch": "0,1"} for i in range(4)])

    def read(path: Path) -> Any:
        try:
            return read_history(path)
        except ValueError as error:  # its readers make one line of it
            raise UsageError(str(error)) from None

    return read


def lookups(path: Path) -> Any:
    class Counted:
        def evaluate(self, arch: tuple[int, ...]) -> float:
            return sum(arch) / 100

    rng = np.random.default_rng(0)
    kept = Lookups(Counted(), SPACE, path=path, identity={"a": 1})
    for _ in range(4):
        kept.evaluate(SPACE.sample(rng))
    kept.flush()

    def read(path: Path) -> Any:
        again = Lookups(Counted(), SPACE, path=path, identity={"a": 1})
        return again.values, again.seconds

    return read


FILES: dict[str, Callable[[Path], Any]] = {
    "table": table,
    "model": model,
    "checkpoint": checkpoint,
    "history": history,
    "lookups": lookups,
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")  # what torch says of odd archives that were sealed as such is none of ours
def test_no_flipped_bit_is_read_as_a_number(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "f"
    read = FILES[kind](path)
    whole, data = read(path), path.read_bytes()
    refused = []
    for bit in random.Random(0).sample(range(8 * len(data)), min(N_FLIPS, 8 * len(data))):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read(path) == whole, f"bit {bit} of {8 * len(data)}"
        except LatbenchError as error:
            refused.append(str(error))
    assert not [text for text in refused if "\n" in text]
    assert len(refused) > 0.8 * min(N_FLIPS, 8 * len(data)), "what is left lies in the checksum itself, or says nothing"


@pytest.mark.parametrize("kind", FILES)
def test_no_truncated_file_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "f"
    read = FILES[kind](path)
    data = path.read_bytes()
    for size in sorted({0, 1, 3, len(data) - 1, *random.Random(0).sample(range(len(data)), 60)}):
        path.write_bytes(data[:size])
        if kind == "lookups" and data[:size].strip() == data.strip():
            continue  # the newline at its end says nothing
        with pytest.raises(LatbenchError):
            read(path)


def test_a_flipped_bit_costs_a_spool_its_line(tmp_path: Path) -> None:
    with Spool(tmp_path / "t", HEADER) as spool:
        for i in range(4):
            spool.append({"key": f"k{i}", "samples_ms": [0.125 * i, 1.5]})
        path, written = spool.path, [{"key": f"k{i}", "samples_ms": [0.125 * i, 1.5]} for i in range(4)]
    data = path.read_bytes()
    stopped = {}
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            with Spool(tmp_path / "t", HEADER) as spool:
                assert all(record in written for record in spool.records)
                assert len(spool.records) >= len(written) - 2  # a newline stands between two
        except TableError as error:
            stopped[bit] = str(error)
    assert max(stopped) // 8 <= data.index(b"\n"), "only the header stops a run"
    assert all("delete" in text for text in stopped.values())


# ---- the folder of a search -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    oracle = LutOracle.fit(TABLE)
    problem = Problem((Constraint(oracle, 2 * oracle.fastest()[1]),), "digits", folder, max_images=160)
    torch.set_num_threads(1)
    AOWS(epochs=1, batch_size=32, adaptive=False).search(problem)
    return folder


def test_a_flipped_bit_in_a_result_is_refused(searched: Path) -> None:
    path = searched / RESULT
    whole, data = json.loads(path.read_text()), path.read_bytes()
    try:
        for bit in random.Random(0).sample(range(8 * len(data)), 400):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                read_result(searched)
            except LatbenchError:
                continue
            now = json.loads(damaged)  # where it is read, nothing but the checksum has changed
            assert {k: v for k, v in now.items() if k in whole and k != "crc32"} == {
                k: v for k, v in whole.items() if k != "crc32"
            }
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("name", [NETWORK, "constraint0.npz"])
def test_a_file_that_is_not_the_one_the_result_speaks_of_is_refused(searched: Path, name: str) -> None:
    """Damaged, or of a later run that was killed before it had written both."""
    data = (searched / name).read_bytes()
    middle = len(data) // 2
    try:
        (searched / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        with pytest.raises(LatbenchError, match=f"{name} is not the file that result.json beside it speaks of"):
            check_network(read_result(searched))
    finally:
        (searched / name).write_bytes(data)
    assert check_network(read_result(searched)) == searched / NETWORK


def test_a_result_that_names_no_file_that_can_be_is_refused(searched: Path) -> None:
    path = searched / RESULT
    data = path.read_text()
    try:
        raw = json.loads(data)
        del raw["crc32"]
        path.write_text(json.dumps(raw).replace("constraint0.npz", "x" * 300))
        with pytest.raises(UsageError, match="File name too long"):
            read_result(searched)
    finally:
        path.write_text(data)


# ---- what others see ------------------------------------------------------------------------------------------------


def test_other_tools_read_sealed_files_as_ever(tmp_path: Path) -> None:
    table(tmp_path / "t.parquet")
    assert pd.read_parquet(tmp_path / "t.parquet")["key"].tolist() == TABLE.take(range(3)).frame["key"].tolist()
    model(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as arrays:
        assert json.loads(arrays["latbench"].tobytes())["oracle"] == "lut"
    checkpoint(tmp_path / "c")
    assert torch.load(tmp_path / "c", weights_only=True)["identity"]["a"] == 1


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    """Of an older latbench."""
    model(tmp_path / "m.npz")
    whole = store.load(tmp_path / "m.npz").oracle
    with np.load(tmp_path / "m.npz") as arrays:
        np.savez(tmp_path / "old.npz", **dict(arrays))
    archs = np.array([SPACE.sample(np.random.default_rng(0))], np.int64)
    assert store.load(tmp_path / "old.npz").oracle.latencies(archs) == whole.latencies(archs)
    (tmp_path / "t.partial.jsonl").write_text(
        '{"pid":"0000000001","header":' + canonical_json(HEADER) + '}\n{"key":"a"}\n'
    )
    with Spool(tmp_path / "t", HEADER) as spool:
        assert spool.records == [{"key": "a"}]


def test_what_cannot_be_sealed_is_refused() -> None:
    with pytest.raises(ValueError, match="no zip archive"):
        seal_zip(b"PK\3\4 cut off")
    assert json.loads(seal_json('{"a": 1}'))["a"] == 1
