"""Does RelativeNAS find better networks than random search that trains as many candidates, under one latency?

    latbench profile --space relativenas --backend roofline --resolution 16 --set channels=8 --set layers=5 -o TABLE
    python benchmarks/relativenas_search.py TABLE -o DIR [--target-share 0.4] [--seeds 3]

Two searches per seed. RelativeNAS has `--population` times `--generations` candidates, each trained for one epoch from
its weight store; random search trains its candidates from scratch for `--rival-epochs` epochs, so many that the epochs
are as many. With another `--evaluator` than supernet (naswot, synflow, train) both ask it, equally often. Each found
network is then trained from scratch by one recipe on all training images and tested on the test split. Searches and
trainings resume; figures are printed whichever way they fall.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latbench.oracle.base import Constraint
from latbench.oracle.lut import LutOracle
from latbench.spaces.base import Arch
from latbench.tables import LatencyTable
from searchers.base import Problem, SearchResult
from searchers.derive import Recipe, train_network
from searchers.random_search import RandomSearch
from searchers.relativenas import SUPERNET, RelativeNAS


def target_of(oracle: LutOracle, share: float) -> float:
    """This share of the way from the fastest network to the slowest of 1,000 random ones."""
    rng = np.random.default_rng(0)
    high = oracle.latencies(np.array([oracle.space.sample(rng) for _ in range(1000)], np.int64)).max()
    low = oracle.fastest()[1]
    return float(low + share * (high - low))


def relativenas(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> RelativeNAS:
    """With a store of the space's own networks, which loses nothing between search and result."""
    return RelativeNAS(
        population=arguments.population,
        generations=arguments.generations,
        feasible_start=arguments.feasible_start,
        evaluator=arguments.evaluator,
        channels=settings["channels"],
        layers=settings["layers"],
        batch_size=arguments.batch_size,
        search_val_augment=False,
        drop_path=0.0,
        cutout=0.0,
    )


def rival(arguments: argparse.Namespace, found: SearchResult) -> RandomSearch:
    """With as many evaluations as made `found`."""
    epochs = arguments.population * arguments.generations
    if arguments.evaluator == SUPERNET:
        evaluations = epochs // arguments.rival_epochs
        return RandomSearch(evaluations, "train", arguments.rival_epochs, arguments.batch_size)
    return RandomSearch(found.notes["evaluations"], arguments.evaluator, batch_size=arguments.batch_size)


def accuracy(arguments: argparse.Namespace, problem: Problem, arch: Arch) -> float:
    """On the test split after training from scratch."""
    recipe = Recipe(arguments.epochs, arguments.batch_size, lr=0.8, warmup_epochs=1.0, mixup=0.0)
    final = replace(problem, out=problem.out / "final")
    _, figures = train_network(final, arch, recipe, folder=final.out)
    return float(figures["accuracy"])


def main() -> None:
    """Prints a line per search and seed, then means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--target-share", type=float, default=0.4)
    parser.add_argument("--population", type=int, default=10)
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--rival-epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10, help="of the final training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluator", default=SUPERNET)
    parser.add_argument("--feasible-start", action="store_true")
    arguments = parser.parse_args()
    oracle = LutOracle.fit(LatencyTable.read(arguments.table))
    target = target_of(oracle, arguments.target_share)
    figures: dict[str, list[tuple[float, float]]] = {"relativenas": [], "random": []}  # score, accuracy
    for seed in range(arguments.seeds):
        found: SearchResult | None = None
        for name, values in figures.items():
            out = arguments.output / f"{name}-{arguments.evaluator}-{seed}"
            problem = Problem((Constraint(oracle, target),), arguments.data, out, seed=seed)
            began = time.monotonic()
            searcher = relativenas(arguments, oracle.space.settings()) if found is None else rival(arguments, found)
            found = searcher.search(problem)
            seconds = time.monotonic() - began
            values.append((found.score, accuracy(arguments, problem, found.arch)))
            print(
                f"seed {seed} {name:12s} {found.predicted[0]:.4f} of {target:.4f} ms in {seconds:.0f} s, "
                f"{found.notes.get('evaluations', '-')} evaluations, score {found.score:.4f}, "
                f"accuracy {values[-1][1]:.2%}, {oracle.space.format_arch(found.arch)}",
                flush=True,
            )
    for name, values in figures.items():
        for what, column in zip(("score", "accuracy"), np.array(values).T, strict=True):
            spread = f"{column.std(ddof=1):.4f}" if len(column) > 1 else "-"
            print(f"{name:12s} {what:8s} {column.mean():.4f}, sd over seeds {spread}")


if __name__ == "__main__":
    main()
