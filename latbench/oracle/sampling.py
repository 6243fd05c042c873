"""Which networks to measure: orders in which few measurements tell much.

* ``uniform``: each decision uniform over its options;
* ``biased``: each network holds as many of the least-seen blocks as possible (AOWS, ``generate --biased``);
* ``d_optimal``: each network is the one whose sum of blocks is least known from those before it.

The last two need a space that factors into blocks; ``choose`` falls back on ``uniform`` where it does not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.oracle.base import Archs
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.vocabulary import ABSENT, Vocabulary, vocabulary
from latbench.provenance import Provenance
from latbench.spaces.base import FactoredSpace, SearchSpace

Integers = NDArray[np.int64]

METHODS = ("uniform", "biased", "d_optimal")
NOISE_RATIO = 0.3  # of a measurement's noise to a block's spread: 1 % of a network, a third of a block of fifteen
POOL = 8000  # candidates of the D-optimal choice; twice as many bring 0.01 points of error
TIES = 1e-6  # of one block, at most: which of equally good networks is taken


def choose(
    space: SearchSpace, n: int, method: str, rng: np.random.Generator, *, measured: Archs | None = None
) -> Integers:
    """(n, D) architectures by one of ``METHODS``, in the order to measure them; `measured` (M, D) ones are known.

    Raises UsageError on an unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"unknown way to sample networks {method!r}: {', '.join(METHODS)}")
    if method == "uniform" or not isinstance(space, FactoredSpace):
        return uniform(space, n, rng)
    return (biased if method == "biased" else d_optimal)(space, n, rng, measured=measured)


def uniform(space: SearchSpace, n: int, rng: np.random.Generator) -> Integers:
    """(n, D), as the space samples."""
    archs = [space.sample(rng) for _ in range(n)]
    return np.array(archs, np.int64).reshape(n, len(space.decisions))


def biased(
    space: FactoredSpace,
    n: int,
    rng: np.random.Generator,
    *,
    measured: Archs | None = None,
    legacy: bool = False,
) -> Integers:
    """(n, D) architectures, each with the most sites whose block has been seen least often, so that coverage is even.

    Berman et al. 2020 as released (bermanmaxim/AOWS). Differs from it: ties are broken at random. The released code
    takes the first; on mobilenet_v1 five sites of six then stay at their smallest width in four of five networks, which
    nearly doubles the error of the fit. ``legacy`` does as it does (chains only: UsageError elsewhere).
    """
    words = vocabulary(space)
    counts = np.zeros(len(words.blocks), np.int64)
    if measured is not None and len(measured):
        seen = words.occurrences(measured)
        counts += np.bincount(seen[seen != ABSENT], minlength=len(counts))
    free = np.unique(np.concatenate([np.zeros(0, np.int64), *(t.ravel() for t in words.tables if t.ndim)]))
    free = free[free != ABSENT]  # a block that every network has is no choice
    chain = _chain(words)
    if chain is None:
        if legacy:
            raise UsageError(f"{space.name} is no chain: the released code's order of ties is not defined on it")
        return _biased_by_elimination(words, counts, free, n, rng)
    archs = np.empty((n, len(space.decisions)), np.int64)
    _kernel()(*chain, counts, free, np.float64(0.0 if legacy else TIES), rng, archs)
    return archs


def d_optimal(
    space: FactoredSpace,
    n: int,
    rng: np.random.Generator,
    *,
    measured: Archs | None = None,
    pool: Archs | None = None,
) -> Integers:
    """(n, D): greedily, the candidate whose latency is the most uncertain given those chosen before it.

    The Bayesian linear model has one coefficient per distinct block, independent and of equal spread, noise is
    ``NOISE_RATIO`` of that; the largest predictive variance is the largest gain in log det of the information
    (Fedorov 1972; Chaloner and Verdinelli 1995). Candidates: `pool` (C, D), by default ``POOL`` uniform ones, or five
    times n; each is taken once. It is a pivoted Cholesky factorisation of the candidates' kernel: C * n^2 operations.
    Raises UsageError where the pool has fewer than n.
    """
    candidates = uniform(space, max(POOL, 5 * n), rng) if pool is None else np.asarray(pool, np.int64)
    if len(candidates) < n:
        raise UsageError(f"{n} networks cannot be chosen from a pool of {len(candidates)}")
    known = np.empty((0, candidates.shape[1]), np.int64) if measured is None else np.asarray(measured, np.int64)
    design = vocabulary(space).design(np.concatenate([known, candidates])).astype(np.float32)
    variance = np.asarray(design.multiply(design).sum(axis=1)).ravel()
    factor = np.empty((design.shape[0], len(known) + n), np.float32, order="F")  # L: kernel of the chosen = L L'
    order = np.empty(len(known) + n, np.int64)
    for k in range(len(order)):
        best = order[k] = k if k < len(known) else int(variance.argmax())
        covariance = design @ design[[best]].toarray()[0] - factor[:, :k] @ factor[best, :k]
        factor[:, k] = covariance / np.sqrt(variance[best] + NOISE_RATIO**2)
        variance -= factor[:, k] ** 2
        variance[best] = -np.inf
        if k + 1 == len(known):
            variance[: len(known)] = -np.inf
    return candidates[order[len(known) :] - len(known)]


