"""A chain of three convolutions and images that tell what its layers are good for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latbench.graph.blocks import classifier, conv_bn_act
from latbench.graph.ir import GraphBuilder
from latbench.spaces.base import Decision, FactoredSpace, Site
from searchers.sources import ArraySource

WIDTHS = ((1, 2, 4), (1, 2, 4), (12, 24, 36, 48))


@dataclass(frozen=True)
class ToySpace(FactoredSpace):
    """Three 3x3 convolutions, strides 2, 1, 2; the last one has more channels than any task here needs."""

    resolution: int = 16
    num_classes: int = 8

    name: ClassVar[str] = "toy"

    @property
    def decisions(self):
        return tuple(Decision(f"width{i}", options) for i, options in enumerate(WIDTHS, 1))

    @property
    def sites(self):
        stages = (Site("conv1", (0,), "conv"), Site("conv2", (0, 1), "conv"), Site("conv3", (1, 2), "conv"))
        return (*stages, Site("head", (2,), "head"))

    def block(self, site, picks):
        widths = [WIDTHS[d][i] for d, i in zip(site.scope, picks, strict=True)]
        side = self.resolution
        b = GraphBuilder(self.dtype)
        if site.name == "head":
            x = b.input("x", (self.batch, widths[0], side // 4, side // 4))
            return b.build(classifier(b, x, self.num_classes, name=""))
        number = int(site.name[-1])
        n_in = 3 if number == 1 else widths[0]
        x = b.input("x", (self.batch, n_in, side if number == 1 else side // 2, side if number == 1 else side // 2))
        return b.build(conv_bn_act(b, x, widths[-1], 3, stride=1 if number == 2 else 2, name=""))


def three_bits(n: int = 768, seed: int = 0) -> ArraySource:
    """8 classes: each bit is one colour channel's stripes, upright or lying, in noise. One filter a bit tells them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 8, n)
    bits = (labels[:, None] >> np.arange(3)) & 1  # (n, 3)
    stripes = np.where(np.arange(16) // 2 % 2, 60.0, -60.0)
    pattern = np.where(bits[:, None, None, :] == 1, stripes[:, None, None], stripes[None, :, None])  # (n, 16, 16, 3)
    images = np.clip(128 + pattern + rng.normal(0, 50, pattern.shape), 0, 255).astype(np.uint8)
    half = n * 3 // 4
    return ArraySource(
        "three bits",
        tuple("abcdefgh"),
        {"train": list(images[:half]), "test": list(images[half:])},
        {"train": labels[:half].astype(np.int64), "test": labels[half:].astype(np.int64)},
        mirrored=False,
    )
