"""``profile``: a space, a device and a plan -> a latency table on disk, resumable at any moment."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latbench import __version__, host, plugins
from latbench.backends.base import Backend, Scalar
from latbench.errors import ProvenanceConflictError, TableError, UsageError
from latbench.interpreter import describe
from latbench.measure.base import Measurement, SamplingPlan, WorkerSetup
from latbench.measure.launcher import LocalLauncher, cpus_for
from latbench.profiling.additivity import additivity
from latbench.profiling.jobs import Artifact, Context, Job, estimate_s, jobs_of
from latbench.profiling.rows import finish, increment
from latbench.profiling.session import CANARY, Reporter, Session
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace
from latbench.spool import Spool
from latbench.tables import LatencyTable, Provenance, Row


@dataclass(frozen=True)
class Target:
    """Where and how to measure: the device, the back-end with its options, the plan."""

    device: str  # name of the device profile
    device_name: str  # as the driver or the CPU says it
    backend: str  # name of the plug-in
    options: Mapping[str, Scalar]  # of the back-end; `threads` also sets the worker's affinity
    plan: SamplingPlan
    context: Context = "sandwich"
    fold_bn: bool = True
    python: str | None = None  # the worker's interpreter; None: ours
    clock_mhz: int | None = None  # at which the GPU's clock is held; None: it floats

    def __post_init__(self) -> None:
        if plugins.load("latbench.backends", self.backend).clock != "host":  # no neighbours press on a device's own
            object.__setattr__(self, "plan", replace(self.plan, alone_processes=0))

    @property
    def backend_class(self) -> type[Backend]:
        """Raises BackendUnavailableError where it cannot run here, UsageError where there is none of that name."""
        backend: type[Backend] = plugins.load("latbench.backends", self.backend)
        if self.python is None:
            backend.available()
        return backend

    @property
    def simulated(self) -> bool:
        """Whether its times are computed, not measured."""
        clock: str = plugins.load("latbench.backends", self.backend).clock
        return clock == "model"

    @property
    def artifact(self) -> Artifact:
        """What its back-end reads; known where the back-end cannot run, too."""
        artifact: Artifact = plugins.load("latbench.backends", self.backend).artifact
        return artifact

    @property
    def policy(self) -> dict[str, Any]:
        """Every measurement option."""
        counts = "lower half" if self.plan.alone_processes else "median"
        return {**asdict(self.plan), "context": self.context, "fold_bn": self.fold_bn, "estimate": counts}

    def launcher(self) -> LocalLauncher:
        simulated = self.backend_class.clock == "model"
        cpus = () if simulated else cpus_for(int(self.options.get("threads", 1)))
        spec = plugins.spec("latbench.backends", self.backend)
        return LocalLauncher(WorkerSetup(spec, dict(self.options), cpus), python=self.python or sys.executable)

    def versions(self) -> Mapping[str, str]:
        """Of the runtime, as the worker's interpreter has it."""
        if self.python is None:
            return self.backend_class.versions()
        found: dict[str, str] = describe(plugins.spec("latbench.backends", self.backend), self.python)["versions"]
        return found

    def provenance(self, space: SearchSpace | None, conditions: Mapping[str, Any]) -> Provenance:
        """What a table measured so says of itself. `conditions` are the worker's own words."""
        here = host.read()
        environment = {
            "cpu_model": here.cpu_model,
            "cpus": here.cpus,
            "kernel": here.kernel,
            "hypervisor": here.hypervisor or "none",
            "governors": list(here.governors),
            "turbo": "unknown" if here.turbo is None else here.turbo,
            "memory_gib": round((here.memory_bytes or 0) / 2**30),
            "worker_cpus": list(cpus_for(int(self.options.get("threads", 1)))),
            "worker_priority": conditions.get("priority", ""),
            **({} if self.clock_mhz is None else {"locked_clock_mhz": self.clock_mhz}),
        }
        probe = conditions.get("clock_probe_us")
        return Provenance(
            device=self.device,
            device_name=self.device_name,
            backend=self.backend,
            versions={
                "latbench": __version__,
                "onnx": metadata.version("onnx"),
                "python": str(conditions.get("python", platform.python_version())),
                **self.versions(),
            },
            space=space.name if space else "",
            settings=space.settings() if space else {},
            options=dict(self.options),
            policy=self.policy,
            environment={} if self.simulated else environment,
            clock_ref_us=None if probe is None else float(probe),
            seed=self.plan.seed,
            command=command_line(),
            commit=_commit(),
            started_at=now(),
            host=platform.node(),
        )


