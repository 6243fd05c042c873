"""AOWS's latency fit beside the released pipeline's, on a synthetic device. ``python benchmarks/aows_fit.py``.

The truth is additive and monotone, as the paper assumes: a staircase roofline of every block, in ms an image at batch
64 and half precision. Measurements carry 1 % of noise; errors are against the clean latencies of 2,000 fresh uniform
networks, as a share of their mean. Real devices are only nearly so: these figures compare methods, not devices.

Parts: errors by how networks are sampled and which monotonicity rows are used; measurements that a D-optimal order
saves, here and on published FBNet latencies; optimality; and the time of the whole fit, each in a process of its own,
taking turns with the released one (its reading, building and cvxpy call, written down after bermanmaxim/AOWS 2b9efef).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEEDS, HELD_OUT, NOISE, KAPPA = 5, 2000, 0.01, 100.0
TURNS = 3
WIDTHS = (7, 16, 6, 6, 13, 6, 18, 6)  # of columns
STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class Variable(NamedTuple):
    """A component as the released code names it."""

    in_size: tuple[int, int]
    kernel_size: int
    stride: int
    dw: bool
    bias: bool
    in_channels: int
    out_channels: int


def components(widths) -> list[Variable]:
    """The 15 of a configuration."""
    side, before, found = 224, 3, []
    for i, (width, stride) in enumerate(zip(widths, STRIDES, strict=True)):
        found.append(Variable((side, side), 3, stride, i > 0, False, before, width))
        side, before = -(-side // stride), width
    return [*found, Variable((1, 1), 1, 1, False, True, before, 1000)]


def block_ms(v: Variable) -> float:
    """2 operations a MAC at 45 TFLOP/s with widths rounded up to 32, half-precision activations at 700 GB/s, 0.3 us."""
    in_side, out_side = v.in_size[0], -(-v.in_size[0] // v.stride)
    wide_in, wide_out = (-(-n // 32) * 32 for n in (v.in_channels, v.out_channels))
    if v.bias:
        macs, activations = wide_in * wide_out, 49 * v.in_channels + v.out_channels
    elif not v.dw:
        macs = 9 * v.in_channels * wide_out * out_side**2
        activations = v.in_channels * in_side**2 + v.out_channels * out_side**2
    else:  # the depthwise result is written and read once more
        macs = (9 + wide_out) * wide_in * out_side**2
        activations = v.in_channels * in_side**2 + (2 * v.in_channels + v.out_channels) * out_side**2
    return 2 * macs / 45e9 + 2 * activations / 700e6 + 0.0003


# -- the released fit


def released_rows(vocabulary: dict[Variable, int]) -> list[tuple[int, int]]:
    """3,283 on the whole vocabulary: groups are keyed by the values that agree, without the name of the one that does
    not, so equal input and equal output widths of one number fall together."""
    groups = defaultdict(list)
    for v in vocabulary:
        for field in ("in_channels", "out_channels", "in_size"):
            groups[tuple(value for name, value in v._asdict().items() if name != field)].append(v)
    return [
        (vocabulary[a], vocabulary[b])
        for group in groups.values()
        for a, b in zip(sorted(group), sorted(group)[1:], strict=False)
    ]


def released_fit(samples: Path, model: Path) -> None:
    """Reads, builds, solves with SCS as cvxpy sets it, writes."""
    import cvxpy as cp
    from scipy.sparse import csr_matrix

    started = time.process_time()
    measured = [json.loads(line) for line in samples.read_text().splitlines()]
    configurations = [components(widths) for widths, _ in measured]
    y = np.array([ms for _, ms in measured])
    vocabulary: dict[Variable, int] = {}
    at = [(n, vocabulary.setdefault(v, len(vocabulary))) for n, c in enumerate(configurations) for v in c]
    design = csr_matrix((np.ones(len(at)), np.array(at).T), (len(y), len(vocabulary)))
    rows = np.array(released_rows(vocabulary))
    each, signs = np.arange(len(rows)), np.repeat([1.0, -1.0], len(rows))
    monotone = csr_matrix((signs, (np.r_[each, each], rows.T.ravel())), (len(rows), len(vocabulary)))
    x, slack = cp.Variable(len(vocabulary)), cp.Variable(len(rows))
    loss = cp.sum_squares(design @ x - y) + KAPPA * cp.sum_squares(slack)
    cp.Problem(cp.Minimize(loss), [x >= 0, slack >= 0, monotone @ x <= slack]).solve(solver="SCS")
    model.write_text("".join(json.dumps([v._asdict(), x.value[i]]) + "\n" for v, i in vocabulary.items()))
    print(json.dumps(time.process_time() - started))


def our_fit(samples: Path, model: Path) -> None:
    """Reads, builds, solves, calibrates the interval, writes."""
    import scipy.linalg
    import scipy.sparse  # noqa: F401

    from latbench.oracle.pairwise import fit_blocks
    from latbench.oracle.vocabulary import vocabulary
    from latbench.spaces.mobilenet_v1 import MobileNetV1Space

    started = time.process_time()
    measured = [json.loads(line) for line in samples.read_text().splitlines()]
    space = MobileNetV1Space()
    index = [{width: i for i, width in enumerate(options)} for options in space.candidates]
    archs = np.array([[at[w] for at, w in zip(index, widths, strict=True)] for widths, _ in measured])
    words = vocabulary(space)
    x, _ = fit_blocks(words, archs, np.array([ms for _, ms in measured]), KAPPA)
    model.write_text("".join(f'["{b.key}", {ms!r}]\n' for b, ms in zip(words.blocks, x.tolist(), strict=True)))
    print(json.dumps(time.process_time() - started))


# -- the comparison


class Device:
    """The synthetic truth by block, and the released code's variables in our numbering."""

    def __init__(self) -> None:
        from latbench.oracle.vocabulary import vocabulary
        from latbench.spaces.mobilenet_v1 import MobileNetV1Space

        self.space = MobileNetV1Space()
        self.words = vocabulary(self.space)
        self.numbers: dict[Variable, int] = {}
        for site, table in enumerate(self.words.tables):
            for picks in np.ndindex(table.shape):
                arch = [0] * len(STRIDES)
                for decision, pick in zip(self.space.sites[site].scope, picks, strict=True):
                    arch[decision] = pick
                self.numbers[components(self.space.widths(tuple(arch)))[site]] = int(table[picks])
        self.truth = np.empty(len(self.words.blocks))
        for v, number in self.numbers.items():
            self.truth[number] = block_ms(v)
        self.released = np.array([(a, b) for a, b in released_rows(self.numbers) if a != b])

    def clean(self, archs):
        return self.words.design(archs) @ self.truth

    def measure(self, archs, rng):
        return self.clean(archs) * (1 + NOISE * rng.standard_normal(len(archs)))


