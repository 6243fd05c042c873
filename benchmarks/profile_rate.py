"""How fast rows are measured, and where the time goes: ``python benchmarks/profile_rate.py [--rounds 2]``.

200 blocks of mixed kinds, two runs each, as ``latbench profile`` measures them by default. Efficiency is the share of
wall time inside timed inference.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

from blocks200 import sample_jobs

from latbench import devices
from latbench.measure.base import Measurement, SamplingPlan
from latbench.profiling import Target
from latbench.profiling.session import CANARY, Session
from latbench.spool import Spool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="blocks of samples per run; 5: careful")
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--cprofile", action="store_true", help="where the parent spends its time")
    args = parser.parse_args()
    plan = SamplingPlan(rounds=args.rounds)
    jobs = sample_jobs(args.blocks)
    machine = devices.detect()
    target = Target("cpu", machine.host.cpu_model, "onnxruntime", {"threads": 1}, plan)
    taken: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder, target.launcher() as launcher:
        clock = launcher.start()["clock_probe_us"]
        with Spool(Path(folder) / "rate.parquet", {}) as spool:

            def record(measurement: Measurement) -> None:
                spool.append(measurement.to_dict())
                taken.append(measurement)

            session = Session(launcher, plan, "onnx", clock, record)
            profiler = cProfile.Profile()
            if args.cprofile:
                profiler.enable()
            cpu, begin = time.process_time(), time.perf_counter()
            session.measure(jobs)
            wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
            profiler.disable()
    timed = sum(sum(m.samples_ms) * m.repeat for m in taken) / 1e3
    load = sum(m.load_ms for m in taken) / 1e3
    warm = sum(m.warmup_ms for m in taken) / 1e3
    canary = sum(sum(m.samples_ms) * m.repeat + m.load_ms + m.warmup_ms for m in taken if m.key == CANARY.key) / 1e3
    print(f"{len(jobs)} blocks, {plan.runs} runs x {plan.rounds} rounds, {len(taken)} blocks of samples, {wall:.2f} s")
    print(f"rate        {60 * len(jobs) / wall:6.0f} blocks/min    (aim: 1500; careful, --rounds 5: 600)")
    print(f"efficiency  {timed / wall:6.1%} of wall time inside timed inference")
    print(f"warm-up     {warm / wall:6.1%}")
    print(f"load        {load / wall:6.1%} sessions, buffers")
    print(f"rest        {1 - (timed + warm + load) / wall:6.1%} worker start, lowering, probes, pipe, spool")
    print(f"of which canary {canary / wall:.1%}; parent's own CPU {cpu / wall:.1%} of a core")
    ok = [m for m in taken if m.status == "ok"]
    n_flag = sum(bool(m.warnings) for m in ok)
    print(f"{len(taken) - len(ok)} failed, {n_flag} flagged, {len(session.finished)} rows")
    if args.cprofile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
