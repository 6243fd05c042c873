"""The sample that the benchmarks of the engine share: 200 blocks of mixed kinds, a few microseconds to several ms."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np

from latbench import devices
from latbench.graph.blocks import DARTS_OPS, bottleneck, darts_op, inverted_residual
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.passes import fold_structure
from latbench.measure.base import SamplingPlan
from latbench.profiling import Target
from latbench.profiling.jobs import GraphJob
from latbench.profiling.rows import finish
from latbench.profiling.session import Session
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row


def sample_jobs(n: int = 200, seed: int = 0) -> list[GraphJob]:
    """Blocks with batch norms folded: MobileNet-v1 (224 and 96 px), inverted residuals with and without
    squeeze-and-excitation, DARTS operators, bottlenecks, NAS-Bench-201 nodes."""
    rng = np.random.default_rng(seed)
    kinds: list[tuple[str, list[Graph], int]] = [
        ("mobilenet_v1 224", list(MobileNetV1Space().all_blocks().values()), 70),
        ("mobilenet_v1 96", list(MobileNetV1Space(resolution=96).all_blocks().values()), 30),
        ("inverted residual", [_inverted_residual(rng) for _ in range(45)], 45),
        ("darts", [_darts(rng) for _ in range(60)], 60),
        ("bottleneck", [_bottleneck(rng) for _ in range(5)], 5),
        ("nasbench201", list(NASBench201Space().all_blocks().values()), 20),
    ]
    jobs: dict[str, GraphJob] = {}
    for kind, graphs, count in kinds:
        for index in rng.permutation(len(graphs))[:count]:
            graph = fold_structure(graphs[index])
            row = Row(key=graph.key, kind="block", signature=graph.signature, block_type=kind, macs=graph.macs)
            jobs.setdefault(graph.key, GraphJob(graph, row))
    return list(jobs.values())[:n]


def one_pass(seed: int, command: str) -> LatencyTable:
    """The sample measured once on one CPU thread, at the default settings of ``latbench profile``: 10 s alone."""
    plan, jobs = SamplingPlan(seed=seed), sample_jobs()
    target = Target("cpu", devices.detect().host.cpu_model, "onnxruntime", {"threads": 1}, plan, context="isolated")
    with target.launcher() as launcher:
        provenance = target.provenance(None, launcher.start())
        session = Session(launcher, plan, "onnx", provenance.clock_ref_us)
        session.measure(jobs)
    rows = [finish(job.row, session.progress[job.key]) for job in jobs]
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    told = replace(provenance, command=command, commit="", host="", finished_at=finished)
    return LatencyTable.from_rows(rows, told, {"canary": session.canary_notes()})


def _inverted_residual(rng: np.random.Generator) -> Graph:
    side = int(rng.choice([56, 28, 14, 7]))
    width = 8 * int(rng.integers(2, 3 + 112 // side))
    squeeze = width // 4 * 4 if rng.random() < 0.5 else None
    b = GraphBuilder()
    x = b.input("x", (1, width, side, side))
    hidden = width * int(rng.choice([3, 4, 6]))
    kernel = int(rng.choice([3, 5, 7]))
    stride = int(rng.choice([1, 2]))
    out = width if stride == 1 else 8 * (width // 4)
    y = inverted_residual(b, x, hidden, out, kernel_size=kernel, stride=stride, squeeze_channels=squeeze, name="ir")
    return b.build(y)


def _darts(rng: np.random.Generator) -> Graph:
    op = str(rng.choice([name for name in DARTS_OPS if "skip" not in name and name != "none"]))
    side = int(rng.choice([32, 16, 8]))
    b = GraphBuilder()
    x = b.input("x", (1, 36 * 32 // side, side, side))
    return b.build(darts_op(b, op, x, stride=int(rng.choice([1, 2])), name="op"))


def _bottleneck(rng: np.random.Generator) -> Graph:
    side = int(rng.choice([28, 14, 7]))
    width = 3584 // side
    b = GraphBuilder()
    x = b.input("x", (1, width, side, side))
    return b.build(bottleneck(b, x, width // 4, width, name="block"))
