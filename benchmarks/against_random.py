"""Do RelativeNAS, IRLAS and InstaNAS find better networks than chance, with equal evaluations, under one latency?

    latbench profile --space relativenas --resolution 16 --set channels=8 --set layers=5 --networks 60 --threads 1 -o T
    latbench fit T -o M
    python benchmarks/against_random.py relativenas M --data parquet:cifar10.parquet --max-images 3000 -o DIR
    python benchmarks/against_random.py relativenas M --data parquet:cifar10.parquet --max-images 3000 -o DIR --measure

M is a fitted model or a table; the limit is a quantile of what it predicts for random architectures. Per seed the
searcher and its rival run on the same images. The rival of relativenas and irlas is random search with the same
evaluator and as many distinct networks ("judged": what that says of a find); where irlas judges by training, the rival
trains as many blocks just so, and as many finalists in the deployed stack ("judged": the better finalist's accuracy on
held-out images). Both finds are then trained from scratch by one recipe, `--finals` times with as many seeds, and
tested on the test split ("accuracy": the mean). The rival of instanas are `--evaluations` random single networks of the
meta-graph that instanas trained, at most as slow as the mean of its images: the best on the held-out images with
inherited weights, batch norms calibrated, is fine-tuned as long as instanas is. Test accuracies there are those of the
meta-graph under these policies.

What a folder holds already is not done again. `--measure` adds measured latencies (``latbench verify``) to finished
searches; it wants a quiet machine. Figures are printed whichever way they fall.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from latbench import plugins
from latbench.cli.target import assignment
from latbench.oracle import store
from latbench.oracle.base import Constraint, LatencyOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.base import Arch
from latbench.tables import LatencyTable
from latbench.verify import verify
from searchers.base import Problem, SearchResult
from searchers.data import Splits, eval_batches, train_batches
from searchers.derive import Recipe, module_of, publish, train_network
from searchers.evaluators import open_evaluator
from searchers.instanas import InstaNAS
from searchers.instanas_controller import Controller, policies_of
from searchers.instanas_graph import MetaGraph, Routed
from searchers.instanas_policies import Costs, Route
from searchers.instanas_variants import examine, load_weights, snapshot
from searchers.irlas import IRLAS
from searchers.options import from_settings
from searchers.random_search import RandomSearch, draw
from searchers.train import Position, cosine, recalibrate
from searchers.world import Update, World, to_device

PRESETS: Mapping[str, Mapping[str, Any]] = {  # beside the paper's options; --set overrides them
    "relativenas": {"evaluator": "naswot", "population": 12, "generations": 200},
    "irlas": {"evaluator": "naswot", "finalists": 1, "final_epochs": 1},
    "instanas": {"cutout": 0.0, "trials": 40},  # and five variants, each examined twice: as many as its rival's 50
}
NETWORKS = 16  # of instanas that are measured
Figures = tuple[SearchResult, dict[str, Any]]


# ---- the task -------------------------------------------------------------------------------------------------------


def oracle_of(path: Path) -> LatencyOracle:
    """Of a table or a fitted model."""
    return LutOracle.fit(LatencyTable.read(path)) if path.suffix == ".parquet" else store.load(path).oracle


def quantile(oracle: LatencyOracle, share: float) -> float:
    """Below which this share of 2,000 random architectures is predicted."""
    rng = np.random.default_rng(0)
    archs = np.array([oracle.space.sample(rng) for _ in range(2000)], np.int64)
    return float(np.quantile(oracle.latencies(archs), share))


def final_recipe(given: argparse.Namespace) -> Recipe:
    """By which both finds are trained."""
    return Recipe(given.epochs, given.batch_size, given.lr, warmup_epochs=0.5, mixup=0.0)


def trained(problem: Problem, arch: Arch, given: argparse.Namespace, nth: int = 0) -> float:
    """Test accuracy after training from scratch on all of the problem's training images, the `nth` time."""
    seeded = replace(problem, seed=problem.seed + 1000 * nth)
    _, figures = train_network(seeded, arch, final_recipe(given), folder=problem.out / f"final-{nth}")
    return float(figures["accuracy"])


# ---- who runs -------------------------------------------------------------------------------------------------------


def options_of(name: str, given: argparse.Namespace) -> Any:
    """The searcher as the command line asks for it; finalists of irlas are trained as the finds, but for the epochs."""
    settings = {**PRESETS[name], **dict(assignment(text) for text in given.settings)}
    if name == "irlas":
        recipe = final_recipe(given)
        rate = recipe.lr * recipe.batch_size / 1024
        alike = {"final_batch_size": recipe.batch_size, "final_lr": rate, "final_weight_decay": recipe.weight_decay}
        settings = alike | settings
    return from_settings(plugins.load("latbench.searchers", name), settings)


