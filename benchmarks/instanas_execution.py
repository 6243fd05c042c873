"""What running each image's own modules is worth: ``python benchmarks/instanas_execution.py [DIR]``.

Images go through InstaNAS's meta-graph in turns: each module on the rows that select it (*grouped*), each module that
any row selects on the whole batch, outputs masked (*dense*), all modules on the whole batch, as the released code does
(*all*), and one image after another (*single*). Told are the medians over the turns, and the medians of the ratios
within a turn to grouped, which the host's moods touch least.

DIR is the folder of a finished search: its controller decides. Without it, policies are drawn, each module on with the
probabilities of ``--share``, in the space of ``--layout``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from latbench.spaces.instanas import MODULES, InstaNASSpace
from searchers.data import eval_transform
from searchers.instanas_graph import Execution, MetaGraph
from searchers.instanas_variants import read_routed
from searchers.results import read_result
from searchers.sources import open_data


def drawn(layout: str, batch: int, share: float) -> tuple[MetaGraph, Tensor, Tensor]:
    """A meta-graph of first weights, noise, policies."""
    torch.manual_seed(0)
    space = InstaNASSpace(layout=layout)
    images = torch.randn(batch, 3, space.resolution, space.resolution)
    policies = torch.rand(batch, len(space.layers), len(MODULES)) < share
    return MetaGraph(space).eval(), images, policies


def found(folder: Path, batch: int) -> tuple[MetaGraph, Tensor, Tensor]:
    """A searched meta-graph, test images, the policies that its controller gives them."""
    problem, routed = read_result(folder).problem, read_routed(folder)
    source, transform = open_data(problem.data), eval_transform(problem.space.resolution)
    n = len(source.labels("test"))
    pixels = [torch.from_numpy(source.image("test", i % n).transpose(2, 0, 1).copy()) for i in range(batch)]
    images = torch.stack([transform(image) for image in pixels])
    return routed.graph, images, routed.route(images)


@torch.inference_mode()
def compare(graph: MetaGraph, images: Tensor, policies: Tensor, turns: int) -> dict[str, list[float]]:
    """Seconds of every turn, by the way of running."""

    def forward(bits: Tensor, execution: Execution) -> Callable[[], Tensor]:
        return lambda: graph(images, bits, execution)

    ways = {
        "grouped": forward(policies, "grouped"),
        "dense": forward(policies, "dense"),
        "all": forward(torch.ones_like(policies), "dense"),
        "single": forward(policies, "single"),
    }
    want = ways["dense"]()
    for way in ("grouped", "single"):
        difference = float((ways[way]() - want).abs().max() / want.abs().max())
        assert difference <= 1e-4, f"{way} differs from dense by {difference}"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, run in ways.items():
            began = perf_counter()
            run()
            seconds[way].append(perf_counter() - began)
    return seconds


def tell(title: str, seconds: dict[str, list[float]], policies: Tensor) -> None:
    """One line."""
    times = ", ".join(f"{way} {1e3 * median(s):.2f}" for way, s in seconds.items())
    ratios = ", ".join(
        f"{way} {median(a / b for a, b in zip(s, seconds['grouped'], strict=True)):.2f}"
        for way, s in seconds.items()
        if way != "grouped"
    )
    modules = float(policies.float().sum(-1).mean())
    print(f"{title} {len(policies):5d} {modules:7.2f}   ms: {times}   to grouped: {ratios}", flush=True)


def main() -> None:
    """A line per batch and share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of a finished search")
    parser.add_argument("--layout", default="c10")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{'policies':10} batch modules")
    for batch in given.batch:
        if given.folder is not None:
            graph, images, policies = found(given.folder, batch)
            tell(f"{'searched':10}", compare(graph, images, policies, given.turns), graph.effective(policies))
            continue
        for share in given.share:
            graph, images, policies = drawn(given.layout, batch, share)
            tell(f"{f'drawn {share:g}':10}", compare(graph, images, policies, given.turns), graph.effective(policies))


if __name__ == "__main__":
    main()
