"""Who tells which of two genotypes is better: an epoch of training from RelativeNAS' weight store, or an evaluator.

Tan et al., TNNLS 2021; what differs is told in ``relativenas``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from latbench.errors import UsageError
from latbench.graph.ir import Weights
from latbench.spaces.base import Arch
from latbench.spaces.cells import RelativeNASSpace
from searchers.base import Problem
from searchers.data import Splits, eval_batches, train_batches
from searchers.derive import module_of
from searchers.evaluators import Lookups, open_evaluator
from searchers.relativenas_supernet import Supernet, Tensors, settle
from searchers.slow_fast import Floats
from searchers.train import Position, Stateful, evaluate, recalibrate
from searchers.world import Update, World, to_device

LOOKUPS = "evaluations.json"  # in the problem's folder


@dataclass(frozen=True)
class Training:
    """Options of the weight store. Raises UsageError where they are out of range."""

    channels: int = 16  # of the networks that are trained; the space's own are those of the result
    layers: int = 8
    batch_size: int = 256  # of all processes
    lr: float = 0.1  # falls to `min_lr` along a cosine over the generations
    min_lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0  # of the gradient's norm
    cutout: float = 0.5  # side of the hole, as a share of the image's
    drop_path: float = 0.3  # reached linearly at the end
    held_out: float = 0.5  # of the images, to compare by, here and by evaluators that train
    search_val_augment: bool = True  # augments these too, as released

    def __post_init__(self) -> None:
        if self.batch_size < 2 or min(self.lr, self.min_lr, self.clip) <= 0 or self.min_lr > self.lr:
            raise UsageError(
                "relativenas: batch_size must be at least 2; lr, min_lr and clip above zero, min_lr not above lr"
            )
        if not (0 <= self.cutout < 1 and 0 <= self.drop_path < 1 and 0 < self.held_out < 1):
            raise UsageError("relativenas: cutout, drop_path and held_out are shares, below 1; held_out above 0")

    def rate(self, generation: int, generations: int) -> float:
        """Of the weights, constant in a generation."""
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * generation / generations)) / 2


class Ranked(NamedTuple):
    """A genotype, evaluated without training."""

    arch: Arch
    loss: float
    figures: Mapping[str, float]


class Judge(Protocol):
    """Tells what a genotype is worth."""

    remembers: bool  # whether a loss once told holds for good

    @property
    def parts(self) -> Mapping[str, Stateful]:
        """What a checkpoint keeps of it."""
        ...

    def losses(self, pair: Sequence[Arch], excess: Floats, at: Position, seed: int) -> Floats:
        """(2,) of a pair whose violations are (2,); inf where they decide alone and it was not asked."""
        ...

    def settle(self, losses: Floats, first: bool) -> None:
        """Takes what the pair has learned, the first of which is the fast learner, or not."""
        ...

    def rank(self, archs: Sequence[Arch]) -> list[Ranked]:
        """Without training."""
        ...

    def affords(self, arch: Arch) -> bool:
        """Whether it may still be asked about this genotype."""
        ...

    def weights(self, arch: Arch) -> Weights | None:
        """For the space's network of this genotype."""
        ...


class Asked:
    """An evaluator that needs no store; pairs that their violations decide are not asked about.

    Raises BudgetSpentError where more than `budget` distinct networks are asked about.
    """

    remembers = True

    def __init__(self, text: str, problem: Problem, *, held_out: float, budget: int | None = None) -> None:
        settings: dict[str, str | float] = {"evaluator": text, "held_out": held_out}
        identity = {**problem.identity(settings, constraints=False), "seed": problem.seed}
        evaluator = open_evaluator(text, problem, held_out=held_out)
        self.lookups = Lookups(evaluator, problem.space, path=problem.out / LOOKUPS, identity=identity, budget=budget)
        self.parts: Mapping[str, Stateful] = {}

    def losses(self, pair: Sequence[Arch], excess: Floats, at: Position, seed: int) -> Floats:
        """(2,), minus what the evaluator says."""
        if excess[0] != excess[1]:
            return np.full(2, np.inf)
        return np.array([self.loss(arch) for arch in pair])

    def loss(self, arch: Arch) -> float:
        """Minus what the evaluator says."""
        return -self.lookups.evaluate(arch)

    def settle(self, losses: Floats, first: bool) -> None:
        """Nothing is learned."""

    def rank(self, archs: Sequence[Arch]) -> list[Ranked]:
        """What it says of each."""
        self.lookups.prepare(archs)
        losses = [self.loss(arch) for arch in archs]
        self.lookups.flush()
        figures = {"evaluations": self.lookups.spent}
        return [Ranked(arch, loss, figures) for arch, loss in zip(archs, losses, strict=True)]

    def affords(self, arch: Arch) -> bool:
        """Where it is known, or a look-up is left."""
        return self.lookups.left != 0 or self.lookups.knows(arch)

    def weights(self, arch: Arch) -> None:
        """None."""


