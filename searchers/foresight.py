"""Which candidates are worth asking for: what the networks asked so far say of others. [E] of RelativeNAS and IRLAS.

A Gaussian process on decisions, with no figure to tune: losses become normal scores (one that failed weighs no more
than the last in rank), networks are alike by the share of decisions that they share. It never judges: it only picks,
among candidates that a searcher has drawn, those to spend an evaluation on, by the lower end of what it expects.

Pre-selection by a model in evolutionary search: Jin, Surrogate-assisted Evolutionary Computation, 2011; in architecture
search: White, Neiswanger, Savani (BANANAS), AAAI 2021. With 300 look-ups on NAS-Bench-201 RelativeNAS' median regret
falls from 0.38 of random search's to 0.00, hopeful Q-learning's from 0.44 to 0.21 (``benchmarks/nb201_search.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm, rankdata

from latbench.spaces.base import Arch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# In standard deviations of the losses: what depends on few decisions at once, what adds up, what no decision explains.
JOINT, ADDITIVE, UNEXPLAINED = 1.0, 0.3, 0.3
REACH = 0.5  # share of differing decisions over which the joint part falls to 1/e
MAX_KNOWN = 1000  # the latest networks, where more were asked for: the work is cubic in them


def promising(known: Mapping[Arch, float], candidates: Sequence[Arch]) -> list[int]:
    """Indices of the candidates, that with the best prospects first.

    `known`: losses of networks in the order in which they were asked for, the lower the better, none of which must be
    finite. With fewer than two of them the candidates' order stays.
    """
    if len(known) < 2 or not candidates:
        return list(range(len(candidates)))
    latest = list(islice(known.items(), max(0, len(known) - MAX_KNOWN), None))
    asked, losses = (np.array(part) for part in zip(*latest, strict=True))
    order: list[int] = _order(asked, losses, np.array(candidates)).tolist()
    return order


def _order(known: Ints, losses: Floats, candidates: Ints) -> Ints:
    """(N, D) option indices, (N,) losses, (M, D) -> (M,)."""
    ranks = rankdata(np.where(np.isfinite(losses), losses, np.inf))
    scores = norm.ppf((ranks - 0.5) / len(ranks))
    system = _covariance(known, known)
    system[np.diag_indices_from(system)] += UNEXPLAINED**2
    factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
    cross = _covariance(candidates, known)
    expected = cross @ cho_solve(factor, scores, check_finite=False)
    settled = np.einsum("mn,nm->m", cross, cho_solve(factor, cross.T, check_finite=False))
    doubt = np.sqrt(np.maximum(JOINT**2 + ADDITIVE**2 - settled, 0))
    order: Ints = np.argsort(expected - doubt, kind="stable")
    return order


def _covariance(a: Ints, b: Ints) -> Floats:
    """(N, D), (M, D) -> (N, M)."""
    differing = np.zeros((len(a), len(b)))
    for x, y in zip(a.T, b.T, strict=True):
        differing += x[:, None] != y
    differing /= max(a.shape[1], 1)
    covariance: Floats = JOINT**2 * np.exp(-differing / REACH) + ADDITIVE**2 * (1 - differing)
    return covariance
