"""``latbench import``: each format by its command, and what is refused without a file."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from command_line import refused, run

from latbench.graph.onnx import to_onnx
from latbench.graph.passes import random_weights
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable

CELLS = "e0,e1,e2,e3,e4,e5,1080ti_32\n3,3,3,3,3,3,2.5\n1,1,1,1,1,1,1.25\n"
WIDTHS = list(MobileNetV1Space().widths(MobileNetV1Space().published["mobilenet-v1"]))


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    path = tmp_path / "cells.csv"
    path.write_text(CELLS)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "t.parquet"


HELP = ("--space", "nasbench201", "--column", "1080ti_32")


def test_columns_with_their_conditions(cells: Path, output: Path) -> None:
    result = run(
        "import", "help", cells, *HELP, "--unit", "ms", "--batch", 32, "--device", "GTX 1080 Ti",
        "--framework", "pytorch", "--set", "num_classes=100", "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0
    assert result.stdout == (
        f"2 networks of nasbench201 on GeForce GTX 1080 Ti, pytorch, batch 32\n1.25 ms to 2.50 ms -> {output}\n"
    )
    p = LatencyTable.read(output).provenance
    assert (p.device, p.device_name, p.backend) == ("1080ti", "GeForce GTX 1080 Ti", "pytorch")
    assert (p.settings["batch"], p.settings["num_classes"]) == (32, 100)
    assert run("show", output).exit_code == 0


def test_json(cells: Path, output: Path) -> None:
    result = run(
        "import", "help", cells, *HELP, "--unit", "us", "--batch", 1, "--device", "my phone", "-o", output, "--json"
    )
    facts = json.loads(result.stdout)
    assert (facts["rows"], facts["networks"], facts["device"]) == (2, 2, "my phone")
    assert (facts["min_ms"], facts["max_ms"]) == (0.00125, 0.0025)


def test_aows_samples(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps([WIDTHS, 0.0629]) + "\n")
    result = run("import", "aows", path, "--device", "titanxp", "--framework", "tensorrt", "-o", output)
    assert result.exit_code == 0
    assert "1 network of mobilenet_v1 on NVIDIA TITAN Xp, tensorrt, batch 64" in result.stdout
    assert LatencyTable.read(output).networks()[1].tolist() == [0.0629 * 64]


def test_trtexec_times_of_an_architecture(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps([{"computeMs": 1.0}, {"computeMs": 2.0}, {"computeMs": 4.0}]))
    result = run(
        "import", "trtexec", path, "--model", "mobilenet_v1:mobilenet-v1", "--batch", 8, "--device", "titanxp",
        "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0
    space = MobileNetV1Space(batch=8)
    table = LatencyTable.read(output)
    assert table[space.network(space.published["mobilenet-v1"]).key] == 2.0
    assert (table.provenance.backend, table.provenance.settings["batch"]) == ("tensorrt", 8)


def test_trtexec_times_of_an_onnx_file(tmp_path: Path, output: Path) -> None:
    space = MobileNetV1Space(resolution=32, levels=2)
    network = space.network(space.published["narrowest"])
    (tmp_path / "net.onnx").write_bytes(to_onnx(network, random_weights(network, 0)))
    (tmp_path / "times.json").write_text(json.dumps([{"computeMs": 3.0}]))
    result = run("import", "trtexec", tmp_path / "times.json", "--model", tmp_path / "net.onnx", "-o", output)
    assert result.exit_code == 0
    table = LatencyTable.read(output)
    assert (table.provenance.device, table.provenance.backend) == ("unknown", "tensorrt")
    (row,) = table.rows()
    assert (row.kind, row.latency_ms, row.macs, row.n_params) == ("network", 3.0, network.macs, network.n_params)
    assert row.signature.startswith("onnx:net.onnx;")


def test_a_column_names_the_device_where_nobody_else_does(cells: Path, output: Path) -> None:
    assert run("import", "help", cells, *HELP, "--unit", "ms", "--batch", 32, "-o", output).exit_code == 0
    assert LatencyTable.read(output).provenance.device == "1080ti_32"


def test_the_published_tfnas_table(output: Path) -> None:
    path = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "tfnas_latency_gpu.pkl"
    if not path.is_file():
        pytest.skip("needs tfnas_latency_gpu.pkl in the folder $LATBENCH_REFERENCE_DATA")
    result = run("import", "tfnas", path, "-o", output)
    assert result.exit_code == 0
    assert "21956 blocks of tfnas on NVIDIA TITAN RTX, pytorch, batch 32" in result.stdout
    assert "left out: 14526 entries" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*HELP, "--batch", 1), "does not say its unit"),
        ((*HELP, "--unit", "ms"), "--batch N"),
        (("--space", "nasbench201", "--unit", "ms"), "add --column NAME: there are 1080ti_32"),
        (("--column", "1080ti_32", "--unit", "ms"), "arrays are read for fbnet, nasbench201, ofa_mbv3"),
        ((*HELP, "--unit", "ms", "--model", "x"), "help takes no --model"),
        ((*HELP, "--unit", "ms", "--batch", 1, "--set", "chanels=2"), "no setting 'chanels'"),
        ((*HELP, "--unit", "hours"), "--unit"),
    ],
)
def test_what_is_not_known_is_asked_for(cells: Path, output: Path, arguments: tuple[object, ...], message: str) -> None:
    assert message in refused("import", "help", cells, *arguments, "-o", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("file_format", "data", "arguments", "message"),
    [
        ("tfnas", pickle.dumps({"base": os.getcwd}, 4), ("--batch", 1), "it refers to posix.getcwd"),
        ("tfnas", pickle.dumps({"base": 1.0})[:-3], ("--batch", 1), "damaged or cut off"),
        ("aows", b"[[8, 16], -1]", (), "line 1"),
        ("ofa", b"x: 1", ("--unit", "ms"), "key 'x'"),
        (
            "help",
            CELLS.replace("2.5", "nan").encode(),
            (*HELP, "--unit", "ms", "--batch", 1),
            "row 0, column 1080ti_32",
        ),
        ("trtexec", b"[]", ("--model", "mobilenet_v1:mobilenet-v1"), "not a list of times"),
        ("trtexec", b"[]", (), "add --model"),
        ("trtexec", b"[]", ("--model", "mobilenet_v1:nothing"), "is no architecture"),
    ],
)
def test_a_bad_file_is_one_line_and_nothing_is_written(
    tmp_path: Path, output: Path, file_format: str, data: bytes, arguments: tuple[object, ...], message: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    output.write_bytes(b"what was there")
    assert message in refused("import", file_format, path, *arguments, "-o", output)
    assert output.read_bytes() == b"what was there"


def test_a_file_that_is_not_there(tmp_path: Path, output: Path) -> None:
    assert "No such file" in refused("import", "aows", tmp_path / "none", "-o", output)
    assert "Invalid value for 'FORMAT'" in refused("import", "csv", tmp_path / "none", "-o", output)
