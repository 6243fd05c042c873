"""Which candidates are worth asking for: what the networks asked so far say of others. [E] of RelativeNAS and IRLAS.

A Gaussian process with no figure to tune: losses become normal scores (one that failed weighs no more than the last in
rank), networks are alike by the share of decisions that they share and by what they do and cost on paper, the figures
that latency models read. It never judges: it only picks, among candidates that a searcher has drawn, those to spend an
evaluation on, by the lower end of what it expects.

Pre-selection by a model in evolutionary search: Jin, Surrogate-assisted Evolutionary Computation, 2011; in architecture
search: White, Neiswanger, Savani (BANANAS), AAAI 2021. Features of graphs tell more of few networks than decisions do:
Kadlecová et al., Surprisingly Strong Performance Prediction with Neural Graph Features, ICML 2024. Figures: decisions
49 and 57.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist
from scipy.stats import norm, rankdata

from latbench.oracle.features import views
from latbench.oracle.learned_features import scaler
from latbench.spaces.base import Arch, SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Figures = Callable[[Ints], Floats]  # (N, D) option indices -> (N, Q), squared distances 2 on average

# In standard deviations of the losses: what depends on few decisions at once, what adds up, what the figures tell, and
# what nothing explains.
JOINT, ADDITIVE, TOLD, UNEXPLAINED = 1.0, 0.3, 1.0, 0.3
REACH = 0.5  # share of differing decisions over which the joint part falls to 1/e
MAX_KNOWN = 1000  # the latest networks, where more were asked for: the work is cubic in them


def figures_of(space: SearchSpace) -> Figures:
    """What a space's networks do and cost on paper: work, traffic and weights, in all and by kind of kernel."""
    view = views(space)[-1].name  # what the output does not read tells nothing
    return lambda archs: scaler(space, view)(archs).smooth


def promising(known: Mapping[Arch, float], candidates: Sequence[Arch], figures: Figures | None = None) -> list[int]:
    """Indices of the candidates, that with the best prospects first.

    `known`: losses of networks in the order in which they were asked for, the lower the better, none of which must be
    finite. With fewer than two of them the candidates' order stays. Without `figures` decisions alone tell.
    """
    if len(known) < 2 or not candidates:
        return list(range(len(candidates)))
    latest = list(islice(known.items(), max(0, len(known) - MAX_KNOWN), None))
    asked, losses = (np.array(part) for part in zip(*latest, strict=True))
    rows, others = (_Rows.of(archs, figures) for archs in (asked, np.array(candidates)))
    order: list[int] = _order(rows, losses, others).tolist()
    return order


class _Rows(NamedTuple):
    """What networks are likened by."""

    decisions: Ints  # (N, D)
    figures: Floats | None  # (N, Q)

    @classmethod
    def of(cls, archs: Ints, figures: Figures | None) -> _Rows:
        return cls(archs, None if figures is None else figures(archs))


def _order(known: _Rows, losses: Floats, candidates: _Rows) -> Ints:
    """N networks, (N,) losses, M networks -> (M,)."""
    ranks = rankdata(np.where(np.isfinite(losses), losses, np.inf))
    scores = norm.ppf((ranks - 0.5) / len(ranks))
    system = _covariance(known, known)
    own = system[0, 0]  # of every network with itself
    system[np.diag_indices_from(system)] += UNEXPLAINED**2
    factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
    cross = _covariance(candidates, known)
    expected = cross @ cho_solve(factor, scores, check_finite=False)
    settled = np.einsum("mn,nm->m", cross, cho_solve(factor, cross.T, check_finite=False))
    doubt = np.sqrt(np.maximum(own - settled, 0))
    order: Ints = np.argsort(expected - doubt, kind="stable")
    return order


def _covariance(a: _Rows, b: _Rows) -> Floats:
    """N and M networks -> (N, M)."""
    differing = np.zeros((len(a.decisions), len(b.decisions)))
    for x, y in zip(a.decisions.T, b.decisions.T, strict=True):
        differing += x[:, None] != y
    differing /= max(a.decisions.shape[1], 1)
    covariance: Floats = JOINT**2 * np.exp(-differing / REACH) + ADDITIVE**2 * (1 - differing)
    if a.figures is not None and b.figures is not None:
        covariance += TOLD**2 * np.exp(-cdist(a.figures, b.figures, "sqeuclidean") / 2)
    return covariance
