"""Is the found network better than MobileNet-v1 slimmed alike everywhere to the same latency?

    latbench search aows --table TABLE --target 100us --data parquet:cifar10.parquet --max-images 10000 -o DIR
    python benchmarks/aows_accuracy.py DIR [--epochs 30] [--seeds 3]

Both networks are measured on the table's device, then trained from scratch by one recipe on the search's training
images, several seeds each, and tested on the test split. The rival: of the uniform width multiples whose predicted
latency comes nearest to the found network's, the one whose measured latency does. Runs resume; figures are printed
whichever way they fall.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from latbench.errors import UsageError
from latbench.profiling.bench import BENCH_PLAN, bench, read_model
from latbench.spaces.base import Arch
from latbench.spaces.mobilenet_v1 import BASE_WIDTHS, MobileNetV1Space
from latbench.verify import target_of
from searchers.derive import Recipe, train_network
from searchers.results import Found, read_result

RIVALS = 6  # uniform networks that are measured, to train the one of the found network's latency


def uniform(space: MobileNetV1Space, multiple: float) -> Arch:
    """The candidate widths nearest to `multiple` of MobileNet-v1's."""
    return tuple(
        int(np.abs(np.array(options) - base * multiple).argmin())
        for options, base in zip(space.candidates, BASE_WIDTHS, strict=True)
    )


def rivals(found: Found) -> list[Arch]:
    """The uniformly slimmed networks whose predicted latency is nearest to the found one's."""
    oracle, space = found.problem.constraints[0].oracle, found.problem.space
    if not isinstance(space, MobileNetV1Space):
        raise UsageError(f"this compares networks of mobilenet_v1, not of {space.name}")
    archs = {uniform(space, multiple) for multiple in np.linspace(space.min_width, space.max_width, 1000)}
    return sorted(archs, key=lambda arch: abs(oracle.latency(arch) - found.result.predicted[0]))[:RIVALS]


def measured_ms(found: Found, arch: Arch) -> tuple[float, float]:
    """Latency and half-width of its 95 % interval."""
    target = target_of(found.problem.constraints[0].oracle.provenance, BENCH_PLAN)
    space = found.problem.space
    row = bench(
        read_model(f"{space.name}:{space.format_arch(arch)}", settings=space.settings()), target, layers=False
    ).row
    assert row.latency_ms is not None, row.error
    assert row.ci_high_ms is not None
    assert row.ci_low_ms is not None
    return row.latency_ms, (row.ci_high_ms - row.ci_low_ms) / 2


def main() -> None:
    """Prints a line per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    found = read_result(arguments.folder)
    recipe = Recipe(epochs=arguments.epochs, batch_size=arguments.batch_size, mixup=0.0, lr=0.8)
    oracle = found.problem.constraints[0].oracle
    means = {}
    measured = {arch: measured_ms(found, arch) for arch in (found.result.arch, *rivals(found))}
    found_ms, _ = measured[found.result.arch]
    rival = min(measured.keys() - {found.result.arch}, key=lambda arch: abs(measured[arch][0] - found_ms))
    for name, arch in {"found": found.result.arch, "uniform": rival}.items():
        ms, half = measured[arch]
        accuracies = []
        for seed in range(arguments.seeds):
            problem = replace(found.problem, seed=seed)
            folder = arguments.folder / f"{name}-{seed}"
            _, figures = train_network(problem, arch, recipe, folder=folder)
            accuracies.append(figures["accuracy"])
        graph = found.problem.space.network(arch)
        means[name] = statistics.mean(accuracies)
        print(
            f"{name:8s} {found.problem.space.format_arch(arch)}: predicted {oracle.latency(arch):.4f} ms, measured "
            f"{ms:.4f} +- {half:.4f} ms, {graph.n_params:,} parameters, {graph.macs:,} MACs\n"
            f"         accuracy {means[name]:.2%} +- {statistics.stdev(accuracies) if len(accuracies) > 1 else 0:.2%} "
            f"(sd over seeds: {', '.join(f'{a:.2%}' for a in accuracies)})",
            flush=True,
        )
    print(f"found - uniform: {100 * (means['found'] - means['uniform']):+.2f} points")


if __name__ == "__main__":
    main()
