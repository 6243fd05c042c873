"""What a table needs measured: the blocks of a space, in context, their stubs, and whole networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from latbench.backends.roofline import OPTIONS, kernels
from latbench.errors import UsageError
from latbench.graph.context import borders, sandwich, stub
from latbench.graph.ir import Graph
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import fold_structure, random_weights
from latbench.measure.base import COLD_SWEEP_BYTES, SamplingPlan
from latbench.profiling.chains import chain, chains
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace
from latbench.tables import Row

Context = Literal["sandwich", "isolated", "both"]
Artifact = Literal["onnx", "graph"]

# A network alone in its process is what a user runs. In a worker that has loaded other models its memory lies in
# scattered pages, and the caches serve it worse: 2.50 ms +- 1 % in 12 fresh processes, 2.5 to 3.0 ms in a used one.
ALONE_BLOCK_S = 0.04
ALONE_WARMUP_S = 0.05  # its weights (16 MB for mobilenet_v1) settle in the last-level cache within 25 ms; where they
# take longer, another process of the row counts


class Job(Protocol):
    """Something to run, and the row that comes of it."""

    @property
    def row(self) -> Row:
        """Identity and description; no figures yet."""
        ...

    @property
    def key(self) -> str:
        """Key of what runs: what requests and measurements carry."""
        ...

    @property
    def expected_ms(self) -> float:
        """A rough latency, for chunks, budgets and dry runs; never told as a result."""
        ...

    @property
    def nbytes(self) -> int:
        """Size of the artifact, roughly."""
        ...

    @property
    def alone(self) -> bool:
        """Whether each of its blocks of samples gets a fresh worker process."""
        ...

    def plan(self, plan: SamplingPlan) -> SamplingPlan:
        """The session's plan, as this job follows it."""
        ...

    def write(self, path: Path, artifact: Artifact, seed: int) -> None:
        """Writes what the back-end reads."""
        ...


@dataclass(frozen=True)
class GraphJob:
    """A graph of ours: in context, batch norms folded."""

    graph: Graph
    row: Row
    alone: bool = False

    @property
    def key(self) -> str:
        return self.graph.key

    @cached_property
    def expected_ms(self) -> float:
        """By the roofline of one CPU thread."""
        return sum(layer.ms for layer in kernels(self.graph, {k: float(v) for k, v in OPTIONS.items()}))

    @property
    def nbytes(self) -> int:
        return 4 * self.graph.n_params

    def plan(self, plan: SamplingPlan) -> SamplingPlan:
        """What runs alone is warmed up and sampled for longer, and brings its own weights through the caches."""
        if not self.alone:
            return plan
        sweep_bytes = plan.sweep_bytes if plan.sweep_bytes >= COLD_SWEEP_BYTES else 0
        return replace(
            plan,
            sweep_bytes=sweep_bytes,
            block_s=max(plan.block_s, ALONE_BLOCK_S),
            warmup_s=max(plan.warmup_s, ALONE_WARMUP_S),
        )

    def write(self, path: Path, artifact: Artifact, seed: int) -> None:
        """An ONNX file with random weights, or the graph as JSON."""
        if artifact == "graph":
            path.write_text(self.graph.to_json())
        else:
            path.write_bytes(to_onnx(self.graph, random_weights(self.graph, seed)))


@dataclass(frozen=True)
class OnnxJob:
    """An ONNX model as it is."""

    data: bytes
    row: Row
    alone: bool = True

    @property
    def key(self) -> str:
        return self.row.key

    @property
    def expected_ms(self) -> float:
        """At 50 GMAC/s, a CPU core with wide vectors."""
        return (self.row.macs or 0) / 50e6

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def plan(self, plan: SamplingPlan) -> SamplingPlan:
        """As it is."""
        return plan

    def write(self, path: Path, artifact: Artifact, seed: int) -> None:
        """Raises UsageError where the back-end reads graphs only."""
        if artifact != "onnx":
            raise UsageError("this back-end computes from latbench graphs, not ONNX files: give SPACE:ARCH")
        path.write_bytes(self.data)


