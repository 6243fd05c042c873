"""``bench --dtype int8`` and ``--throughput``, on real runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from latbench.cli import cli
from latbench.cli.bench_output import _int8_line
from latbench.profiling.bench import Model
from latbench.profiling.int8 import Int8Report
from latbench.tables import LatencyTable

SMALL = ["mobilenet_v1:narrowest", "--resolution", "32", "--set", "levels=2", "--set", "num_classes=10"]
QUICK = ["--device", "cpu", "--runs", "1", "--max-time", "50ms", "--ci", "50%"]


def run(*args: object, model: list[str] = SMALL) -> Result:
    command = ["bench", *model, *QUICK, *(str(arg) for arg in args)]
    result = CliRunner().invoke(cli, command, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npy"
    np.save(path, np.random.default_rng(0).standard_normal((4, 3, 32, 32)))
    return path


def test_int8_is_measured_in_int8_and_says_what_it_costs(data: Path, tmp_path: Path) -> None:
    floats = json.loads(run("--json").stdout)
    found = json.loads(run("--dtype", "int8", "--calibration", data, "--json", "-o", tmp_path / "t.parquet").stdout)
    assert floats["int8"] is None
    assert {layer["op"] for layer in found["layers"]} >= {"QLinearConv"}
    assert found["key"] != floats["key"]
    assert found["macs"] == floats["macs"]
    report = found["int8"]
    assert (report["scheme"], report["n_samples"], report["percentile"]) == ("onnxruntime", 4, None)
    assert 0 < report["error"] < 0.1
    assert report["error_here"] > 0.5 * report["error"]
    (row,) = LatencyTable.read(tmp_path / "t.parquet").rows()
    assert row.signature.startswith("int8:onnxruntime;float32;")


def test_the_key_is_the_networks_and_not_the_datas(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npy"
    np.save(other, 2 * np.load(data))
    keys = [json.loads(run("--dtype", "int8", "--calibration", d, "--json").stdout)["key"] for d in (data, other)]
    assert keys[0] == keys[1]


def test_a_users_model_in_int8_and_in_words(data: Path, tmp_path: Path) -> None:
    from latbench.graph.onnx import to_onnx
    from latbench.graph.passes import fold_structure, random_weights
    from latbench.spaces.mobilenet_v1 import MobileNetV1Space

    graph = fold_structure(MobileNetV1Space(resolution=32, num_classes=10).network((0,) * 14))
    path = tmp_path / "own.onnx"
    path.write_bytes(to_onnx(graph, random_weights(graph)))
    result = run("--dtype", "int8", "--calibration", data, "--percentile", "99.9%", model=[str(path)])
    assert (result.exit_code, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())
    assert "calibrated on 4 samples (99.9000% of the values at either end); outputs change by" in words
    assert "(RMS), with this processor's int8 kernels by" in words


def test_kernels_that_saturate_are_named() -> None:
    job, folded = None, None
    for here, named in ((0.021, False), (0.18, True), (None, False)):
        report = Int8Report("onnxruntime", "data.npy", 4, None, 9, 0.02, here)
        line = _int8_line(Model("net", job, folded, int8=report))  # type: ignore[arg-type]
        assert ("VNNI" in line) == named


def test_throughput_is_no_latency_and_in_no_table() -> None:
    found = json.loads(run("--throughput", "--streams", "2", "--json").stdout)
    assert set(found) == {"throughput"}
    figure = found["throughput"]
    assert figure["streams"] == 2
    assert figure["low_per_s"] <= figure["per_s"] <= figure["high_per_s"]
    assert figure["ms_in_flight"] == pytest.approx(1e3 * 2 / figure["per_s"])
    assert not any(word.startswith("streams=") for word in figure["warnings"])
    said = run("--throughput").stdout
    assert "inferences/s" in said
    assert "latency " not in said.replace("no latency", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], "--dtype int8 needs data to calibrate on: --calibration FILE"),
        (["--calibration", "data.npy"], "--calibration is for --dtype int8"),
        (["--percentile", "99.9%"], "--percentile is for --dtype int8"),
        (["--dtype", "int8", "--calibration", "{data}", "--percentile", "40%"], "between 50% and 100%"),
        (["--dtype", "int8", "--calibration", "{data}", "--backend", "roofline"], "roofline runs no int8 networks"),
        (["--dtype", "int8", "--calibration", "nowhere.npy"], "nowhere.npy cannot be read"),
        (["--streams", "2"], "--streams is for --throughput"),
        (["--throughput", "--builds", "3"], "--builds is for latencies"),
        (["--throughput", "-o", "t.parquet"], "--output is for latencies"),
        (["--throughput", "--cache", "cold"], "--cache is for latencies"),
        (["--throughput", "--compare-backends"], "--compare-backends is for latencies"),
        (["--throughput", "--backend", "roofline"], "roofline has no throughput mode"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], words: str, data: Path) -> None:
    result = run(*(option.format(data=data) for option in options))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_an_unknown_dtype_names_the_three() -> None:
    result = run("--dtype", "int4")
    assert result.exit_code == 1
    assert "unknown dtype 'int4': fp32, fp16 or int8" in result.stderr


def test_other_data_than_the_model_takes_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((4, 3, 16, 16)))
    result = run("--dtype", "int8", "--calibration", tmp_path / "wrong.npy")
    assert result.exit_code == 1
    assert "samples of input 'x' are 3x16x16, the model wants 3x32x32" in result.stderr
