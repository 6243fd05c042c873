"""One table from many nodes: what is lost, resumed, kept apart. Scripted nodes; real ones stand in test_fleet.py."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripted import PROBE_US
from scripted_nodes import SPACE, ScriptedNode, lost_at, together, usual_ms

from latbench.errors import ProvenanceConflictError, TableBusyError, TableError
from latbench.measure.fleet import NodeLostError
from latbench.profiling import fleet_board
from latbench.profiling.fleet import FleetOutcome, profile_fleet
from latbench.profiling.jobs import jobs_of
from latbench.profiling.session import CANARY
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spool import Spool
from latbench.tables import LatencyTable

WANTED = Counter((job.row.key, job.row.kind) for job in jobs_of(SPACE))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scripted node measures in no time: so that all get some."""
    monkeypatch.setattr(fleet_board, "LEAST_S", 0.05)


def run(nodes: list[ScriptedNode], folder: Path, **asked: Any) -> FleetOutcome:
    return profile_fleet(SPACE, nodes, folder / "t.parquet", **asked)


def nodes_of(table: LatencyTable) -> Counter[str]:
    return Counter(json.loads(text)["node"] for text in table.frame["conditions"])


def check(folder: Path, *, beside: tuple[str, ...] = ()) -> LatencyTable:
    """All rows once, each wholly of one node, and nothing but tables left."""
    table = LatencyTable.read(folder / "t.parquet")
    assert Counter(zip(table.frame["key"], table.frame["kind"], strict=True)) == WANTED
    assert set(table.frame["status"]) == {"ok"}
    assert sorted(one.name for one in folder.iterdir()) == sorted(["t.parquet", *beside])
    return table


def pieces(nodes: list[ScriptedNode]) -> Counter[tuple[str, str, int, int]]:
    """How often each block of samples of a row was measured on each node."""
    return Counter((n.name, m.key, m.run, m.round) for n in nodes for m in n.measured if m.key != CANARY.key)


def test_every_row_is_measured_once_wholly_on_one_node(tmp_path: Path) -> None:
    nodes = together(ScriptedNode("a", pace=1.0), ScriptedNode("b", pace=1.01))
    outcome = run(nodes, tmp_path)
    table = check(tmp_path)
    assert set(nodes_of(table)) == {"a", "b"}
    assert outcome.n_missing == 0
    assert max(pieces(nodes).values()) == 1
    assert {name: about["rows"] for name, about in outcome.nodes.items() if about["rows"]} == dict(nodes_of(table))
    for row in table.select(kind="stub").rows():  # what runs is the row's own graph
        pace = {"a": 1.0, "b": 1.01}[json.loads(row.conditions or "")["node"]]
        assert {round(ms / pace / usual_ms(row.key), 3) for ms in row.samples_ms} == {1.0, 1.001, 1.002}


def test_blocks_are_measured_with_their_stubs_on_one_node(tmp_path: Path) -> None:
    """The increment is less the node's own stubs: on a node that is 1 % slower it is 1 % larger, not less stubs of
    another pace."""
    table = run(together(ScriptedNode("a", pace=1.0), ScriptedNode("b", pace=1.02)), tmp_path).table
    for row in table.select(kind="block").rows():
        pace = {"a": 1.0, "b": 1.02}[json.loads(row.conditions or "")["node"]]
        assert row.latency_ms is not None
        assert row.gross_ms is not None
        stubs_ms = 2 * (row.gross_ms - row.latency_ms)
        assert stubs_ms == pytest.approx(1.001 * pace * sum(map(usual_ms, row.stubs)), rel=1e-6)


def test_a_quick_node_does_what_a_slow_one_leaves(tmp_path: Path) -> None:
    quick_is_through = threading.Event()

    def quick(node: ScriptedNode, n: int) -> None:
        if len({m.key for m in node.measured}) > len(WANTED) // 2:
            quick_is_through.set()

    def slow(node: ScriptedNode, n: int) -> None:
        assert quick_is_through.wait(120)

    table = run(together(ScriptedNode("quick", at=quick), ScriptedNode("slow", at=slow)), tmp_path).table
    counted = nodes_of(table)
    assert counted["quick"] > counted["slow"] > 0


@pytest.mark.parametrize("k", [0, 1, 20, 60])
def test_what_a_lost_node_had_begun_is_measured_elsewhere(k: int, tmp_path: Path) -> None:
    said: list[str] = []
    b_is_lost = threading.Event()

    def patient(node: ScriptedNode, n: int) -> None:
        assert n != 1 or b_is_lost.wait(120)

    def hear(line: str) -> None:
        said.append(line)
        b_is_lost.set()

    nodes = together(ScriptedNode("a", at=patient), ScriptedNode("b", pace=1.01, at=lost_at(k)))
    outcome = run(nodes, tmp_path, say=hear)
    check(tmp_path)
    assert outcome.n_missing == 0
    assert said == ["b is out, its rows go on elsewhere: b is lost: as the script says"]
    assert outcome.nodes["b"]["lost"] == "b is lost: as the script says"
    assert len(nodes[1].measured) == k


