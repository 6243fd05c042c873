"""Sections: what a page says of whole tables, of broken ones, of models and searches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latbench.errors import UsageError
from latbench.oracle.store import StoredModel
from latbench.report.diagram import cells, drawing, stages
from latbench.report.gather import gather
from latbench.report.words import amount, citation, kinds, machine, method, two_digits
from latbench.spaces.cells import RelativeNASSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Provenance, Row
from searchers.results import HISTORY, RESULT, note

pytest.importorskip("altair", reason="the report extra is not installed")

PROVENANCE = Provenance(
    "cpu", "Xeon", "onnxruntime", versions={"onnxruntime": "1.20", "latbench": "0.1"}, space="mobilenet_v1",
    settings={"batch": 1, "resolution": 96, "dtype": "float32"}, options={"threads": 2},
    policy={"rounds": 2, "runs": 2, "criterion": "ci-median", "precision": 0.02, "context": "sandwich"},
    environment={"cpus": 8, "memory_gib": 32, "governors": ["performance"], "worker_cpus": [1]}, clock_ref_us=6.0,
)  # fmt: skip
ROWS = [
    Row(f"b{i}", "block", "s", "sandwich", block_type="conv", site=f"s{i}", macs=10**6 * i, latency_ms=0.1 * i - 0.05,
        ci_low_ms=0.1 * i - 0.06, ci_high_ms=0.1 * i - 0.04, n_samples=80, n_blocks=4)
    for i in range(9)
]  # fmt: skip
FAILED = Row("f", "block", "s", "sandwich", status="timeout", stage="load", error="no answer\nafter 60 s")


def section(rows: list[Row], notes: dict[str, object] | None = None):
    return gather([("t.parquet", LatencyTable.from_rows(rows, PROVENANCE, notes or {}))])[0]


def test_a_table_says_what_was_measured_on_what_and_how() -> None:
    found = section(ROWS)
    facts = dict(found.facts)
    assert found.title == "mobilenet_v1 on Xeon"
    assert found.lead.startswith("9 blocks on Xeon: onnxruntime 1.20, 2 threads, batch 1, 96 px, float32, sandwich.")
    assert "8 cores, 32 GiB, governor performance, measured on core 1" in facts["device"]
    assert "blocks of about 5 ms, 2 in each of 2 worker processes" in facts["how"]
    assert "±2 %" in facts["how"]
    assert "half of whose own time is taken off" in facts["how"]
    assert "half of the interval is" in facts["noise"]
    assert [picture.name for picture in found.pictures] == ["part1-latency", "part1-slowest", "part1-noise"]
    assert "1 increments at or below 0 ms" in found.pictures[0].caption
    assert "no whole network was measured" in found.missing[0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "the table holds no row"),
        ([FAILED], "none of 1 rows succeeded; 1 ended in timeout while in load: no answer after 60 s"),
        ([replace(ROWS[3], macs=None)], "no row has both MACs and a latency above 0"),
        ([ROWS[0]], "no row has both MACs and a latency above 0"),
    ],
    ids=["empty", "only failures", "no MACs", "only an increment below 0"],
)
def test_a_page_says_what_is_missing(rows: list[Row], words: str) -> None:
    found = section(rows)
    assert any(words in text for text in found.missing), found.missing
    assert "part1-latency" not in [picture.name for picture in found.pictures]
    assert len(found.grids) == bool(rows)


def test_rows_that_failed_stand_in_the_grid_with_their_reason_and_no_figure() -> None:
    frame = section([*ROWS, replace(FAILED, latency_ms=None)]).grids[0].frame
    last = frame.iloc[-1]
    assert last["remarks"] == "timeout load no answer after 60 s"
    assert last[["ms", "low", "high", "half", "rate"]].isna().all()


def test_tables_of_other_devices_say_so() -> None:
    first = LatencyTable.from_rows(ROWS, PROVENANCE)
    other = LatencyTable.from_rows(ROWS, replace(PROVENANCE, device_name="EPYC"))
    one, two = gather([("a", first), ("b", other)])
    assert not any("conditions differ" in text for text in one.missing)
    assert any("device_name: Xeon / EPYC" in text for text in two.missing)
    mixed = section(ROWS, {"mixed": ["device_name: Xeon / EPYC"]})
    assert dict(mixed.facts)["conditions mixed"] == "device_name: Xeon / EPYC"


def test_sums_of_blocks_are_drawn_where_networks_were_measured() -> None:
    sums = {"predicted_ms": [1.0, 2.1], "measured_ms": [1.0, 2.0], "mape": 0.025, "bias": 0.025, "spearman": None}
    found = section(ROWS, {"additivity": sums})
    assert "2 networks against the sums of their blocks" in found.pictures[-1].caption
    assert "Mean error 2.50%" in found.pictures[-1].caption
    assert found.missing == ()


def test_a_model_is_compared_with_the_networks_beside_it(table: LatencyTable, stored: StoredModel) -> None:
    alone = gather([("m.npz", stored)])[0]
    assert alone.pictures == ()
    assert "give a table with measured networks" in alone.missing[0]
    assert "was not told" in alone.lead
    space = MobileNetV1Space(resolution=32, levels=2, num_classes=10)
    archs = [tuple(int(i == j) for j in range(14)) for i in range(5)]
    networks = [
        Row(f"n{i}", "network", "s", arch=arch, latency_ms=1.02 * stored.oracle.latency(arch))
        for i, arch in enumerate(archs)
    ]
    assert stored.oracle.space == space
    beside = LatencyTable.from_rows(networks, table.provenance)
    model = gather([("m.npz", stored), ("n.parquet", beside)])[0]
    assert model.missing == ()
    assert "5 networks" in model.pictures[0].caption
    assert model.grids[0].frame["off"].tolist() == pytest.approx([100 * (1 / 1.02 - 1)] * 5)


def test_a_search_is_told_with_its_network_front_and_history(found_folder: Path, table: LatencyTable) -> None:
    found = gather([("run", found_folder)])[0]
    names = [picture.name.removeprefix("part1-") for picture in found.pictures]
    assert names == ["network", "front", "loss", "score", "predicted0"]
    assert "for a target of 0.100 ms" in found.lead
    assert any("latbench verify" in text for text in found.missing)
    verified = {
        "device": "Xeon", "unit": "ms", "target": 0.1, "predicted": 0.08, "measured": 0.11, "low": 0.108, "high": 0.112,
        "as_measured": 0.11, "simulated": False, "met": False, "error": -0.27,
    }  # fmt: skip
    before = (found_folder / RESULT).read_text()
    note(found_folder, "verified", [verified])
    try:
        again = gather([("run", found_folder)])[0]
    finally:
        (found_folder / RESULT).write_text(before)
    assert "measured 0.110 ms: missed" in again.lead
    assert again.pictures[1].name == "part1-verified0"
    assert "-27.00% off" in again.pictures[1].caption
    assert again.missing == ()


def test_an_unfinished_search_shows_what_is_there(found_folder: Path, tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_bytes((found_folder / HISTORY).read_bytes())
    found = gather([("run", tmp_path)])[0]
    assert "has not ended: 3 epochs" in found.lead
    assert "result.json is missing" in found.missing[0]
    assert [picture.name for picture in found.pictures] == ["part1-loss", "part1-score"]
    (tmp_path / HISTORY).unlink()
    (tmp_path / "search.ckpt").touch()
    assert len(gather([("run", tmp_path)])[0].missing) == 2
    (tmp_path / RESULT).write_text(json.dumps({"schema": 1}))
    with pytest.raises(UsageError, match="is damaged"):
        gather([("run", tmp_path)])


def test_the_drawing_has_every_stage_once_and_is_wired_as_the_network() -> None:
    space = MobileNetV1Space(resolution=32, levels=2, num_classes=10)
    found = stages(space, (0,) * 14)
    assert [stage.name for stage in found] == ["stem", *(f"stage{i}" for i in range(2, 15)), "head"]
    assert [stage.inputs for stage in found[1:]] == [(stage.name,) for stage in found[:-1]]
    assert sum(stage.macs for stage in found) == space.network((0,) * 14).macs
    svg = drawing(found)
    assert svg.count('font-weight="600"') == len(found)
    assert svg.count("<path") == len(found) - 1


def test_a_network_of_many_nodes_is_drawn_by_its_cells() -> None:
    space = NASBench201Space()
    sparse, dense = (3, 0, 0, 1, 3, 0), (3, 3, 3, 3, 3, 3)  # one node with two inputs; every edge a convolution
    for arch, branches in ((sparse, True), (dense, False)):
        found = stages(space, arch)
        assert len(found) <= 40
        assert any(len(stage.inputs) > 1 for stage in found) == branches
        assert drawing(found).count("<path") == sum(len(stage.inputs) for stage in found)
        assert sum(stage.macs for stage in found) == space.network(arch).macs
        known = {stage.name for stage in found}
        assert all(set(stage.inputs) <= known for stage in found)


def test_the_inside_of_cells_is_drawn_and_chains_of_blocks_have_none() -> None:
    assert cells(MobileNetV1Space(resolution=32), (0,) * 14) == []
    space = RelativeNASSpace()
    arch = space.sample(np.random.default_rng(0))
    found = cells(space, arch)
    assert len(found) == 2  # the normal cell and the one that reduces
    for name, parts in found:
        assert name.startswith("cell")
        assert {"pre0", "pre1", "node2", "node3", "node4", "node5"} <= {part.name for part in parts}
        whole = next(stage for stage in stages(space, arch) if stage.name == name)
        assert sum(part.macs for part in parts) == whole.macs
        svg = drawing(parts)
        assert svg.count("<path") == sum(len(part.inputs) for part in parts)


def test_words() -> None:
    assert kinds(LatencyTable.from_rows([], PROVENANCE).frame) == "no row that succeeded"
    assert method(Provenance("x", "y", "imported")) == ""
    assert machine(Provenance("x", "y", "imported")) == "y"
    assert (amount(4.6912), amount(100.04), amount(12345.6)) == ("4.69 ms", "100 ms", "12346 ms")
    assert amount(4_231_976, "parameters") == "4.23 M parameters"
    assert [two_digits(value) for value in (0.6549, 3.25, 76.1, 604.45)] == ["0.65", "3.2", "76", "600"]
    text = citation(LatencyTable.from_rows(ROWS, PROVENANCE))
    assert text.startswith("Latencies of mobilenet_v1 (9 blocks) were measured on Xeon with onnxruntime 1.20")
    assert f"policy {PROVENANCE.policy_id}, 80 samples in 4 blocks per row" in text
