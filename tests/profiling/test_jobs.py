"""What is measured for a space: every block once, its stubs, the networks; and in which parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from latbench.errors import UsageError
from latbench.graph.ir import Graph
from latbench.graph.ops import BatchNorm2d
from latbench.measure.base import COLD_SWEEP_BYTES, SamplingPlan
from latbench.profiling.jobs import GraphJob, OnnxJob, chunks, estimate_s, jobs_of
from latbench.spaces.base import Arch, Decision, SearchSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import Row

SPACE = MobileNetV1Space(resolution=32, levels=2, max_width=0.75, num_classes=10)
PLAN = SamplingPlan()


def kinds(jobs: list[GraphJob]) -> Counter[tuple[str, str]]:
    return Counter((job.row.kind, job.row.context) for job in jobs)


def test_every_distinct_block_is_one_job_and_every_stub_is_shared() -> None:
    jobs = jobs_of(SPACE)
    blocks = [job.row.key for job in jobs if job.row.kind == "block"]
    stubs = [job.row.key for job in jobs if job.row.kind == "stub"]
    assert sorted(blocks) == sorted(SPACE.all_blocks())
    assert len(set(stubs)) == len(stubs)
    assert {key for job in jobs for key in job.row.stubs} == set(stubs)
    assert len(stubs) < len(blocks)


def test_the_networks_first_and_last_blocks_have_one_stub() -> None:
    by_site = {job.row.site: job.row for job in jobs_of(SPACE) if job.row.kind == "block"}
    assert len(by_site["stem"].stubs) == len(by_site["head"].stubs) == 1
    assert all(len(row.stubs) == 2 for site, row in by_site.items() if site not in ("stem", "head"))


def test_contexts_are_as_asked_for() -> None:
    n = len(SPACE.all_blocks())
    assert kinds(jobs_of(SPACE, context="isolated")) == {("block", "isolated"): n}  # type: ignore[arg-type]
    both = kinds(jobs_of(SPACE, context="both"))  # type: ignore[arg-type]
    assert both["block", "isolated"] == both["block", "sandwich"] == n


@pytest.mark.parametrize("fold_bn", [True, False])
def test_what_runs_is_folded_as_asked_and_the_key_stays_the_blocks(fold_bn: bool) -> None:
    arch = SPACE.sample(np.random.default_rng(0))
    jobs = jobs_of(SPACE, networks=[arch, arch], fold_bn=fold_bn)
    for job in jobs:
        assert isinstance(job, GraphJob)
        assert not fold_bn or not any(isinstance(node.op, BatchNorm2d) for node in job.graph.nodes)
    (network,) = (job.row for job in jobs if job.row.kind == "network")  # asked for twice
    assert (network.key, network.arch) == (SPACE.network(arch).key, arch)
    assert {job.row.key for job in jobs if job.row.kind == "block"} == set(SPACE.all_blocks())


class Whole(SearchSpace):
    """A space that does not factor."""

    name = "whole"
    decisions = (Decision("width", (8, 16)),)

    def network(self, arch: Arch) -> Graph:
        return SPACE.network(SPACE.published["narrowest"])


def test_a_space_without_blocks_is_measured_as_networks() -> None:
    (job,) = jobs_of(Whole(), networks=[(0,)])
    assert job.row.kind == "network"
    with pytest.raises(UsageError, match=r"whole has no blocks .* ask for networks"):
        jobs_of(Whole())


def test_architectures_of_one_network_are_one_job() -> None:
    space = NASBench201Space(num_cells=1)
    spelled = [(3, 0, 0, 1, 0, 0), (0, 0, 0, 1, 0, 0), (3, 0, 0, 2, 0, 0)]  # nothing reads the first node
    jobs = [job for job in jobs_of(space, networks=spelled) if job.row.kind == "network"]
    assert [job.row.arch for job in jobs] == [spelled[0], spelled[2]]


def test_chunks_hold_every_job_once_with_its_stubs_not_later() -> None:
    jobs = jobs_of(SPACE, networks=[SPACE.published["narrowest"]])
    for limit_s, limit_bytes in [(1e9, 1 << 40), (1.0, 1 << 40), (1e-9, 1 << 40), (1e9, 1 << 20), (-1.0, 1)]:
        parts = chunks(jobs[::-1], PLAN, limit_s, limit_bytes)
        flat = [job.row.key for part in parts for job in part]
        assert sorted(flat) == sorted(job.row.key for job in jobs)
        place = {job.row.key: i for i, part in enumerate(parts) for job in part}
        assert all(place[stub] <= place[job.row.key] for job in jobs for stub in job.row.stubs)
        for part in parts:
            assert sum(estimate_s(job, PLAN) for job in part[:-1]) <= max(limit_s, 0.0)
    assert len(chunks(jobs, PLAN, 1e9, 1 << 40)) == 1
    assert len(chunks(jobs, PLAN, 1e-9, 1 << 40)) == len(jobs)
    assert chunks([], PLAN, 1.0, 1 << 40) == []


def test_estimates_grow_with_the_model_and_the_plan() -> None:
    small, large = (GraphJob(g, Row(g.key, "network", g.signature)) for g in map(SPACE.network, (
        SPACE.published["narrowest"], SPACE.published["widest"])))  # fmt: skip
    assert 0 < estimate_s(small, PLAN) < estimate_s(large, PLAN)
    assert estimate_s(small, SamplingPlan(runs=4)) == pytest.approx(2 * estimate_s(small, PLAN))


def test_artifacts_are_what_the_back_end_reads(tmp_path: Path) -> None:
    job = jobs_of(SPACE)[0]
    job.write(tmp_path / "g", "graph", 0)
    assert Graph.from_json((tmp_path / "g").read_text()).key == job.key
    job.write(tmp_path / "o", "onnx", 0)
    onnx.checker.check_model(str(tmp_path / "o"))
    again = tmp_path / "again"
    job.write(again, "onnx", 0)
    assert again.read_bytes() == (tmp_path / "o").read_bytes()
    job.write(again, "onnx", 1)
    assert again.read_bytes() != (tmp_path / "o").read_bytes()


def test_an_onnx_file_is_no_graph(tmp_path: Path) -> None:
    job = OnnxJob(b"data", Row("k", "network", "s", macs=50_000_000))
    job.write(tmp_path / "m", "onnx", 0)
    assert (tmp_path / "m").read_bytes() == b"data"
    assert job.expected_ms == pytest.approx(1.0)
    with pytest.raises(UsageError, match="give SPACE:ARCH"):
        job.write(tmp_path / "m", "graph", 0)


def test_networks_run_alone_for_longer_and_blocks_do_not() -> None:
    space = MobileNetV1Space(resolution=32, levels=2)
    plan = SamplingPlan()
    for job in jobs_of(space, networks=[(0,) * 14]):
        assert job.alone == (job.row.kind in ("network", "chain"))
        longer = job.plan(plan).block_s > plan.block_s and job.plan(plan).warmup_s > plan.warmup_s
        assert longer == job.alone
    assert not any(job.alone for job in jobs_of(space, networks=[(0,) * 14], simulated=True))


@pytest.mark.parametrize(("sweep_bytes", "kept"), [(0, 0), (14 << 20, 0), (COLD_SWEEP_BYTES, COLD_SWEEP_BYTES)])
def test_a_network_is_swept_by_a_cold_plan_only(sweep_bytes: int, kept: int) -> None:
    """What stands for the rest of a network is not put beside a whole one."""
    space = MobileNetV1Space(resolution=32, levels=2)
    block, *_, network = jobs_of(space, networks=[(0,) * 14])
    plan = SamplingPlan(sweep_bytes=sweep_bytes)
    assert (block.plan(plan).sweep_bytes, network.plan(plan).sweep_bytes) == (sweep_bytes, kept)