def trains_blocks(options: Any) -> bool:
    """Whether it is irlas, judging by training: its finalists are trained further."""
    return isinstance(options, IRLAS) and options.evaluator.startswith("train")


def searched(problem: Problem, name: str, given: argparse.Namespace) -> Figures:
    """The searcher's find and its figures."""
    options = options_of(name, given)
    result = options.search(problem)
    notes = result.notes
    if name == "instanas":
        told = {"evaluations": given.evaluations, "judged": notes["accuracy"], "predicted_ms": notes["test"]["mean"][0]}
        return result, told | {"accuracies": [notes["test"]["accuracy"]]}
    evaluations = notes["evaluated"] if name == "irlas" else notes["evaluations"]
    if trains_blocks(options):
        judged = notes["accuracy"]
    else:
        evaluator = open_evaluator(options.evaluator, problem, held_out=options.held_out)  # on one scale for both
        judged = evaluator.evaluate(problem.space.canonical(result.arch))
    return result, {"evaluations": evaluations, "judged": judged, "accuracies": []}


def rival(problem: Problem, found: SearchResult, row: Mapping[str, Any], given: argparse.Namespace) -> Figures:
    """Random search with as many evaluations, and its figures."""
    if found.searcher == "instanas":
        return single_networks(problem, found, given)
    options = options_of(found.searcher, given)
    if trains_blocks(options):
        return random_blocks(problem, options, row["evaluations"])
    result = RandomSearch(row["evaluations"], options.evaluator, held_out=options.held_out).search(problem)
    return result, {"evaluations": result.notes["evaluations"], "judged": result.score, "accuracies": []}


def random_blocks(problem: Problem, options: IRLAS, n: int) -> Figures:
    """The best of as many random blocks as irlas trained, by its short trainings and then its finalists' training."""
    evaluator = options._evaluator(problem)
    drawn = draw(problem, n, np.random.default_rng((problem.seed, 0xD1CE)))
    ranked = sorted(drawn.archs, key=lambda arch: -evaluator.evaluate(arch))
    splits = Splits.of(problem, problem.space.num_classes, held_out=options.held_out)
    finals = [(*options._final(problem, splits, arch, None), arch) for arch in ranked[: options.finalists]]
    module, judged, arch = max(finals, key=lambda final: final[1])
    searcher = RandomSearch(n, "train")
    result = publish(
        problem, searcher, module, World.here(), arch=arch, score=judged, history=(), notes={**drawn.notes}
    )
    return result, {"evaluations": n, "judged": judged, "accuracies": []}


def single_networks(problem: Problem, found: SearchResult, given: argparse.Namespace) -> Figures:
    """The best of random single networks of instanas' meta-graph, fine-tuned."""
    options: InstaNAS = options_of("instanas", given)
    (constraint,), mean = problem.constraints, found.notes["latency"][0]["mean"]
    costs, world = Costs.of(problem), World.here()
    drawn = draw(
        replace(problem, constraints=(Constraint(constraint.oracle, mean),)),
        given.evaluations,
        np.random.default_rng((problem.seed, 0xD1CE)),
    )
    splits = Splits.of(problem, costs.space.num_classes)
    held_out = eval_batches(problem, splits, world, "held_out")

    def route(arch: Arch) -> Routed:
        """Of every image to this network, in the meta-graph as instanas' search left it."""
        graph = MetaGraph(costs.space)
        load_weights(snapshot(found.network.parent, found.notes["variant"]), Controller(costs.space), graph)
        routed = Routed(graph, Route(Always(arch), torch.zeros(costs.tables.shape[1:]), costs))
        recalibrate(routed, train_batches(problem, splits, world, options.batch_size), world)
        return routed

    scores = [examine(route(arch), held_out, world).accuracy for arch in drawn.archs]
    best = int(np.argmax(scores))
    routed = route(drawn.archs[best])
    finetune(routed, problem, splits, options, world)
    accuracy = examine(routed, eval_batches(problem, splits, world), world).accuracy
    network = problem.space.network(drawn.archs[best])
    result = publish(
        problem,
        RandomSearch(len(drawn.archs)),
        module_of(network, routed.graph.weights(network)),
        world,
        arch=drawn.archs[best],
        score=scores[best],
        history=(),
        notes=dict(drawn.notes),
    )
    judged = examine(routed, held_out, world).accuracy  # fine-tuned, as instanas' own
    return result, {"evaluations": len(drawn.archs), "judged": judged, "accuracies": [accuracy]}


class Always(nn.Module):
    """A controller that gives every image one network."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.register_buffer("policy", policies_of(torch.tensor(arch)).float())  # (L, 5)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, 5) probabilities."""
        policy: Tensor = self.policy
        return policy.expand(len(images), *policy.shape)


