"""How much of each ingredient a few measurements speak for: Bayesian model averaging over a linear model's scales.

The relative latency is 1 + a sum of ingredients (each source device, quantities on paper, free options) + noise. Each
ingredient's coefficients are normal with a scale of its own, and zero in a part of the models: "no source at all" is
one of them, and wins where the sources mislead. Noise is relative to the latency and a mixture of sizes, of which the
larger ones are delays: what disturbs a measurement makes it slower. So an outlier counts little, the least where it is
late. Nothing is chosen: scales and outliers are averaged over as their marginal likelihood says
(MacKay 1992; Hoeting et al. 1999), by sampling with tempering, Metropolis-Hastings moves (Del Moral, Doucet, Jasra
2006) and Gibbs sweeps over the measurements. Leave-one-out predictions follow in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_MODELS = (400, 2000, 20_000)  # at least, at most, and over the number of measurements
_TEMPERATURES = (0.1, 0.3, 0.6, 1.0, 1.0)
_STEP = 0.5  # of a move, in the logarithm of a scale
_LEVEL_SCALE = 0.5  # of the constant, relative to the median measurement
_NOISE = (0.03, 1.0)  # median and spread of its scale, as an ingredient's
_SIZES = np.array([1.0, 3.0, 10.0, 40.0])  # of a measurement's noise, relative to the usual: about a Student t
_SHARES = np.array([0.82, 0.11, 0.055, 0.015])  # of the sizes
_DELAYS = _SIZES - 1  # mean of each size's noise, in the same unit
_FEW, _ALONE = 0.8, 0.1  # shares of models with few sources, and with none
_N_FEW = 1.3  # sources expected among few
_PAPER = 0.2  # of the chance of other guesses, where there are sources
_WORK = 2_000_000  # numbers in one batch of (n, n) matrices


@dataclass(frozen=True)
class Ingredient:
    """Columns that share one scale; what is expected of it."""

    columns: Floats  # (n, p) at the measured architectures, relative to the latency
    median: float  # of the scale
    spread: float  # of the scale's logarithm
    chance: float  # that it matters at all
    guess: bool = False  # one column, which the latency may be expected to follow
    source: bool = False  # another device: in most models there are few of them


@dataclass(frozen=True)
class Blend:
    """Relative latency = 1 + constant + sum of columns @ coefficients."""

    constant: float
    coefficients: tuple[Floats, ...]  # (p,) per ingredient
    left_out: Floats  # (n,) predictions for each measurement from the others
    chances: Floats  # (ingredients,) posterior probability that it matters


class _Models(NamedTuple):
    """M models: scales (the noise's last), which are on, how large the noise of each measurement is."""

    log_scales: Floats  # (M, C + 1)
    on: Bools  # (M, C + 1)
    sizes: NDArray[np.int64]  # (M, n) positions in _SIZES

    def pick(self, rows: NDArray[np.int64]) -> _Models:
        return _Models(self.log_scales[rows], self.on[rows], self.sizes[rows])

    @property
    def variances(self) -> Floats:
        return np.where(self.on, np.exp(2 * self.log_scales), 0.0)


class _Evidence(NamedTuple):
    log_likelihood: Floats  # (M,)
    alphas: Floats  # (M, n) covariance^-1 (y - expected, delays included)
    inverse: Floats  # (M, n, n)

    def pick(self, rows: NDArray[np.int64]) -> _Evidence:
        return _Evidence(self.log_likelihood[rows], self.alphas[rows], self.inverse[rows])


@dataclass(frozen=True, eq=False)
class _Problem:
    y: Floats  # (n,) about 1
    ingredients: tuple[Ingredient, ...]

    @cached_property
    def kernels(self) -> Floats:
        """(C, n * n) covariances of the ingredients at scale 1."""
        return np.stack([(i.columns @ i.columns.T).ravel() for i in self.ingredients])

    @cached_property
    def guesses(self) -> Floats:
        """(C, n); zero for what is no guess."""
        return np.stack([i.columns[:, 0] if i.guess else np.zeros(len(self.y)) for i in self.ingredients])

    def draw(self, m: int, rng: np.random.Generator) -> _Models:
        """From the prior."""
        chance = np.tile([*(i.chance for i in self.ingredients), 1.0], (m, 1))
        source = np.array([*(i.source for i in self.ingredients), False])
        paper = np.array([*(i.guess and not i.source for i in self.ingredients), False])
        if source.any():
            chance[np.ix_(rng.uniform(size=m) < _FEW, source)] = min(1.0, _N_FEW / source.sum())
            alone = rng.uniform(size=m) < _ALONE
            chance[np.ix_(alone, source)] = 0.0
            chance[np.ix_(~alone, paper)] *= _PAPER
        centre, spread = self._prior()
        return _Models(
            rng.normal(centre, spread, chance.shape),
            rng.uniform(size=chance.shape) < chance,
            np.searchsorted(np.cumsum(_SHARES)[:-1], rng.uniform(size=(m, len(self.y)))),
        )

    def _prior(self) -> tuple[Floats, Floats]:
        medians = [*(i.median for i in self.ingredients), _NOISE[0]]
        return np.log(medians), np.array([*(i.spread for i in self.ingredients), _NOISE[1]])

    def log_prior(self, models: _Models) -> Floats:
        """(M,) of the scales, up to a constant."""
        centre, spread = self._prior()
        density: Floats = -0.5 * (((models.log_scales - centre) / spread) ** 2).sum(axis=1)
        return density

    def shares(self, models: _Models) -> Floats:
        """(M, C): what each guess's coefficient is expected to be: those that are on alike, 1 together."""
        on = models.on[:, :-1] & [i.guess for i in self.ingredients]
        shares: Floats = on / np.maximum(on.sum(axis=1, keepdims=True), 1)
        return shares

    def noise(self, models: _Models) -> Floats:
        """(M, n) variances of a measurement of the usual size."""
        return models.variances[:, -1:] * self.y**2

    def delay(self, models: _Models) -> Floats:
        """(M, n) expected noise of each measurement."""
        delay: Floats = np.sqrt(self.noise(models)) * _DELAYS[models.sizes]
        return delay

    def evaluate(self, models: _Models) -> _Evidence:
        """Marginal likelihoods, up to a constant."""
        n = len(self.y)
        variances, noise = models.variances, self.noise(models) * _SIZES[models.sizes] ** 2
        residuals = self.y - 1 - self.shares(models) @ self.guesses - self.delay(models)
        inverses, log_dets, batch = [], [], max(1, _WORK // n**2)
        for at in range(0, len(variances), batch):
            covariance = (variances[at : at + batch, :-1] @ self.kernels).reshape(-1, n, n) + _LEVEL_SCALE**2
            covariance[:, np.arange(n), np.arange(n)] += noise[at : at + batch] + 1e-10
            inverses.append(np.linalg.inv(covariance))
            log_dets.append(np.linalg.slogdet(covariance)[1])
        inverse = np.concatenate(inverses)
        alphas = (inverse @ residuals[:, :, None])[:, :, 0]
        return _Evidence(-0.5 * ((alphas * residuals).sum(axis=1) + np.concatenate(log_dets)), alphas, inverse)

    def sweep(self, models: _Models, found: _Evidence, temperature: float, rng: np.random.Generator) -> _Models:
        """Draws the size of every measurement's noise anew, given all else (Gibbs)."""
        sizes, usual = models.sizes.copy(), self.noise(models)
        alphas, inverse = found.alphas.copy(), found.inverse.copy()
        for i in range(len(self.y)):
            precision, before, root = inverse[:, i, i], sizes[:, i], np.sqrt(usual[:, i, None])
            held = usual[:, i] * _SIZES[before] ** 2
            late = (alphas[:, i] / precision)[:, None] + root * (_DELAYS[before][:, None] - _DELAYS)
            spread = np.maximum(1 / precision - held, 0)[:, None] + usual[:, i, None] * _SIZES**2 + 1e-10
            score = temperature * -0.5 * (np.log(spread) + late**2 / spread) + np.log(_SHARES)
            now = (score + rng.gumbel(size=score.shape)).argmax(axis=1)
            moved = np.flatnonzero(now != before)
            change = usual[moved, i] * (_SIZES[now[moved]] ** 2 - _SIZES[before[moved]] ** 2)
            delayed = root[moved, 0] * (_DELAYS[now[moved]] - _DELAYS[before[moved]])
            column = inverse[moved, :, i]  # Sherman and Morrison
            gain = 1 / (1 + change * precision[moved])
            alphas[moved] -= (gain * (change * alphas[moved, i] + delayed))[:, None] * column
            inverse[moved] -= (gain * change)[:, None, None] * column[:, :, None] * column[:, None, :]
            sizes[:, i] = now
        return models._replace(sizes=sizes)


def blend(y: Floats, ingredients: Sequence[Ingredient], rng: np.random.Generator) -> Blend:
    """(n,) relative latencies of about 1 and their ingredients -> the average over models."""
    problem = _Problem(y, tuple(ingredients))
    least, most, work = _MODELS  # the fewer the measurements, the more models explain them
    models, found = _sample(problem, min(max(work // len(y), least), most), rng)
    dual = (found.alphas[:, None, :] * models.variances[:, :-1, None]).mean(axis=0)  # (C, n)
    shares = problem.shares(models).mean(axis=0)
    return Blend(
        constant=float(_LEVEL_SCALE**2 * found.alphas.sum(axis=1).mean()),
        coefficients=tuple(i.columns.T @ d + s for i, d, s in zip(ingredients, dual, shares, strict=True)),
        left_out=_left_out(problem, models, found),
        chances=models.on[:, :-1].mean(axis=0),
    )


def _sample(problem: _Problem, m: int, rng: np.random.Generator) -> tuple[_Models, _Evidence]:
    """M models from the posterior, by way of ever less tempered likelihoods."""
    models = problem.draw(m, rng)
    found, before = problem.evaluate(models), 0.0
    for now in _TEMPERATURES:
        weights = np.exp((now - before) * (found.log_likelihood - found.log_likelihood.max()))
        rows = _systematic(weights / weights.sum(), rng)
        models = problem.sweep(models.pick(rows), found.pick(rows), now, rng)
        found = problem.evaluate(models)
        for propose in (_nearby, _one_anew):
            proposal, log_ratio = propose(problem, models, rng)
            theirs = problem.evaluate(proposal)
            log_ratio = log_ratio + now * (theirs.log_likelihood - found.log_likelihood)
            accepted = np.flatnonzero(np.log(rng.uniform(size=m)) < log_ratio)
            for mine, new in ((models, proposal), (found, theirs)):
                for a, b in zip(mine, new, strict=True):
                    a[accepted] = b[accepted]
        before = now
    return models, found


def _nearby(problem: _Problem, models: _Models, rng: np.random.Generator) -> tuple[_Models, Floats]:
    """Every scale a step away."""
    moved = models._replace(log_scales=models.log_scales + _STEP * rng.standard_normal(models.log_scales.shape))
    return moved, problem.log_prior(moved) - problem.log_prior(models)


def _one_anew(problem: _Problem, models: _Models, rng: np.random.Generator) -> tuple[_Models, Floats]:
    """One ingredient of each model drawn anew, as if ingredients were on independently of each other: nearly so."""
    m, c = models.on.shape
    fresh = problem.draw(m, rng)
    change = np.arange(c) == rng.integers(c, size=(m, 1))
    scales = np.where(change, fresh.log_scales, models.log_scales)
    return models._replace(log_scales=scales, on=np.where(change, fresh.on, models.on)), np.zeros(m)


def _systematic(weights: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    """Resampling: row i about M * weights[i] times."""
    m = len(weights)
    rows = np.searchsorted(np.cumsum(weights), (np.arange(m) + rng.uniform()) / m)
    return np.minimum(rows, m - 1).astype(np.int64)


def _left_out(problem: _Problem, models: _Models, found: _Evidence) -> Floats:
    """(n,) averages over the models as the other measurements alone weigh them."""
    precision = np.diagonal(found.inverse, axis1=1, axis2=2)  # (M, n)
    error = found.alphas / precision + problem.delay(models)  # of what is expected without noise
    usual = problem.noise(models)
    rest = np.maximum(1 / precision - usual * _SIZES[models.sizes] ** 2, 0)
    spread = (rest + 1e-10)[:, :, None] + usual[:, :, None] * _SIZES**2  # (M, n, sizes)
    late = error[:, :, None] - np.sqrt(usual)[:, :, None] * _DELAYS
    density = (_SHARES / np.sqrt(spread) * np.exp(-0.5 * late**2 / spread)).sum(axis=2)
    weights = density.min(axis=0) / density
    predictions = problem.y - error
    average: Floats = (weights * predictions).sum(axis=0) / weights.sum(axis=0)
    return average
