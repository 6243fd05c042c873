"""Sums over a chain of choices, exactly: the best path, the Gibbs distribution's marginals, joint samples.

A path takes one state per layer. Layer l gives ``scores[l, j]`` and entering its state j from state i of the layer
before costs ``costs[k, l, i, j]`` of resource k; layer 0 is entered from state 0. Arrays are padded to the widest layer
and kernels stop at the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.oracle.factors import Chain

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Path = tuple[int, ...]
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """By numba on the first call, kept on disk."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))


@dataclass(frozen=True, eq=False)
class Paths:
    """The scores and costs of all paths of one chain."""

    scores: Floats  # (L, M)
    costs: Floats  # (K, L, M, M)
    sizes: Ints  # (L,) states of each layer
    constants: Floats  # (K,) what every path costs
    cheapest: tuple[Path, ...]  # of each resource
    least: tuple[float, ...]  # what these cost of it, constants included

    @classmethod
    def of(cls, scores: Sequence[Floats], chains: Sequence[Chain]) -> Paths:
        """L score vectors (K_l,), and one chain of costs per resource. Raises UsageError where shapes differ."""
        sizes = np.array([len(row) for row in scores], np.int64)
        width = int(sizes.max(initial=1))
        padded = np.zeros((len(sizes), width))
        costs = np.zeros((len(chains), len(sizes), width, width))
        for layer, row in enumerate(scores):
            padded[layer, : len(row)] = row
        for k, chain in enumerate(chains):
            found = [len(u) for u in chain.unary]
            if found != sizes.tolist() or [p.shape for p in chain.pairwise] != list(pairwise(found)):
                raise UsageError(f"scores of {sizes.tolist()} states do not fit costs of {found}")
            for layer, unary in enumerate(chain.unary):
                costs[k, layer, :, : len(unary)] = unary
            for layer, pair in enumerate(chain.pairwise, 1):
                costs[k, layer, : pair.shape[0], : pair.shape[1]] += pair
        constants = np.array([chain.constant for chain in chains])
        best = [max_sum(np.zeros_like(padded), cost, sizes) for cost in costs]
        least = tuple(constant - value for constant, (_, value) in zip(constants.tolist(), best, strict=True))
        return cls(padded, costs, sizes, constants, tuple(path for path, _ in best), least)

    def with_scores(self, scores: Floats) -> Paths:
        """The same costs under other scores, (L, M) padded."""
        return replace(self, scores=np.ascontiguousarray(scores, np.float64))

    def sums(self, path: Sequence[int] | Ints) -> tuple[float, list[float]]:
        """Of (L,) options: the sum of scores, and K sums of costs, constants included."""
        states = np.asarray(path, np.int64)
        found = [totals(self.scores, cost, states) for cost in self.costs]
        return found[0][0], [
            used + constant for (_, used), constant in zip(found, self.constants.tolist(), strict=True)
        ]

    def priced(self, prices: Floats) -> Floats:
        """(K,) -> (L, M, M): the cost of a path at these prices."""
        return cast(Floats, self.costs[0] * prices[0] if len(prices) == 1 else np.tensordot(prices, self.costs, 1))


def max_sum(scores: Floats, cost: Floats, sizes: Ints) -> tuple[Path, float]:
    """The path of the largest sum of scores less costs (Viterbi), the first of equals, and that sum.

    (L, M), (L, M, M), (L,).
    """
    path = np.empty(len(sizes), np.int64)
    value = viterbi(scores, cost, sizes, 1.0, path)
    return tuple(path.tolist()), float(value)


def marginals(scores: Floats, cost: Floats, sizes: Ints, temperature: float) -> Floats:
    """(L, M) probabilities of each layer's states where P(path) ~ exp((scores - costs) / temperature)."""
    probs = np.zeros_like(scores)
    _marginals(scores, cost, sizes, 1.0 / temperature, probs)
    return probs


def sample(scores: Floats, cost: Floats, sizes: Ints, temperature: float, n: int, rng: np.random.Generator) -> Ints:
    """(n, L) paths drawn from that distribution jointly: forward filtering, backward sampling."""
    paths = np.empty((n, len(sizes)), np.int64)
    _backward_sample(scores, cost, sizes, 1.0 / temperature, rng.random((n, len(sizes))), paths)
    return paths


def sample_layers(probs: Floats, sizes: Ints, n: int, rng: np.random.Generator) -> Ints:
    """(n, L) states, each layer drawn by itself from its row of (L, M) probabilities."""
    cdf = np.cumsum(probs, axis=1)
    draws = rng.random((n, len(sizes))) * cdf[:, -1]
    paths = (draws[:, :, None] >= cdf).sum(axis=2)  # (n, L)
    return cast(Ints, np.minimum(paths, sizes - 1))


