"""RelativeNAS' training from scratch: auxiliary classifier, paths dropped, cutout.

Tan et al., TNNLS 2021, by the released code: ``CIFAR`` and ``IMAGENET`` are its settings. Differs from it: images are
normalised as everywhere here, by ImageNet's mean and deviation; the accuracy is the last epoch's, theirs on CIFAR the
best test accuracy of all epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from latbench.errors import UsageError
from latbench.graph.torch import weights_of
from latbench.spaces.base import Arch
from latbench.spaces.cells import CellSite, RelativeNASSpace
from searchers.base import Problem, Reporter
from searchers.data import Batch, Splits, eval_batches, train_batches
from searchers.derive import module_of
from searchers.relativenas_judges import cutout
from searchers.relativenas_supernet import drop_paths
from searchers.train import Loop, Position, cosine, evaluate
from searchers.world import Update, World

EASING = 5  # epochs of growth at the start of the linear schedule, and of its slower end


@dataclass(frozen=True)
class Retraining:
    """Options. Raises UsageError where they are out of range."""

    epochs: int = 600
    batch_size: int = 128  # of all processes
    lr: float = 0.025
    schedule: Literal["cosine", "linear"] = "cosine"  # to 0, constant in an epoch
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float | None = 5.0  # of the gradient's norm
    cutout: float = 0.5  # side of the hole, as a share of the image's
    drop_path: float = 0.3  # approached linearly
    auxiliary: float = 0.4  # weight of the auxiliary classifier's loss; 0: there is none
    label_smoothing: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            raise UsageError("a retraining needs epochs >= 1, batch_size >= 2 and lr above zero")
        if self.schedule == "linear" and self.epochs <= EASING:
            raise UsageError(f"the linear schedule needs more than {EASING} epochs, got {self.epochs}")

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, from 0."""
        if self.schedule == "cosine":
            return cosine(self.lr, Position(epoch, 0, 1, self.epochs))
        if epoch < EASING:
            return self.lr * (epoch + 1) / EASING
        left, falling = self.epochs - epoch, self.epochs - EASING
        return self.lr * (left - EASING if left > EASING else left / EASING) / falling


CIFAR = Retraining()
IMAGENET = Retraining(
    epochs=250,
    batch_size=1024,
    lr=0.5,
    schedule="linear",
    weight_decay=3e-5,
    clip=None,
    cutout=0.0,
    drop_path=0.0,
    label_smoothing=0.1,
    jitter=0.4,
)


def retrain(
    problem: Problem,
    arch: Arch,
    options: Retraining,
    *,
    folder: Path,
    world: World | None = None,
    reporter: Reporter | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a network of RelativeNAS' space on all training images of the problem, resumably in `folder`.

    Gives it in evaluation mode, without its auxiliary classifier, and its figures: "accuracy" and "loss" on the test
    split. Raises UsageError where the space is another, GraphError where maps are too small for the classifier.
    """
    world, space = world or World.here(), problem.space
    if not isinstance(space, RelativeNASSpace):
        raise UsageError(f"this trains networks of the space relativenas, not of {space.name}: latbench train")
    splits = Splits.of(problem, space.num_classes, held_out=0.0)
    batches = train_batches(problem, splits, world, options.batch_size, jitter=options.jitter)
    torch.manual_seed(problem.seed)
    graph = space.network(arch)
    trained = space.with_auxiliary(arch) if options.auxiliary else graph
    module = world.place(module_of(trained)).train()
    chance = dropped(module, space, arch)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    update = Update(optimizer, world, clip=options.clip)
    settings = {"name": space.name, **space.settings()}
    loop = Loop(
        folder,
        "retrain",
        {"network": module, "update": update},
        identity={
            "options": asdict(options),
            "arch": list(arch),
            "space": settings,
            "data": [problem.data_name, problem.max_images],
        },
        epochs=options.epochs,
        seed=problem.seed,
        world=world,
        reporter=reporter,
    )
    loop.resume()
    wrapped = world.wrap(module)

    def step(batch: Batch, at: Position) -> dict[str, float]:
        chance(options.drop_path * at.epoch / at.epochs)
        with world.autocast():
            outputs = wrapped(cutout(batch.images, options.cutout))
        losses = [
            functional.cross_entropy(logits.float(), batch.labels, label_smoothing=options.label_smoothing)
            for logits in (outputs if options.auxiliary else (outputs,))
        ]
        update.backward(losses[0] + sum(options.auxiliary * loss for loss in losses[1:]))
        update.step(options.rate(at.epoch))
        return {"loss": float(losses[0].detach())}

    loop.run(batches, step)
    weights = weights_of(module)
    alone = world.place(module_of(graph, {name: weights[name] for name in graph.weight_shapes()}))
    figures = evaluate(alone, eval_batches(problem, splits, world), world)
    return alone, {**figures, "images": len(splits.train), "seed": problem.seed, "recipe": asdict(options)}


def dropped(module: nn.Module, space: RelativeNASSpace, arch: Arch) -> Callable[[float], None]:
    """Drops outputs of a network's operations, identities excepted, while it trains; gives what sets the chance."""
    chance = 0.0

    def set_chance(value: float) -> None:
        nonlocal chance
        chance = value

    def drop(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return drop_paths(output, chance) if layer.training else output

    layers = dict(module.named_children())
    for site in space.sites:
        block = space.block(site, space.picks(site, arch))
        if isinstance(site, CellSite) and site.block_type == "operation" and block is not None:
            last = f"{site.name}/{block.outputs[0]}"
            if last in layers:  # else it feeds no output
                layers[last].register_forward_hook(drop)
    return set_chance
