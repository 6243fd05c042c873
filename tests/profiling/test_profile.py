"""From a space to a table: by the roofline (deterministic), and by ONNX Runtime on a small space."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latbench import __version__
from latbench.errors import ProvenanceConflictError, SchemaMismatchError, TableBusyError, UsageError
from latbench.measure.base import Measurement, Request, SamplingPlan
from latbench.measure.launcher import LocalLauncher
from latbench.oracle.lut import LutOracle
from latbench.profiling import Target, duration_s, profile, wanted
from latbench.profiling.jobs import jobs_of
from latbench.profiling.profile import _commit, sampled
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.spool import Spool
from latbench.tables import LatencyTable, Row

SPACE = MobileNetV1Space(resolution=32, levels=3, min_width=0.1, max_width=0.25, num_classes=10)
PLAN = SamplingPlan(block_s=0.001, min_time_s=0.001, rounds=1)
ROOFLINE = Target("cpu", "a made-up CPU", "roofline", {"peak_gflops": 50.0}, PLAN)
REAL = Target("cpu", "this CPU", "onnxruntime", {"threads": 1}, PLAN)
EVERY_KEY = {(job.row.key, job.row.kind) for job in jobs_of(SPACE)}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that real launchers are asked for."""
    asked: list[Request] = []
    real = LocalLauncher.measure

    def measure(self: LocalLauncher, requests: Any) -> Iterator[Measurement]:
        def heard() -> Iterator[Request]:
            for request in requests:
                asked.append(request)
                yield request

        return real(self, heard())

    monkeypatch.setattr(LocalLauncher, "measure", measure)
    return asked


def identities(table: LatencyTable) -> set[tuple[str, str]]:
    return set(zip(table.frame["key"], table.frame["kind"], strict=True))


def beside(path: Path) -> list[str]:
    return sorted(one.name for one in path.parent.iterdir())