def test_with_no_node_left_what_was_measured_is_kept_and_the_same_command_goes_on(tmp_path: Path) -> None:
    nodes = [ScriptedNode("a", at=lost_at(30)), ScriptedNode("b", at=lost_at(30))]
    with pytest.raises(NodeLostError, match=r"no node is left .*run the same command again"):
        run(nodes, tmp_path)
    assert not (tmp_path / "t.parquet").exists()
    before = pieces(nodes)
    run(nodes, tmp_path)
    check(tmp_path)
    assert max(pieces(nodes).values()) == 1, "a block of samples that was on disk was measured again"
    assert before <= pieces(nodes)


def test_the_only_node_s_own_reason_is_told_where_nothing_was_measured(tmp_path: Path) -> None:
    with pytest.raises(NodeLostError, match=r"^a is lost: as the script says$"):
        run([ScriptedNode("a", at=lost_at(0))], tmp_path)


def test_rows_of_a_node_that_is_not_there_any_more_count(tmp_path: Path) -> None:
    gone = ScriptedNode("gone", pace=1.01, at=lost_at(60))
    with pytest.raises(NodeLostError):
        run([gone], tmp_path)
    outcome = run([ScriptedNode("here")], tmp_path)
    counted = nodes_of(check(tmp_path))
    assert counted["gone"] > 0
    assert counted["here"] > 0
    assert outcome.nodes["gone"]["rows"] == counted["gone"]


class KilledHereError(Exception):
    pass


