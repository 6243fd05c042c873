"""Exact selection under a latency budget against the search over its multiplier that AOWS published.

    python benchmarks/aows_selection.py [--instances 20] [--repeats 200]

Full-size instances of mobilenet_v1 (14 widths, 6 to 14 options): block times of an idealised GPU at batch 64 with a
staircase in the widths, scaled at random by group and entry, and concave scores. Each is solved by label setting, by
a mixed-integer program (HiGHS, gap 0) and by the published line search: the multiplier doubled from 10 until feasible,
then bisected 12 times, a Viterbi pass each (Berman et al., CVPR 2020; released code, `solve_ows`: a Python loop around
compiled passes, each on freshly scaled arrays), and once more with its loop compiled too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from latbench.errors import InfeasibleTargetError
from latbench.oracle.factors import Chain, FactorOracle, site_factors
from latbench.provenance import Provenance
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.chains import Paths, compiled, viterbi
from searchers.selection import select


def staircase_ms(space: MobileNetV1Space) -> Chain:
    """Block times in ms an image: widths in steps of 32 at 45 TFLOP/s, traffic at 700 GB/s, 0.3 us a block."""

    def entry(block: object) -> tuple[float, int]:
        (_, n_in, side, _), *_, shape = block.shapes.values()  # type: ignore[attr-defined]
        n_out, out_side = shape[1], shape[2] if len(shape) == 4 else 1
        wide_in, wide_out = -(-n_in // 32) * 32, -(-n_out // 32) * 32
        kernel = 9 if n_in == 3 else 1
        macs = out_side**2 * wide_in * wide_out * kernel + (0 if n_in == 3 else 9 * out_side**2 * wide_in)
        return 2 * macs / 45e9 + 2 * (n_in * side**2 + n_out * out_side**2) / 700e6 + 0.3e-3, 1

    return FactorOracle(space, site_factors(space, entry), Provenance("", "", "")).chain()


def instance(chain: Chain, space: MobileNetV1Space, rng: np.random.Generator, noise: float) -> tuple[Paths, float]:
    """Times scaled by layer and entry, scores -a((C_max/C)^p - 1) with noise, a budget amid what is possible."""
    pairs = tuple(p * rng.uniform(0.6, 1.6) * rng.normal(1, 0.05, p.shape).clip(0.5) for p in chain.pairwise)
    scores = []
    for decision in space.decisions:
        width = np.array(decision.options, float)
        gap = (width[-1] / width) ** rng.uniform(0.4, 1.2) - 1
        value = -rng.uniform(0.02, 0.25) * gap / gap[0] - 0.02
        scores.append(value + rng.normal(0, 0.002, len(width)) + rng.normal(0, noise, len(width)))
    paths = Paths.of(scores, [Chain(chain.constant, chain.unary, pairs)])
    free = [int(row.argmax()) for row in scores]
    low, high = paths.least[0], paths.sums(free)[1][0]
    return paths, float(low + rng.uniform(0.15, 0.7) * (high - low))


def line_search(paths: Paths, target: float) -> list[int]:
    """The published search as published. Never ends on an infeasible target."""

    def solve(multiplier: float) -> tuple[list[int], float]:
        path = np.empty(len(paths.sizes), np.int64)
        viterbi(paths.scores, multiplier * paths.costs[0], paths.sizes, 1.0, path)
        return path.tolist(), _cost(paths.costs[0], path)

    low, high = 0.0, 10.0
    path, ms = solve(high)
    while ms > target:
        high *= 2
        path, ms = solve(high)
    for _ in range(12):
        middle = (low + high) / 2
        trial, ms = solve(middle)
        if ms > target:
            low = middle
        else:
            high, path = middle, trial
    return path


@compiled
def compiled_search(scores: np.ndarray, cost: np.ndarray, sizes: np.ndarray, target: float, path: np.ndarray) -> float:
    """The same search as one compiled function; `path` becomes its answer."""
    low, high = 0.0, 10.0
    trial = np.empty(len(path), np.int64)
    viterbi(scores, cost, sizes, high, path)
    while _cost(cost, path) > target:
        high *= 2
        viterbi(scores, cost, sizes, high, path)
    for _ in range(12):
        middle = (low + high) / 2
        viterbi(scores, cost, sizes, middle, trial)
        if _cost(cost, trial) > target:
            low = middle
        else:
            high = middle
            path[:] = trial
    return high


@compiled
def _cost(cost: np.ndarray, path: np.ndarray) -> float:
    total, before = 0.0, 0
    for layer in range(len(path)):
        total += cost[layer, before, path[layer]]
        before = path[layer]
    return total


def by_milp(paths: Paths, target: float) -> float:
    """The optimum by HiGHS: a binary per edge of the chain, flow conserved, one row for the budget."""
    edges = [
        (layer, i, j)
        for layer, size in enumerate(paths.sizes)
        for i in range(1 if layer == 0 else paths.sizes[layer - 1])
        for j in range(size)
    ]
    n_layers = len(paths.sizes)
    rows, columns, signs = [], [], []
    offset = np.concatenate([[0], np.cumsum(paths.sizes)])
    for column, (layer, i, j) in enumerate(edges):
        if layer > 0:
            rows.append(1 + offset[layer - 1] + i)
            columns.append(column)
            signs.append(-1.0)
        else:
            rows.append(0)
            columns.append(column)
            signs.append(1.0)
        if layer < n_layers - 1:
            rows.append(1 + offset[layer] + j)
            columns.append(column)
            signs.append(1.0)
    n_rows = 1 + int(offset[-2])
    flow = sparse.csr_matrix((signs, (rows, columns)), (n_rows, len(edges)))
    right = np.zeros(n_rows)
    right[0] = 1
    cost = np.array([paths.costs[0, layer, i, j] for layer, i, j in edges])
    gain = np.array([paths.scores[layer, j] for layer, _, j in edges])
    found = milp(
        -gain,
        integrality=np.ones(len(edges)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(flow, right, right),
            LinearConstraint(cost[None], -np.inf, target - paths.constants[0]),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return -float(found.fun)


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median microseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    """Prints a line per instance and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.003, help="sd of extra noise on the scores")
    arguments = parser.parse_args()
    space = MobileNetV1Space()
    chain = staircase_ms(space)
    rng = np.random.default_rng(0)
    rows = []
    print("  # |  budget ms |     exact       MILP  published | labels | us: exact  published   compiled | budget used")
    for number in range(arguments.instances):
        paths, target = instance(chain, space, rng, arguments.noise)
        limit = target - float(paths.constants[0])
        found, optimum, theirs = select(paths, [target]), by_milp(paths, target), line_search(paths, limit)
        out = np.empty(len(paths.sizes), np.int64)
        us = [
            timed(lambda p=paths, t=target: select(p, [t]), arguments.repeats),
            timed(lambda p=paths, t=limit: line_search(p, t), arguments.repeats),
            timed(
                lambda p=paths, t=limit, o=out: compiled_search(p.scores, p.costs[0], p.sizes, t, o), arguments.repeats
            ),
        ]
        used = [found.cost[0] / target, paths.sums(theirs)[1][0] / target]
        rows.append((found.score - optimum, found.score - paths.sums(theirs)[0], *us, *used))
        print(
            f"{number:3d} | {target:10.6f} | {found.score:9.6f}  {optimum:9.6f}  {paths.sums(theirs)[0]:9.6f} |"
            f" {found.n_labels:6d} | {us[0]:9.1f} {us[1]:10.1f} {us[2]:10.1f} | {used[0]:7.2%} {used[1]:7.2%}"
        )
    errors, gains, ours, published, whole, used_all, their_used = (np.array(c) for c in zip(*rows, strict=True))
    print(f"equal to MILP: {(abs(errors) < 1e-6).sum()} of {len(rows)} (largest difference {abs(errors).max():.1e})")
    above, below = (gains > 1e-9).sum(), (gains < -1e-9).sum()
    print(f"above the published answer {above}, below {below}; mean gain {gains.mean():.1e}")
    print(
        f"median time: exact {np.median(ours):.0f} us (worst {ours.max():.0f}), published "
        f"{np.median(published):.0f} us, its loop compiled {np.median(whole):.0f} us"
    )
    print(f"budget used: exact {used_all.mean():.2%}, published {their_used.mean():.2%}")
    start = time.perf_counter()
    try:
        select(paths, [float(paths.least[0]) * 0.99])
    except InfeasibleTargetError as error:
        print(f"infeasible target, told after {(time.perf_counter() - start) * 1e6:.0f} us: {error}")


if __name__ == "__main__":
    main()
