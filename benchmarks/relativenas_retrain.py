"""Trains the network of a search by RelativeNAS' own recipe, which reaches the published errors.

    python benchmarks/relativenas_retrain.py DIR --data parquet:cifar10.parquet [--recipe cifar] [--set epochs=30]

DIR is a folder of ``latbench search relativenas``; without --arch its network is trained, else a published one of its
space. Resumes; prints accuracy and loss on the test split.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from latbench.cli.target import assignment
from searchers.options import from_settings
from searchers.relativenas_retraining import CIFAR, IMAGENET, Retraining, retrain
from searchers.results import read_result


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=("cifar", "imagenet"), default="cifar")
    parser.add_argument("--data", help="default: the search's")
    parser.add_argument("--arch", help="a name or option indices; default: what was found")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the recipe")
    arguments = parser.parse_args()
    found = read_result(arguments.folder)
    recipe = CIFAR if arguments.recipe == "cifar" else IMAGENET
    options = from_settings(Retraining, {**asdict(recipe), **dict(assignment(text) for text in arguments.set)})
    problem = replace(found.problem, data=arguments.data or found.problem.data)
    arch = problem.space.parse_arch(arguments.arch) if arguments.arch else found.result.arch
    name = problem.space.format_arch(arch)
    _, figures = retrain(problem, arch, options, folder=arguments.folder / "retrained")
    print(json.dumps({"arch": name, **figures}))


if __name__ == "__main__":
    main()
