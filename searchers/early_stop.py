"""What a block is worth, quickly: its accuracy after a short training (BlockQNN's early stop), or a proxy's score.

``EarlyStop``: Zhong, Yan, Wu, Shao, Liu: Practical Block-wise Neural Network Architecture Generation, CVPR 2018,
sec. 3.3 and 4: He's initial weights, Adam, a rate that falls in steps, and another try at a lower one where the first
epoch teaches nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from latbench.errors import UsageError
from latbench.spaces.base import Arch, SearchSpace
from searchers.base import Evaluator, Problem
from searchers.data import Batches, Splits, eval_batches, eval_transform, train_batches, train_transform
from searchers.derive import module_of
from searchers.train import evaluate
from searchers.world import Update, World, memory_told, to_device


@dataclass(frozen=True)
class ShortTraining:
    """How a candidate is trained. Raises UsageError where a figure is out of range."""

    epochs: int = 12
    batch_size: int = 256
    lr: float = 1e-3  # of Adam
    lr_decay: float = 0.2  # every `decay_epochs`
    decay_epochs: int = 5
    restarts: int = 3  # where the first epoch ends below chance
    restart_decay: float = 0.4  # of the rate

    def __post_init__(self) -> None:
        if min(self.epochs, self.decay_epochs, self.restarts + 1, self.batch_size - 1) < 1:
            raise UsageError(
                "a short training needs epochs and decay_epochs from 1, batch_size from 2, restarts from 0"
            )
        if not (self.lr > 0 and self.lr_decay > 0 and self.restart_decay > 0):
            raise UsageError("a short training needs a rate and its decays above zero")


@dataclass(frozen=True)
class EarlyStop:
    """Accuracy on the held-out images after a short training of `space`'s network, which may be another stack of the
    problem's blocks. Every candidate starts from the problem's seed and sees the same images in the same order.
    """

    problem: Problem
    space: SearchSpace
    splits: Splits
    training: ShortTraining = ShortTraining()

    def evaluate(self, arch: Arch) -> float:
        """In [0, 1]; of the last try where all end their first epoch below chance. Raises OutOfMemoryError."""
        training, accuracy = self.training, 0.0
        for attempt in range(training.restarts + 1):
            torch.manual_seed(self.problem.seed)
            with memory_told(training.batch_size):
                begun, accuracy = self._train(arch, training.lr * training.restart_decay**attempt, attempt)
            if begun:
                break
        return accuracy

    def _train(self, arch: Arch, lr: float, attempt: int) -> tuple[bool, float]:
        """Whether the first epoch taught anything (a last try always goes on), and the accuracy at the end."""
        training, world = self.training, World.here()
        module = world.place(he_initial(module_of(self.space.network(arch)))).train()
        wrapped = world.wrap(module)
        update = Update(torch.optim.Adam(module.parameters(), lr=lr), world)
        chance = 1 / len(self.splits.source.classes)
        batches = self._train_batches
        for epoch in range(training.epochs):
            rate = lr * training.lr_decay ** (epoch // training.decay_epochs)
            for images, labels in to_device(batches.epoch(epoch), world.device):
                with world.autocast():
                    logits = wrapped(images)
                update.backward(nn.functional.cross_entropy(logits.float(), labels))
                update.step(rate)
            if epoch == 0 and attempt < training.restarts and self._accuracy(module, world) < chance:
                return False, 0.0
        return True, self._accuracy(module, world)

    def _accuracy(self, module: nn.Module, world: World) -> float:
        module.eval()
        accuracy = evaluate(module, self._held_out, world)["accuracy"]
        module.train()
        return accuracy

    @cached_property
    def _train_batches(self) -> Batches:
        found = train_batches(self.problem, self.splits, World.here(), self.training.batch_size)
        mirrored = self.splits.source.mirrored
        return replace(found, transform=train_transform(self.space.resolution, mirrored=mirrored))

    @cached_property
    def _held_out(self) -> Batches:
        found = eval_batches(self.problem, self.splits, World.here(), "held_out")
        return replace(found, transform=eval_transform(self.space.resolution))


def he_initial(module: nn.Module) -> nn.Module:
    """The module with normal weights of He et al. 2015 in its convolutions and linear layers, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


@dataclass(frozen=True)
class Standardised:
    """A proxy's score where an accuracy is wanted: in (0, 1), 0.5 for the median of random architectures.

    The logistic function of its distance from that median, in robust standard deviations of `n` sampled scores.
    """

    evaluator: Evaluator
    space: SearchSpace
    n: int = 32

    def evaluate(self, arch: Arch) -> float:
        """Ranks as the evaluator's own."""
        middle, spread = self._scale
        return 1 / (1 + math.exp(-float(np.clip((self.evaluator.evaluate(arch) - middle) / spread, -500, 500))))

    @cached_property
    def _scale(self) -> tuple[float, float]:
        rng = np.random.default_rng(0)
        scores = np.array([self.evaluator.evaluate(self.space.sample(rng)) for _ in range(self.n)])
        middle = float(np.median(scores))
        return middle, 1.4826 * float(np.median(abs(scores - middle))) or 1.0