@dataclass(frozen=True)
class Outcome:
    """What a profile run came to."""

    table: LatencyTable
    path: Path
    n_wanted: int  # rows that the command asks for
    n_missing: int  # of them not measured for want of time: the same command goes on
    seconds: float


def wanted(
    space: SearchSpace,
    target: Target,
    networks: int | Sequence[Arch] = 0,
    only: str | None = None,
    *,
    blocks: bool = True,
) -> list[Job]:
    """The jobs of a profile command.

    `networks`: how many to sample, or which. `only`: the row of this key and the stubs it needs. Raises UsageError.
    """
    archs = sampled(space, networks, target.plan.seed) if isinstance(networks, int) else list(networks)
    jobs = jobs_of(space, context=target.context, networks=archs, fold_bn=target.fold_bn, simulated=target.simulated)
    if not blocks:
        jobs = [job for job in jobs if job.row.kind == "network"]
    if only is None:
        return jobs
    chosen = [job for job in jobs if job.row.key.startswith(only)]
    if not chosen:
        raise UsageError(f"{space.name} has no block with key {only} at these settings (keys: latbench show TABLE)")
    needed = {key for job in chosen for key in job.row.stubs}
    return [job for job in jobs if job in chosen or (job.row.kind == "stub" and job.row.key in needed)]


def sampled(space: SearchSpace, n: int, seed: int) -> list[Arch]:
    """Architectures of `n` distinct networks, or of all there are where the space has fewer."""
    rng = np.random.default_rng(seed)
    archs: dict[str, Arch] = {}  # by network: NAS-Bench-201 can spell some in several ways
    drawn: set[Arch] = set()
    while len(archs) < n and len(drawn) < space.size:
        arch = space.sample(rng)
        if arch not in drawn:
            drawn.add(arch)
            archs.setdefault(space.network(arch).key, arch)
    return list(archs.values())


def median_weight_bytes(space: SearchSpace) -> int:
    """Weights of the median of 101 sampled networks: what passes through the caches between two runs of a block."""
    rng = np.random.default_rng(0)
    sizes = [space.network(space.sample(rng)).n_params for _ in range(101)]
    return int(np.median(sizes)) * np.dtype(space.dtype).itemsize


def duration_s(jobs: Sequence[Job], plan: SamplingPlan) -> float:
    """Estimated seconds of measuring, by a roofline: for dry runs."""
    return sum(estimate_s(job, plan) for job in {job.key: job for job in jobs}.values())


def profile(
    space: SearchSpace,
    target: Target,
    out: Path,
    *,
    networks: int | Sequence[Arch] = 0,
    only: str | None = None,
    blocks: bool = True,
    budget_s: float = float("inf"),
    reporter: Reporter | None = None,
) -> Outcome:
    """Measures what `out` does not hold yet and writes it there, atomically.

    Every measurement is kept in ``<out>.partial.jsonl`` as it comes, so a killed run loses one at most, and the same
    command goes on from there. Raises TableBusyError, ProvenanceConflictError, BackendUnavailableError, TableError.
    """
    begin = time.monotonic()
    jobs = wanted(space, target, networks, only, blocks=blocks)
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no directory: make it, or choose another -o")
    with target.launcher() as launcher:
        provenance = target.provenance(space, launcher.start())
        header = {name: value for name, value in provenance.to_dict().items() if name in HEADER}
        with Spool(out, header) as spool:
            try:
                held = _held(out, provenance)
            except TableError:
                if not spool.records:  # nothing to go on from: left behind, it would refuse the next run's options
                    spool.remove()
                raise
            provenance = replace(provenance, clock_ref_us=_clock_ref(held, spool, provenance))
            if not any("clock_ref_us" in record for record in spool.records):  # new, or that line was damaged
                spool.append({"clock_ref_us": provenance.clock_ref_us})
            have = {identity(row): row for row in (held.rows(samples=False) if held else ()) if row.status == "ok"}
            todo = [job for job in jobs if identity(job.row) not in have]
            session = Session(
                launcher,
                target.plan,
                target.artifact,
                provenance.clock_ref_us,
                record=lambda measurement: spool.append(measurement.to_dict()),
                reporter=reporter,
                deadline=begin + budget_s,
            )
            session.restore(Measurement.from_dict(r) for r in spool.records if "key" in r)
            session.measure(todo)
            table = _assemble(space, target, session, todo, held, have, provenance)
            table.write(out)
            finished = set(zip(*(table.frame[name] for name in ("key", "kind", "context")), strict=True))
            if all(session.complete(key) for key in session.progress if key != CANARY.key):
                spool.remove()
    n_missing = sum((job.row.key, job.row.kind, job.row.context) not in finished for job in todo)
    return Outcome(table, out, len(jobs), n_missing, time.monotonic() - begin)


