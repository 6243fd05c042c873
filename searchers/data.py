"""How labelled images are split, transformed, and dealt in batches.

Everything random is a function of (seed, epoch, image): batches are the same however many workers decode them, and a
run that goes on in the middle of an epoch sees what an uninterrupted one would.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from latbench.errors import UsageError
from searchers.base import DataSource, Problem
from searchers.sources import Indices, open_data, split
from searchers.world import World

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LARGE = 96  # pixels from which images are cropped as on ImageNet
CACHE_BYTES = 1 << 30  # decoded images that are kept in memory


class Batch(NamedTuple):
    """What a training step reads."""

    images: Tensor  # (N, 3, H, W) float32
    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class Splits:
    """The images of a problem: for the weights, kept out of training for the searcher's own use, and for the end."""

    source: DataSource
    train: Indices  # of the source's "train"
    held_out: Indices  # of the source's "train"
    test: Indices  # of the source's "test"

    @classmethod
    def of(cls, problem: Problem, num_classes: int, *, held_out: float = 0.2) -> Splits:
        """`num_classes` is the space's. Raises UsageError where the data have more, or too few images to split."""
        source = open_data(problem.data)
        if len(source.classes) > num_classes:
            raise UsageError(
                f"{source.name} has {len(source.classes)} classes, the table's networks tell {num_classes} apart: "
                f"profile the space with --set num_classes={len(source.classes)}"
            )
        labels = source.labels("train")
        chosen = np.arange(len(labels))
        if problem.max_images is not None and problem.max_images < len(labels):
            (chosen,) = split(labels, (problem.max_images / len(labels),), problem.seed)
        parts = split(labels[chosen], (1 - held_out, held_out), problem.seed)
        train, kept = (chosen[part].astype(np.int64) for part in parts)
        if len(train) < 2 or (held_out > 0 and len(kept) < 1):
            raise UsageError(f"{source.name}: {len(chosen)} images are too few to train on and keep some out")
        return cls(source, train, kept, np.arange(len(source.labels("test")), dtype=np.int64))


# ---- batches --------------------------------------------------------------------------------------------------------


def train_transform(resolution: int, *, mirrored: bool = True, jitter: float = 0.0) -> v2.Transform:
    """Random crops as on CIFAR below ``LARGE`` pixels, as on ImageNet from there; mirrored; colours jittered."""
    crop: list[v2.Transform] = (
        [v2.RandomResizedCrop(resolution, antialias=True)]
        if resolution >= LARGE
        else [v2.Resize((resolution, resolution), antialias=True), v2.RandomCrop(resolution, padding=resolution // 8)]
    )
    flip = [v2.RandomHorizontalFlip()] if mirrored else []
    colour = [v2.ColorJitter(jitter, jitter, jitter, jitter / 2)] if jitter else []
    return v2.Compose([*crop, *flip, *colour, *_normalise()])


def eval_transform(resolution: int) -> v2.Transform:
    """Resized; from ``LARGE`` pixels the centre of a resize to 8/7 of the side."""
    crop: list[v2.Transform] = (
        [v2.Resize(round(resolution * 8 / 7), antialias=True), v2.CenterCrop(resolution)]
        if resolution >= LARGE
        else [v2.Resize((resolution, resolution), antialias=True)]
    )
    return v2.Compose([*crop, *_normalise()])


def _normalise() -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


@dataclass(frozen=True)
class Batches:
    """Batches of some images of a source. Under several processes each reads its own share of every batch.

    Shuffled batches are all full and come in an order that depends on (seed, epoch); the others come in order and end
    with a smaller one. `batch_size` counts one process's images.
    """

    source: DataSource
    part: Literal["train", "test"]
    indices: Indices
    transform: Callable[[Any], Tensor]
    batch_size: int
    shuffle: bool = True
    seed: int = 0
    rank: int = 0
    n_ranks: int = 1
    workers: int = 0  # processes that decode; 0: this one

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"a batch holds at least 1 image, got {self.batch_size}")
        if self.shuffle and len(self.indices) < self.batch_size * self.n_ranks:
            raise UsageError(
                f"{self.source.name}: {len(self.indices)} images do not fill one batch of "
                f"{self.batch_size * self.n_ranks}: take a smaller --batch-size"
            )

    def __len__(self) -> int:
        """Steps per epoch."""
        wide = self.batch_size * self.n_ranks
        return len(self.indices) // wide if self.shuffle else -(-len(self.indices) // wide)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, the first `skip` left out. Raises UsageError where an image is damaged."""
        plan = self._plan(epoch)[skip:]
        images = _Images(self, epoch)
        if self.workers == 0:
            loaded: Iterator[Any] = (_collate([images[i] for i in chosen]) for chosen in plan)
        else:
            loader = torch.utils.data.DataLoader(
                images,
                batch_sampler=plan,
                num_workers=self.workers,
                collate_fn=_collate,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else it would draw from the one that a step's noise comes from
            )
            loaded = iter(loader)
        for batch in loaded:
            if isinstance(batch, str):
                raise UsageError(batch)
            yield Batch(*batch)

    def _plan(self, epoch: int) -> list[list[int]]:
        """The indices of each batch of this process."""
        order = self.indices
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch, 0xBA7C)).permutation(order)
        wide = self.batch_size * self.n_ranks
        steps = [order[i * wide : (i + 1) * wide] for i in range(len(self))]
        return [step[self.rank :: self.n_ranks].tolist() for step in steps]

    @cached_property
    def _decoded(self) -> _Cache:
        return _Cache(self.source, self.part)