def jobs_of(
    space: SearchSpace,
    *,
    context: Context = "sandwich",
    networks: Sequence[Arch] = (),
    fold_bn: bool = True,
    simulated: bool = False,
) -> list[Job]:
    """Every distinct block of a factored space in the contexts asked for, its chains, their stubs, and the networks.

    Two blocks that run as one graph (they differ in what folding removes) stay two jobs with one `key`. Architectures
    of one and the same network are one job, the first one's. What is simulated needs neither chains nor, as nothing
    presses on it, processes of its own.
    """
    jobs: list[Job] = list(_blocks(space, context, fold_bn, not simulated)) if isinstance(space, FactoredSpace) else []
    whole: dict[str, Job] = {}
    for job in (_network(space, arch, fold_bn, alone=not simulated) for arch in dict.fromkeys(networks)):
        whole.setdefault(job.row.key, job)
    jobs += whole.values()
    if not jobs:
        raise UsageError(f"{space.name} has no blocks that can be measured apart: ask for networks (--networks N)")
    return jobs


def _blocks(space: FactoredSpace, context: Context, fold_bn: bool, with_chains: bool) -> Iterator[GraphJob]:
    contexts = ("sandwich", "isolated") if context == "both" else (context,)
    first, last = space.sites[0], space.sites[-1]
    seen: set[str] = set()
    stubs: dict[str, Graph] = {}
    for site, _, block in space.slots():
        if block.key in seen:
            continue
        seen.add(block.key)
        edges = {"first": site == first, "last": site == last}
        row = Row.of(block, "block", space=space.name, site=site.name, block_type=site.block_type)
        for where in contexts:
            if where == "sandwich":
                yield _sandwiched(block, row, edges, stubs, fold_bn)
            else:
                yield GraphJob(_fold(block, fold_bn), row)
    for block, n in chains(space) if with_chains and "sandwich" in contexts else ():
        graph = chain(block, n)
        row = Row.of(graph, "chain", signature=f"{n} x {block.signature}", space=space.name, block_type="chain")
        yield replace(_sandwiched(graph, row, {}, stubs, fold_bn), alone=True)
    for graph in stubs.values():
        yield GraphJob(graph, Row.of(graph, "stub", space=space.name, block_type="stub"))


def _sandwiched(block: Graph, row: Row, edges: Mapping[str, bool], stubs: dict[str, Graph], fold_bn: bool) -> GraphJob:
    """The block in context, its stubs added to `stubs`."""
    around = [stub(shape, block.dtype) for shape in borders(block, **edges)]
    stubs |= {s.key: s for s in around}
    row = replace(row, context="sandwich", stubs=tuple(s.key for s in around))
    return GraphJob(_fold(sandwich(block, **edges), fold_bn), row)


def _network(space: SearchSpace, arch: Arch, fold_bn: bool, *, alone: bool) -> GraphJob:
    graph = space.network(arch)
    row = Row.of(graph, "network", space=space.name, block_type="network", arch=arch)
    return GraphJob(_fold(graph, fold_bn), row, alone=alone)


def _fold(graph: Graph, fold_bn: bool) -> Graph:
    return fold_structure(graph) if fold_bn else graph


def n_blocks(job: Job, plan: SamplingPlan) -> int:
    """How many blocks of samples a job gets where nothing is disturbed."""
    return max(plan.runs * plan.rounds, plan.alone_processes if job.alone else 0)


def estimate_s(job: Job, plan: SamplingPlan) -> float:
    """Seconds that a job will take: for chunks, budgets and dry runs."""
    plan, n = job.plan(plan), n_blocks(job, plan)
    latency_s = job.expected_ms / 1e3
    sampling_s = max(plan.block_s, latency_s * -(-plan.min_samples // (plan.runs * plan.rounds)))
    session_s = 0.0012 + 5e-10 * job.nbytes + 0.12 * job.alone  # seen with ONNX Runtime: loading, probes, pipe, process
    return n * (session_s + max(plan.warmup_s, 3 * latency_s) + min(sampling_s, plan.max_time_s))


def chunks(jobs: Sequence[Job], plan: SamplingPlan, limit_s: float, limit_bytes: int) -> list[list[Job]]:
    """Jobs in parts of about `limit_s` of measuring and `limit_bytes` of models, each with the stubs that it needs."""
    by_stub = {job.row.key: job for job in jobs if job.row.kind == "stub"}
    done: set[str] = set()
    parts: list[list[Job]] = []
    room_s = room_bytes = 0.0
    for job in jobs:
        for one in (*(by_stub[key] for key in job.row.stubs if key in by_stub), job):
            if one.row.kind == "stub":
                if one.row.key in done:
                    continue
                done.add(one.row.key)
            if room_s <= 0 or room_bytes <= 0:
                parts.append([])
                room_s, room_bytes = limit_s, float(limit_bytes)
            parts[-1].append(one)
            room_s -= estimate_s(one, plan)
            room_bytes -= one.nbytes
    return parts
