"""Does anything grow while one process profiles on and on? ``python benchmarks/soak.py --minutes 30``.

One parent profiles NAS-Bench-201 with ONNX Runtime again and again, each time into a new table, as ``latbench profile``
does it: spool, worker processes, chunks, table, merge. Between two profiles a worker that lives as long as the soak
measures the same blocks once more, so that a leak of the worker's own shows too: a profile's workers live for seconds.

After every cycle: resident and unique memory (RSS, USS) of the parent and of the long-lived worker, the peak memory of
the profile's workers, open file descriptors, threads and children of the parent, temporary files. Memory may grow by
2 % from the first cycles behind the settling time to the last ones, the rest not at all; else it ends with status 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from latbench import devices
from latbench.measure.base import Request, SamplingPlan
from latbench.profiling import Target, profile
from latbench.profiling.jobs import jobs_of
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable

LIMIT = 0.02  # growth of a memory figure
MEMORY = ("parent RSS", "parent USS", "worker RSS", "worker USS", "workers' peak")  # bytes
COUNTS = ("parent files", "worker files", "threads", "children", "temporary files")
SPACE = NASBench201Space()
N_NETWORKS = 2  # each of their blocks of samples takes a process of its own


def memory(pid: int) -> tuple[int, int]:
    """Resident and unique bytes of a process."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name] = int(value) << 10
    return found["Rss:"], found["Private_Clean:"] + found["Private_Dirty:"]


def n_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def children() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum(len((task / "children").read_text().split()) for task in tasks)


def endless(folder: Path, plan: SamplingPlan) -> Iterator[Request]:
    """Every block of the space, over and over, in one run and so in one worker process."""
    jobs = [job for job in jobs_of(SPACE) if not job.alone]
    for job in jobs:
        job.write(folder / f"{job.key}.onnx", "onnx", 0)
    order = 0
    while True:
        for job in jobs:
            yield Request(job.key, str(folder / f"{job.key}.onnx"), 0, order, plan, order)
            order += 1


def cycles(minutes: float, folder: Path) -> Iterator[dict[str, float]]:
    """One profile and one round of the long-lived worker after the other; what stands open and resident after each."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    for name in ("tmp", "models", "out"):
        (folder / name).mkdir()
    plan = SamplingPlan()
    target = Target("cpu", devices.detect().host.cpu_model, "onnxruntime", {"threads": 1}, plan)
    n_round = len([job for job in jobs_of(SPACE) if not job.alone])
    active_s, took_s = 0.0, []
    with target.launcher() as launcher:
        launcher.start()
        measured = launcher.measure(endless(folder / "models", plan))
        while active_s < 60 * minutes:
            begin = time.monotonic()
            out = folder / "out" / "t.parquet"
            profile(SPACE, target, out, networks=N_NETWORKS)
            peak = LatencyTable.read(out).frame["peak_memory_bytes"].max()
            out.unlink()
            taken = [next(measured) for _ in range(n_round)]
            assert all(one.status == "ok" for one in taken), taken
            pids = {one.pid for one in taken}
            if len(pids) > 1:
                raise SystemExit(f"the long-lived worker died and was replaced: pids {sorted(pids)}")
            (pid,) = pids
            took_s.append(time.monotonic() - begin)
            active_s += min(took_s[-1], 3 * statistics.median(took_s))  # no more where the machine stopped us meanwhile
            gc.collect()
            left = [path for part in ("tmp", "out") for path in (folder / part).rglob("*")]
            figures = (*memory(os.getpid()), *memory(pid), peak)
            counts = (n_files(os.getpid()), n_files(pid), threading.active_count(), children(), len(left))
            yield {
                "minute": active_s / 60,
                **dict(zip((*MEMORY, *COUNTS), (*figures, *counts), strict=True)),
            }
        measured.close()


def judged(seen: list[dict[str, float]], settle: float, limit: float = LIMIT) -> tuple[list[str], bool]:
    """A line for each figure, and whether all keep their limit.

    Memory is the median of the first and of the last fifth of the cycles behind `settle` minutes; a count is its
    largest after them against its largest before: what a cycle opens it must close.
    """
    after = [one for one in seen if one["minute"] > settle]
    if len(after) < 2 or len(after) == len(seen):
        raise SystemExit(f"{len(after)} of {len(seen)} cycles ended behind the settling time: give more --minutes")
    n = max(len(after) // 5, 1)
    lines, kept = [], True
    for name in MEMORY:
        first, last = (statistics.median(one[name] for one in part) for part in (after[:n], after[-n:]))
        growth = last / first - 1
        kept &= growth <= limit
        lines.append(f"{name:16s} {first / 2**20:8.1f} -> {last / 2**20:8.1f} MiB  {growth:+7.2%} (limit {limit:.0%})")
    for name in COUNTS:
        before, most = (max(one[name] for one in part) for part in (seen[: len(seen) - len(after)], after))
        kept &= most <= before
        lines.append(f"{name:16s} {before:8.0f} -> {most:8.0f}      (at most {before:.0f})")
    return lines, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--settle", type=float, default=5, help="minutes after which nothing may grow any more")
    parser.add_argument("--limit", type=float, default=100 * LIMIT, metavar="PERCENT", help="growth of memory, at most")
    args = parser.parse_args()
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        for cycle in cycles(args.minutes, Path(folder)):
            seen.append(cycle)
            told = "  ".join(f"{name} {cycle[name] / 2**20:.1f}" for name in MEMORY)
            print(f"{cycle['minute']:5.1f} min  {told} MiB", flush=True)
    lines, kept = judged(seen, args.settle, args.limit / 100)
    n_rows = len(jobs_of(SPACE)) + N_NETWORKS
    print(f"{len(seen)} profiles of {n_rows} rows in {seen[-1]['minute']:.1f} min; from minute {args.settle:g} on:")
    print("\n".join(lines))
    print("flat" if kept else "GROWING")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
