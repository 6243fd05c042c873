"""How large may a table and a profile be? ``python benchmarks/scale.py [--rows 1000000]`` (20 minutes, 3 GB of disk).

Two tables of a million rows are made through ``LatencyTable`` itself: every block, chain and stub of MobileNet-v1, 40
of its networks, and beside them blocks like its own at other widths and sizes, each row with the samples, probes and
flags that a profile stores (two runs of two blocks of samples, 128 samples). The second is a later pass over them.

Each question is then put in a fresh process, with the seconds it took and the peak of resident memory; the aim is an
opened table within 2 s and 1 GB. At last spaces of about 100, 1,000, 5,000 and 20,000 blocks are profiled with the
roofline, which takes no time itself: what a row costs the parent must not grow with their number.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latbench.compare import compare
from latbench.measure.base import SamplingPlan
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.lut import LutOracle
from latbench.profiling import Target, profile
from latbench.profiling.jobs import estimate_s, jobs_of
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable, Provenance, Row

AIM_S, AIM_GB = 2.0, 1.0
SPACE = MobileNetV1Space(resolution=96)
N_NETWORKS, N_QUERIES = 40, 10_000
BLOCKS, SAMPLES = 4, 32  # per row, and per block
LEVELS = {100: 3, 1000: 11, 5000: 26, 20_000: 60}  # blocks, roughly, by levels of width


def made_up(n: int, seed: int) -> Iterator[Row]:
    """`n` rows; `seed` moves the noise alone, so two tables hold the same rows of the same true latencies."""
    fixed, noise = np.random.default_rng(0), np.random.default_rng(seed + 1)
    archs = [SPACE.sample(fixed) for _ in range(N_NETWORKS)]
    jobs = jobs_of(SPACE, networks=archs)
    blocks = [job.row for job in jobs if job.row.kind == "block"]
    ms = {job.row.key: 1e3 * estimate_s(job, SamplingPlan()) / 4 for job in jobs}
    for job in jobs:
        yield _measured(job.row, ms[job.row.key], noise)
    for i in range(n - len(jobs)):
        like = blocks[int(fixed.integers(len(blocks)))]
        signature = f"{like.signature};{i}"
        key = hashlib.sha256(signature.encode()).hexdigest()[:16]
        scale = float(fixed.lognormal(0, 0.7))
        row = replace(like, key=key, signature=signature, macs=int(scale * (like.macs or 0)))
        if i % 1000 == 999:
            yield replace(row, status="timeout", stage="warmup", error="no answer within 60 s; the worker was killed")
        else:
            yield _measured(row, scale * ms[like.key], noise)


def _measured(row: Row, ms: float, rng: np.random.Generator) -> Row:
    """The row as ``profiling.rows.finish`` leaves it: 0.5 % between blocks, 1 % within, one block in 50 flagged."""
    of_block = np.repeat(rng.normal(ms, 0.005 * ms, BLOCKS), SAMPLES)
    samples = np.abs(of_block * (1 + 0.01 * np.abs(rng.standard_normal(BLOCKS * SAMPLES))))
    probes = rng.normal(6.0, 0.05, BLOCKS * 8)
    centre, half = float(np.median(samples)), 0.008 * ms
    noisy = rng.random() < 0.05
    return replace(
        row, latency_ms=centre, latency_ref_ms=centre, ci_low_ms=centre - half, ci_high_ms=centre + half,
        gross_ms=1.1 * centre, gross_ref_ms=1.1 * centre, mean_ms=float(samples.mean()), std_ms=float(samples.std()),
        min_ms=float(samples.min()), p90_ms=float(np.quantile(samples, 0.9)), n_samples=len(samples), n_blocks=BLOCKS,
        n_runs=2, run_spread=0.004, repeat=3, clock="host", clock_probe_us=float(probes.mean()),
        order=int(rng.integers(10**7)), started_at=1.79e9 + float(rng.random()), stop_reason="converged",
        first_inference_ms=3 * centre, load_ms=1.2, wait_ms=0.0, peak_memory_bytes=80 << 20,
        warnings=("noise>ci",) if noisy else (), samples_ms=tuple(samples.tolist()), block_sizes=(SAMPLES,) * BLOCKS,
        block_run=(0, 0, 1, 1), probes_us=tuple(probes.tolist()), probe_at=(0, 5, 9, 14, 18, 23, 27, SAMPLES) * BLOCKS,
        block_flags=("", "", "", "foreign_load" if rng.random() < 0.08 else ""),
    )  # fmt: skip


def provenance(seed: int) -> Provenance:
    conditions: dict[str, Any] = {"versions": {"onnxruntime": "1.31"}, "options": {"threads": 1}}
    settings = SPACE.settings()
    return Provenance(
        "cpu", "made up", "onnxruntime", space=SPACE.name, settings=settings, clock_ref_us=6.0, seed=seed, **conditions
    )


# ---- the questions, each in a process of its own ----


def write(files: list[Path], n: int) -> str:
    for seed, path in enumerate(files):
        LatencyTable.from_rows(made_up(n, seed), provenance(seed)).write(path)
    return ", ".join(f"{path.stat().st_size / 1e6:.0f} MB" for path in files)


def opened(files: list[Path], n: int) -> str:
    return f"{len(LatencyTable.read(files[0]))} rows"


def filtered(files: list[Path], n: int) -> str:
    table = LatencyTable.read(files[0])
    failed = table.select(status="timeout")
    blocks = table.select(kind="block", status="ok")
    stems = blocks.take(np.flatnonzero(blocks.frame_of("block_type")["block_type"] == "stem"))
    row = next(stems.rows())
    found = f"{row.key}: {table[row.key]:.3f} ms of {len(row.samples_ms)} samples"
    return f"{len(failed)} failed, {len(stems)} stems, {found}"


def shown(files: list[Path], n: int) -> str:
    from latbench.cli import show

    with redirect_stdout(io.StringIO()) as text:
        show.command.main(
            [str(files[0]), "--sort", "latency_ms", "--where", "latency_ms>0.5ms", "--status", "ok"],
            standalone_mode=False,
        )
    return text.getvalue().splitlines()[-1]


def looked_up(files: list[Path], n: int) -> str:
    return _asked(LutOracle.fit(LatencyTable.read(files[0])))


def calibrated(files: list[Path], n: int) -> str:
    return _asked(CalibratedOracle.fit(LatencyTable.read(files[0])))


def _asked(oracle: Any) -> str:
    options = [len(decision.options) for decision in SPACE.decisions]
    archs = np.random.default_rng(0).integers(0, options, (N_QUERIES, len(options)))
    begin = time.perf_counter()
    found = oracle.latencies(archs)
    return f"{N_QUERIES} networks in {time.perf_counter() - begin:.2f} s, mean {found.mean():.2f} ms"


def compared(files: list[Path], n: int) -> str:
    found = compare(*(LatencyTable.read(path) for path in files))
    return ", ".join(f"{count} {verdict}" for verdict, count in found.counts.items())


def merged(files: list[Path], n: int) -> str:
    old, new = (LatencyTable.read(path) for path in files)
    return f"{len(old.merge(new))} rows"


def profiled(files: list[Path], n: int) -> str:
    """In memory where there is room, so that the disk's syncs are not in it; a row is four blocks of samples."""
    root = next((str(path) for path in (Path("/dev/shm"),) if path.is_dir()), None)
    space = MobileNetV1Space(resolution=32, levels=LEVELS[n], min_width=0.1, max_width=2.0)
    target = Target("cpu", "made up", "roofline", {}, SamplingPlan())
    with tempfile.TemporaryDirectory(dir=root) as folder:
        cpu, begin = time.process_time(), time.perf_counter()
        rows = len(profile(space, target, Path(folder) / "t.parquet").table)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - begin
    return f"{rows} rows, each {1e3 * cpu / rows:.2f} ms of the parent's CPU, {1e3 * wall / rows:.2f} ms in all"