def error(device: Device, x, seed: int) -> tuple[float, float]:
    """NRMSE in % over the fresh networks that hold no unseen block, and the share of those."""
    from latbench.oracle.sampling import uniform

    archs = uniform(device.space, HELD_OUT, np.random.default_rng(1000 + seed))
    want = device.clean(archs)
    seen = ~np.isnan(x)
    known = (device.words.design(archs) @ ~seen) == 0
    off = device.words.design(archs[known]) @ np.where(seen, x, 0) - want[known]
    return 100 * float(np.sqrt(np.mean(off**2)) / want.mean()), float(known.mean())


def errors(device: Device) -> None:
    from latbench.oracle.conformal import coverage
    from latbench.oracle.hinge_nnls import Problem, solve
    from latbench.oracle.pairwise import fit_blocks
    from latbench.oracle.sampling import biased, choose, uniform

    print(f"{'networks, rows':46s} {'n':>5s} {'error':>8s} {'seeds':>17s} {'covered':>8s} {'inside 90 %':>12s}")
    for n in (8000, 2000):
        for name in ("biased, first of ties; released rows", "biased, first of ties", "uniform", "biased", "d_optimal"):
            if name == "d_optimal" and n > 2000:
                continue
            found, shares, inside = [], [], []
            for seed in range(SEEDS):
                rng = np.random.default_rng(seed)
                legacy = name.startswith("biased, first")
                archs = biased(device.space, n, rng, legacy=True) if legacy else choose(device.space, n, name, rng)
                ms = device.measure(archs, rng)
                if name.endswith("released rows"):
                    x = solve(Problem(device.words.design(archs), ms, device.released, KAPPA)).x
                else:
                    x, scores = fit_blocks(device.words, archs, ms, KAPPA)
                    fresh = uniform(device.space, HELD_OUT, rng)
                    fresh = fresh[(device.words.design(fresh) @ np.isnan(x)) == 0]
                    predicted = device.words.design(fresh) @ np.nan_to_num(x)
                    interval = scores.interval(predicted, 0.9)
                    inside.append(coverage(interval, device.measure(fresh, rng)) if interval else np.nan)
                of, share = error(device, x, seed)
                found.append(of)
                shares.append(share)
            covered = f"{100 * np.mean(inside):11.1f}%" if inside else ""
            spread = f"{min(found):.3f} to {max(found):.3f}"
            print(
                f"{name:46s} {n:5d} {np.mean(found):7.3f}% {spread:>17s} {np.mean(shares):8.1%} {covered:>12s}",
                flush=True,
            )