# Conditions that another run must share to go on with an interrupted one.
HEADER = ("device_name", "backend", "versions", "environment", "options", "policy", "space", "settings")


def _held(out: Path, provenance: Provenance) -> LatencyTable | None:
    """The table that is there already. Raises ProvenanceConflictError where it was made under other conditions."""
    if not out.exists():
        return None
    held = LatencyTable.read(out)
    conflicts = held.provenance.conflicts(provenance)
    if conflicts:
        raise ProvenanceConflictError(
            f"{out} was measured under other conditions (there / now): {'; '.join(conflicts)}; choose another -o"
        )
    return held


def _clock_ref(held: LatencyTable | None, spool: Spool, provenance: Provenance) -> float | None:
    """The reference clock: the table's, else the interrupted run's, else what the worker has just seen."""
    if held is not None:
        return held.provenance.clock_ref_us
    for record in spool.records:
        if "clock_ref_us" in record:
            value: float | None = record["clock_ref_us"]
            return value
    return provenance.clock_ref_us


def _assemble(
    space: SearchSpace,
    target: Target,
    session: Session,
    jobs: Sequence[Job],
    held: LatencyTable | None,
    have: Mapping[tuple[str, str, str], Row],
    provenance: Provenance,
) -> LatencyTable:
    origin: Literal["simulated", "measured"] = "simulated" if target.simulated else "measured"
    gross = [finish(job.row, session.progress[job.key], origin=origin) for job in jobs if session.complete(job.key)]
    stubs = {row.key: row for row in (*have.values(), *gross) if row.kind == "stub"}
    rows = [increment(row, stubs) for row in gross]
    provenance = replace(provenance, finished_at=now())
    notes: dict[str, Any] = {"canary": session.canary_notes()} if target.plan.canary_every else {}
    table = LatencyTable.from_rows(rows, provenance, notes)
    return with_sums(table if held is None else held.merge(table), space, target.context)


def with_sums(table: LatencyTable, space: SearchSpace, context: Context) -> LatencyTable:
    """The table with notes on how well sums of its blocks foretell its networks."""
    if not isinstance(space, FactoredSpace):
        return table
    contexts = ("sandwich", "isolated") if context == "both" else (context,)
    found = {where: additivity(table, space, where) for where in contexts}
    told = {where: figures for where, figures in found.items() if figures is not None}
    if told:
        main = next(iter(told))
        table = replace(table, notes={**table.notes, "additivity": {"context": main, **told[main]}})
        if len(told) > 1:
            table = replace(table, notes={**table.notes, "additivity_isolated": told["isolated"]})
    return table


def identity(row: Row) -> tuple[str, str, str]:
    """By which a table tells rows apart."""
    return row.key, row.kind, row.context


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line() -> str:
    """The command that runs, shell-quoted; "" in a program that is not ``latbench``."""
    return shlex.join(["latbench", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "latbench" else ""


def _commit() -> str:
    """Commit of the latbench that runs, "+dirty" where its files differ from it; "" outside a checkout.

    Takes no lock (as ``git describe`` would): a commit of the user's beside it must not fail.
    """
    here = Path(__file__).parent
    words = [
        "git",
        "--no-optional-locks",
        "-C",
        str(here),
        "status",
        "--porcelain=v2",
        "--branch",
        "--untracked-files=no",
    ]
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    head, *lines = run.stdout.splitlines() or [""]
    commit = head.removeprefix("# branch.oid ")
    if run.returncode != 0 or not set(commit) <= set("0123456789abcdef"):
        return ""
    return commit[:12] + ("+dirty" if any(not line.startswith("#") for line in lines) else "")