TASKS: dict[str, Callable[[list[Path], int], str]] = {
    "write": write, "open": opened, "filter": filtered, "show": shown, "lut": looked_up, "calibrated": calibrated,
    "compare": compared, "merge": merged, "profile": profiled,
}  # fmt: skip
AIMED = ("open", "filter", "show", "lut", "calibrated")


def peak_gb() -> float:
    """Of this process's own memory: a parent's, which getrusage may tell, is not in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e6
    raise OSError("this system does not tell a process's peak memory: /proc/self/status has no VmHWM")


def asked(name: str, n: int, folder: Path) -> str:
    """A question's line, from a process of its own."""
    command = [sys.executable, __file__, "--task", name, "--rows", str(n), "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return f"ended with status {done.returncode}"
    found = json.loads(done.stdout.splitlines()[-1])
    return f"{found['seconds']:7.2f} s  peak {found['gb']:5.2f} GB  {found['told']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the tables here, and use those that are there")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        files = [args.folder / "first.parquet", args.folder / "second.parquet"]
        begin = time.perf_counter()
        told = TASKS[args.task](files, args.rows)
        print(json.dumps({"seconds": time.perf_counter() - begin, "gb": peak_gb(), "told": told}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        print(f"{args.rows} rows; each line a fresh process")
        for name in args.tasks.split(","):
            if name == "write" and (folder / "second.parquet").exists():
                continue
            for n in LEVELS if name == "profile" else [args.rows]:
                print(f"{name:10s} {asked(name, n, folder)}", flush=True)
        print(f"aim: open within {AIM_S:g} s, and {', '.join(AIMED)} within {AIM_GB:g} GB")


if __name__ == "__main__":
    main()
