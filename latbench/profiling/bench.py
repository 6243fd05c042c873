"""``bench``: one network, measured alone; its latency, its layers, what was folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from latbench import plugins
from latbench.backends.base import Backend
from latbench.errors import ModelError, UsageError
from latbench.graph import onnx_model, torch_export
from latbench.graph.ir import DType
from latbench.graph.passes import FoldReport, fold_structure, plan_fold
from latbench.measure.base import SamplingPlan
from latbench.profiling.int8 import Int8Report, in_int8
from latbench.profiling.jobs import GraphJob, Job, OnnxJob
from latbench.profiling.profile import Target
from latbench.profiling.rows import finish
from latbench.profiling.scratch import scratch
from latbench.profiling.session import Reporter, Session
from latbench.spaces.base import SearchSpace
from latbench.tables import LatencyTable, Row

Fold = Literal["auto", "on", "off"]

# One network gets more care than a row among thousands: blocks of 0.1 s in five processes or more, 1 %.
BENCH_PLAN = SamplingPlan(
    precision=0.01,
    block_s=0.1,
    rounds=1,
    runs=5,
    min_time_s=0.5,
    max_time_s=20.0,
    warmup_s=0.1,
    canary_every=0,
    alone_processes=0,  # the median of all, as other tools tell it
)


@dataclass(frozen=True)
class Model:
    """A network to measure, and what folding and quantising did to it."""

    name: str
    job: Job
    folded: FoldReport
    space: SearchSpace | None = None
    int8: Int8Report | None = None

    def in_int8(self, backend: type[Backend], data: Path, percentile: float | None = None) -> Model:
        """As `backend` runs it in int8, calibrated on `data`. Raises UsageError, ModelError."""
        job, report = in_int8(self.job, backend, data, percentile)
        return replace(self, job=job, int8=report)


@dataclass(frozen=True)
class Bench:
    """A measured network."""

    model: Model
    table: LatencyTable  # of one row, with its provenance
    row: Row
    layers: list[dict[str, Any]] | None  # name, op, ms: of a separate pass; None where the runtime has no profiler


def read_model(
    text: str,
    *,
    batch: int | None = None,
    resolution: int | None = None,
    dtype: DType | None = None,
    shapes: Mapping[str | None, tuple[int, ...]] | None = None,
    fold: Fold = "auto",
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """ "FILE.onnx", "torchvision:NAME" or "SPACE:ARCH" -> a model, batch norms folded as asked.

    fold: "auto" folds what can be, "on" refuses a model in which one stays, "off" folds nothing. Raises UsageError,
    ModelError, EnvironmentUnfitError.
    """
    kind, colon, rest = text.partition(":")
    if colon and kind in plugins.names("latbench.spaces"):
        if shapes:
            raise UsageError("--shape is for ONNX files: a space takes --batch and --resolution")
        given = {"batch": batch, "resolution": resolution, "dtype": dtype}
        space_class = plugins.load("latbench.spaces", kind)
        space = space_class.from_settings({k: v for k, v in given.items() if v is not None} | dict(settings or {}))
        return _from_space(text, space, rest, fold)
    if settings:
        raise UsageError("--set is for SPACE:ARCH")
    if colon and kind == "torchvision":
        if shapes or dtype == "float16":
            raise UsageError("torchvision models take --batch and --resolution, in fp32")
        data = torch_export.from_torchvision(rest, resolution=resolution or 224, batch=batch or 1)
        return _from_onnx(text, onnx_model.from_bytes(data, source=text), fold)
    if not text.endswith(".onnx") and not Path(text).exists():
        known = ", ".join(plugins.names("latbench.spaces"))
        raise UsageError(f"{text!r} is neither FILE.onnx, torchvision:NAME nor SPACE:ARCH (spaces: {known})")
    if batch is not None or resolution is not None or dtype is not None:
        raise UsageError("an ONNX file has its own batch, resolution and dtype: --shape sets dynamic dimensions")
    return _from_onnx(Path(text).name, onnx_model.load(text, shapes or {}), fold)


def _from_space(name: str, space: SearchSpace, arch_text: str, fold: Fold) -> Model:
    arch = space.parse_arch(arch_text)
    graph = space.network(arch)
    report = FoldReport((), ()) if fold == "off" else plan_fold(graph)
    _refuse_kept(name, report, fold)
    row = Row(
        key=graph.key,
        kind="network",
        signature=graph.signature,
        space=space.name,
        arch=arch,
        block_type="network",
        macs=graph.macs,
        n_params=graph.n_params,
    )
    return Model(name, GraphJob(graph if fold == "off" else fold_structure(graph), row, alone=True), report, space)


def _from_onnx(name: str, model: Any, fold: Fold) -> Model:
    summary = onnx_model.summarise(model)
    report = FoldReport((), ())
    if fold != "off":
        model, report = onnx_model.fold_batch_norm(model)
        _refuse_kept(name, report, fold)
    inputs = ";".join(f"{i.name}:{'x'.join(map(str, i.shape or ()))}" for i in summary.inputs)
    row = Row(
        key=summary.key,
        kind="network",
        signature=f"onnx:{name};{inputs}",
        block_type="network",
        macs=summary.macs,
        n_params=summary.n_params,
    )
    return Model(name, OnnxJob(model.SerializeToString(), row), report)


def _refuse_kept(name: str, report: FoldReport, fold: Fold) -> None:
    if fold == "on" and report.kept:
        bn, reason = report.kept[0]
        more = f" (and {len(report.kept) - 1} more)" if len(report.kept) > 1 else ""
        raise ModelError(f"{name}: batch norm {bn} cannot be folded: {reason}{more}; --fold-bn auto leaves it in")


def bench(model: Model, target: Target, *, layers: bool = True, reporter: Reporter | None = None) -> Bench:
    """Measures one model on one target. A failure is a row with status error or timeout, as in a profile."""
    with target.launcher() as launcher:
        conditions = launcher.start()
        provenance = target.provenance(model.space, conditions)
        artifact = target.backend_class.artifact
        session = Session(launcher, target.plan, artifact, provenance.clock_ref_us, reporter=reporter)
        session.measure([model.job])
        origin = "simulated" if target.simulated else "measured"
        row = finish(model.job.row, session.progress[model.job.key], origin=origin)
        passed = None
        if layers and row.status == "ok":
            with scratch() as folder:
                path = folder / ("model.json" if artifact == "graph" else "model.onnx")
                model.job.write(path, artifact, target.plan.seed)
                passed = launcher.layers(path, target.plan)
    table = LatencyTable.from_rows([row], replace(provenance, finished_at=provenance.started_at))
    return Bench(model, table, row, passed)
