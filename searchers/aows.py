"""AOWS: optimal width search by statistics of one slimmable network.

Berman, Pishchulin, Xu, Blaschko, Medioni: AOWS: Adaptive and Optimal Network Width Search With Latency Constraints,
CVPR 2020. A slimmable network is trained at random widths; the loss that each width of each layer adds to the widest
network's is a unary term, latency a pairwise one, and the best widths under a budget are a shortest path with a
resource. OWS samples uniformly and can answer any target afterwards; AOWS samples from the Gibbs distribution around
the current answer, ever colder.

Differs from the paper and its released code:

* The budgeted path is optimal, not that of the Lagrangian relaxation, which leaves 2 to 3 % of the budget unused; the
  relaxed answer is reported beside it. Multipliers are the dual's exact ones, not 12 bisections of [0, 10].
* Several budgets may hold at once.
* Masks stand where channels mix, so a masked network is the trimmed one (``slimmable.Slimmable``); `leaky` restores
  theirs. Inactive channels keep out of depthwise batch statistics. The narrowest network runs trimmed.
* Images are shuffled and every augmentation is drawn anew; 20 % of the training images are held out, to tell the
  accuracy of the found network with its inherited weights. Theirs trains on all, class by class.
* The loss gap is fitted as a sum over layers, with forgetting and a prior that fades with the number of images
  (`estimator` "additive"), and a wider cell never counts as worse (`monotone`). Theirs are means per cell ("means",
  `monotone` false): on data smaller than ImageNet their best path follows the noise, and under adaptive sampling old
  and new cells are not comparable.
* `window` is one epoch's share of a cell, 1,000 images at least; theirs 100,000, one epoch's share on ImageNet.
* Cells never visited follow the prior, or their neighbours; theirs count as the widest network.
* Weights of the found network come with batch norms recalibrated (Yu, Huang, ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from latbench.errors import UsageError
from latbench.spaces.base import Arch
from searchers.aows_statistics import AdditiveFit, CellMeans, Statistics, falling, log_width
from searchers.base import Problem, Reporter, SearchResult
from searchers.chains import Floats, Ints, Paths, marginals, sample, sample_layers
from searchers.data import Batch, Splits, train_batches
from searchers.derive import inherit, num_classes, publish
from searchers.options import settings_of
from searchers.selection import Selection, relax, select
from searchers.slimmable import Slimmable
from searchers.train import Loop, Position, cosine, soft_cross_entropy
from searchers.world import Update, World, unsynced

SHORTEST = 11  # epochs of AOWS: its temperatures have a knot at epoch 10


@dataclass(frozen=True)
class AOWS:
    """Options. The score of a result is minus the estimated training loss above the widest network's, in nats.

    Raises UsageError where they contradict each other.
    """

    epochs: int = 20
    batch_size: int = 64  # of all processes; theirs 512
    lr: float = 0.1  # at 256 images a batch, scaled linearly
    schedule: Literal["constant", "cosine"] = "constant"  # of the rate
    momentum: float = 0.9
    weight_decay: float = 1e-5
    adaptive: bool = True  # False: OWS, which can answer another target without training
    warmup_epochs: int = 5  # of uniform sampling
    min_temperature: float = 5e-4
    sampler: Literal["marginal", "ffbs"] = "marginal"  # layers apart, as released, or whole architectures
    estimator: Literal["additive", "means"] = "additive"
    monotone: bool = True  # wider is never worse
    window: int | None = None  # images of a cell that its statistic remembers
    leaky: bool = False

    name: ClassVar[str] = "aows"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.lr > 0 or (self.window is not None and self.window < 1):
            raise UsageError("aows: epochs and window must be at least 1, batch_size at least 2, lr above zero")
        if self.sampler == "ffbs" and self.estimator == "means":
            raise UsageError("aows: means per cell are wrong under joint sampling: take estimator=additive with ffbs")
        if self.adaptive:
            self.temperature(0.0)

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """As ``Searcher.search``; with `adaptive` a new target is answered once training is finished."""
        problem = problem.summed(self.name)
        paths = paths_of(problem)
        budgets = problem.budgets()
        problem.check_feasible()
        select(paths, budgets)  # all budgets together, before any training
        world = World.here()
        net, statistics, history = self._train(problem, paths, budgets, world, reporter)
        found = select(paths.with_scores(self._scores(statistics, paths)), budgets)
        graph = problem.space.network(found.path)
        splits = Splits.of(problem, num_classes(graph))
        module, accuracy = inherit(problem, graph, net.weights(graph), splits, world, self.batch_size)
        return publish(
            problem,
            self,
            module,
            world,
            arch=found.path,
            score=found.score,
            history=history,
            notes=_notes(problem, paths, statistics, found, accuracy),
        )

    def temperature(self, progress: float) -> float:
        """Of the Gibbs distribution after `progress` epochs: linear in the logarithm between the code's knots.

        1 until the warm-up ends, 0.01 an epoch later, 0.001 at epoch 10, `min_temperature` at the end.
        """
        if self.epochs < SHORTEST or not 0 <= self.warmup_epochs < 9:
            raise UsageError(
                f"aows: its temperatures need {SHORTEST} epochs and a warm-up below 9, got {self.epochs} and "
                f"{self.warmup_epochs}; or search with adaptive=false (OWS)"
            )
        knots = {0: 1.0, self.warmup_epochs: 1.0, self.warmup_epochs + 1: 0.01, 10: 0.001}
        knots[self.epochs] = self.min_temperature
        return float(10 ** np.interp(progress, list(knots), np.log10(list(knots.values()))))

    # -- training

    def _train(
        self, problem: Problem, paths: Paths, budgets: tuple[float, ...], world: World, reporter: Reporter | None
    ) -> tuple[Slimmable, Statistics, tuple[Mapping[str, Any], ...]]:
        """The slimmable network and its statistics, resumed from where they stand."""
        torch.manual_seed(problem.seed)
        net = world.place(Slimmable(problem.space, leaky=self.leaky)).train()
        batches = train_batches(problem, Splits.of(problem, num_classes(net.graph)), world, self.batch_size)
        sizes = paths.sizes.tolist()
        window = self.window or max(1000, len(batches) * self.batch_size // max(sizes))
        statistics: Statistics = CellMeans(sizes, window)
        if self.estimator == "additive":
            statistics = AdditiveFit(sizes, window, log_width([d.options for d in problem.space.decisions]))
        update = Update(
            torch.optim.SGD(net.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay), world
        )
        options = settings_of(self, without=["epochs"])
        loop = Loop(
            problem.out,
            "search",
            {"network": net, "update": update, "statistics": statistics},
            identity=problem.identity({**options, "window": window}, constraints=self.adaptive),
            epochs=self.epochs,
            seed=problem.seed,
            world=world,
            reporter=reporter,
        )
        loop.resume(free=["constraints"])
        wrapped, narrowest = world.wrap(net), (0,) * len(sizes)

        def step(batch: Batch, at: Position) -> dict[str, float]:
            drawn, about = self._draw(paths, budgets, statistics, at, len(batch.labels), loop.rng("widths"))
            archs = torch.from_numpy(drawn).to(world.device)
            losses, figures = sandwich(wrapped, update, batch, (net.widest, narrowest, archs), world)
            gaps, gaps_narrowest = losses[2] - losses[0], losses[1] - losses[0]
            observe(statistics, *(world.gather(tensor) for tensor in (archs, gaps, gaps_narrowest)))
            rate = self.lr * self.batch_size / 256
            update.step(rate if self.schedule == "constant" else cosine(rate, at))
            return {**figures, "gap": float(gaps.mean()), **about}

        def end_epoch(epoch: int) -> dict[str, Any]:
            found = select(paths.with_scores(self._scores(statistics, paths)), budgets)
            costs = {f"predicted{k}": cost for k, cost in enumerate(problem.predicted(found.path))}
            return {"score": found.score, **costs, "arch": problem.space.format_arch(found.path)}

        loop.run(batches, step, end_epoch)
        return net, statistics, tuple(loop.history)

    def _draw(
        self,
        paths: Paths,
        budgets: tuple[float, ...],
        statistics: Statistics,
        at: Position,
        n: int,
        rng: np.random.Generator,
    ) -> tuple[Ints, dict[str, float]]:
        """(n, L) widths for one batch, and what they were drawn with: uniform, or around the current answer."""
        uniform = (np.arange(paths.scores.shape[1]) < paths.sizes[:, None]) / paths.sizes[:, None]  # (L, M)
        if not self.adaptive or at.epoch < self.warmup_epochs:
            return sample_layers(uniform, paths.sizes, n, rng), {"entropy": entropy(uniform)}
        temperature = self.temperature(at.progress)
        scores = self._scores(statistics, paths) / len(paths.sizes)  # the paper's scale, which its temperatures go with
        limits = np.asarray(budgets) - paths.constants
        prices = relax(paths.with_scores(scores), limits).multipliers
        cost = paths.priced(prices)
        probs = marginals(scores, cost, paths.sizes, temperature)
        about = {"entropy": entropy(probs), "temperature": temperature, "multiplier": float(prices[0])}
        if self.sampler == "ffbs":
            return sample(scores, cost, paths.sizes, temperature, n, rng), about
        return sample_layers(probs, paths.sizes, n, rng), about

    def _scores(self, statistics: Statistics, paths: Paths) -> Floats:
        """(L, M), summing up to minus the estimated loss gap."""
        gaps = statistics.gaps()
        return -falling(gaps, statistics.weights(), paths.sizes.tolist()) if self.monotone else -gaps


def paths_of(problem: Problem) -> Paths:
    """The constraints' chains, scores still zero. Raises UsageError where an oracle is no sum over a chain."""
    chains = [oracle.chain() for oracle in problem.sums(AOWS.name)]
    return Paths.of([np.zeros(len(decision.options)) for decision in problem.space.decisions], chains)


