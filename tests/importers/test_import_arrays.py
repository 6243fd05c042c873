"""Columns of network latencies: the published files, and small ones made here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from latbench.errors import LatbenchError
from latbench.importers import arrays
from latbench.importers.base import Source
from latbench.spaces.base import SearchSpace
from latbench.spaces.fbnet import FBNetSpace
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space

REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", ""))
CELLS = [(3, 3, 3, 3, 3, 3), (1, 2, 0, 3, 4, 1), (0, 1, 2, 3, 4, 0)]


def frame(latencies: list[Any] | None = None) -> pd.DataFrame:
    columns: dict[str, Any] = {f"e{i}": [cell[i] for cell in CELLS] for i in range(6)}
    return pd.DataFrame(
        columns | {"macs": [1, 2, 3], "gpu_ms": latencies or [1.5, 0.1 + 0.2, 3.0], "cpu": [1.0, 2.0, 3.0]}
    )


def written(tmp_path: Path, data: pd.DataFrame, suffix: str) -> Source:
    path = tmp_path / f"f{suffix}"
    if suffix == ".csv":
        data.to_csv(path, index=False)
    else:
        data.to_parquet(path)
    return Source(path, device="gpu")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_are_networks_in_their_order(tmp_path: Path, suffix: str) -> None:
    table = arrays.read(written(tmp_path, frame(), suffix), "nasbench201", {}, "gpu_ms", None)
    space = NASBench201Space()
    rows = list(table.rows())
    assert [row.arch for row in rows] == CELLS
    assert [row.latency_ms for row in rows] == [1.5, 0.1 + 0.2, 3.0]  # bit by bit, also through csv
    assert [row.order for row in rows] == [0, 1, 2]
    assert all(row.signature == space.network(row.arch).signature for row in rows if row.arch)
    assert {(row.kind, row.origin) for row in rows} == {("network", "imported")}
    assert table.provenance.policy == {"imported": "help", "column": "gpu_ms", "unit": "ms"}


@pytest.mark.parametrize(("unit", "ms"), [("ms", 1.1), ("us", 1.1 / 1000), ("s", 1.1 * 1000)])
def test_units(tmp_path: Path, unit: str, ms: float) -> None:
    data = frame().assign(cpu=1.1)
    table = arrays.read(written(tmp_path, data, ".parquet"), "nasbench201", {}, "cpu", unit)
    assert set(table.frame["latency_ms"]) == {ms}


def test_each_spelling_of_one_graph_keeps_its_figure(tmp_path: Path) -> None:
    """Node 1 reaches nothing: its edge is idle in the second cell, and absent in the third."""
    cells = [(0, 3, 0, 0, 0, 1), (3, 3, 0, 0, 0, 1), (2, 3, 0, 0, 0, 1)]
    data = pd.DataFrame({f"e{i}": [cell[i] for cell in cells] for i in range(6)} | {"t": [2.0, 4.0, 3.0]})
    table = arrays.read(written(tmp_path, data.iloc[[1, 0, 2]], ".csv"), "nasbench201", {}, "t", "ms")
    archs, latencies_ms = table.networks()
    assert [tuple(arch) for arch in archs.tolist()] == [cells[1], cells[0], cells[2]]
    assert latencies_ms.tolist() == [4.0, 2.0, 3.0]
    assert table[NASBench201Space().network(cells[1]).key] == 2.0  # what ran that graph and nothing else


@pytest.mark.parametrize(
    ("file", "space", "column", "batch"),
    [
        ("fbnet_latency.parquet", FBNetSpace(batch=32), "1080ti_32", 32),
        ("nb201_latency.parquet", NASBench201Space(batch=1), "pixel3", 1),
        ("ofa_latency.parquet", OFAMobileNetV3Space(batch=64), "v100_64", 64),
    ],
)
def test_published_arrays(tmp_path: Path, file: str, space: SearchSpace, column: str, batch: int) -> None:
    if not (REFERENCE / file).is_file():
        pytest.skip(f"needs {file} in the folder $LATBENCH_REFERENCE_DATA")
    data = pd.read_parquet(REFERENCE / file).iloc[:200]
    table = arrays.read(written(tmp_path, data, ".parquet"), space.name, {"batch": batch}, column, "ms")
    archs, latencies_ms = table.networks()
    np.testing.assert_array_equal(latencies_ms, data[column].to_numpy(np.float64))
    assert len(archs) == 200
    for arch in archs[:5]:
        space.check(tuple(int(i) for i in arch))


@pytest.mark.parametrize(
    ("change", "arguments", "match"),
    [
        (lambda d: d, ("nasbench201", {}, "cpu", None), "does not say its unit: add --unit"),
        (lambda d: d, ("nasbench201", {}, "gpu_ms", "us"), "--unit us, but the column is called gpu_ms"),
        (lambda d: d, ("nasbench201", {}, None, "ms"), "add --column NAME: there are gpu_ms, cpu"),
        (lambda d: d, ("nasbench201", {}, "tpu", "ms"), "no column 'tpu' of latencies: there are gpu_ms, cpu"),
        (lambda d: d, ("nasbench201", {}, "e0", "ms"), "no column 'e0' of latencies"),
        (lambda d: d, ("mobilenet_v1", {}, "cpu", "ms"), "arrays are read for fbnet, nasbench201, ofa_mbv3"),
        (lambda d: d, ("fbnet", {}, "cpu", "ms"), "no column op0"),
        (lambda d: d.rename(columns={"cpu": "v100_32"}), ("nasbench201", {}, "v100_32", "ms"), "--batch N"),
        (lambda d: d.assign(cpu=[1.0, float("nan"), 1.0]), ("nasbench201", {}, "cpu", "ms"), "row 1, column cpu"),
        (
            lambda d: d.assign(cpu=[1.0, 0.0, 1.0]),
            ("nasbench201", {}, "cpu", "ms"),
            "row 1, column cpu: a latency of 0",
        ),
        (
            lambda d: d.assign(cpu=[1.0, 1.0, -2.0]),
            ("nasbench201", {}, "cpu", "ms"),
            "row 2, column cpu: a latency of -2",
        ),
        (
            lambda d: d.assign(cpu=["1", "x", "2"]),
            ("nasbench201", {}, "cpu", "ms"),
            "row 0, column cpu|row 1, column cpu",
        ),
        (
            lambda d: d.assign(e2=[0, 5, 1]),
            ("nasbench201", {}, "cpu", "ms"),
            "row 1: nasbench201: 2<-1 has no option 5",
        ),
        (lambda d: d.assign(e2=[0, 1.5, 1]), ("nasbench201", {}, "cpu", "ms"), r"row 1, column e2: .*1\.5.* no whole"),
        (lambda d: d.assign(e2=[0, None, 1]), ("nasbench201", {}, "cpu", "ms"), "row 1, column e2"),
        (lambda d: pd.concat([d, d.iloc[:1]]), ("nasbench201", {}, "cpu", "ms"), "row 3: the architecture of row 0"),
        (lambda d: d.iloc[:0], ("nasbench201", {}, "cpu", "ms"), "holds no measurement"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_is_wrong_is_named(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], arguments: Any, match: str, suffix: str
) -> None:
    source = written(tmp_path, change(frame()), suffix)
    with pytest.raises(LatbenchError, match=match) as caught:
        arrays.read(source, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_cut_parquet_file_is_refused(tmp_path: Path, kept: float) -> None:
    source = written(tmp_path, frame(), ".parquet")
    source.path.write_bytes(source.path.read_bytes()[: int(kept * source.path.stat().st_size)])
    with pytest.raises(LatbenchError, match="damaged or cut off"):
        arrays.read(source, "nasbench201", {}, "cpu", "ms")


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("f.csv", b"", "is empty"),
        ("f.csv", b"\xff\xfe\x00", "is no text"),
        ("f.parquet", b"hello", "is no parquet file"),
        ("f.csv", b"e0,e0\n1,2\n", "two columns are called 'e0'"),
        ("f.csv", b"e0,e1,e2,e3,e4,e5,t\n1,1,1,1,1,1,2.0,9\n", "row 0: 8 cells, the header has 7"),
        ("f.csv", b"e0,e1,e2,e3,e4,e5,t\n1,1,1,1,1", "row 0: 5 cells, the header has 7"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LatbenchError, match=match):
        arrays.read(Source(tmp_path / name), "nasbench201", {}, "t", "ms")
