"""What each width of each layer costs in training loss: the statistics that AOWS selects by.

Both estimators take (architecture, loss gap) pairs and give ``gaps()``: one figure per cell (layer, width), such that
the sum over an architecture's cells estimates its loss less the widest network's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from searchers.chains import Floats, Ints, compiled


class Statistics(Protocol):
    """An estimator whose state a checkpoint holds."""

    def push(self, archs: Ints, gaps: Floats, narrowest: Floats) -> None:
        """(N, L) option indices, (N,) loss gaps of these images, (N,) gaps of the narrowest network on them."""
        ...

    def gaps(self) -> Floats:
        """(L, M) estimated loss gap per cell, padded; also of cells never visited."""
        ...

    def weights(self) -> Floats:
        """(L, M) images that each figure rests on."""
        ...

    def visits(self) -> Ints:
        """(L, M) times that each cell was pushed."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class CellMeans:
    """The mean of each cell's last `window` gaps (Berman et al. 2020; the released code's windows hold 100,000).

    With layers sampled independently the mean of cell (i, w) is f_i(w) plus the same for all w of layer i, so
    m_i(w) - (L - 1) / L * m, m the mean over all cells, adds up to the expected gap. One ring per cell in fixed memory.
    Cells never visited are interpolated within their layer.
    """

    def __init__(self, sizes: Sequence[int], window: int) -> None:
        self.sizes, self.window = tuple(sizes), window
        shape = (len(self.sizes), max(self.sizes))
        self._rings = np.zeros((*shape, window), np.float32)
        self._sums = np.zeros(shape)
        self._counts = np.zeros(shape, np.int64)

    def push(self, archs: Ints, gaps: Floats, narrowest: Floats) -> None:
        """(N, L), (N,), (N,)."""
        _push(archs, gaps.astype(np.float32), self._rings, self._sums, self._counts)

    def means(self) -> Floats:
        """(L, M) of what each window holds; NaN where it is empty."""
        held = np.minimum(self._counts, self.window)
        return np.divide(self._sums, held, out=np.full_like(self._sums, np.nan), where=held > 0)

    def gaps(self) -> Floats:
        """(L, M)."""
        held = np.minimum(self._counts, self.window)
        overall = self._sums.sum() / held.sum() if held.any() else 0.0
        share = (len(self.sizes) - 1) / len(self.sizes)
        return filled(self.means(), self.sizes, overall) - share * overall

    def weights(self) -> Floats:
        """(L, M)."""
        return np.minimum(self._counts, self.window).astype(np.float64)

    def visits(self) -> Ints:
        """(L, M)."""
        counts: Ints = self._counts.copy()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Rings up to their fill."""
        depth = int(np.minimum(self._counts.max(initial=0), self.window))
        rings = torch.from_numpy(self._rings[:, :, :depth].copy())
        return {"rings": rings, "sums": _tensor(self._sums), "counts": _tensor(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        rings = state["rings"].numpy()
        self._rings[:, :, : rings.shape[2]] = rings
        self._sums[:], self._counts[:] = state["sums"].numpy(), state["counts"].numpy()


class AdditiveFit:
    """gap ~ b + sum of g_i(w_i): a ridge regression with forgetting, around a prior that a fit without data gives.

    Right however layers are sampled: where some widths come together (joint samples), or come from another time than
    others (adaptive sampling), cell means blame one layer for its company. It is also the sharper one under uniform
    sampling, since what the other layers add is no noise to it. An image is worth 1/e after `window` further visits of
    a typical cell.

    The prior: g_i falls with the logarithm of the width, from a common share of the narrowest network's gap to 0. A
    cell departs from it by tau = half an average layer's part of that gap, so the ridge is sigma^2 / tau^2, sigma^2
    the variance of a single image's gap: data of ImageNet's size (90,000 images a cell, ridge near 1,000) speak for
    themselves, a few hundred images do not send the search after noise.
    """

    def __init__(self, sizes: Sequence[int], window: int, curve: Floats) -> None:
        self.sizes, self._curve = tuple(sizes), curve
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])[:-1]
        n = sum(self.sizes)
        self._keep = 1.0 - 1.0 / (window * max(self.sizes))  # per image
        self._normal, self._right = np.zeros((n, n)), np.zeros(n)
        self._total = np.zeros(4)  # images; sums of their gaps, of squared gaps, of the narrowest network's gaps
        self._counts = np.zeros((len(self.sizes), max(self.sizes)), np.int64)

    def push(self, archs: Ints, gaps: Floats, narrowest: Floats) -> None:
        """(N, L), (N,), (N,)."""
        chosen = np.zeros((len(archs), len(self._right)))
        np.put_along_axis(chosen, archs + self._starts, 1.0, axis=1)
        kept = self._keep ** len(archs)
        self._normal = kept * self._normal + chosen.T @ chosen
        self._right = kept * self._right + chosen.T @ gaps
        self._total = kept * self._total + [len(archs), gaps.sum(), (gaps**2).sum(), narrowest.sum()]
        np.add.at(self._counts, (np.arange(len(self.sizes)), archs), 1)

    def gaps(self) -> Floats:
        """(L, M)."""
        n = max(self._total[0], 1e-300)
        mean, square, narrowest = self._total[1:] / n
        depth = max(narrowest, 1e-3)  # a narrowest network that looks better is noise, too
        ridge = (square - mean**2) / (0.5 * depth / len(self.sizes)) ** 2
        prior = np.concatenate([depth * row[:size] for row, size in zip(self._curve, self.sizes, strict=True)])
        visits = np.diag(self._normal)
        offset = mean - visits @ prior / n
        right = self._right - self._normal @ prior - offset * visits
        effects = prior + np.linalg.solve(self._normal + max(ridge, 1e-6) * np.eye(len(prior)), right)
        return self._rows(effects + offset / len(self.sizes))

    def weights(self) -> Floats:
        """(L, M)."""
        return self._rows(np.diag(self._normal))

    def visits(self) -> Ints:
        """(L, M)."""
        counts: Ints = self._counts.copy()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """The normal equations."""
        return {name: _tensor(getattr(self, f"_{name}")) for name in ("normal", "right", "total", "counts")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        for name in ("normal", "right", "total", "counts"):
            setattr(self, f"_{name}", state[name].numpy().copy())

    def _rows(self, flat: Floats) -> Floats:
        out = np.zeros(self._counts.shape)
        for layer, (start, size) in enumerate(zip(self._starts, self.sizes, strict=True)):
            out[layer, :size] = flat[start : start + size]
        return out


def log_width(options: Sequence[Sequence[Any]]) -> Floats:
    """(L, M) that fall with log(width), alike in all layers: they sum to 1 at the narrowest widths, to 0 at the widest.

    The shape of ``AdditiveFit``'s prior.
    """
    logs = [np.log(row[-1] / np.array(row, np.float64)) for row in options]
    curve = np.zeros((len(logs), max(map(len, logs))))
    for layer, row in enumerate(logs):
        curve[layer, : len(row)] = row
    curve /= max(float(curve[:, 0].sum()), 1e-300)
    return curve


def falling(gaps: Floats, weights: Floats, sizes: Sequence[int]) -> Floats:
    """(L, M) figures nearest to `gaps`, by weighted squares, that never rise with the width (pool adjacent violators).

    More channels can hold what fewer do: a wider cell that looks worse is noise, and the best of many noisy cells is
    an illusion.
    """
    out = np.zeros_like(gaps)
    for layer, size in enumerate(sizes):
        pools: list[list[float]] = []  # value, weight, cells
        for gap, weight in zip(gaps[layer, :size].tolist(), weights[layer, :size].tolist(), strict=True):
            pools.append([gap, max(weight, 1e-9), 1])
            while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
                value, mass, cells = pools.pop()
                before = pools[-1]
                before[0] = (before[0] * before[1] + value * mass) / (before[1] + mass)
                before[1] += mass
                before[2] += cells
        out[layer, :size] = np.repeat([pool[0] for pool in pools], [int(pool[2]) for pool in pools])
    return out


def filled(values: Floats, sizes: Sequence[int], default: float) -> Floats:
    """(L, M) with NaN among the first sizes[l] of a row replaced: linear between known neighbours, else the nearest
    known one, else `default`; padding becomes 0."""
    out = np.zeros_like(values)
    for layer, size in enumerate(sizes):
        row = values[layer, :size]
        known = np.flatnonzero(~np.isnan(row))
        out[layer, :size] = np.interp(np.arange(size), known, row[known]) if len(known) else default
    return out


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array.copy())


@compiled
def _push(archs: Any, gaps: Any, rings: Any, sums: Any, counts: Any) -> None:
    window = rings.shape[2]
    for n in range(archs.shape[0]):
        for layer in range(archs.shape[1]):
            state = archs[n, layer]
            place = counts[layer, state] % window
            if counts[layer, state] >= window:
                sums[layer, state] -= rings[layer, state, place]
            rings[layer, state, place] = gaps[n]
            sums[layer, state] += gaps[n]
            counts[layer, state] += 1