class Trained:
    """The paper's way: an epoch of training from the weight store, then the loss on held-out images."""

    remembers = False

    def __init__(self, options: Training, problem: Problem, world: World) -> None:
        space = problem.space
        if not isinstance(space, RelativeNASSpace):
            raise UsageError(
                f"relativenas trains networks of the space relativenas, not {space.name}: give a table of it, or "
                "another evaluator (--set evaluator=train)"
            )
        self.options, self.problem, self.world = options, problem, world
        self.space = replace(space, channels=options.channels, layers=options.layers, keep_unread=False)
        torch.manual_seed(problem.seed)
        self.net = world.place(Supernet(self.space))
        self.parts: Mapping[str, Stateful] = {"store": self.net}
        self.wrapped = world.wrap(self.net, unused=True)
        self.splits = Splits.of(problem, space.num_classes, held_out=options.held_out)
        self.batches = train_batches(problem, self.splits, world, options.batch_size)
        self.held_out = eval_batches(problem, self.splits, world, "held_out")
        self.trained: list[Tensors] = []
        self.before: Tensors = {}

    def losses(self, pair: Sequence[Arch], excess: Floats, at: Position, seed: int) -> Floats:
        """(2,) in nats; both start from the store as it is, which stays."""
        self.before = self.net.copy_of(self.net.used(pair[0]) | self.net.used(pair[1]))
        self.trained, losses = [], []
        for arch in pair:
            torch.manual_seed(seed)
            self._train(arch, at)
            torch.manual_seed(seed)
            losses.append(self._loss(arch))
            self.trained.append(self.net.copy_of(self.net.used(arch)))
            self.net.put(self.before)
        if not np.isfinite(losses).any():
            raise UsageError("relativenas: no loss is finite any more; search again with a smaller lr (--set lr=0.02)")
        return np.array(losses)

    def settle(self, losses: Floats, first: bool) -> None:
        """Section "weight set". A winner by its violation alone whose loss is not finite leaves nothing either."""
        fast = 0 if first else 1
        if not np.isfinite(losses[fast]):
            fast = 1 - fast
        sound = bool(np.isfinite(losses[1 - fast]))
        settle(self.net, self.before, self.trained[fast], self.trained[1 - fast], sound=sound)
        self.trained, self.before = [], {}

    def _train(self, arch: Arch, at: Position) -> None:
        """One epoch, with a new optimiser."""
        options, world = self.options, self.world
        optimizer = torch.optim.SGD(
            self.net.parameters_of(arch),
            lr=options.rate(at.epoch, at.epochs),
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        update = Update(optimizer, world, clip=options.clip)
        drop_path = options.drop_path * at.epoch / at.epochs
        self.net.train()
        for batch in to_device(self.batches.epoch(at.epoch * at.steps + at.step), world.device):
            with world.autocast():
                logits: Tensor = self.wrapped(cutout(batch.images, options.cutout), arch, drop_path)
            update.backward(functional.cross_entropy(logits.float(), batch.labels))
            update.step()

    def _loss(self, arch: Arch) -> float:
        """On the held-out images."""
        augmented, hole = self.options.search_val_augment, self.options.cutout
        batches = replace(self.held_out, transform=self.batches.transform) if augmented else self.held_out
        self.net.eval()
        figures = evaluate(
            lambda images: self.net(cutout(images, hole if augmented else 0.0), arch), batches, self.world
        )
        return figures["loss"] if math.isfinite(figures["loss"]) else math.inf

    def affords(self, arch: Arch) -> bool:
        """Always."""
        return True

    def rank(self, archs: Sequence[Arch]) -> list[Ranked]:
        """With the store's weights, batch norms calibrated, on images that are not augmented."""
        ranked = []
        for arch in archs:
            graph = self.space.network(arch)
            module = self.world.place(module_of(graph, self.net.weights(graph, arch)))
            recalibrate(module, self.batches, self.world)
            figures = evaluate(module.eval(), self.held_out, self.world)
            if math.isfinite(figures["loss"]):
                ranked.append(Ranked(arch, figures["loss"], {"accuracy": figures["accuracy"]}))
        return ranked

    def weights(self, arch: Arch) -> Weights | None:
        """The store's where it has the space's shapes."""
        space = self.problem.space
        assert isinstance(space, RelativeNASSpace)
        if (space.channels, space.layers) != (self.space.channels, self.space.layers):
            return None
        return self.net.weights(space.network(arch), arch)


def cutout(images: Tensor, share: float) -> Tensor:
    """(N, 3, H, W) with a square of the mean colour in each, `share` of the side, around a random pixel.

    DeVries, Taylor: Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
    """
    n, _, height, width = images.shape
    size = round(share * height)
    if size == 0:
        return images
    inside = []
    for axis, side in ((2, height), (3, width)):
        start = torch.randint(side, (n, 1), device=images.device) - size // 2
        at = torch.arange(side, device=images.device)
        shape = [n, 1, 1, 1]
        shape[axis] = side
        inside.append(((at >= start) & (at < start + size)).reshape(shape))  # (N, 1, H, 1), (N, 1, 1, W)
    return images.masked_fill(inside[0] & inside[1], 0.0)
