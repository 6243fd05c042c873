"""The best architecture under budgets, proven: label setting on the chain, seeded by the exact Lagrangian dual.

Berman et al. 2020 maximise the sum of scores under one budget by a search over its multiplier. That relaxation is
solved exactly here too (Handler and Zang 1980: its breakpoints instead of a bisection) and reported, but its answer
leaves 2 to 3 % of the budget unused (``benchmarks/aows_selection.py``). From its multiplier follow bounds on what any
completion of a partial path can score; labels (score, costs) that cannot beat the best known path, cannot keep the
budgets, or are dominated are dropped, and what is left after the last layer is optimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linprog

from latbench.errors import InfeasibleTargetError
from searchers.base import TOLERANCE
from searchers.chains import Floats, Ints, Path, Paths, compiled, max_sum, totals, viterbi

_ROUNDS = 200  # of the cutting plane; two budgets take 10 to 40


class Relaxed(NamedTuple):
    """What the Lagrangian relaxation knows."""

    path: Ints | None  # (L,) the best feasible path met on the way
    multipliers: Floats  # (K,) prices of the budgets
    bound: float  # no path within the budgets scores more


@dataclass(frozen=True)
class Selection:
    """The optimum, and the relaxation's answer beside it."""

    path: Path
    score: float
    cost: tuple[float, ...]
    relaxed: Path  # the Lagrangian answer: the paper's
    relaxed_score: float
    relaxed_cost: tuple[float, ...]
    multipliers: tuple[float, ...]
    bound: float
    n_labels: int


def select(paths: Paths, budgets: Sequence[float]) -> Selection:
    """The path of the highest score whose costs stay within (K,) budgets.

    A cost equals its budget up to a relative ``TOLERANCE``. Raises InfeasibleTargetError where no path does.
    """
    wanted = np.array(budgets, np.float64)
    limits = wanted + np.abs(wanted) * TOLERANCE - paths.constants
    relaxed = relax(paths, limits)
    best = np.empty(len(paths.sizes), np.int64)
    best[:] = -1 if relaxed.path is None else relaxed.path
    price, offset = paths.priced(relaxed.multipliers), float(relaxed.multipliers @ limits)
    n_labels = _label(paths.scores, paths.costs, paths.sizes, limits, price, offset, best)
    if best[0] < 0:
        raise InfeasibleTargetError(_apart(paths, wanted))
    shown = best if relaxed.path is None else relaxed.path
    score, cost = paths.sums(best)
    relaxed_score, relaxed_cost = paths.sums(shown)
    return Selection(
        tuple(best.tolist()),
        score,
        tuple(cost),
        tuple(shown.tolist()),
        relaxed_score,
        tuple(relaxed_cost),
        tuple(relaxed.multipliers.tolist()),
        relaxed.bound,
        n_labels,
    )


def relax(paths: Paths, limits: Floats) -> Relaxed:
    """The Lagrangian dual, exactly. `limits` (K,): budgets less the constants.

    Raises InfeasibleTargetError where one budget is below its cheapest path.
    """
    for k, cheapest in enumerate(paths.cheapest):
        least = paths.least[k]
        if least - paths.constants[k] > limits[k]:
            raise InfeasibleTargetError(
                f"budget {limits[k] + paths.constants[k]:.6g} is below the cheapest path, "
                f"{','.join(map(str, cheapest))} at {least:.6g}"
            )
    if len(limits) > 1:
        return _relax_several(paths, limits)
    path = np.array(paths.cheapest[0], np.int64)
    multiplier, bound = _dual(paths.scores, paths.costs[0], paths.sizes, limits[0], path)
    return Relaxed(path, np.array([multiplier]), bound)


def _apart(paths: Paths, budgets: Floats) -> str:
    each = "; ".join(
        f"{','.join(map(str, path))} needs {low:.6g} of {budget:.6g}"
        for path, low, budget in zip(paths.cheapest, paths.least, budgets, strict=True)
    )
    return f"each budget can be kept by itself, but not all of them together (the cheapest of each: {each}); raise one"


# ---- one budget: the breakpoints of the dual ------------------------------------------------------------------------


@compiled
def _dual(scores: Any, cost: Any, sizes: Any, limit: float, path: Any) -> Any:
    """(multiplier, bound); `path` holds a feasible path and becomes the best one that the dual meets.

    The line through an infeasible and a feasible point gives the next price; the best path at that price replaces one
    of them, until none lies above the line.
    """
    trial = np.empty(len(path), np.int64)
    viterbi(scores, cost, sizes, 0.0, trial)
    s0, t0 = totals(scores, cost, trial)
    if t0 <= limit:
        path[:] = trial
        return 0.0, s0
    s1, t1 = totals(scores, cost, path)
    price = 0.0
    for _ in range(1000):
        price = max(0.0, (s0 - s1) / (t0 - t1))
        value = viterbi(scores, cost, sizes, price, trial)
        if value <= s1 - price * t1 + 1e-13 * (abs(s1) + price * abs(t1)):
            break
        s, t = totals(scores, cost, trial)
        if t <= limit:
            s1, t1 = s, t
            path[:] = trial
        else:
            s0, t0 = s, t
    return price, s1 - price * t1 + price * limit


