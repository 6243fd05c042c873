"""AOWS's samples and models: there and back again, and what is wrong with a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latbench.errors import TableError, UsageError
from latbench.importers import aows
from latbench.importers.base import Source
from latbench.oracle.lut import LutOracle
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Provenance

FULL = MobileNetV1Space(batch=64)
SMALL = {"levels": 2, "resolution": 64, "num_classes": 10, "batch": 64}


def lines(path: Path, values: list[Any]) -> Source:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return Source(path, device="titanxp")


def samples(space: MobileNetV1Space, n: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [[list(space.widths(space.sample(rng))), float(rng.uniform(0.01, 0.1))] for _ in range(n)]


def model(space: MobileNetV1Space) -> list[Any]:
    """A fitted entry for each of the space's variables, some of them zero, as non-negative least squares gives them."""
    rng = np.random.default_rng(1)
    found: list[Any] = []
    sides = [space.resolution, *space._sides]
    for i, widths in enumerate(space.candidates):
        for c_in in space.candidates[i - 1] if i else (3,):
            for c_out in widths:
                stride = sides[i] // sides[i + 1]
                entry = {
                    "in_size": [sides[i], sides[i]],
                    "kernel_size": 3,
                    "stride": stride,
                    "dw": i > 0,
                    "bias": False,
                    "in_channels": c_in,
                    "out_channels": c_out,
                }
                if all(entry != known for known, _ in found):  # stages 8 to 12 share theirs
                    found.append([entry, float(max(0, rng.normal(0.01, 0.01)))])
    head = {"in_size": [1, 1], "kernel_size": 1, "stride": 1, "dw": False, "bias": True}
    last = ({**head, "in_channels": c_in, "out_channels": space.num_classes} for c_in in space.candidates[-1])
    found += [[entry, float(rng.uniform(0.001, 0.01))] for entry in last]
    return found


def test_samples_round_trip_byte_by_byte(tmp_path: Path) -> None:
    source = lines(tmp_path / "samples.jsonl", samples(FULL, 30))
    table = aows.read(source, {})
    table.write(tmp_path / "t.parquet")
    aows.write_samples(LatencyTable.read(tmp_path / "t.parquet"), tmp_path / "back.jsonl")
    assert (tmp_path / "back.jsonl").read_bytes() == source.data


def test_samples_are_networks_in_ms_per_inference(tmp_path: Path) -> None:
    values = samples(FULL, 3)
    table = aows.read(lines(tmp_path / "s.jsonl", values), {})
    assert table.provenance.settings["batch"] == 64  # the released command line's default
    for order, (row, (widths, ms)) in enumerate(zip(table.rows(), values, strict=True)):
        assert (row.kind, row.origin, row.order) == ("network", "imported", order)
        assert row.latency_ms == ms * 64
        assert row.arch is not None
        assert list(FULL.widths(row.arch)) == widths
        assert row.key == FULL.network(row.arch).key


def test_a_model_round_trips_byte_by_byte(tmp_path: Path) -> None:
    space = MobileNetV1Space.from_settings(SMALL)
    source = lines(tmp_path / "model.jsonl", model(space))
    table = aows.read(source, SMALL)
    table.write(tmp_path / "t.parquet")
    aows.write_model(LatencyTable.read(tmp_path / "t.parquet"), tmp_path / "back.jsonl")
    assert (tmp_path / "back.jsonl").read_bytes() == source.data


def test_a_model_has_the_published_vocabulary(tmp_path: Path) -> None:
    values = model(FULL)
    assert len(values) == 1612
    assert len(aows.read(lines(tmp_path / "m.jsonl", values), {})) == 1612


def test_a_model_predicts_the_sum_of_its_entries(tmp_path: Path) -> None:
    space = MobileNetV1Space.from_settings(SMALL)
    values = model(space)
    oracle = LutOracle.fit(aows.read(lines(tmp_path / "m.jsonl", values), SMALL))
    sides = [space.resolution, *space._sides]
    arch = space.sample(np.random.default_rng(2))
    widths = (3, *space.widths(arch))
    total = 0.0
    for i in range(14):
        c_in, c_out = widths[i : i + 2]
        total += next(
            ms
            for e, ms in values
            if (e["in_size"][0], e["dw"], e["in_channels"], e["out_channels"]) == (sides[i], i > 0, c_in, c_out)
            and e["stride"] == sides[i] // sides[i + 1]
        )
    total += next(ms for e, ms in values if e["bias"] and e["in_channels"] == widths[-1])
    assert oracle.latency(arch) == pytest.approx(64 * total, rel=1e-12)
    assert set(oracle.sources(arch)) == {"fitted"}  # never the latency of a block