@pytest.mark.parametrize("n", [0, 1, 7, 50])
def test_going_on_after_the_head_was_killed_measures_nothing_twice(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, count = Spool.append, 0

    def fail(self: Spool, record: Any) -> None:
        nonlocal count
        if "key" in record:
            if count >= n:
                raise KilledHereError
            count += 1
        append(self, record)

    nodes = [ScriptedNode("a"), ScriptedNode("b")]
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", fail)
        with pytest.raises(KilledHereError):
            run(nodes, tmp_path)
    on_disk = Counter(
        (node.name, r["key"], r["run"], r["round"])
        for node in nodes
        for r in records(tmp_path / f"t.{node.name}.parquet.partial.jsonl")
    )
    for node in nodes:
        node.measured.clear()
    run(nodes, tmp_path)
    check(tmp_path)
    assert not on_disk & pieces(nodes)
    assert sum(on_disk.values()) <= n


def records(spool: Path) -> list[dict[str, Any]]:
    """Measurements of rows, where the node got so far."""
    lines = spool.read_text().splitlines() if spool.exists() else []
    return [record for record in map(json.loads, lines) if record.get("key") not in (None, CANARY.key)]


def test_a_node_that_disagrees_is_kept_apart_and_its_rows_are_measured_again(tmp_path: Path) -> None:
    nodes = together(ScriptedNode("a"), ScriptedNode("b", pace=1.005), ScriptedNode("odd", pace=1.1))
    outcome = run(nodes, tmp_path)
    (apart,) = outcome.apart
    table = check(tmp_path, beside=("t.odd.parquet",))
    assert "odd" not in nodes_of(table)
    assert (apart.path, apart.nodes) == (tmp_path / "t.odd.parquet", ("odd",))
    assert apart.why == "its reference block is 10.0% slower"
    odd = LatencyTable.read(apart.path)
    assert set(nodes_of(odd)) == {"odd"}
    assert len(odd) == apart.rows > 0


def test_nodes_of_other_versions_are_kept_apart(tmp_path: Path) -> None:
    nodes = [ScriptedNode("a"), ScriptedNode("b"), ScriptedNode("old", versions={"onnxruntime": "1.19"})]
    together(*nodes[:2])
    outcome = run(nodes, tmp_path)
    (apart,) = outcome.apart
    assert apart.nodes == ("old",)
    assert apart.why == "other conditions (versions.onnxruntime: 1.20 / 1.19)"
    beside = () if apart.path is None else (apart.path.name,)  # it may have begun before there were two of the others
    assert set(nodes_of(check(tmp_path, beside=beside))) == {"a", "b"}


def test_machines_around_the_device_may_differ_and_are_named(tmp_path: Path) -> None:
    nodes = [ScriptedNode("a"), ScriptedNode("b", environment={"kernel": "6.1"})]
    with pytest.raises(NodeLostError):  # so that both are sure to have measured
        run(
            [ScriptedNode("a", at=lost_at(20)), ScriptedNode("b", environment={"kernel": "6.1"}, at=lost_at(20))],
            tmp_path,
        )
    table = run(nodes, tmp_path).table
    assert table.provenance.environment == {"memory_gib": 16}
    assert set(table.provenance.host.split(", ")) == {"a", "b"}
    peculiar = {name: about["peculiar"] for name, about in table.notes["fleet"]["nodes"].items()}
    assert peculiar == {"a": {"kernel": "5.10"}, "b": {"kernel": "6.1"}}


def test_nodes_are_restated_at_one_clock(tmp_path: Path) -> None:
    """A node whose clock is 10 % slower takes 10 % longer for everything: at one clock they agree."""
    outcome = run(together(ScriptedNode("a"), ScriptedNode("b", pace=1.1, clock_us=6.6)), tmp_path)
    assert outcome.apart == ()
    assert len(nodes_of(outcome.table)) == 2
    for row in outcome.table.select(kind="stub").rows():
        pace = {"a": 1.0, "b": 1.1}[json.loads(row.conditions or "")["node"]]
        clock_us = outcome.table.provenance.clock_ref_us
        assert row.latency_ms == pytest.approx(1.001 * pace * usual_ms(row.key), rel=1e-6)
        assert row.latency_ref_ms == pytest.approx(1.001 * usual_ms(row.key) * (clock_us or 0) / PROBE_US, rel=1e-6)


def test_more_networks_go_into_the_table_that_is_there(tmp_path: Path) -> None:
    first = run([ScriptedNode("a")], tmp_path, networks=2).table
    other = ScriptedNode("b", pace=1.01)
    table = run([other], tmp_path, networks=5).table
    assert len(table) == len(first) + 3
    new = jobs_of(SPACE, networks=[row.arch for row in table.select(kind="network").rows() if row.arch])
    assert {m.key for m in other.measured} - {CANARY.key} == {j.key for j in new if j.row.kind == "network"} - {
        j.key for j in new if j.row.key in {row.key for row in first.rows()}
    }
    assert {name: about["rows"] for name, about in table.notes["fleet"]["nodes"].items()} == {"a": len(first), "b": 3}


def test_a_node_that_disagrees_with_the_table_adds_nothing_to_it(tmp_path: Path) -> None:
    run([ScriptedNode("a")], tmp_path, networks=2)
    before = LatencyTable.read(tmp_path / "t.parquet")
    outcome = run([ScriptedNode("odd", pace=1.2)], tmp_path, networks=60)
    assert outcome.n_missing > 0
    assert nodes_of(outcome.table) == nodes_of(before)
    assert outcome.apart[0].why == "its reference block is 20.0% slower"


def test_a_table_made_otherwise_is_refused_and_kept(tmp_path: Path) -> None:
    run([ScriptedNode("a")], tmp_path)
    before = (tmp_path / "t.parquet").read_bytes()
    with pytest.raises(ProvenanceConflictError, match=re.escape("versions.onnxruntime: 1.20 / 1.21")):
        run([ScriptedNode("a", versions={"onnxruntime": "1.21"})], tmp_path, networks=1)
    other = profile_of_another_space(tmp_path)
    with pytest.raises(ProvenanceConflictError, match=re.escape("settings.resolution: 32 / 64")):
        other()
    assert (tmp_path / "t.parquet").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["t.parquet"]  # nothing that would refuse the old options


def profile_of_another_space(folder: Path) -> Any:
    space = MobileNetV1Space(resolution=64, levels=3, max_width=0.75, num_classes=10)
    return lambda: profile_fleet(space, [ScriptedNode("a")], folder / "t.parquet")


def test_two_runs_cannot_write_one_table(tmp_path: Path) -> None:
    with Spool(tmp_path / "t.parquet", {}), pytest.raises(TableBusyError):
        run([ScriptedNode("a")], tmp_path)


def test_no_room_here_ends_the_run_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, count = Spool.append, 0

    def full(self: Spool, record: Any) -> None:
        nonlocal count
        count += 1
        if count > 40:
            raise TableError("cannot write: No space left on device")
        append(self, record)

    monkeypatch.setattr(Spool, "append", full)
    with pytest.raises(TableError, match="No space left"):
        run([ScriptedNode("a"), ScriptedNode("b")], tmp_path)


def test_a_spent_budget_says_what_is_missing(tmp_path: Path) -> None:
    outcome = run([ScriptedNode("a")], tmp_path, budget_s=0.0)
    assert (outcome.n_missing, len(outcome.table)) == (outcome.n_wanted, 0)
    outcome = run([ScriptedNode("a")], tmp_path)
    assert outcome.n_missing == 0
    check(tmp_path)


def test_progress_ends_where_the_work_ends(tmp_path: Path) -> None:
    told: list[tuple[float, float, int, int]] = []

    class Listener:
        def advance(self, *figures: Any) -> None:
            told.append(figures)

    run([ScriptedNode("a"), ScriptedNode("b")], tmp_path, reporter=Listener())
    assert all(0 <= done <= total and rows <= n for done, total, rows, n in told)
    n_rows = told[-1][3]
    assert n_rows == len({job.key for job in jobs_of(SPACE)})
    assert max(rows for _, _, rows, _ in told) == n_rows
