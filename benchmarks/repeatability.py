"""Do two passes agree? ``python benchmarks/repeatability.py`` (about ten minutes).

Two independent passes over the 200 blocks of ``blocks200.py``, each in processes of its own, minutes apart: at the
default settings of ``latbench profile``, at the careful ones (``--rounds 5``), and at the default ones with a busy
process on every other core. Printed: |log ratio| of the clock-normalised and of the raw latencies, and the share of
rows whose second pass falls into the first one's stated 95 % interval.

``--tables A.parquet B.parquet`` compares two tables made by ``latbench profile`` instead, rows in context included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from blocks200 import sample_jobs

from latbench import devices
from latbench.measure.base import SamplingPlan
from latbench.profiling import Target
from latbench.profiling.rows import finish
from latbench.profiling.session import Session
from latbench.tables import LatencyTable

SETTINGS = {"default": (2, 0), "careful": (5, 0), "busy": (2, 1)}  # rounds, busy processes per spare core
AIMS = {"default": (0.006, 0.025, 1500), "careful": (0.004, 0.020, 600), "busy": (0.006, 0.025, 0)}


def one_pass(rounds: int, seed: int, out: Path) -> None:
    """Measures the 200 blocks; writes key, raw and normalised latency, interval, and the rate."""
    plan = SamplingPlan(rounds=rounds, seed=seed)
    jobs = sample_jobs()
    target = Target("cpu", devices.detect().host.cpu_model, "onnxruntime", {"threads": 1}, plan)
    with target.launcher() as launcher:
        clock = launcher.start()["clock_probe_us"]
        session = Session(launcher, plan, "onnx", clock)
        begin = time.perf_counter()
        session.measure(jobs)
        wall = time.perf_counter() - begin
    rows = [finish(job.row, session.progress[job.key]) for job in jobs]
    columns = ("key", "block_type", "latency_ms", "latency_ref_ms", "ci_low_ms", "ci_high_ms")
    frame = pd.DataFrame({name: [getattr(row, name) for row in rows] for name in columns})
    scale = 1 / clock  # at one and the same clock for both passes
    for name in ("latency_ref_ms", "ci_low_ms", "ci_high_ms"):
        frame[name] *= scale
    out.write_text(json.dumps({"rate": 60 * len(jobs) / wall, "rows": frame.to_dict("list")}))


def spin() -> None:
    """Keeps one core busy with arithmetic and memory traffic until it is killed."""
    room = np.zeros(1 << 20)
    while True:
        room += 1.0


def run(name: str, seed: int) -> tuple[float, pd.DataFrame]:
    rounds, busy = SETTINGS[name]
    spinners = [multiprocessing.Process(target=spin, daemon=True) for _ in range(busy * (os.cpu_count() or 1) // 2)]
    for spinner in spinners:
        spinner.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "pass.json"
            command = [sys.executable, __file__, "--pass", str(rounds), "--seed", str(seed), "--out", str(out)]
            subprocess.run(command, check=True)
            raw = json.loads(out.read_text())
    finally:
        for spinner in spinners:
            spinner.kill()
    return raw["rate"], pd.DataFrame(raw["rows"])


def compare(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    """Figures of two passes over the same keys."""
    both = first.merge(second, on=list({"key", "context", "kind"} & set(first.columns)), suffixes=("", "_2"))
    normal = np.abs(np.log(both["latency_ref_ms_2"] / both["latency_ref_ms"]))
    raw = np.abs(np.log(both["latency_ms_2"] / both["latency_ms"]))
    inside = (both["latency_ref_ms_2"] >= both["ci_low_ms"]) & (both["latency_ref_ms_2"] <= both["ci_high_ms"])
    return {
        "rows": len(both),
        "median": float(normal.median()),
        "p95": float(normal.quantile(0.95)),
        "raw_median": float(raw.median()),
        "raw_p95": float(raw.quantile(0.95)),
        "inside": float(inside.mean()),
    }


def line(name: str, figures: dict[str, float]) -> str:
    return (
        f"{name:24s} {figures['rows']:5.0f} rows   clock-normalised {figures['median']:.2%} / {figures['p95']:.2%}   "
        f"raw {figures['raw_median']:.2%} / {figures['raw_p95']:.2%}   inside the interval {figures['inside']:.1%}"
    )


def tables(first: Path, second: Path) -> None:
    frames = []
    for path in (first, second):
        table = LatencyTable.read(path)
        frame = table.frame[table.frame["status"] == "ok"].copy()
        clock = table.provenance.clock_ref_us or 1.0
        for name in ("latency_ref_ms", "gross_ref_ms", "ci_low_ms", "ci_high_ms"):
            frame[name] /= clock
        frames.append(frame)
    for (kind, context), part in frames[0].groupby(["kind", "context"]):
        other = frames[1][(frames[1]["kind"] == kind) & (frames[1]["context"] == context)]
        print(line(f"{kind} ({context})", compare(part, other)))
        if context == "sandwich":
            gross = [f.drop(columns=["latency_ref_ms", "latency_ms"]) for f in (part, other)]
            gross = [f.rename(columns={"gross_ref_ms": "latency_ref_ms", "gross_ms": "latency_ms"}) for f in gross]
            figures = compare(gross[0], gross[1])
            print(f"{'  the same, stubs in it':24s} clock-normalised {figures['median']:.2%} / {figures['p95']:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pass", dest="rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default,careful,busy")
    parser.add_argument("--tables", nargs=2, type=Path)
    args = parser.parse_args()
    if args.tables:
        tables(*args.tables)
        return
    if args.rounds:
        one_pass(args.rounds, args.seed, args.out)
        return
    names = args.settings.split(",")
    passes = {(name, which): run(name, which) for which in (0, 1) for name in names}
    print("|log ratio| of two passes: median / 95th percentile")
    for name in names:
        (rate, first), (_, second) = passes[name, 0], passes[name, 1]
        aim = AIMS[name]
        print(line(name, compare(first, second)), f"  {rate:.0f} blocks/min")
        print(f"{'':24s} aim: {aim[0]:.1%} / {aim[1]:.1%}, inside >= 90 %" + (f", >= {aim[2]}/min" if aim[2] else ""))


if __name__ == "__main__":
    main()