@compiled
def viterbi(scores: Any, cost: Any, sizes: Any, price: float, path: Any) -> float:
    """Fills `path` (L,) with the best path at this price of the cost; gives its value."""
    n_layers, width = scores.shape
    back = np.empty((n_layers, width), np.int64)
    value, following = np.empty(width), np.empty(width)
    for j in range(sizes[0]):
        value[j] = scores[0, j] - price * cost[0, 0, j]
    for layer in range(1, n_layers):
        for j in range(sizes[layer]):
            best, arg = -np.inf, 0
            for i in range(sizes[layer - 1]):
                v = value[i] - price * cost[layer, i, j]
                if v > best:
                    best, arg = v, i
            following[j] = best + scores[layer, j]
            back[layer, j] = arg
        value, following = following, value
    last = sizes[n_layers - 1]
    state = int(np.argmax(value[:last]))
    best = value[state]
    for layer in range(n_layers - 1, -1, -1):
        path[layer] = state
        state = back[layer, state] if layer else 0
    return float(best)


@compiled
def totals(scores: Any, cost: Any, path: Any) -> Any:
    """(sum of scores, sum of costs) of one path."""
    score, total, before = 0.0, 0.0, 0
    for layer in range(len(path)):
        score += scores[layer, path[layer]]
        total += cost[layer, before, path[layer]]
        before = path[layer]
    return score, total


@compiled
def _forward(scores: Any, cost: Any, sizes: Any, beta: float, a: Any) -> None:
    """Fills a (L, M): log of the sum over all beginnings of exp(beta * ...), the state's own score included."""
    n_layers, width = scores.shape
    terms = np.empty(width)
    for j in range(sizes[0]):
        a[0, j] = beta * (scores[0, j] - cost[0, 0, j])
    for layer in range(1, n_layers):
        for j in range(sizes[layer]):
            top = -np.inf
            for i in range(sizes[layer - 1]):
                terms[i] = a[layer - 1, i] - beta * cost[layer, i, j]
                top = max(top, terms[i])
            total = 0.0
            for i in range(sizes[layer - 1]):
                total += np.exp(terms[i] - top)
            a[layer, j] = top + np.log(total) + beta * scores[layer, j]


@compiled
def _marginals(scores: Any, cost: Any, sizes: Any, beta: float, probs: Any) -> None:
    n_layers, width = scores.shape
    a, b = np.empty((n_layers, width)), np.zeros((n_layers, width))
    terms = np.empty(width)
    _forward(scores, cost, sizes, beta, a)
    for layer in range(n_layers - 2, -1, -1):
        for i in range(sizes[layer]):
            top = -np.inf
            for j in range(sizes[layer + 1]):
                terms[j] = b[layer + 1, j] + beta * (scores[layer + 1, j] - cost[layer + 1, i, j])
                top = max(top, terms[j])
            total = 0.0
            for j in range(sizes[layer + 1]):
                total += np.exp(terms[j] - top)
            b[layer, i] = top + np.log(total)
    for layer in range(n_layers):
        top, total = -np.inf, 0.0
        for j in range(sizes[layer]):
            top = max(top, a[layer, j] + b[layer, j])
        for j in range(sizes[layer]):
            probs[layer, j] = np.exp(a[layer, j] + b[layer, j] - top)
            total += probs[layer, j]
        for j in range(sizes[layer]):
            probs[layer, j] /= total


@compiled
def _backward_sample(scores: Any, cost: Any, sizes: Any, beta: float, draws: Any, paths: Any) -> None:
    """Fills paths (N, L); draws (N, L) are uniform in [0, 1)."""
    n_layers, width = scores.shape
    a = np.empty((n_layers, width))
    _forward(scores, cost, sizes, beta, a)
    cdf = np.empty((n_layers, width, width))  # of a layer's state given the next layer's state j
    for layer in range(n_layers):
        n_next = sizes[layer + 1] if layer + 1 < n_layers else 1
        for j in range(n_next):
            top, total = -np.inf, 0.0
            for i in range(sizes[layer]):
                price = cost[layer + 1, i, j] if layer + 1 < n_layers else 0.0
                cdf[layer, j, i] = a[layer, i] - beta * price
                top = max(top, cdf[layer, j, i])
            for i in range(sizes[layer]):
                total += np.exp(cdf[layer, j, i] - top)
                cdf[layer, j, i] = total
    for n in range(paths.shape[0]):
        j = 0
        for layer in range(n_layers - 1, -1, -1):
            size = sizes[layer]
            at = draws[n, layer] * cdf[layer, j, size - 1]
            i = 0
            while i < size - 1 and cdf[layer, j, i] <= at:
                i += 1
            paths[n, layer] = j = i
