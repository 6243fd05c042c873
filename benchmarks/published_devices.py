"""Prediction of whole networks on published devices: error, rank correlation and coverage beside the best known.

    python benchmarks/published_devices.py --data DIR [--space fbnet] [--n 10 25] [--seeds 5] [--order] [--out FILE]

DIR holds fbnet_latency.parquet, nb201_latency.parquet and ofa_latency.parquet (HELP's latencies: one column per device
and batch, one row per network in measuring order). Per seed 1,000 networks are kept out and n others measured: random
rows; in NAS-Bench-201 whole classes of equal cells, where only edges on a way from the cell's input to its output
count, and no cell without such a way (its cost is 0 or everything's, by the runtime). With --order the model is told
every network's place in the measuring order, the held-out ones' too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from latbench.oracle.conformal import coverage
from latbench.oracle.features import live_cells
from latbench.oracle.learned import LearnedOracle
from latbench.oracle.learned_gp import Measured
from latbench.provenance import Provenance
from latbench.spaces.base import FactoredSpace
from latbench.spaces.fbnet import FBNetSpace
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space

NS = (10, 25, 50, 100, 300, 900)
HELD_OUT = 1000
CONFIDENCE = 0.9

# MAPE, %, at NS and with the whole pool: the better of a ridge on physical features and one-hot decisions, and a
# Gaussian process with linear, Hamming and RBF kernels; mean of 5 seeds.
BEST_KNOWN = """\
fbnet
  1080ti_1         4.36   2.30   1.90   1.75   1.62   1.58   1.56
  1080ti_32        4.10   2.28   1.88   1.60   1.46   1.37   1.31
  1080ti_64        5.50   2.05   1.41   1.22   1.00   0.91   0.83
  titanx_1         3.27   0.81   0.60   0.44   0.45   0.39   0.34
  titanx_32        4.20   1.80   1.21   1.03   0.74   0.62   0.54
  titanx_64        5.80   2.85   2.14   1.95   1.63   1.53   1.45
  silver_4114      5.06   4.16   3.36   3.02   2.54   2.35   2.12
  silver_4210r     4.42   3.26   2.28   1.88   1.09   0.81   0.72
  gold_6240        5.42   3.99   2.96   2.55   2.17   1.95   1.61
  samsung_a50      7.41   6.85   6.22   6.65   4.09   3.99   3.46
  samsung_s7      14.63  11.86  12.10   9.95   7.84   7.75   7.49
  essential_ph_1  13.10  12.12  11.21  10.48   9.40   9.21   9.03
  pixel3           7.52   3.31   2.30   1.49   0.00   0.00   0.00
nasbench201
  1080ti_1         5.46   2.28   2.22   1.85   1.72   1.68   1.64
  1080ti_32        8.69   4.45   3.24   2.84   2.41   2.29   2.00
  1080ti_256       4.99   0.35   0.24   0.17   0.12   0.08   0.04
  titanx_1         6.95   3.58   2.93   2.75   2.49   2.43   2.33
  titanx_32        6.58   3.36   3.14   2.71   2.54   2.44   2.39
  titanx_256       5.95   1.37   1.02   1.01   0.86   0.84   0.78
  silver_4114     19.44   9.85   8.67   8.78   8.00   7.87   7.50
  silver_4210r     9.10   4.32   3.83   2.72   2.42   2.13   1.38
  gold_6240       19.64   9.66   8.00   7.47   7.11   7.02   5.71
  samsung_a50     24.14   6.49   4.50   3.83   3.37   3.12   2.14
  samsung_s7      22.09  14.03   8.88   7.76   7.14   6.80   6.06
  essential_ph_1  19.47  13.05   9.82   9.59   9.04   8.74   8.33
  pixel3          32.98  18.03  17.21  15.13  13.55  11.51   7.73
ofa_mbv3
  2080ti_1        10.13   9.95   9.20   7.81   7.76   7.53   7.04
  2080ti_32       19.05  11.82  12.41  12.32   9.37   8.37   7.33
  2080ti_64        7.35   6.53   4.33   3.46   2.81   2.52   1.82
  v100_1           6.90   5.93   5.20   4.88   4.34   4.26   4.06
  v100_32          7.77   5.61   4.51   3.94   3.23   3.10   2.64
  v100_64          4.66   2.07   1.20   0.85   0.71   0.56   0.40