# ---- several budgets: cutting planes --------------------------------------------------------------------------------


def _relax_several(paths: Paths, limits: Floats) -> Relaxed:
    """Kelley's cutting plane over the prices; each cut is a path. Ends where the best path is no new one.

    Scores and costs are scaled by their ranges: the program's tolerance is absolute.
    """
    free, _ = max_sum(paths.scores, np.zeros_like(paths.costs[0]), paths.sizes)
    starts = [free, *paths.cheapest]
    used = np.array([paths.sums(path)[1] for path in starts]) - paths.constants  # (n, K)
    scale = np.where(np.ptp(used, axis=0) > 0, np.ptp(used, axis=0), 1.0)
    spread = float(np.ptp(paths.scores, axis=1).sum()) or 1.0
    cuts = {
        path: (paths.sums(path)[0] / spread, (limits - row) / scale) for path, row in zip(starts, used, strict=True)
    }
    prices, bound = np.zeros(len(limits)), np.inf
    for _ in range(_ROUNDS):
        found = linprog(
            [1.0] + [0.0] * len(limits),
            A_ub=np.array([[-1.0, *slack] for _, slack in cuts.values()]),
            b_ub=[-score for score, _ in cuts.values()],
            bounds=[(None, None)] + [(0.0, 1e6)] * len(limits),
        )
        if found.x is None:
            break  # what is known so far is a valid bound
        trial = found.x[1:] * spread / scale
        path, value = max_sum(paths.scores, paths.priced(trial), paths.sizes)
        value += float(trial @ limits)
        if value < bound:
            bound, prices = value, trial
        if path in cuts:
            break
        score, cost = paths.sums(path)
        cuts[path] = score / spread, (limits - (np.array(cost) - paths.constants)) / scale
    within = [(score, path) for path, (score, slack) in cuts.items() if (slack >= 0).all()]
    return Relaxed(np.array(max(within)[1], np.int64) if within else None, prices, float(bound))


# ---- labels ---------------------------------------------------------------------------------------------------------


@compiled
def _fits(costs: Any, limits: Any, path: Any) -> bool:
    for k in range(len(limits)):
        total, before = 0.0, 0
        for layer in range(len(path)):
            total += costs[k, layer, before, path[layer]]
            before = path[layer]
        if total > limits[k]:
            return False
    return True


@compiled
def _climb(scores: Any, costs: Any, sizes: Any, limits: Any, path: Any) -> None:
    """Raises a feasible path's score by changing one layer at a time while the budgets allow."""
    better = True
    while better:
        better = False
        for layer in range(len(path)):
            for state in range(sizes[layer]):
                old = path[layer]
                if scores[layer, state] > scores[layer, old]:
                    path[layer] = state
                    if _fits(costs, limits, path):
                        better = True
                    else:
                        path[layer] = old


@compiled
def _to_go(scores: Any, cost: Any, sizes: Any, out: Any) -> None:
    """Fills out (L, M) with the largest score less cost of what follows each state."""
    n_layers = len(sizes)
    for i in range(sizes[n_layers - 1]):
        out[n_layers - 1, i] = 0.0
    for layer in range(n_layers - 2, -1, -1):
        for i in range(sizes[layer]):
            best = -np.inf
            for j in range(sizes[layer + 1]):
                best = max(best, out[layer + 1, j] + scores[layer + 1, j] - cost[layer + 1, i, j])
            out[layer, i] = best


@compiled
def _undominated(score: Any, used: Any, n: int, keep: Any) -> int:
    """Of n labels, score (n,) and used (n, K), those that no other beats in all; fills `keep`, gives how many.

    In order of falling score a label stays if none kept costs as little of everything. One resource: a running
    minimum; two: the staircase of kept costs; more: all pairs.
    """
    if n <= 1:  # most often so
        keep[:n] = 0
        return n
    n_kept, n_steps, k_all = 0, 0, used.shape[1]
    low = np.inf
    x, y = np.empty(n), np.empty(n)  # the staircase: x rises, y falls
    for at in np.argsort(-score[:n]):
        if k_all == 1:
            beaten = used[at, 0] >= low
            low = min(low, used[at, 0])
        elif k_all == 2:
            n_before = n_steps
            n_steps = _descend(x, y, n_steps, used[at, 0], used[at, 1])
            beaten = n_steps < 0
            n_steps = n_before if beaten else n_steps
        else:
            beaten = False
            for other in keep[:n_kept]:
                cheaper = True
                for k in range(k_all):
                    cheaper = cheaper and used[other, k] <= used[at, k]
                if cheaper:
                    beaten = True
                    break
        if not beaten:
            keep[n_kept] = at
            n_kept += 1
    return n_kept