def savings(device: Device) -> None:
    from latbench.oracle.sampling import choose

    print("\nuniform against d_optimal, synthetic: error, and the share of fresh networks without an unseen block")
    sizes, curves = (400, 600, 800, 1000, 1400, 2000), {}
    for method in ("uniform", "d_optimal"):
        found = np.empty((SEEDS, len(sizes), 2))
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            archs = choose(device.space, sizes[-1], method, rng)  # an order: its beginning is a smaller choice
            ms = device.measure(archs, rng)
            for i, n in enumerate(sizes):
                found[seed, i] = error(device, solve_blocks(device.words, archs[:n], ms[:n]), seed)
        curves[method] = found.mean(axis=0)
    _compare(sizes, curves)


def published(device: Device) -> None:
    """The same on public measurements of FBNet networks (HELP's), block sums by ``fit_blocks``."""
    import pandas as pd

    from latbench.oracle.sampling import d_optimal
    from latbench.oracle.vocabulary import vocabulary
    from latbench.spaces.fbnet import FBNetSpace

    folder = os.environ.get("LATBENCH_REFERENCE_DATA")
    if not folder:
        print("\nFBNet: set LATBENCH_REFERENCE_DATA to the folder of fbnet_latency.parquet to see it")
        return
    frame = pd.read_parquet(Path(folder) / "fbnet_latency.parquet")
    archs = frame[[f"op{i}" for i in range(22)]].to_numpy(np.int64)
    number = {tuple(arch): i for i, arch in enumerate(archs.tolist())}
    space, sizes = FBNetSpace(), (75, 100, 150, 200, 300, 500)
    words = vocabulary(space)
    for name in ("1080ti_64", "titanx_64", "silver_4210r", "gold_6240"):
        ms = frame[name].to_numpy(np.float64)
        curves = {method: np.zeros((len(sizes), 2)) for method in ("uniform", "d_optimal")}
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            fresh, pool = np.split(rng.permutation(len(archs)), [1000])
            informed = d_optimal(space, sizes[-1], rng, pool=archs[pool])
            orders = {"uniform": pool, "d_optimal": np.array([number[tuple(arch)] for arch in informed.tolist()])}
            design = words.design(archs[fresh])
            for method, order in orders.items():
                for i, n in enumerate(sizes):
                    x = solve_blocks(words, archs[order[:n]], ms[order[:n]])
                    known = (design @ np.isnan(x)) == 0
                    off = design[known] @ np.nan_to_num(x) / ms[fresh][known] - 1
                    curves[method][i] += np.array([100 * np.abs(off).mean(), known.mean()]) / SEEDS
        print(f"\nFBNet, {name}: MAPE of 1,000 held-out networks, and the share without an unseen block")
        _compare(sizes, curves)


def solve_blocks(words, archs, ms):
    """``fit_blocks`` without its interval: (P,), NaN where no network has the block."""
    from latbench.oracle.hinge_nnls import solve
    from latbench.oracle.pairwise import problem_of

    problem, used = problem_of(words, words.design(archs), ms, KAPPA)
    x = np.full(len(used), np.nan)
    x[used] = solve(problem).x
    return x