WIDTHS = [8, 16, 24, 24, 48, 48, 104, 104, 104, 104, 104, 104, 208, 208]
BLOCK = {
    "in_size": [224, 224],
    "kernel_size": 3,
    "stride": 2,
    "dw": False,
    "bias": False,
    "in_channels": 3,
    "out_channels": 8,
}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("\n\n", "holds no line"),
        (json.dumps([WIDTHS, 1.0]) + "\n[[8, 16", "line 2: not JSON, or cut off"),
        (json.dumps([WIDTHS, float("nan")]), "line 1: a latency of nan ms"),
        (json.dumps([WIDTHS, float("inf")]), "line 1: a latency of inf ms"),
        (json.dumps([WIDTHS, 0]), r"line 1: a latency of 0\.0 ms"),
        (json.dumps([WIDTHS, -0.1]), r"line 1: a latency of -0\.1 ms"),
        (json.dumps([WIDTHS, "0.1"]), "line 1: '0.1' is no number"),
        (json.dumps([WIDTHS, True]), "line 1: True is no number"),
        (json.dumps([WIDTHS, 10**400]), "line 1: a latency of inf ms"),
        (json.dumps([WIDTHS, 1.0]) + "\n" + json.dumps([WIDTHS, 2.0]), "line 2: the architecture of line 1 once more"),
        (json.dumps([WIDTHS[:-1], 1.0]), "line 1: wants 14 widths"),
        (json.dumps([[9, *WIDTHS[1:]], 1.0]), r"line 1: width 1 is 9, which is no candidate \(8, 16"),
        (json.dumps([[8.0, *WIDTHS[1:]], 1.0]), r"line 1: width 1 is 8\.0"),
        (json.dumps({"widths": WIDTHS}), r"line 1: not \[widths, ms\]"),
        (json.dumps([WIDTHS, 1.0, 2.0]), r"line 1: not \[widths, ms\]"),
        ("[" * 100_000, "line 1: not JSON"),
        (json.dumps([BLOCK, 1.0]) + "\n" + json.dumps([BLOCK, 1.0]), "line 2: .* appears twice"),
        (json.dumps([{**BLOCK, "in_channels": 4}, 1.0]), "line 1: .* is no block of mobilenet_v1"),
        (json.dumps([{**BLOCK, "groups": 1}, 1.0]), "line 1: a block has exactly the fields"),
        (json.dumps([{**BLOCK, "dw": 0}, 1.0]), "line 1: a field of the block has another type"),
        (json.dumps([{**BLOCK, "in_size": 224}, 1.0]), "line 1: a field of the block has another type"),
        (json.dumps([BLOCK, -1e-9]), "line 1: a latency of -1e-09 ms"),
        ('[{"in_size": [224, 224], "in_size": [1, 1]}, 1.0]', "line 1: .*'in_size' appears twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(TableError, match=match) as caught:
        aows.read(Source(path), {})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_of_something_else_is_no_file_of_aows(tmp_path: Path) -> None:
    space = NASBench201Space()
    provenance = Provenance("cpu", "cpu", "none", space=space.name, settings=space.settings())
    with pytest.raises(UsageError, match="the table nasbench201"):
        aows.write_samples(LatencyTable.from_rows([], provenance), tmp_path / "s.jsonl")
    empty = Provenance("cpu", "cpu", "none", space=FULL.name, settings=FULL.settings())
    with pytest.raises(UsageError, match="no measured network"):
        aows.write_samples(LatencyTable.from_rows([], empty), tmp_path / "s.jsonl")
    with pytest.raises(UsageError, match="no block"):
        aows.write_model(LatencyTable.from_rows([], empty), tmp_path / "s.jsonl")
    assert not (tmp_path / "s.jsonl").exists()
