"""``latbench predict``: the answers are the oracle's, and say where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, run

from latbench.oracle import store
from latbench.oracle.base import space_of
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.lut import LutOracle
from latbench.tables import LatencyTable

pytestmark = pytest.mark.usefixtures("linear")
ONES = ",".join("1" * 14)


@pytest.fixture
def model(table: Path, tmp_path: Path) -> Path:
    assert run("fit", table, "--oracle", "linear", "-o", tmp_path / "m.npz").exit_code == 0
    return tmp_path / "m.npz"


@pytest.fixture
def holed(table: Path, tmp_path: Path) -> Path:
    """A table of a finer space (widths 0.2, 0.85, 1.5) in which stage 7 was measured at its ends only."""
    whole = LatencyTable.read(table)
    space = space_of(whole.provenance)
    finer = type(space).from_settings({**space.settings(), "levels": 3})
    from dataclasses import replace

    from latbench.tables import Row

    stage = next(site for site in finer.sites if site.name == "stage7")
    gaps = {block.key for site, picks, block in finer.slots() if site == stage and picks[-1] == 1}
    rows = [
        Row(key, "block", block.signature, "sandwich", latency_ms=1e-9 * block.macs)
        for key, block in finer.all_blocks().items()
        if key not in gaps
    ]
    provenance = replace(whole.provenance, settings=finer.settings())
    LatencyTable.from_rows(rows, provenance).write(tmp_path / "holed.parquet")
    return tmp_path / "holed.parquet"


def predict(*args: object) -> dict[str, Any]:
    result = run("predict", *args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout))


def test_a_model_answers_as_its_oracle_does(model: Path) -> None:
    oracle = store.load(model).oracle
    told = predict(model, ONES, "random:3", next(iter(oracle.space.published), "random:4"))
    assert (told["oracle"], told["space"], told["confidence"]) == ("linear", "mobilenet_v1", 0.9)
    archs = np.array([one["arch"] for one in told["predictions"]])
    np.testing.assert_array_equal(archs[0], np.ones(14))
    np.testing.assert_array_equal(archs[1], oracle.space.parse_arch("random:3"))
    np.testing.assert_allclose([one["latency_ms"] for one in told["predictions"]], oracle.latencies(archs))
    low, high = oracle.interval(archs, 0.9) or ([], [])
    np.testing.assert_allclose([one["low_ms"] for one in told["predictions"]], low)
    np.testing.assert_allclose([one["high_ms"] for one in told["predictions"]], high)
    assert told["predictions"][0]["sources"] == {"fitted": 15}


def test_confidence_widens_the_interval(model: Path) -> None:
    widths = []
    for confidence in ("50%", "0.7", "90%"):
        (one,) = predict(model, ONES, "--confidence", confidence)["predictions"]
        widths.append(one["high_ms"] - one["low_ms"])
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_what_is_printed_names_the_network_and_the_sources(model: Path) -> None:
    result = run("predict", model, ONES, "random:3")
    assert (result.exit_code, result.stderr) == (0, "")
    for words in ("mobilenet_v1 on ", "predicted by linear", "90 % interval", "random:3 = ", "15 fitted", " to "):
        assert words in result.stdout, words


def test_a_table_of_blocks_answers_by_sums(table: Path, tmp_path: Path) -> None:
    whole = LatencyTable.read(table)
    archs, measured = whole.networks()
    texts = [",".join(map(str, arch)) for arch in archs]
    table = tmp_path / "blocks.parquet"
    whole.select(kind="block").write(table)
    told = predict(table, *texts)
    assert told["oracle"] == "lut"
    np.testing.assert_allclose([one["latency_ms"] for one in told["predictions"]], measured, rtol=1e-6)
    assert told["predictions"][0]["sources"] == {"simulated": len(LutOracle.fit(whole).factors)}
    assert {one["low_ms"] for one in told["predictions"]} == {None}
    printed = run("predict", table, texts[0]).stdout
    assert "(simulated), predicted by lut" in printed
    assert "interval" not in printed


def test_a_table_with_networks_answers_as_in_a_search(table: Path) -> None:
    whole = LatencyTable.read(table)
    told = predict(table, ONES, "random:3")
    assert told["oracle"] == "calibrated"
    archs = np.array([one["arch"] for one in told["predictions"]])
    expected = CalibratedOracle.fit(whole)
    np.testing.assert_allclose([one["latency_ms"] for one in told["predictions"]], expected.latencies(archs))
    blocks = len(LutOracle.fit(whole).factors)
    assert told["predictions"][0]["sources"] == {"simulated": blocks, "fitted": 1}
    assert "(simulated), predicted by calibrated" in run("predict", table, ONES).stdout


@pytest.mark.parametrize("kind", ["table", "model"])
def test_a_missing_entry_is_refused_or_interpolated_and_said(kind: str, holed: Path, tmp_path: Path) -> None:
    path = holed
    if kind == "model":
        path = tmp_path / "holed.npz"
        assert run("fit", holed, "-o", path).exit_code == 0
    known, unknown = "0,0,0,0,0,0,0,0,0,0,0,0,0,0", "0,0,0,0,0,0,1,0,0,0,0,0,0,0"
    predict(path, known)
    words = refused("predict", path, known, unknown)
    assert "stage7" in words if kind == "model" else "no entry for" in words
    (one,) = predict(path, unknown, "--missing", "interpolate")["predictions"]
    ends = [predict(path, unknown.replace("1", end))["predictions"][0]["latency_ms"] for end in ("0", "2")]
    assert ends[0] < one["latency_ms"] < ends[1]
    assert one["sources"]["interpolated"] >= 1
    assert "1 interpolated" in run("predict", path, unknown, "--missing", "interpolate").stdout


BAD_INPUT = {
    "no arch": ([], "Missing argument 'ARCH...'"),
    "letters": (["resnet50"], "'resnet50' is no architecture: give 14 option indices"),
    "too short": (["0,1"], "an architecture has 14 option indices"),
    "out of range": ([ONES.replace("1", "7")], "has no option 7: 0 to 1"),
    "seed": (["random:x"], "random:SEED takes a whole number"),
    "confidence": ([ONES, "--confidence", "100%"], "--confidence must lie between 0% and 100%"),
    "confidence of letters": ([ONES, "--confidence", "high"], "'high' is no percentage"),
    "missing": ([ONES, "--missing", "guess"], "'guess' is not one of"),
}


@pytest.mark.parametrize(("args", "words"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input_is_one_line(args: list[str], words: str, model: Path) -> None:
    assert words in refused("predict", model, *args)


def test_what_is_neither_model_nor_table_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "part").write_bytes(model.read_bytes()[:200])
    (tmp_path / "empty").touch()
    for name in ("text", "part", "empty", "absent", "."):
        assert str(tmp_path / name) in refused("predict", tmp_path / name, ONES)
