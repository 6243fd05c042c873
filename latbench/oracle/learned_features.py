"""The rows that ``learned_gp`` reads: a view's figures, centred and in units of what the space's mean network costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from latbench.oracle.base import Archs, Floats
from latbench.oracle.features import N_WHOLE, Ints, View
from latbench.spaces.base import SearchSpace

GROUPS = ("total", "kind", "level", "block", "decision")  # of linear features, the last from the decisions themselves
N_REFERENCE = 2000  # sampled architectures whose mean and spread scale the features


@dataclass(frozen=True, eq=False)
class Features:
    """Rows of a view's scaled features: what the kernels read."""

    decisions: Ints  # (N, D) as they count
    linear: tuple[Floats, ...]  # per group (N, M_g), centred
    smooth: Floats  # (N, Q), centred and scaled so that squared distances average 2
    mean: Floats  # (N,) prior mean

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class Scaler:
    """From a view's figures to features, by the mean and the spread over the space's own samples."""

    view: View
    linear: tuple[tuple[Floats, Floats], ...]  # per group of figures ((M, M_g), (M_g,)): x @ matrix + shift
    smooth: tuple[Floats, Floats]
    mean: tuple[Floats, float]
    shares: Floats  # (D, K) how often an option was sampled

    def __call__(self, archs: Archs) -> Features:
        """(N, D) -> N rows."""
        decisions, x = self.view.figures(archs)
        linear = [x @ matrix + shift for matrix, shift in self.linear]
        chosen = (decisions[:, :, None] == np.arange(self.shares.shape[1])) - self.shares
        linear.append(chosen.reshape(len(x), -1) * self.decision_scale)
        smooth = x @ self.smooth[0] + self.smooth[1]
        return Features(decisions, tuple(linear), smooth, x @ self.mean[0] + self.mean[1])

    @cached_property
    def decision_scale(self) -> float:
        """Makes the centred one-hot rows' squared norm 1 on average."""
        return float(1 / np.sqrt(max((self.shares * (1 - self.shares)).sum(), 1e-12)))


@lru_cache(maxsize=16)
def scaler(space: SearchSpace, view_name: str) -> Scaler:
    """Of one view of a space; deterministic. Features that its samples share, as their stem, drop out."""
    view, rng = View(view_name, space), np.random.default_rng(0)
    n = N_WHOLE if space.whole_figures else N_REFERENCE
    decisions, x = view.figures(np.array([space.sample(rng) for _ in range(n)], np.int64))
    names = view.sums.names
    total = {name.rpartition("/")[2]: x[:, i].mean() for i, name in enumerate(names) if name.startswith("total/")}
    unit = np.array([1 / max(total[name.rpartition("/")[2]], 1e-300) for name in names])
    centre = x.mean(axis=0)

    def pick(columns: list[int], weights: Floats) -> tuple[Floats, Floats]:
        matrix = np.zeros((len(names), len(columns)))
        matrix[columns, range(len(columns))] = weights
        return matrix, -centre @ matrix

    varies = x.std(axis=0) > 1e-12 * np.maximum(abs(centre), 1e-300) if len(names) else np.zeros(0, bool)
    column = {name: i for i, name in enumerate(names)}
    of = {g: [i for i, name in enumerate(names) if name.startswith(g) and varies[i]] for g in GROUPS[:-1]}
    of["kind"] = [i for i in of["kind"] if not names[i].endswith("/weights")]
    linear = [pick(of[g], unit[of[g]]) for g in ("total", "kind", "level")]
    launched = [i for i in of["block"] if names[i].endswith("/kernels")]
    counts, (sizes, _) = pick(launched, unit[launched]), pick(launched, np.zeros(len(launched)))
    for j, i in enumerate(launched):
        for q in ("macs", "bytes"):
            sizes[column[names[i].replace("/kernels", f"/{q}")], j] = 0.5 * unit[column[f"total/{q}"]]
    linear.append((np.hstack([counts[0], sizes]), np.concatenate([counts[1], -centre @ sizes])))
    chosen = of["total"] + of["kind"]
    smooth = pick(chosen, 1 / (x[:, chosen].std(axis=0) * np.sqrt(max(len(chosen), 1))))
    mean = np.array(
        [unit[i] / 3 if n in ("total/kernels", "total/macs", "total/bytes") else 0.0 for i, n in enumerate(names)]
    )
    shares = (decisions[:, :, None] == np.arange(max(len(decision.options) for decision in space.decisions))).mean(
        axis=0
    )
    return Scaler(view, tuple(linear), smooth, (mean, 0.0 if len(names) else 1.0), shares)
