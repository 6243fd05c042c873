"""IRLAS: how far an expert's margin reaches, what its guidance does to the search, and to the latency of what is found.

    python benchmarks/irlas_guidance.py [--seeds 5] [--alpha 0.1] [--measure]

Five tables, nothing trained. (1) The mirror stimuli function: margin of ResNeXt over every other block, score of other
wirings, for both layouts of features. (2) The Q-learning of 178 x 64 blocks where accuracy says nothing: score of the
greedy block. (3) A price per layer and an accuracy that grows with convolutions: what a budget of 6 does. (4) Guidance
against none (lambda 0, 0.2, 1) under BlockQNN's whole reward, blocks of up to 9 layers in the mobile stack at 224
pixels: mirror score, multiply-accumulates and latency of the best-ranked block, by the roofline of one CPU core or,
with --measure, on this machine. Accuracy is "flat" (0.5 for all) or "convs" (that of table 3). (5) The published
network with its 1x1 depthwise convolutions and without. Mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from latbench.backends.roofline import OPTIONS, kernels
from latbench.graph.passes import fold_structure
from latbench.oracle.base import Archs, Constraint, Floats
from latbench.provenance import Provenance
from latbench.spaces.base import Arch
from latbench.spaces.nsc import IRLASSpace
from searchers.irlas import IRLAS
from searchers.irlas_blocks import BlockSearch
from searchers.mirror import Features, Mirror, train

WIRINGS = {
    "ResNeXt": "resnext",
    "IRLAS-mobile": "irlas-mobile",
    "four conv3 in a row": "(1,1,3,0,0)(2,1,3,1,0)(3,1,3,2,0)(4,1,3,3,0)(5,7,0,0,0)",
    "one conv1": "(1,1,1,0,0)(2,7,0,0,0)",
}
PRICES = {"conv1": 1.0, "conv3": 2.0, "conv5": 4.0, "max1": 0.5, "avg1": 0.5, "max3": 1.0, "avg3": 1.0}
PRICES |= {"add": 0.5, "concat": 1.0}


def kinds(space: IRLASSpace, arch: Sequence[int]) -> list[str]:
    """Names of a block's layers: "conv3", "add"."""
    codes = space.codes(tuple(int(option) for option in arch))
    told = [str(space.decisions[i].options[arch[i]]) for i in range(len(codes) - 1)]
    return [text.partition("<-")[0] for text in told]


@dataclass(frozen=True)
class Priced:
    """An oracle of a price per layer."""

    space: IRLASSpace
    unit: str = "ms"

    @property
    def provenance(self) -> Provenance:
        """None."""
        return Provenance("", "", "", space=self.space.name)

    def latency(self, arch: Arch) -> float:
        """The sum over the block's layers."""
        return sum(PRICES.get(kind, 0.0) for kind in kinds(self.space, arch))

    def latencies(self, archs: Archs) -> Floats:
        """(N, D) -> (N,)."""
        return np.array([self.latency(arch) for arch in archs], np.float64)


def accuracy_of(space: IRLASSpace) -> Callable[[Arch], float]:
    """Grows with convolutions, their size, and an add."""

    def accuracy(arch: Arch) -> float:
        found = kinds(space, arch)
        n_convs = sum(kind.startswith("conv") and kind != "concat" for kind in found)
        return min(0.9, 0.3 + 0.05 * n_convs + 0.02 * found.count("conv5") + 0.05 * ("add" in found))

    return accuracy


def told(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):8.{digits}f} +- {spread:.{digits}f}"


def margins() -> None:
    """Table 1."""
    print("1. mirror stimuli function, gamma 0.9, expert ResNeXt")
    for max_index in (6, 10):
        space = IRLASSpace(max_index=max_index)
        for layout, method in (("indexed", "max_margin"), ("fields", "projection")):
            began = time.perf_counter()
            features = Features(max_index, layout=layout)
            found = train(features, [space.parse_arch("resnext")], method=method)
            seconds = time.perf_counter() - began
            best = features.best(found.weights) == features.cut(space.parse_arch("resnext"))
            scores = ", ".join(f"{name} {found.score(space.parse_arch(code)):.3f}" for name, code in WIRINGS.items())
            print(
                f"   T_max {max_index:2d} {layout:7s} {method:10s}: margin in [{found.margin[0]:.4f}, "
                f"{found.margin[1]:.4f}], {len(found.distances)} iterations, {seconds:.2f} s, best block "
                f"{'is' if best else 'is not'} the expert\n      scores: {scores}",
                flush=True,
            )


def uninformed(options: IRLAS, seeds: int) -> None:
    """Table 2."""
    space = IRLASSpace(stack="cifar", resolution=32, max_index=6)
    options = replace(options, tolerance=1e-2, flops_weight=0.0, density_weight=0.0)
    trained = options.mirror(space)
    print("2. greedy block's mirror score, accuracy 0.5 for all, T_max 6")
    for balance in (0.0, 0.2, 1.0):
        scores, evaluated, began = [], [], time.perf_counter()
        for seed in range(seeds):
            search = BlockSearch(replace(options, balance=balance), space, trained, lambda arch: 0.5, seed=seed)
            search.run()
            scores.append(trained.score(search.learner.greedy()))
            evaluated.append(search.n_evaluated)
        seconds = (time.perf_counter() - began) / seeds
        print(f"   lambda {balance:.1f}: {told(scores)}, {told(evaluated, 0)} blocks evaluated, {seconds:.2f} s a run")