@compiled
def _descend(x: Any, y: Any, n: int, a: float, b: float) -> int:
    """Puts (a, b) into a staircase of n steps, x rising and y falling; gives its steps, or -1 where one lies below."""
    place = np.searchsorted(x[:n], a, side="right")
    if place > 0 and y[place - 1] <= b:
        return -1
    end = place  # steps from `place` to `end` lie above (a, b)
    while end < n and y[end] >= b:
        end += 1
    shift = place + 1 - end
    if shift > 0:
        for q in range(n - 1, end - 1, -1):
            x[q + shift], y[q + shift] = x[q], y[q]
    elif shift < 0:
        for q in range(end, n):
            x[q + shift], y[q + shift] = x[q], y[q]
    x[place], y[place] = a, b
    return int(n + shift)


@compiled
def _extend(
    state: Any, score: Any, used: Any, reduced: Any, gains: Any, costs: Any, price: Any, size: int, ahead: Any,
    spare: Any, limits: Any, least: float,
) -> Any:  # fmt: skip
    """The labels of the next layer that can still win: (state, parent, score, used, reduced), one row each.

    gains (M,), costs (K, M, M), price (M, M): of entering it. ahead (M,), spare (K, M): the most that can follow, of
    score less price and of minus each cost. least: what `reduced` plus `ahead` must exceed.
    """
    count, k_all = len(state), len(limits)
    room = count * size
    o_state, o_parent = np.empty(room, np.int64), np.empty(room, np.int64)
    o_score, o_used, o_reduced = np.empty(room), np.empty((room, k_all)), np.empty(room)
    s, u, r = np.empty(count), np.empty((count, k_all)), np.empty(count)
    p, keep = np.empty(count, np.int64), np.empty(count, np.int64)
    total = 0
    for j in range(size):
        n = 0
        for at in range(count):
            i = state[at]
            r[n] = reduced[at] + gains[j] - price[i, j]
            if r[n] + ahead[j] <= least:
                continue
            fits = True
            for k in range(k_all):
                u[n, k] = used[at, k] + costs[k, i, j]
                fits = fits and u[n, k] - spare[k, j] <= limits[k]
            if fits:
                s[n] = score[at] + gains[j]
                p[n] = at
                n += 1
        for at in keep[: _undominated(s, u, n, keep)]:
            o_state[total], o_parent[total] = j, p[at]
            o_score[total], o_reduced[total] = s[at], r[at]
            for k in range(k_all):
                o_used[total, k] = u[at, k]
            total += 1
    return o_state[:total], o_parent[:total], o_score[:total], o_used[:total], o_reduced[:total]


@compiled
def _label(scores: Any, costs: Any, sizes: Any, limits: Any, price: Any, offset: float, best: Any) -> int:
    """Fills `best` (L,) with the optimal path; it comes with a feasible path, or with -1: none is known.

    price (L, M, M): costs at the dual's multipliers; offset: the limits at them. Gives the number of labels, and
    leaves -1 where no path keeps the limits.
    """
    k_all, n_layers, width = costs.shape[0], costs.shape[1], costs.shape[2]
    bound, least = -np.inf, -np.inf
    if best[0] >= 0:
        _climb(scores, costs, sizes, limits, best)
        bound = 0.0
        for layer in range(n_layers):
            bound += scores[layer, best[layer]]
        least = bound - offset + 1e-13 * (abs(bound) + abs(offset))
    ahead, spare, nothing = np.empty((n_layers, width)), np.empty((k_all, n_layers, width)), np.zeros_like(scores)
    _to_go(scores, price, sizes, ahead)
    for k in range(k_all):
        _to_go(nothing, costs[k], sizes, spare[k])
    state, score, used, reduced = np.zeros(1, np.int64), np.zeros(1), np.zeros((1, k_all)), np.zeros(1)
    states, parents = [state], [np.zeros(1, np.int64)]
    n_labels = 0
    for layer in range(n_layers):
        state, parent, score, used, reduced = _extend(
            state, score, used, reduced, scores[layer], costs[:, layer], price[layer], sizes[layer], ahead[layer],
            spare[:, layer], limits, least,
        )  # fmt: skip
        states.append(state)
        parents.append(parent)
        n_labels += len(state)
    if len(score) and score.max() > bound:
        at = int(np.argmax(score))
        for layer in range(n_layers - 1, -1, -1):
            best[layer] = states[layer + 1][at]
            at = parents[layer + 1][at]
    return n_labels