def _compare(sizes, curves) -> None:
    for method, curve in curves.items():
        cells = "  ".join(f"{n}: {e:.3f}% {share:4.0%}" for n, (e, share) in zip(sizes, curve, strict=True))
        print(f"{method:10s} {cells}", flush=True)
    errors_, order = curves["d_optimal"][:, 0], np.argsort(curves["d_optimal"][:, 0])
    for n, (of, _) in zip(sizes, curves["uniform"], strict=True):
        if errors_.min() <= of <= errors_.max():
            same = np.interp(of, errors_[order], np.array(sizes)[order])
            print(f"the error of {n} uniform networks takes {same:.0f} D-optimal ones ({same / n - 1:+.0%})")


def optimality(device: Device) -> None:
    from latbench.oracle.hinge_nnls import Problem, solve, solve_cvxpy
    from latbench.oracle.monotone import monotone_rows
    from latbench.oracle.sampling import biased

    rng = np.random.default_rng(0)
    archs = biased(device.space, 8000, rng)
    ms = device.measure(archs, rng)
    ms = ms / ms.mean()  # SCS stops at absolute tolerances
    design, rows = device.words.design(archs), monotone_rows(device.words)
    heads = zip(("kappa", "ours", "s", "steps", "SCS above it", "s", "Clarabel above it", "s"), WIDTHS, strict=True)
    print("\n" + " ".join(f"{head:>{width}s}" for head, width in heads))
    for kappa in (0.0, 1.0, 100.0, 1e4):
        problem = Problem(design, ms, rows, kappa)
        started = time.perf_counter()
        ours = solve(problem)
        line = f"{kappa:7g} {ours.objective:16.10f} {time.perf_counter() - started:6.2f} {ours.newton_steps:6d}"
        for solver in ("SCS", "CLARABEL"):
            started = time.perf_counter()
            x = solve_cvxpy(problem, solver)
            took = time.perf_counter() - started
            line += f" {problem.objective(x) / ours.objective - 1:+{13 if solver == 'SCS' else 18}.1e} {took:6.2f}"
        print(line, flush=True)


def durations(device: Device) -> None:
    from latbench.oracle.sampling import biased

    rng = np.random.default_rng(0)
    archs = biased(device.space, 8000, rng)
    ms = device.measure(archs, rng)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        lines = ([device.space.widths(tuple(a)), y] for a, y in zip(archs.tolist(), ms.tolist(), strict=True))
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        model, torch = Path(folder) / "model", ["--torch"]
        kinds = {
            "released program": ("--released", torch),
            "released, no torch": ("--released", []),
            "ours": ("--ours", []),
        }
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for turn in range(TURNS + 1):  # the first fills the disk's cache
            for name, (kind, more) in kinds.items():
                one = _process([kind, str(samples), str(model), *more])
                if turn:
                    took[name].append(one)
    middle = {name: np.min(held, axis=0) for name, held in took.items()}
    print(f"\nthe whole fit of 8,000 samples, CPU time, the least of {TURNS} turns")
    print(f"{'':22s} {'process':>9s} {'ratio':>7s} {'imports apart':>15s} {'ratio':>7s}")
    for name, (process, inside) in middle.items():
        ratios = np.array([process, inside]) / middle["ours"]
        print(f"{name:22s} {process:7.2f} s {ratios[0]:6.1f}x {inside:13.2f} s {ratios[1]:6.1f}x")


def _process(arguments: list[str]) -> tuple[float, float]:
    """CPU seconds from start to end, and of them those after the imports: load beside one thread counts little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return total, json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--released", nargs=2, type=Path, metavar=("SAMPLES", "MODEL"), help="only this fit")
    parser.add_argument("--ours", nargs=2, type=Path, metavar=("SAMPLES", "MODEL"), help="only this fit")
    parser.add_argument("--torch", action="store_true", help="load torch first, as the released program does")
    parser.add_argument(
        "--part", choices=("errors", "savings", "published", "optimality", "durations"), help="default: all"
    )
    args = parser.parse_args()
    if args.torch:
        import torch  # noqa: F401
    if args.released or args.ours:
        (released_fit if args.released else our_fit)(*(args.released or args.ours))
        return
    device = Device()
    for part in (errors, savings, published, optimality, durations):
        if args.part in (None, part.__name__):
            part(device)


if __name__ == "__main__":
    main()