def budgeted(options: IRLAS, seeds: int) -> None:
    """Table 3."""
    space = IRLASSpace(stack="cifar", resolution=32, max_index=6)
    options = replace(options, tolerance=1e-2, flops_weight=0.0, density_weight=0.0, balance=0.2)
    trained, oracle, accuracy = options.mirror(space), Priced(space), accuracy_of(space)
    print("3. most accurate block found, price per layer, T_max 6, lambda 0.2")
    for budget, mode in ((None, "none"), (6.0, "filter"), (6.0, "penalty")):
        prices, accuracies, evaluated = [], [], []
        for seed in range(seeds):
            constraints = () if budget is None else (Constraint(oracle, budget),)
            chosen = replace(options, latency_mode=mode)
            search = BlockSearch(chosen, space, trained, accuracy, constraints, seed=seed)
            search.run()
            best = max((arch for _, arch in search.ranked()), key=accuracy)
            prices.append(oracle.latency(best))
            accuracies.append(accuracy(best))
            evaluated.append(search.n_evaluated)
        print(
            f"   budget {'none' if budget is None else budget!s:4s} {mode:8s}: price {told(prices, 2)}, accuracy "
            f"{told(accuracies, 3)}, {told(evaluated, 0)} blocks evaluated",
            flush=True,
        )


def roofline_ms(space: IRLASSpace, arch: Arch) -> float:
    """Of the deployed network, batch norms folded."""
    options = {name: float(value) for name, value in OPTIONS.items()}
    return sum(layer.ms for layer in kernels(fold_structure(space.network(arch)), options))


def measured_ms(space: IRLASSpace, arch: Arch) -> float:
    """Of the deployed network on this machine, by its default back-end."""
    from latbench.cli.target import target_of
    from latbench.profiling.bench import BENCH_PLAN, bench, read_model

    target, _ = target_of("auto", None, None, 1, (), BENCH_PLAN)
    row = bench(read_model(f"irlas:{space.format_arch(arch)}", settings=space.settings()), target, layers=False).row
    assert row.latency_ms is not None, row.error
    return row.latency_ms


def guided(options: IRLAS, seeds: int, latency: Callable[[IRLASSpace, Arch], float]) -> None:
    """Table 4."""
    space = IRLASSpace()
    trained: Mirror = options.mirror(space)
    print("4. best-ranked block in the mobile stack, batch 1, 224 pixels, T_max 10")
    for name, accuracy in {"flat": lambda arch: 0.5, "convs": accuracy_of(space)}.items():
        for balance in (0.0, 0.2, 1.0):
            figures: dict[str, list[float]] = {"score": [], "greedy": [], "ms": [], "macs": [], "accuracy": []}
            for seed in range(seeds):
                search = BlockSearch(replace(options, balance=balance), space, trained, accuracy, seed=seed)
                search.run()
                best = search.ranked()[0][1]
                figures["score"].append(trained.score(best))
                figures["greedy"].append(trained.score(search.learner.greedy()))
                figures["ms"].append(latency(space, best))
                figures["macs"].append(space.network(best).macs / 1e6)
                figures["accuracy"].append(accuracy(best))
            print(
                f"   {name:5s} lambda {balance:.1f}: score {told(figures['score'])}, latency {told(figures['ms'], 2)} "
                f"ms, {told(figures['macs'], 0)} M MACs, accuracy {told(figures['accuracy'], 2)}; greedy block's score "
                f"{told(figures['greedy'])}",
                flush=True,
            )


def deployed(latency: Callable[[IRLASSpace, Arch], float]) -> None:
    """Table 5."""
    print("5. IRLAS-mobile, batch 1, 224 pixels, batch norms folded")
    for scales in (True, False):
        space = IRLASSpace(scales=scales)
        arch = space.parse_arch("irlas-mobile")
        graph = space.network(arch)
        print(
            f"   1x1 depthwise scales {'kept  ' if scales else 'folded'}: {graph.n_params:,} parameters, "
            f"{fold_structure(graph).n_params:,} folded, {graph.macs:,} MACs, {latency(space, arch):.2f} ms"
        )


def main() -> None:
    """Prints the five tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Q-learning; the published 0.01 learns little")
    parser.add_argument("--measure", action="store_true", help="latencies on this machine, not by a roofline")
    arguments = parser.parse_args()
    options = IRLAS(alpha=arguments.alpha)
    margins()
    uninformed(options, arguments.seeds)
    budgeted(options, arguments.seeds)
    latency = measured_ms if arguments.measure else roofline_ms
    guided(options, arguments.seeds, latency)
    deployed(latency)


if __name__ == "__main__":
    main()
