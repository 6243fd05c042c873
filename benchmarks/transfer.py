"""Predicting a new device from few measurements and other devices' tables: transfer against no transfer.

    python benchmarks/transfer.py --data DIR [--spaces fbnet,nb201,ofa] [--counts 10,20,50] [--seeds 5]

DIR holds HELP's latencies as fbnet_latency.parquet, nb201_latency.parquet and ofa_latency.parquet (one row per
network, one column per device and batch size). Protocol: the target's family of devices is left out of the sources;
1,000 random networks are held out (in NAS-Bench-201 whole classes of equal cells), n of the others are the new
device's measurements; mean over seeds. Sources are other devices' whole columns, which hold the held-out networks too,
as HELP's do: each becomes a function of the architecture before it is used, and no measured value of a source is ever
looked up. "no transfer" is the learned oracle on the same n networks.

Families are read in two ways: "by device" (1080ti, titanx, silver, gold, samsung, essential, pixel, 2080ti, v100: any
batch size), and "by kind", where silver and gold are one, because both are Xeons.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from latbench.oracle.conformal import coverage
from latbench.oracle.factors import FactorOracle
from latbench.oracle.features import live_cells
from latbench.oracle.learned import LearnedOracle
from latbench.oracle.transfer import TransferOracle
from latbench.oracle.transfer_sources import source_model
from latbench.provenance import Provenance
from latbench.spaces.base import SearchSpace
from latbench.spaces.fbnet import FBNetSpace
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space
from latbench.tables import LatencyTable, Row

Archs = NDArray[np.int64]
Figures = tuple[float, float, float]  # MAPE %, Spearman, coverage of the 90 % interval
READINGS = {"by device": {}, "by kind": {"silver": "xeon", "gold": "xeon"}}
# The figures to beat, MAPE % and Spearman by n: the best of scaling, mixing, principal components and a Gaussian
# process with the sources' components in its kernel.
KNOWN = {
    "fbnet": {10: (1.54, 0.977), 20: (1.32, 0.987), 50: (0.95, 0.988)},
    "nb201": {10: (3.28, 0.984), 20: (2.84, 0.985), 50: (2.72, 0.986)},
    "ofa": {10: (4.48, 0.952), 20: (4.16, 0.961), 50: (3.84, 0.964)},
}


def read(data: Path, name: str) -> tuple[SearchSpace, Archs, pd.DataFrame]:
    """The space, (N, D) architectures, and one column of ms per device and batch size."""
    frame = pd.read_parquet(data / f"{name}_latency.parquet")
    space: SearchSpace
    if name == "fbnet":
        space = FBNetSpace()
        archs = [FBNetSpace.from_columns(row) for row in frame.to_dict("records")]
    elif name == "ofa":
        space = OFAMobileNetV3Space(resolution=int(frame["r"].max()))
        archs = [OFAMobileNetV3Space.from_columns(row) for row in frame.to_dict("records")]
    else:
        space = NASBench201Space()
        archs = frame[[f"e{i}" for i in range(6)]].to_numpy()
    return space, np.array(archs, np.int64), frame.iloc[:, frame.columns.get_loc("macs") + 1 :]


def table(space: SearchSpace, device: str, archs: Archs, ms: NDArray[np.float64]) -> LatencyTable:
    """As an import would make it."""
    batch = device.rpartition("_")[2]
    space = replace(space, batch=int(batch)) if batch.isdecimal() and int(batch) in (1, 32, 64, 256) else space
    provenance = Provenance("", device, "HELP", space=space.name, settings=space.settings())
    rows = [
        Row(key=str(i), kind="network", signature="", arch=tuple(a), latency_ms=float(y), origin="imported")
        for i, (a, y) in enumerate(zip(archs.tolist(), ms, strict=True))
    ]
    return LatencyTable.from_rows(rows, provenance)


def split(name: str, archs: Archs, seed: int, n: int, held_out: int) -> tuple[Archs, Archs]:
    """Positions of the n measured and of the held-out networks; equal networks are on one side."""
    same = np.arange(len(archs))
    if name == "nb201":
        cells, connected = live_cells(archs)
        same = np.unique(cells * connected[:, None], axis=0, return_inverse=True)[1].ravel()
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.permutation(same.max() + 1)[same], kind="stable")
    out = order[:held_out]
    pool = order[~np.isin(same[order], same[out])]
    return rng.choice(pool, n, replace=False), out


def figures(model: Any, archs: Archs, ms: NDArray[np.float64]) -> Figures:
    predicted, interval = model.latencies(archs), model.interval(archs, 0.9)
    covered = float("nan") if interval is None else coverage(interval, ms)
    return 100 * float(np.abs(predicted / ms - 1).mean()), float(spearmanr(predicted, ms)[0]), covered


def evaluate(data: Path, name: str, counts: Sequence[int], seeds: int, held_out: int) -> None:
    space, archs, frame = read(data, name)
    devices = list(frame.columns)
    full = {d: table(space, d, archs, frame[d].to_numpy(np.float64)) for d in devices}
    models: dict[str, FactorOracle] = {d: source_model(t) for d, t in full.items()}
    for n in counts:
        rows = {d: [] for d in devices}  # per device, per seed, (1 + readings) x Figures
        for device in devices:
            ms = frame[device].to_numpy(np.float64)
            for seed in range(seeds):
                few, out = split(name, archs, seed, n, held_out)
                measured = full[device].take(few)
                found = [figures(LearnedOracle.fit(measured), archs[out], ms[out])]
                fitted: dict[tuple[str, ...], Figures] = {}
                for renamed in READINGS.values():
                    others = tuple(d for d in devices if family(d, renamed) != family(device, renamed))
                    if others not in fitted:
                        model = TransferOracle.fit(measured, sources=[models[d] for d in others], seed=seed)
                        fitted[others] = figures(model, archs[out], ms[out])
                    found.append(fitted[others])
                rows[device].append(found)
        report(name, n, {d: np.mean(r, axis=0) for d, r in rows.items()})


def family(device: str, renamed: dict[str, str]) -> str:
    first = device.partition("_")[0]
    return renamed.get(first, first)


def report(name: str, n: int, means: dict[str, NDArray[np.float64]]) -> None:
    """`means`: per device (1 + readings, 3)."""
    print(f"\n{name}, n = {n}: MAPE % / Spearman / coverage of the 90 % interval")
    print(f"{'':16}{'no transfer':24}" + "".join(f"{r:24}{'change':10}" for r in READINGS))
    for device, m in means.items():
        print(f"{device:16}{cell(m[0]):24}" + "".join(f"{cell(r):24}{r[0] / m[0, 0] - 1:<+10.1%}" for r in m[1:]))
    stacked = np.stack(list(means.values()))  # (devices, 1 + readings, 3)
    middle, mean = np.median(stacked, axis=0), stacked.mean(axis=0)
    line = [cell((*m[:2], c)) for m, c in zip(middle, mean[:, 2], strict=True)]
    worst = [f"max {change:+.1%}" for change in (stacked[:, 1:, 0] / stacked[:, :1, 0] - 1).max(axis=0)]
    print(f"{'median':16}{line[0]:24}" + "".join(f"{a:24}{b:10}" for a, b in zip(line[1:], worst, strict=True)))
    if n in KNOWN[name]:
        print(f"{'best known':16}{'':24}{KNOWN[name][n][0]:5.2f} / {KNOWN[name][n][1]:.3f}", flush=True)


def cell(f: Any) -> str:
    return f"{f[0]:5.2f} / {f[1]:.3f} / {f[2]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--spaces", default="fbnet,nb201,ofa")
    parser.add_argument("--counts", default="10,20,50")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=1000)
    args = parser.parse_args()
    for name in args.spaces.split(","):
        evaluate(args.data, name, [int(n) for n in args.counts.split(",")], args.seeds, args.held_out)


if __name__ == "__main__":
    main()
