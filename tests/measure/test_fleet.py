"""Profiles on real Ray nodes, started here as processes of their own; simulated devices, and this machine's CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'latbench[fleet]'")

from fleet_cluster import QUIET, ROOT, Cluster, cluster

from latbench.profiling.jobs import jobs_of
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable

SPACE = MobileNetV1Space(resolution=32, levels=5, max_width=0.75, num_classes=10)
WORDS = ["--space", "mobilenet_v1", "--resolution", "32"]
WORDS += ["--set", "levels=5", "--set", "max_width=0.75", "--set", "num_classes=10"]
TITANXP = ["--device", "titanxp", "--backend", "roofline", *WORDS]
CPU = ["--device", "cpu", "--rounds", "1", "--ci", "20%", *WORDS]
WANTED = Counter((job.row.key, job.row.kind, job.row.context) for job in jobs_of(SPACE, simulated=True))
WITH_CHAINS = Counter((job.row.key, job.row.kind, job.row.context) for job in jobs_of(SPACE))  # where it is measured

CODE = "from latbench.cli import main; main()"

LIMIT_S = 400  # for what takes seconds on a machine that does nothing else

WAITING = "is not free, another run may hold it"  # said of nodes that are slow to start, too

Workers = Callable[[int], list[int]]  # the fixture: living workers of a process


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two nodes that announce a TITAN Xp each; the first, this machine's CPU too."""
    with (
        tempfile.TemporaryDirectory(prefix="ray") as folder,
        cluster(Path(folder), [["titanxp", "cpu"], ["titanxp"]]) as made,
    ):
        yield made


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """What a failed test has left running is killed."""
    yield
    for process in Run.started:
        with process:
            process.kill()
    Run.started.clear()