def sandwich(
    net: nn.Module, update: Update, batch: Batch, archs: tuple[Arch, Arch, Tensor], world: World
) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients of one step at the widest, the narrowest and each image's own widths (Yu, Huang, ICCV 2019).

    The widest learns the labels, the others its softmax. Gives the hard losses of the three, (N,) each, without
    gradient, and their figures.
    """
    widest, narrowest, own = archs
    with unsynced(net):
        with world.autocast():
            teacher: Tensor = net(batch.images, widest)
        update.backward(functional.cross_entropy(teacher.float(), batch.labels))
        with world.autocast():
            narrow: Tensor = net(batch.images, narrowest)
        loss_narrowest = soft_cross_entropy(narrow, teacher).mean()
        update.backward(loss_narrowest)
    with world.autocast():
        logits: Tensor = net(batch.images, own)
    loss_random = soft_cross_entropy(logits, teacher).mean()
    update.backward(loss_random)
    with torch.no_grad():
        hard = [functional.cross_entropy(y.float(), batch.labels, reduction="none") for y in (teacher, narrow, logits)]
    return hard, {
        "loss_widest": float(hard[0].mean()),
        "loss_narrowest": float(loss_narrowest.detach()),
        "loss_random": float(loss_random.detach()),
        "accuracy_widest": float((teacher.argmax(-1) == batch.labels).float().mean()),
    }


def observe(statistics: Statistics, archs: Tensor, gaps: Tensor, narrowest: Tensor) -> None:
    """Pushes a step's figures: (N, L) networks, (N,) loss gaps of the images, (N,) gaps of the narrowest network.

    Raises UsageError where training has diverged: a NaN would stay in every mean.
    """
    values, low = gaps.double().cpu().numpy(), narrowest.double().cpu().numpy()
    if not (np.isfinite(values).all() and np.isfinite(low).all()):
        raise UsageError("aows: the loss is no longer finite; search again with a smaller lr (--set lr=0.02)")
    statistics.push(archs.cpu().numpy(), values, low)


def entropy(probs: Floats) -> float:
    """Mean over layers of the entropy of (L, M) probabilities, in nats."""
    logs = np.log(probs, out=np.zeros_like(probs), where=probs > 0)
    return float(-(probs * logs).sum() / len(probs))


def _notes(problem: Problem, paths: Paths, statistics: Statistics, found: Selection, accuracy: float) -> dict[str, Any]:
    relaxed: Arch = found.relaxed
    inside = np.arange(paths.scores.shape[1]) < paths.sizes[:, None]
    return {
        "accuracy": accuracy,  # of the inherited weights on the held-out images
        "bound": found.bound,  # no architecture within the budgets has a larger score
        "lagrangian": {
            "arch": list(relaxed),
            "score": found.relaxed_score,
            "predicted": list(problem.predicted(relaxed)),
            "multipliers": list(found.multipliers),
        },
        "labels": found.n_labels,
        "cells_never_visited": int(((statistics.visits() == 0) & inside).sum()),
    }
