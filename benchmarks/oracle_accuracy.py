"""How well oracles foretell networks of a measured table: held-out error by the number of networks they may see.

    python benchmarks/oracle_accuracy.py TABLE [--second TABLE2] [--held-out 200] [--counts 0,25,100,200] [--seeds 5]

TABLE: latbench profile --space S --networks 420 [--context both]. Beside our oracles: sums of isolated blocks (where
the table has them), AOWS's pairwise fit, a line through the MACs, and boosting and a forest on the decisions (where
scikit-learn is installed). With a second table of the same networks, the floor: how much two passes differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from latbench import plugins
from latbench.errors import LatbenchError
from latbench.oracle.base import space_of
from latbench.oracle.conformal import coverage
from latbench.oracle.lut import LutOracle
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable

Floats = NDArray[np.float64]
Predict = Callable[[NDArray[np.int64]], Floats]
Fitted = tuple[Predict, Callable[[NDArray[np.int64]], tuple[Floats, Floats] | None]]
Fit = Callable[[LatencyTable], Fitted]


def ours(name: str) -> Fit:
    def fit(table: LatencyTable) -> Fitted:
        model = plugins.load("latbench.oracles", name).fit(table)
        return model.latencies, lambda archs: model.interval(archs, 0.9)

    return fit


def sums(context: str) -> Fit:
    def fit(table: LatencyTable) -> Fitted:
        return LutOracle.fit(table, context=context).latencies, lambda archs: None

    return fit


def line_through_macs(table: LatencyTable) -> Fitted:
    space = space_of(table.provenance)

    def macs(archs: NDArray[np.int64]) -> Floats:
        return np.array([space.network(tuple(map(int, arch))).macs for arch in archs], np.float64)

    archs, ms = table.networks()
    x = macs(archs)
    weights = 1 / ms
    slope, offset = np.polyfit(x, ms, 1, w=weights)
    return (lambda asked: slope * macs(asked) + offset), lambda asked: None


def scikit(make: Callable[[], object]) -> Fit:
    def fit(table: LatencyTable) -> Fitted:
        archs, ms = table.networks()
        model = make().fit(archs, np.log(ms))  # type: ignore[attr-defined]
        return (lambda asked: np.exp(model.predict(asked))), lambda asked: None

    return fit


def methods(table: LatencyTable) -> dict[str, tuple[Fit, str]]:
    """Name -> (fit, what it makes of networks: "needs", "ignores" or "may use" them)."""
    found: dict[str, tuple[Fit, str]] = {}
    contexts = set(table.select(kind="block").frame["context"])
    for context in sorted(contexts, reverse=True):
        found[f"sums ({context})"] = sums(context), "ignores"
    for name in ("calibrated", "learned", "pairwise"):
        chains = name == "calibrated" and len(table.select(kind="chain", status="ok")) > 0
        found[name] = ours(name), "may use" if chains else "needs"
    found["MACs, affine"] = line_through_macs, "needs"
    try:
        from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
    except ImportError:
        return found
    found["boosting"] = scikit(lambda: GradientBoostingRegressor(random_state=0)), "needs"
    found["forest"] = scikit(lambda: RandomForestRegressor(random_state=0)), "needs"
    return found


def names_of(table: LatencyTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number per network row; equal for rows that mean the same network (NAS-Bench-201's dead edges)."""
    space = space_of(table.provenance)
    archs = [tuple(map(int, arch)) for arch in table.take(rows).frame["arch"]]
    if isinstance(space, NASBench201Space):
        archs = [space.canonical(arch) for arch in archs]
    return np.unique(np.array(archs), axis=0, return_inverse=True)[1].ravel()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--second", type=Path)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--counts", default="0,10,25,50,100,200")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    table = LatencyTable.read(args.table)
    kinds, status = table.frame["kind"].to_numpy(), table.frame["status"].to_numpy()
    networks = np.flatnonzero((kinds == "network") & (status == "ok"))
    others = np.flatnonzero(kinds != "network")
    p = table.provenance
    print(f"{p.space} {dict(p.settings)} on {p.device_name}, {p.backend}: {len(networks)} networks", flush=True)
    if args.second:
        floor(table, LatencyTable.read(args.second))
    counts = [int(text) for text in args.counts.split(",")]
    kept = f"{args.held_out} networks kept out, mean of {args.seeds} seeds"
    print(f"held-out MAPE %, {kept} (Spearman; share inside the 90 % interval)")
    print(f"{'':22s}" + "".join(f"{n:>22d}" for n in counts))
    groups = names_of(table, networks)
    for name, (fit, networks_are) in methods(table).items():
        cells = []
        for n in counts:
            if networks_are == ("ignores" if n else "needs"):
                cells.append("")
                continue
            cells.append(cell(table, fit, n, networks, others, groups, args.held_out, args.seeds))
        print(f"{name:22s}" + "".join(f"{text:>22s}" for text in cells), flush=True)


def cell(
    table: LatencyTable,
    fit: Fit,
    n: int,
    networks: NDArray[np.int64],
    others: NDArray[np.int64],
    groups: NDArray[np.int64],
    held_out: int,
    seeds: int,
) -> str:
    errors, ranks, inside = [], [], []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(groups.max() + 1)
        place = np.argsort(order)[groups]  # whole groups of one network, shuffled
        rows = networks[np.argsort(place, kind="stable")]
        cut = int(np.searchsorted(np.sort(place), np.sort(place)[min(held_out, len(rows) - 1)]))
        kept_out, seen = table.take(rows[:cut]), table.take(np.r_[others, rows[cut:][:n]])
        archs, measured = kept_out.networks()
        try:
            predict, interval = fit(seen)
            predicted = predict(archs)
        except LatbenchError as error:
            return type(error).__name__
        errors.append(float(np.abs(predicted / measured - 1).mean()))
        ranks.append(float(spearmanr(predicted, measured)[0]))
        found = interval(archs)
        if found is not None:
            inside.append(coverage(found, measured))
    text = f"{100 * np.mean(errors):.2f} ({np.mean(ranks):.3f}"
    return text + (f"; {100 * np.mean(inside):.0f} %)" if inside else ")")


def floor(first: LatencyTable, second: LatencyTable) -> None:
    """How much two passes over the same networks differ."""
    one = {tuple(a): ms for a, ms in zip(*first.networks(), strict=True)}
    two = {tuple(a): ms for a, ms in zip(*second.networks(), strict=True)}
    both = np.array([(one[a], two[a]) for a in one.keys() & two.keys()])
    ratio = np.abs(np.log(both[:, 0] / both[:, 1]))
    mean, median = 100 * ratio.mean(), 100 * np.median(ratio)
    print(f"floor: two passes over {len(both)} networks differ by {mean:.2f} % (median {median:.2f})")


if __name__ == "__main__":
    main()