def finetune(routed: Routed, problem: Problem, splits: Splits, options: InstaNAS, world: World) -> None:
    """As ``InstaNAS.finetune``."""
    sgd = torch.optim.SGD(
        routed.graph.parameters(), options.finetune_lr, options.momentum, 0, options.finetune_weight_decay, True
    )
    update = Update(sgd, world)
    batches = train_batches(problem, splits, world, options.finetune_batch_size)
    for epoch in range(options.finetune_epochs):
        torch.manual_seed(problem.seed + epoch)
        for step, batch in enumerate(to_device(batches.epoch(epoch), world.device)):
            routed.graph.train()
            update.backward(functional.cross_entropy(routed(batch.images).float(), batch.labels))
            update.step(cosine(options.finetune_lr, Position(epoch, step, len(batches), options.finetune_epochs)))


# ---- the study ------------------------------------------------------------------------------------------------------


def rows_of(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One per seed and contestant; kept in its folder."""
    oracle = oracle_of(given.model)
    target = given.target or quantile(oracle, given.quantile)
    rows: list[dict[str, Any]] = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        found: SearchResult | None = None
        for name in (given.searcher, "random"):
            out = given.output / f"{name}-{seed}"
            kept = out / "row.json"
            problem = Problem(
                (Constraint(oracle, target, given.confidence),), given.data, out, seed, max_images=given.max_images
            )
            if not kept.exists():
                began = time.monotonic()
                if name != "random":
                    result, figures = found, _ = searched(problem, name, given)
                else:
                    if found is None:
                        before = replace(problem, out=given.output / f"{given.searcher}-{seed}")
                        found, _ = searched(before, given.searcher, given)
                    result, figures = rival(problem, found, rows[-1], given)
                row = {"searcher": given.searcher, "seed": seed, "who": name}
                row |= {"target_ms": target, "predicted_ms": result.predicted[0], "measured_ms": None} | figures
                row |= {"seconds": time.monotonic() - began, "arch": problem.space.format_arch(result.arch)}
                kept.write_text(json.dumps(row))
            row = json.loads(kept.read_text())
            while given.searcher != "instanas" and len(row["accuracies"]) < given.finals:
                arch = problem.space.parse_arch(row["arch"])
                row["accuracies"].append(trained(problem, arch, given, len(row["accuracies"])))
                kept.write_text(json.dumps(row))
            row["accuracy"] = float(np.mean(row["accuracies"]))
            if given.measure and row["measured_ms"] is None:
                networks = NETWORKS if name == "instanas" else 1
                row["measured_ms"] = verify(out, networks=networks)[0].measured
                kept.write_text(json.dumps(row))
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """For people."""
    measured = "" if row["measured_ms"] is None else f", measured {1e3 * row['measured_ms']:.1f}"
    return (
        f"seed {row['seed']} {row['who']:12s} accuracy {row['accuracy']:.2%}, judged {row['judged']:.4f}, predicted "
        f"{1e3 * row['predicted_ms']:.1f}{measured} of {1e3 * row['target_ms']:.1f} us, {row['evaluations']} "
        f"evaluations, {row['seconds']:.0f} s, {row['arch']}"
    )


def main() -> None:
    """A line per search and seed, then means and spreads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searcher", choices=list(PRESETS))
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--quantile", type=float, default=0.1, help="of random architectures' latencies: the limit")
    parser.add_argument("--target", type=float, help="the limit itself, in ms")
    parser.add_argument("--confidence", type=float)
    parser.add_argument("--evaluations", type=int, default=50, help="of instanas' rival")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6, help="of the final training")
    parser.add_argument("--finals", type=int, default=1, help="such trainings of each find")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.8, help="of the final training, at 1024 images a batch")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--table", type=Path, help="figures of these searches, others' in it kept: FILE.parquet")
    given = parser.parse_args()
    table = pd.DataFrame(rows_of(given))
    for what in ("accuracy", "judged", "predicted_ms", "measured_ms"):
        for who, part in table.groupby("who", sort=False):
            column = part[what].astype(float)
            print(f"{who:12s} {what:12s} {column.mean():.4f}, sd over seeds {column.std():.4f}")
    apart = table.pivot(index="seed", columns="who", values="accuracy")
    gain = 100 * (apart[given.searcher] - apart["random"])
    print(f"accuracy above random search: {gain.mean():+.2f} points, sd over seeds {gain.std():.2f}")
    if given.table:
        others = pd.read_parquet(given.table) if given.table.exists() else table.head(0)
        others = others[others["searcher"] != given.searcher]
        pd.concat([others, table], ignore_index=True).to_parquet(given.table, index=False)


if __name__ == "__main__":
    main()