"""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def best_known() -> dict[tuple[str, str], tuple[float, ...]]:
    """(space, set) -> figures at NS, then the floor."""
    found, space = {}, ""
    for line in BEST_KNOWN.splitlines():
        name, *figures = line.split()
        if figures:
            found[space, name] = tuple(map(float, figures))
        else:
            space = name
    return found


def load(folder: Path) -> Iterator[tuple[FactoredSpace, Ints, pd.DataFrame]]:
    """(space, (N, D) architectures, rows) of each published file."""
    fbnet = pd.read_parquet(folder / "fbnet_latency.parquet")
    yield FBNetSpace(), np.array([FBNetSpace.from_columns(row) for row in fbnet.to_dict("records")]), fbnet
    cells = pd.read_parquet(folder / "nb201_latency.parquet")
    yield NASBench201Space(), cells[[f"e{i}" for i in range(6)]].to_numpy(np.int64), cells
    ofa = pd.read_parquet(folder / "ofa_latency.parquet")
    rows = ofa.to_dict("records")
    yield OFAMobileNetV3Space(), np.array([OFAMobileNetV3Space.from_columns(row) for row in rows]), ofa


def splitter(space: FactoredSpace, archs: Ints) -> Callable[[int], tuple[Ints, Ints]]:
    """seed -> (rows that may be measured, in random order; rows kept out)."""
    if not isinstance(space, NASBench201Space):

        def by_row(seed: int) -> tuple[Ints, Ints]:
            rows = np.random.default_rng(seed).permutation(len(archs))
            return rows[HELD_OUT:], rows[:HELD_OUT]

        return by_row
    cells = useful_cells(archs)
    usable = np.flatnonzero(cells.any(axis=1))
    _, classes = np.unique(cells[usable], axis=0, return_inverse=True)

    def by_class(seed: int) -> tuple[Ints, Ints]:
        rng = np.random.default_rng(seed)
        rank = rng.permutation(classes.max() + 1)[classes.ravel()]
        cut = np.searchsorted(np.bincount(rank).cumsum(), HELD_OUT) + 1
        rows = rng.permutation(len(usable))
        return usable[rows[rank[rows] >= cut]], usable[rows[rank[rows] < cut]][:HELD_OUT]

    return by_class


def useful_cells(archs: Ints) -> Ints:
    """Edges that carry the cell's input to its output; the others ``none``. All zero: the cell has no way through."""
    cells = archs.copy()
    cells[:, 2] *= cells[:, 0] > 0
    cells[:, 4] *= cells[:, 0] > 0
    cells[:, 5] *= (cells[:, 1] > 0) | (cells[:, 2] > 0)
    cells, connected = live_cells(cells)
    return cells * connected[:, None]


def run(
    space: FactoredSpace, archs: Ints, rows: pd.DataFrame, name: str, ns: list[int], seeds: int, order: bool
) -> Iterator[dict[str, object]]:
    """One line of figures per n, each the mean over the seeds."""
    latency, split = rows[name].to_numpy(np.float64), splitter(space, archs)
    place = np.arange(len(rows), dtype=np.float64)
    for n in ns:
        figures = []
        for seed in range(seeds):
            pool, out = split(seed)
            train = pool[:n]
            began = time.perf_counter()
            measured = Measured(archs[train], latency[train], place[train] if order else None)
            oracle = LearnedOracle.of(space, Provenance("", "", ""), measured)
            fit_s = time.perf_counter() - began
            at = place[out] if order else None
            predicted = oracle.latencies(archs[out], at)
            found = oracle.interval(archs[out], CONFIDENCE, at)
            figures.append(
                (
                    100 * np.mean(abs(predicted / latency[out] - 1)),
                    spearmanr(predicted, latency[out]).statistic,
                    np.nan if found is None else 100 * coverage(found, latency[out]),
                    fit_s,
                )
            )
        mape, spearman, covered, fit_s = np.mean(figures, axis=0)
        yield {
            "space": space.name, "set": name, "n": n, "seeds": seeds, "order_given": order, "mape_percent": mape,
            "spearman": spearman, "coverage_90_percent": covered, "fit_s": fit_s,
        }  # fmt: skip


def summary(table: pd.DataFrame) -> Iterator[str]:
    """Per space and n: medians over its sets, the share of sets at or below the best known, mean coverage."""
    for (space, n), part in table.groupby(["space", "n"], sort=False):
        shares = []
        for kind, column in (("best known", "best_known_percent"), ("floor", "floor_percent")):
            reached = (part["mape_percent"].round(2) <= part[column]).mean()  # the figures have two places
            shares.append(f"{kind} {part[column].median():.2f}, at or below on {reached:.0%}")
        yield (
            f"{space:12} n={n:<4} median {part['mape_percent'].median():6.2f} %  ({'; '.join(shares)})"
            f"  coverage {part['coverage_90_percent'].mean():.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--space", choices=[c.name for c in (FBNetSpace, NASBench201Space, OFAMobileNetV3Space)])
    parser.add_argument("--set", dest="only", help="one device and batch, such as pixel3")
    parser.add_argument("--n", type=int, nargs="+", default=list(NS[:-1]))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--order", action="store_true", help="tell the model the measuring order")
    parser.add_argument("--out", type=Path, help="the figures as parquet")
    options = parser.parse_args()

    known, lines = best_known(), []
    print("$ python", " ".join(sys.argv))
    print("space        set                n   MAPE %   known   floor    rho  in 90 %  fit s")
    for space, archs, rows in load(options.data):
        for name in (name for s, name in known if s == space.name):
            if (options.space or space.name) != space.name or (options.only or name) != name:
                continue
            for line in run(space, archs, rows, name, options.n, options.seeds, options.order):
                figures = dict(zip((*NS, "floor"), known[space.name, name], strict=True))
                line |= {"best_known_percent": figures.get(line["n"], np.nan), "floor_percent": figures["floor"]}
                lines.append(line)
                print(
                    "{space:12} {set:15} {n:4} {mape_percent:8.3f} {best_known_percent:7.2f} {floor_percent:7.2f}"
                    " {spearman:6.3f} {coverage_90_percent:8.1f} {fit_s:6.2f}".format(**line),
                    flush=True,
                )
    table = pd.DataFrame(lines)
    print("\n".join(["", *summary(table)]))
    if options.out:
        table.to_parquet(options.out, index=False)


if __name__ == "__main__":
    main()