def _chain(words: Vocabulary) -> tuple[Any, ...] | None:
    """Options per decision, and per site its last decision, number of the options before it and block numbers.

    None where a site's scope is neither one decision nor two neighbours.
    """
    sites = []
    for site, table in zip(words.space.sites, words.tables, strict=True):
        if len(site.scope) > 2 or (len(site.scope) == 2 and site.scope[1] != site.scope[0] + 1):
            return None
        if site.scope:
            sites.append((site.scope[-1], len(table) if len(site.scope) == 2 else 1, table.ravel()))
    sites.sort(key=lambda site: site[0])
    n_options = np.array([len(d.options) for d in words.space.decisions], np.int64)
    if not sites or len(n_options) == 0:
        return None
    last, before, tables = zip(*sites, strict=True)
    offsets = np.cumsum([0, *(len(t) for t in tables)])
    return n_options, np.array(last), np.array(before), offsets, np.concatenate(tables)


def _biased_by_elimination(
    words: Vocabulary, counts: Integers, free: Integers, n: int, rng: np.random.Generator
) -> Integers:
    """For sites that are entangled otherwise: milliseconds each."""
    archs = np.empty((n, len(words.space.decisions)), np.int64)
    provenance = Provenance("", "", "")
    for i in range(n):
        least = counts[free].min() if len(free) else 0
        factors = []
        for site, table in zip(words.space.sites, words.tables, strict=True):
            if site.scope:
                gain = ((table != ABSENT) & (counts[table] == least)) + TIES * rng.random(table.shape)
                factors.append(Factor(site.name, site.scope, -gain))
        archs[i] = FactorOracle(words.space, tuple(factors), provenance).fastest()[0]
        seen = words.occurrences(archs[i : i + 1])
        counts += np.bincount(seen[seen != ABSENT], minlength=len(counts))
    return archs


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Compiled on first use and kept on disk by numba."""
    import numba

    return numba.njit(cache=True)(_biased_on_chain)


def _biased_on_chain(
    n_options: Any, last: Any, before: Any, offsets: Any, tables: Any, counts: Any, free: Any, ties: Any, rng: Any,
    archs: Any,
) -> None:  # fmt: skip
    """Fills archs (n, D), one Viterbi each: scores[d, j] is the best sum up to decision d where it takes j."""
    n_decisions, widest = len(n_options), n_options.max()
    scores = np.zeros((n_decisions, widest))
    came_from = np.zeros((n_decisions, widest), np.int64)
    gain = np.zeros((widest, widest))
    for n in range(archs.shape[0]):
        least = counts[free[0]]
        for block in free:
            least = min(least, counts[block])
        site = 0
        for d in range(n_decisions):
            n_before = n_options[d - 1] if d else 1
            gain[:, :] = 0.0
            while site < len(last) and last[site] == d:
                for i in range(n_before):
                    for j in range(n_options[d]):
                        row = i if before[site] > 1 else 0
                        block = tables[offsets[site] + row * n_options[d] + j]
                        if block >= 0 and counts[block] == least:
                            gain[i, j] += 1.0
                        if ties > 0.0:
                            gain[i, j] += ties * rng.random()
                site += 1
            for j in range(n_options[d]):
                best, at = -1.0, 0
                for i in range(n_before):
                    score = gain[i, j] + (scores[d - 1, i] if d else 0.0)
                    if score > best:  # strictly: of equals the first
                        best, at = score, i
                scores[d, j], came_from[d, j] = best, at
        pick = 0
        for j in range(n_options[n_decisions - 1]):
            if scores[n_decisions - 1, j] > scores[n_decisions - 1, pick]:
                pick = j
        for d in range(n_decisions - 1, -1, -1):
            archs[n, d] = pick
            pick = came_from[d, pick]
        for s in range(len(last)):
            row = archs[n, last[s] - 1] if before[s] > 1 else 0
            block = tables[offsets[s] + row * n_options[last[s]] + archs[n, last[s]]]
            if block >= 0:
                counts[block] += 1