class _Cache:
    """Decoded images, kept while they fit ``CACHE_BYTES``; one per process."""

    def __init__(self, source: DataSource, part: str) -> None:
        self.source, self.part, self.room = source, part, CACHE_BYTES
        self.labels = source.labels(part)
        self.kept: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> Tensor:
        found = self.kept.get(index)
        if found is None:
            array = self.source.image(self.part, index)
            found = torch.from_numpy(np.array(array.transpose(2, 0, 1)))  # (3, H, W) uint8
            if found.nbytes <= self.room:
                self.room -= found.nbytes
                self.kept[index] = found
        return found


class _Images(torch.utils.data.Dataset[Any]):
    """One epoch's images, transformed. A damaged one becomes its error's text: a worker's traceback is no message."""

    def __init__(self, batches: Batches, epoch: int) -> None:
        self.batches, self.epoch = batches, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        batches, cache = self.batches, self.batches._decoded
        try:
            image = cache[index]
        except UsageError as error:
            return str(error)
        if not batches.shuffle:
            return batches.transform(image), int(cache.labels[index])
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(zlib.crc32(f"{batches.seed}/{self.epoch}/{index}".encode()))
        try:
            return batches.transform(image), int(cache.labels[index])
        finally:
            torch.set_rng_state(state)


def _collate(samples: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    good = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        good.append(sample)
    images, labels = zip(*good, strict=True)
    return torch.stack(images), torch.tensor(labels)


def eval_batches(
    problem: Problem,
    splits: Splits,
    world: World,
    part: Literal["test", "held_out"] = "test",
    batch_size: int = 256,
) -> Batches:
    """The images kept out: of the source's test split, or "held_out" from its training images; in order."""
    resolution = problem.space.resolution
    return Batches(
        splits.source,
        "test" if part == "test" else "train",
        splits.test if part == "test" else splits.held_out,
        eval_transform(resolution),
        batch_size,
        shuffle=False,
        rank=world.rank,
        n_ranks=world.size,
        workers=default_workers(resolution),
    )


def train_batches(problem: Problem, splits: Splits, world: World, batch_size: int, *, jitter: float = 0.0) -> Batches:
    """The training images, augmented and shuffled. `batch_size` counts all processes' images."""
    if batch_size % world.size:
        raise UsageError(f"a batch of {batch_size} does not split evenly over {world.size} processes")
    resolution = problem.space.resolution
    return Batches(
        splits.source,
        "train",
        splits.train,
        train_transform(resolution, mirrored=splits.source.mirrored, jitter=jitter),
        batch_size // world.size,
        seed=problem.seed,
        rank=world.rank,
        n_ranks=world.size,
        workers=default_workers(resolution),
    )


def default_workers(resolution: int) -> int:
    """Decoding processes: none for small images, which stay in memory; else the CPUs but one, 8 at most."""
    return 0 if resolution < LARGE else max(0, min(8, (os.cpu_count() or 1) - 1))
