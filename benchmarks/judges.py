"""Which cheap judge of a network tells what it is worth once it is trained?

    python benchmarks/judges.py M --data parquet:cifar10.parquet

M is a fitted model or a table; random networks under a quantile of its latencies are judged by each evaluator, on as
many images as stand beside it, and trained from scratch by the recipe of ``against_random.py``, both with two seeds.
Prints how well each judge goes with the mean test accuracy, and what one look costs beside training.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from against_random import oracle_of, quantile, trained
from scipy.stats import spearmanr

from latbench.oracle.base import Constraint
from searchers.base import Problem
from searchers.evaluators import open_evaluator
from searchers.random_search import draw

SEEDS = (0, 1)


def main() -> None:
    """A line per judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--judges", default="train:3@3000,train:1@8000,naswot@3000,synflow@3000", help="TEXT@IMAGES,..."
    )
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--quantile", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=3000, help="of the final training")
    parser.add_argument("--epochs", type=int, default=6, help="of the final training")
    parser.set_defaults(batch_size=64, lr=0.8)  # of the final training, as against_random's
    given = parser.parse_args()
    oracle = oracle_of(given.model)
    constraint = Constraint(oracle, quantile(oracle, given.quantile))
    with tempfile.TemporaryDirectory() as folder:

        def problem(name: str, seed: int, images: int) -> Problem:
            return Problem((constraint,), given.data, Path(folder) / name, seed, max_images=images)

        archs = draw(problem("drawn", 0, given.images), given.networks, np.random.default_rng(5)).archs
        truth, seconds = np.zeros((len(SEEDS), len(archs))), time.monotonic()
        for at in np.ndindex(truth.shape):
            truth[at] = trained(problem(f"final-{at}", SEEDS[at[0]], given.images), archs[at[1]], given)
        whole = (time.monotonic() - seconds) / truth.size
        apart = (truth[0] - truth[1]).std(ddof=1) / np.sqrt(2)
        spread = truth.mean(0).std(ddof=1)
        print(f"{len(archs)} networks: accuracy {truth.mean():.1%}, sd {spread:.1%}, of two trainings {apart:.1%}")
        for text, _, images in (judge.rpartition("@") for judge in given.judges.split(",")):
            told, seconds = np.zeros_like(truth), time.monotonic()
            for row, seed in enumerate(SEEDS):
                evaluator = open_evaluator(text, problem(f"{text}-{seed}", seed, int(images)))
                told[row] = [evaluator.evaluate(arch) for arch in archs]
            cost = (time.monotonic() - seconds) / told.size / whole
            pearson = [np.corrcoef(one, truth.mean(0))[0, 1] for one in told]
            ranks = [spearmanr(one, truth.mean(0))[0] for one in told]
            print(
                f"{text:10s} {images:>6s} images: correlation {np.mean(pearson):5.2f}, of ranks {np.mean(ranks):5.2f}, "
                f"{cost:.2f} of a training",
                flush=True,
            )


if __name__ == "__main__":
    main()
