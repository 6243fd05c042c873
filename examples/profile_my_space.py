"""Profile a search space of your own: ``python examples/profile_my_space.py --backend onnxruntime -o mine.parquet``.

A space is decisions and sites. Each site says which decisions its block depends on; the block is a small graph. That is
all: profiling, additivity, reports and searches work from there. To use the space by name (``latbench profile --space
tower``), put one line into your package's pyproject.toml::

    [project.entry-points."latbench.spaces"]
    tower = "my_package:TowerSpace"
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from latbench import devices
from latbench.graph.blocks import classifier, conv_bn_act
from latbench.graph.ir import Graph, GraphBuilder
from latbench.measure.base import SamplingPlan
from latbench.profiling import Target, profile
from latbench.spaces.base import Decision, FactoredSpace, Site


@dataclass(frozen=True)
class TowerSpace(FactoredSpace):
    """Four convolutions that halve the image; each chooses its kernel size and its width."""

    resolution: int = 64
    num_classes: int = 10

    name: ClassVar[str] = "tower"
    stages: ClassVar[int] = 4

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        kernels = [Decision(f"stage{i}/kernel", (3, 5)) for i in range(self.stages)]
        widths = [Decision(f"stage{i}/width", (8 << i, 16 << i)) for i in range(self.stages)]
        return tuple(decision for pair in zip(kernels, widths, strict=True) for decision in pair)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        first = Site("stage0", (0, 1), "conv")
        # A convolution depends on its kernel, its width, and the width before it: decisions 2i, 2i+1 and 2i-1.
        others = (Site(f"stage{i}", (2 * i - 1, 2 * i, 2 * i + 1), "conv") for i in range(1, self.stages))
        return (first, *others, Site("head", (2 * self.stages - 1,), "head"))

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph:
        chosen = [int(self.decisions[d].options[i]) for d, i in zip(site.scope, picks, strict=True)]
        b = GraphBuilder(self.dtype)
        if site.name == "head":
            side = self.resolution >> self.stages
            return b.build(classifier(b, b.input("x", (self.batch, chosen[0], side, side)), self.num_classes, name=""))
        stage = int(site.name.removeprefix("stage"))
        before = 3 if stage == 0 else chosen[0]
        kernel, width = chosen[-2:]
        side = self.resolution >> stage
        x = b.input("x", (self.batch, before, side, side))
        return b.build(conv_bn_act(b, x, width, kernel, stride=2, name=""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="roofline", help="roofline (simulated), onnxruntime, openvino, ...")
    parser.add_argument("--networks", type=int, default=20, help="whole networks to measure beside the blocks")
    parser.add_argument("-o", "--output", type=Path, default=Path("tower.parquet"))
    args = parser.parse_args()

    space = TowerSpace()
    simulated = args.backend == "roofline"  # which says the same each time: one block of samples is enough
    options, plan = ({}, SamplingPlan(rounds=1, runs=1)) if simulated else ({"threads": 1}, SamplingPlan())
    target = Target("cpu", devices.detect().host.cpu_model, args.backend, options, plan)
    outcome = profile(space, target, args.output, networks=args.networks)

    print(f"{space.size} networks from {len(space.all_blocks())} blocks; {len(outcome.table)} rows in {args.output}")
    figures = outcome.table.notes["additivity"]
    print(f"sums of blocks are {figures['mape']:.2%} off {figures['n']} networks")


if __name__ == "__main__":
    main()