@pytest.fixture
def own_nodes() -> Iterator[Cluster]:
    """Two nodes to be killed."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, cluster(Path(folder), [["titanxp"], ["titanxp"]]) as made:
        yield made


class Run:
    """``latbench profile --fleet`` as a process, warnings as errors."""

    started: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, folder: Path, address: str, words: list[str]) -> None:
        self.table, self.tmp = folder / "t.parquet", folder / "tmp"
        self.tmp.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp), "PYTHONWARNINGS": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, "profile", "--fleet", address, *words, "-o", str(self.table)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

        self.started.append(self.process)

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out, "".join(line for line in err.splitlines(True) if WAITING not in line)

    def spools(self) -> list[Path]:
        """Those of the nodes."""
        return sorted(self.table.parent.glob("t.*.parquet.partial.jsonl"))

    def records(self) -> dict[str, list[dict[str, Any]]]:
        """Whole measurements, by spool."""
        found = {}
        for path in self.spools():
            lines = path.read_bytes().split(b"\n")[:-1]
            found[path.name] = [record for record in map(json.loads, lines) if "key" in record]
        return found

    def wait_for(self, n: int, n_nodes: int) -> None:
        """Until so many nodes have n measurements in their spools."""
        end = time.monotonic() + LIMIT_S
        while sum(len(records) >= n for records in self.records().values()) < n_nodes:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < end, "no measurements in time"
            time.sleep(0.02)


def check(path: Path, wanted: Counter[tuple[str, str, str]] = WANTED) -> LatencyTable:
    """All rows once, every one ok, nothing beside the table."""
    table = LatencyTable.read(path)
    assert Counter(zip(table.frame["key"], table.frame["kind"], table.frame["context"], strict=True)) == wanted
    assert set(table.frame["status"]) == {"ok"}
    assert sorted(one.name for one in path.parent.iterdir() if one.name != "tmp") == [path.name]
    return table


def gone(found: Callable[[], list[Any]]) -> bool:
    for _ in range(200):
        if not found():
            return True
        time.sleep(0.05)
    return False


def test_two_simulated_devices_measure_every_row_once(nodes: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, nodes.client, TITANXP)
    status, out, err = run.end()
    assert (status, err) == (0, "")
    table = check(run.table)
    assert sum(kind == "block" for _, kind, _ in WANTED) >= 200
    by_node = Counter(json.loads(text)["node"] for text in table.frame["conditions"])
    assert len(by_node) <= 2  # a node that is slow to start may find nothing left
    assert {name: node["rows"] for name, node in table.notes["fleet"]["nodes"].items()} == by_node
    assert all(f"{name}: {n} rows" in out for name, n in by_node.items())
    assert set(table.frame["origin"]) == {"simulated"}
    assert (table.provenance.device, table.provenance.device_name) == ("titanxp", "NVIDIA TITAN Xp")
    assert gone(nodes.measurers)


def test_a_device_that_nobody_has_is_status_4_and_names_what_there_is(nodes: Cluster, tmp_path: Path) -> None:
    status, out, err = Run(tmp_path, nodes.address, ["--device", "rtx3090", *WORDS]).end()
    assert (status, out, err.count("\n")) == (4, "", 1)
    assert "announces rtx3090" in err
    assert "holds cpu, titanxp" in err


@pytest.mark.slow
def test_a_client_whose_server_dies_as_it_starts_gets_another(nodes: Cluster) -> None:
    before = set(nodes.client_servers())
    words = ["-c", CODE, "fleet", "status", nodes.client]
    asking = subprocess.Popen(
        [sys.executable, *words], env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with asking:
        while not (started := set(nodes.client_servers()) - before):
            assert asking.poll() is None, asking.communicate()
        for pid in started:
            os.kill(pid, signal.SIGKILL)
        out, err = asking.communicate(timeout=LIMIT_S)
    assert (asking.returncode, err) == (0, "")
    assert out.count("titanxp") == 2


@pytest.mark.slow
def test_a_real_cpu_is_measured_by_one_run_at_a_time(nodes: Cluster, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first = Run(folders[0], nodes.address, CPU)
    first.wait_for(1, 1)
    second = Run(folders[1], nodes.address, CPU)
    assert second.process.stderr is not None
    assert WAITING in second.process.stderr.readline()
    assert second.end()[0] == 0
    assert first.end()[0] == 0
    tables = [check(run.table, WITH_CHAINS) for run in (first, second)]
    spans = [(t.frame["started_at"].min(), t.frame["started_at"].max()) for t in tables]
    assert spans[0][1] < spans[1][0]  # not one measurement of the second before the last of the first
    assert set(tables[0].frame["origin"]) == {"measured"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["process", "machine"])
def test_a_node_lost_in_mid_run_costs_no_row(what: str, own_nodes: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, own_nodes.address, [*TITANXP, "--rounds", "4"])
    run.wait_for(20, 2)
    if what == "process":
        os.kill(own_nodes.measurers()[-1], signal.SIGKILL)
    else:
        own_nodes.kill_node(1)
    status, out, err = run.end()
    assert status == 0, err
    assert err.count("\n") == 1
    assert "is out, its rows go on elsewhere" in err
    assert ", then lost" in out
    check(run.table)


@pytest.mark.slow
def test_a_killed_head_goes_on_and_has_lost_one_measurement_a_node(
    nodes: Cluster, tmp_path: Path, workers: Workers
) -> None:
    known: dict[str, list[dict[str, Any]]] = {}
    for kill in range(3):
        run = Run(tmp_path, nodes.address, [*TITANXP, "--rounds", "4"])
        run.wait_for(15 * (kill + 1), 2)
        measurers = nodes.measurers()
        run.process.kill()
        run.end()
        assert gone(nodes.measurers)
        assert all(gone(lambda pid=pid: workers(pid)) for pid in measurers)  # type: ignore[misc]
        now = run.records()
        for name, records in known.items():  # nothing that was there is lost, or measured again
            assert now[name][: len(records)] == records
            again = Counter((r["key"], r["run"], r["round"]) for r in now[name] if r["order"] >= 0 and not canary(r))
            assert max(again.values()) == 1
        known = now
    status, _, err = Run(tmp_path, nodes.address, [*TITANXP, "--rounds", "4"]).end()
    assert status == 0, err
    check(tmp_path / "t.parquet")
    assert not scratch_folders(tmp_path)


@pytest.mark.slow
def test_an_interrupt_ends_with_130_and_leaves_nothing_on_the_nodes(
    nodes: Cluster, tmp_path: Path, workers: Workers
) -> None:
    run = Run(tmp_path, nodes.client, [*TITANXP, "--rounds", "4"])
    run.wait_for(10, 2)
    measurers = nodes.measurers()
    run.process.send_signal(signal.SIGINT)
    status, out, err = run.end()
    assert (status, out, err.strip().count("\n")) == (130, "", 0), err
    assert gone(nodes.measurers)
    assert all(gone(lambda pid=pid: workers(pid)) for pid in measurers)  # type: ignore[misc]
    assert all(records for records in run.records().values())
    status, _, err = Run(tmp_path, nodes.client, [*TITANXP, "--rounds", "4"]).end()
    assert (status, err) == (0, "")
    check(tmp_path / "t.parquet")


@pytest.mark.slow
def test_with_no_node_left_one_line_says_what_is_kept(own_nodes: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, own_nodes.address, [*TITANXP, "--rounds", "4"])
    run.wait_for(20, 2)
    for pid in own_nodes.measurers():
        os.kill(pid, signal.SIGKILL)
    status, out, err = run.end()
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert "no node is left" in last
    assert "run the same command again" in last
    kept = run.records()
    assert len(kept) == 2
    status, _, err = Run(tmp_path, own_nodes.address, [*TITANXP, "--rounds", "4"]).end()
    assert status == 0, err
    check(run.table)


def canary(record: dict[str, Any]) -> bool:
    from latbench.profiling.session import CANARY

    return bool(record["key"] == CANARY.key)


def scratch_folders(folder: Path) -> list[Path]:
    return list((folder / "tmp").iterdir())