@pytest.mark.parametrize("target", [ROOFLINE, REAL], ids=["roofline", "onnxruntime"])
def test_every_distinct_block_has_one_row(target: Target, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    outcome = profile(SPACE, target, out, networks=2)
    table = LatencyTable.read(out)
    assert len(table) == len(EVERY_KEY) + 2 == outcome.n_wanted
    assert identities(table.select(kind="block")) | identities(table.select(kind="stub")) == EVERY_KEY
    assert set(table.frame["status"]) == {"ok"}
    assert (outcome.n_missing, beside(out)) == (0, ["t.parquet"])
    for row in table.rows():
        assert len(row.samples_ms) == sum(row.block_sizes) > 0
        assert row.origin == ("simulated" if target is ROOFLINE else "measured")
        assert len(row.block_sizes) >= PLAN.rounds * PLAN.runs  # of which some may be flagged, on a busy machine
        assert (row.kind == "block") == bool(row.stubs)


def test_simulated_increments_sum_to_the_networks(tmp_path: Path) -> None:
    outcome = profile(SPACE, ROOFLINE, tmp_path / "t.parquet", networks=10)
    found = outcome.table.notes["additivity"]
    assert found["mape"] == pytest.approx(0, abs=1e-5)  # samples are kept to 0.1 ns
    assert (found["n"], found["n_incomplete"], found["context"]) == (10, 0, "sandwich")
    archs, latencies = outcome.table.networks()
    for arch, latency_ms in zip(archs, latencies, strict=True):
        total_ms = sum(outcome.table[block.key] for block in SPACE.blocks(tuple(arch.tolist())))
        assert total_ms == pytest.approx(latency_ms, rel=1e-5)


def test_both_contexts_stand_in_one_table(tmp_path: Path) -> None:
    outcome = profile(SPACE, replace(ROOFLINE, context="both"), tmp_path / "t.parquet", networks=3)
    n = len(SPACE.all_blocks())
    assert len(outcome.table.select(kind="block", context="sandwich")) == n
    assert len(outcome.table.select(kind="block", context="isolated")) == n
    assert outcome.table.notes["additivity_isolated"]["mape"] > outcome.table.notes["additivity"]["mape"]


def test_a_complete_table_is_not_measured_again(tmp_path: Path, measured: list[Request]) -> None:
    out = tmp_path / "t.parquet"
    first = profile(SPACE, ROOFLINE, out, networks=2)
    n = len(measured)
    assert n > 0
    second = profile(SPACE, ROOFLINE, out, networks=2)
    assert len(measured) == n
    assert second.table.data.equals(first.table.data)
    assert second.table.notes["additivity"] == first.table.notes["additivity"]


def test_more_networks_add_to_the_table_that_is_there(tmp_path: Path, measured: list[Request]) -> None:
    out = tmp_path / "t.parquet"
    profile(SPACE, ROOFLINE, out, networks=2)
    n = len(measured)
    table = profile(SPACE, ROOFLINE, out, networks=5).table
    new = {request.key for request in measured[n:]}
    assert len(new) == 3 + 1  # the canary too
    assert len(table.select(kind="network")) == 5
    assert table.notes["additivity"]["n"] == 5


def test_only_one_row_and_its_stubs(tmp_path: Path) -> None:
    key = sorted(SPACE.all_blocks())[3]
    out = tmp_path / "t.parquet"
    table = profile(SPACE, ROOFLINE, out, only=key[:12]).table
    (row,) = table.select(kind="block").rows()
    assert row.key == key
    assert {one.key for one in table.select(kind="stub").rows()} == set(row.stubs)
    whole = profile(SPACE, ROOFLINE, out).table  # and later the rest
    assert identities(whole) == EVERY_KEY
    assert whole[key] == table[key]
    with pytest.raises(UsageError, match="no block with key nonsense"):
        profile(SPACE, ROOFLINE, out, only="nonsense")


def test_networks_are_distinct_and_of_the_seed() -> None:
    def archs(seed: int, n: int) -> list[Any]:
        target = replace(ROOFLINE, plan=replace(PLAN, seed=seed))
        return [job.row.arch for job in wanted(SPACE, target, n) if job.row.kind == "network"]

    assert archs(0, 5) == archs(0, 5) == archs(0, 9)[:5]
    assert archs(0, 5) != archs(1, 5)
    assert len(set(archs(0, 50))) == 50
    tiny = replace(SPACE, levels=1)
    assert len([job for job in wanted(tiny, ROOFLINE, 50) if job.row.kind == "network"]) == tiny.size == 1


def test_failed_rows_are_measured_again(tmp_path: Path, measured: list[Request]) -> None:
    out = tmp_path / "t.parquet"
    whole = profile(SPACE, ROOFLINE, out).table
    rows = list(whole.rows())
    (stub, *_) = [row for row in rows if row.kind == "stub"]
    lost = [row for row in rows if stub.key in row.stubs] + [stub]
    none = dict.fromkeys(("latency_ms", "latency_ref_ms", "ci_low_ms", "ci_high_ms"))

    def failed(row: Row) -> Row:
        return replace(row, status="error", error="made up", **none) if row in lost else row  # type: ignore[arg-type]

    LatencyTable.from_rows(map(failed, rows), whole.provenance).write(out)
    measured.clear()
    again = profile(SPACE, ROOFLINE, out).table
    assert len({request.key for request in measured}) == len({job.key for job in jobs_of(SPACE) if job.row.key in
                                                              {row.key for row in lost}}) + 1  # fmt: skip
    assert set(again.frame["status"]) == {"ok"}
    assert {key: again[key] for key, _ in EVERY_KEY} == {key: whole[key] for key, _ in EVERY_KEY}


HOLDER = "import sys, time; from latbench.spool import Spool; spool = Spool(sys.argv[1], {}).__enter__()"


class InterruptedHereError(Exception):
    pass


@pytest.mark.parametrize("n", [0, 1, 7, 100])
@pytest.mark.parametrize("target", [ROOFLINE, REAL], ids=["roofline", "onnxruntime"])
def test_going_on_after_an_interruption_equals_an_undisturbed_run(
    target: Target, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[Request]
) -> None:
    out = tmp_path / "t.parquet"
    append, n_appended = Spool.append, 0

    def fail(self: Spool, record: Any) -> None:
        nonlocal n_appended
        if "key" in record:
            if n_appended == n:
                raise InterruptedHereError
            n_appended += 1
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", fail)
        with pytest.raises(InterruptedHereError):
            profile(SPACE, target, out)
    assert not out.exists()
    assert beside(out) == ["t.parquet.partial.jsonl"]
    kept = [json.loads(line) for line in (tmp_path / "t.parquet.partial.jsonl").read_text().splitlines()]
    taken = {(record["key"], record["run"], record["round"]) for record in kept if "key" in record}
    measured.clear()
    table = profile(SPACE, target, out).table
    assert identities(table) == EVERY_KEY
    jobs = {job.key for job in jobs_of(SPACE)}
    assert not taken & {(r.key, r.run, r.round) for r in measured if r.key in jobs}  # nothing twice
    assert beside(out) == ["t.parquet"]
    assert table.provenance.clock_ref_us == next((r["clock_ref_us"] for r in kept if "clock_ref_us" in r), None)


def test_a_budget_leaves_a_table_that_says_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    outcome = profile(SPACE, ROOFLINE, out, budget_s=0.0)
    assert (outcome.n_wanted, outcome.n_missing, len(outcome.table)) == (len(EVERY_KEY), len(EVERY_KEY), 0)
    assert len(LatencyTable.read(out)) == 0
    assert beside(out) == ["t.parquet"]
    outcome = profile(SPACE, ROOFLINE, out)
    assert outcome.n_missing == 0
    assert identities(outcome.table) == EVERY_KEY


def test_missing_rows_are_counted_per_context(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    both = replace(ROOFLINE, context="both")
    whole = profile(SPACE, both, out).table
    kept = [row for row in whole.rows() if row.context == "sandwich" or row.kind != "block"]
    LatencyTable.from_rows(kept, whole.provenance).write(out)
    assert profile(SPACE, both, out, budget_s=0.0).n_missing == len(SPACE.all_blocks())


def test_as_many_distinct_networks_are_measured_as_asked_for(tmp_path: Path) -> None:
    space = NASBench201Space(num_cells=1)
    whole = profile(space, ROOFLINE, tmp_path / "t.parquet", networks=120).table
    table = whole.select(kind="network")
    assert len({row.key for row in table.rows()}) == len(table) == 120
    archs, ms = whole.networks()
    spelled = float(np.abs(LutOracle.fit(whole).latencies(archs) / ms - 1).mean())
    assert 3 * whole.notes["additivity"]["mape"] < spelled  # of what runs: blocks that nothing reads do not
    assert len(sampled(MobileNetV1Space(levels=1), 5, 0)) == 1  # all there are


def test_provenance_says_everything_a_reader_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/latbench", "profile", "--space", "mobilenet_v1", "-o", "a b.parquet"])
    about = profile(SPACE, REAL, tmp_path / "t.parquet", only=sorted(SPACE.all_blocks())[0]).table.provenance
    assert about.command == "latbench profile --space mobilenet_v1 -o 'a b.parquet'"
    assert (about.device, about.device_name, about.backend) == ("cpu", "this CPU", "onnxruntime")
    assert about.space == "mobilenet_v1"
    assert about.settings == SPACE.settings()
    assert about.options == {"threads": 1}
    assert about.policy == {**asdict(PLAN), "context": "sandwich", "fold_bn": True, "estimate": "lower half"}
    assert set(about.versions) == {"latbench", "onnx", "python", "onnxruntime"}
    assert about.versions["latbench"] == __version__
    assert about.versions["python"] == platform.python_version()
    assert {"cpu_model", "cpus", "kernel", "governors", "turbo", "worker_cpus", "worker_priority"} <= set(
        about.environment
    )
    assert about.clock_ref_us is not None
    assert 1 < about.clock_ref_us < 1000
    assert re.fullmatch(r"|[0-9a-f]{12}(\+dirty)?", about.commit)
    assert about.host == platform.node()
    assert about.started_at <= about.finished_at
    assert about.started_at.endswith("+00:00")


def test_the_commit_is_told_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measuring run must not be in the way of its user's commits."""

    def git(*words: str) -> str:
        about = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        return subprocess.run(
            ["git", "-C", str(folder), *about, *words], check=True, capture_output=True, text=True
        ).stdout

    folder = tmp_path / "of latbench"
    folder.mkdir()
    module = folder / "profile.py"
    module.write_text("first")
    monkeypatch.setattr(sys.modules["latbench.profiling.profile"], "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert _commit() == ""
    git("init", "--quiet")
    assert _commit() == ""
    git("add", "profile.py")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert _commit() == head
    (folder / "untracked").touch()
    os.utime(module, (1, 1))  # for git to look again whether it is the same
    index = (folder / ".git" / "index").read_bytes()
    assert _commit() == head
    assert (folder / ".git" / "index").read_bytes() == index
    module.write_text("second")
    assert _commit() == f"{head}+dirty"
    (folder / ".git" / "index.lock").touch()
    assert _commit() == f"{head}+dirty"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda: (SPACE, replace(ROOFLINE, options={"peak_gflops": 51.0})), "options.peak_gflops: 50.0 / 51.0"),
        (lambda: (SPACE, replace(ROOFLINE, plan=replace(PLAN, precision=0.1))), "policy.precision: 0.02 / 0.1"),
        (lambda: (replace(SPACE, resolution=64), ROOFLINE), "settings.resolution: 32 / 64"),
        (lambda: (SPACE, replace(ROOFLINE, device_name="another")), "device_name: a made-up CPU / another"),
    ],
)
def test_a_table_made_otherwise_is_refused_and_kept(change: Callable[[], Any], what: str, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    profile(SPACE, ROOFLINE, out)
    before = out.read_bytes()
    space, target = change()
    with pytest.raises(ProvenanceConflictError, match=re.escape(what)):
        profile(space, target, out)
    assert out.read_bytes() == before
    assert beside(out) == ["t.parquet"]
    profile(SPACE, ROOFLINE, out)  # nothing was left that would refuse the old options


def test_a_damaged_table_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    for data in (b"", b"PAR1 and no more", b"key,latency_ms\n"):
        out.write_bytes(data)
        with pytest.raises(SchemaMismatchError):
            profile(SPACE, ROOFLINE, out)
        assert out.read_bytes() == data
        assert beside(out) == ["t.parquet"]


def test_a_table_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    code = f"{HOLDER}; print(1, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(TableBusyError, match=f"pid {other.pid}"):
            profile(SPACE, ROOFLINE, out)
        other.kill()


def test_a_missing_folder_is_named_before_any_work(tmp_path: Path, measured: list[Request]) -> None:
    with pytest.raises(UsageError, match=r"no such is no directory: make it"):
        profile(SPACE, ROOFLINE, tmp_path / "no such" / "t.parquet")
    assert measured == []


def test_estimated_durations_add_up_over_distinct_graphs() -> None:
    jobs = jobs_of(SPACE)
    assert duration_s(jobs, PLAN) == duration_s([*jobs, *jobs], PLAN) > 0
    assert duration_s(jobs, replace(PLAN, runs=4)) > duration_s(jobs, PLAN)


def test_what_is_measured_agrees_with_what_is_summed(tmp_path: Path) -> None:
    """Real rows at their reference clock: each lies within its own interval, and p90 is not below the median."""
    table = profile(SPACE, REAL, tmp_path / "t.parquet").table
    frame = table.frame
    assert (frame["ci_low_ms"] <= frame["latency_ref_ms"]).all()
    assert (frame["latency_ref_ms"] <= frame["ci_high_ms"]).all()
    assert (frame["gross_ms"] > 0).all()
    assert np.isfinite(frame["clock_probe_us"]).all()
    assert set(frame["clock"]) == {"host"}
