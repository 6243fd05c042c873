"""The accuracy/latency variants of one InstaNAS search: snapshots along its run, each examined on held-out images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from latbench.errors import UsageError
from latbench.spaces.instanas import N_SUBSETS, SUBSETS
from searchers.base import Scalar
from searchers.data import Batches
from searchers.derive import write_network
from searchers.foresight import promising
from searchers.instanas_controller import Controller, controller_graph
from searchers.instanas_graph import MetaGraph, Routed
from searchers.instanas_policies import OPEN, Costs, Route, draw_latencies
from searchers.results import read_result, write_bytes, write_history
from searchers.train import load_tensors, recalibrate
from searchers.world import World, to_device

DRAWN = 200  # of what is drawn twice, uniformly and near the best, one is tried
WEIGHTS, VARIANTS, IMAGES = "instanas.pt", "variants.parquet", "images.parquet"  # in a problem's folder
CONTROLLER, HISTOGRAM = "controller.onnx", "latencies.svg"


def snapshot_epochs(n_variants: int, epochs: int) -> list[int]:
    """Of epochs 0 to `epochs`: evenly spaced, the last one among them; all where they are fewer."""
    if n_variants > epochs:
        return list(range(epochs + 1))
    return [round(epochs * (k + 1) / n_variants) for k in range(n_variants)]


def snapshot(folder: Path, epoch: int) -> Path:
    """Where the weights behind an epoch of the search are."""
    return folder / f"variant{epoch}.pt"


def save_weights(path: Path, controller: nn.Module, graph: nn.Module, prices: Tensor) -> None:
    """State dicts that load with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save({"controller": controller.state_dict(), "graph": graph.state_dict(), "prices": prices}, buffer)
    write_bytes(path, buffer.getvalue())


def load_weights(path: Path, controller: nn.Module, graph: nn.Module) -> Tensor:
    """Inverse of ``save_weights``; gives the (L, 32) prices. Raises UsageError where the file does not fit."""
    try:
        state = load_tensors(path)
        controller.load_state_dict(state["controller"])
        graph.load_state_dict(state["graph"])
        prices: Tensor = state["prices"]
    except Exception as error:  # whatever a damaged file makes torch raise
        raise UsageError(f"{path} holds no weights of this search ({' '.join(str(error).split())[:120]})") from None
    return prices


def read_routed(folder: Path) -> Routed:
    """The found controller and meta-graph of a result folder, in evaluation mode: images -> logits.

    Raises UsageError where `folder` holds no result of this searcher.
    """
    costs = Costs.of(read_result(folder).problem)
    controller, graph = Controller(costs.space), MetaGraph(costs.space)
    prices = load_weights(folder / WEIGHTS, controller, graph)
    return Routed(graph, Route(controller, prices, costs)).eval()


@dataclass(frozen=True, eq=False)
class Exam:
    """What every image of a set was given and whether it was told right."""

    policies: Tensor  # (N, L, 5) bool
    hits: Tensor  # (N,) bool
    losses: Tensor  # (N,) nats

    @property
    def loss(self) -> float:
        """Mean over images: tells variants apart where accuracies of some hundred images do not."""
        return float(self.losses.double().mean())

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.hits.double().mean())


@torch.inference_mode()
def examine(routed: Routed, batches: Batches, world: World) -> Exam:
    """Every image under its own policy."""
    routed.eval()
    policies, hits, losses = [], [], []
    for images, labels in to_device(batches.epoch(0), world.device):
        with world.autocast():
            chosen = routed.route(images)
            logits = routed.graph(images, chosen)
        policies.append(chosen.cpu())
        hits.append((logits.argmax(-1) == labels).cpu())
        losses.append(functional.cross_entropy(logits.float(), labels, reduction="none").cpu())
    return Exam(torch.cat(policies), torch.cat(hits), torch.cat(losses))


@dataclass(frozen=True, eq=False)
class Variant:
    """A snapshot under its own MAP policies, and under those that keep the budgets."""

    epoch: int  # of the search
    prices: Tensor  # (L, 32); all 0 where the MAP policies keep the budgets
    own: Exam
    kept: Exam
    costs: Costs
    fixed: tuple[int, ...]  # per layer the subset that ``kept`` gives every image, or OPEN

    @cached_property
    def predicted(self) -> list[float]:
        """Mean latency of the MAP policies under each constraint, in its unit."""
        return [float(mean) for mean in self.costs.latencies(self.own.policies).mean(1)]

    def row(self, others: Sequence[Variant]) -> dict[str, Scalar]:
        """Figures on the held-out images; among `others` on the Pareto front or not."""
        priced = self.costs.latencies(self.kept.policies).mean(1).tolist()
        return {
            "epoch": self.epoch,
            "accuracy": self.own.accuracy,
            **{f"predicted{k}": value for k, value in enumerate(self.predicted)},
            "networks": len(self.costs.census(self.own.policies)),
            "pareto": not any(other.dominates(self) for other in others),
            "accuracy_kept": self.kept.accuracy,
            **{f"predicted_kept{k}": float(value) for k, value in enumerate(priced)},
        }

    def dominates(self, other: Variant) -> bool:
        """Whether it is as accurate and as fast under every constraint, and better in one of these."""
        ours, theirs = (self.own.accuracy, self.predicted), (other.own.accuracy, other.predicted)
        no_worse = ours[0] >= theirs[0] and all(a <= b for a, b in zip(ours[1], theirs[1], strict=True))
        return no_worse and ours != theirs


@dataclass(frozen=True, eq=False)
class Examiner:
    """Examines snapshots of one search. The modules it is given take on what it examines."""

    controller: Controller
    graph: MetaGraph
    costs: Costs
    calibration: Batches  # training images
    held_out: Batches
    world: World

    def variant(self, epoch: int) -> Variant:
        """The snapshot of an epoch."""
        prices = self.costs.settle(self._probabilities(epoch))
        own = self.settled(torch.zeros_like(prices))
        kept = self.settled(prices) if prices.any() else own
        return Variant(epoch, prices, own, kept, self.costs, (OPEN,) * len(self.costs.space.layers))

    def fixing(self, chosen: Variant, trials: int, rng: np.random.Generator) -> Variant:
        """[E] Of so many variants of a variant that give all images one subset in some layers, and it, the one of the
        smallest loss.

        In every other layer the controller decides, at prices that keep the budgets. What is tried is the most
        promising of what is drawn (``foresight``), half of it near the best so far.
        """
        if not trials:
            return chosen
        probs, n = self._probabilities(chosen.epoch), len(chosen.fixed)
        known, best = {chosen.fixed: chosen.kept.loss}, chosen
        for _ in range(trials):
            drawn = rng.integers(N_SUBSETS, size=(DRAWN, n))
            drawn[rng.random(drawn.shape) < rng.random((DRAWN, 1))] = OPEN
            near = np.where(rng.random((DRAWN, n)) < 1.5 / n, drawn, best.fixed)
            rows = dict.fromkeys(tuple(row) for row in np.concatenate([near, drawn]).tolist())
            new = [row for row in rows if row not in known and self.costs.affords(row)]
            if not new:
                break
            fixed = new[promising(known, new)[0]]
            prices = self.costs.settle(probs, fixed)
            kept = self.settled(prices)
            known[fixed] = kept.loss
            if kept.loss < best.kept.loss:
                best = replace(chosen, prices=prices, kept=kept, fixed=fixed)
        return best

    def _probabilities(self, epoch: int) -> Tensor:
        """(N, L, 5) of the held-out images, by an epoch's controller, which the modules take on with its graph."""
        load_weights(snapshot(self.costs.problem.out, epoch), self.controller, self.graph)
        free = Route(self.controller, torch.zeros(self.costs.tables.shape[1:], dtype=torch.float64), self.costs)
        images = (batch.images for batch in to_device(self.held_out.epoch(0), self.world.device))
        return torch.cat([free.probabilities(x).cpu() for x in images])

    def settled(self, prices: Tensor) -> Exam:
        """The present weights at these prices, batch norms calibrated under the policies that follow."""
        return examine(self._calibrated(prices), self.held_out, self.world)

    def restore(self, chosen: Variant) -> None:
        """The modules as they were when the variant's ``kept`` was examined."""
        load_weights(snapshot(self.costs.problem.out, chosen.epoch), self.controller, self.graph)
        self._calibrated(chosen.prices)

    def _calibrated(self, prices: Tensor) -> Routed:
        routed = Routed(self.graph, Route(self.controller, prices, self.costs))
        recalibrate(routed, self.calibration, self.world)
        return routed


def best(variants: Sequence[Variant]) -> Variant:
    """The most accurate that keeps the budgets, the last of equals."""
    return max(variants, key=lambda variant: (variant.kept.accuracy, variant.epoch))


def image_rows(exam: Exam, costs: Costs) -> list[Mapping[str, Scalar]]:
    """One row per image: its network, what that is predicted to cost, whether the answer was right."""
    latencies = costs.latencies(exam.policies).T.tolist()  # (N, K)
    names = [costs.space.format_arch(arch) for arch in costs.archs(exam.policies)]
    return [
        {"image": i, "arch": name, **{f"predicted{k}": ms for k, ms in enumerate(row)}, "correct": bool(hit)}
        for i, (name, row, hit) in enumerate(zip(names, latencies, exam.hits, strict=True))
    ]


def write_beside(
    variants: Sequence[Mapping[str, Scalar]],
    controller: Controller,
    graph: MetaGraph,
    chosen: Variant,
    held_out: Exam,
    costs: Costs,
) -> None:
    """The weights of both, the controller as ONNX, variants and images as tables, the images' latencies drawn."""
    out = costs.problem.out
    save_weights(out / WEIGHTS, controller, graph, chosen.prices)
    write_network(out / CONTROLLER, controller_graph(costs.space), controller.body)
    write_history(out / VARIANTS, variants)
    write_history(out / IMAGES, image_rows(held_out, costs))
    if find_spec("matplotlib") is not None:
        units = [oracle.unit for oracle in costs.oracles]
        draw_latencies(out / HISTOGRAM, costs.latencies(held_out.policies).numpy(), costs.problem.targets, units)


def notes_of(costs: Costs, chosen: Variant, held_out: Exam, test: Exam) -> dict[str, Any]:
    """JSON: how accurate and how fast, on held-out images and on the source's test images."""
    fresh = [float(mean) for mean in costs.latencies(test.policies).mean(1)]
    extra = controller_graph(costs.space)
    return {
        "accuracy": held_out.accuracy,
        "variant": chosen.epoch,
        "priced": bool(chosen.prices.any()),
        "fixed": {
            site.name: SUBSETS[subset]
            for site, subset in zip(costs.space.layers, chosen.fixed, strict=True)
            if subset != OPEN
        },
        **costs.told(held_out.policies),
        "test": {"accuracy": test.accuracy, "mean": fresh},
        "controller": {"n_params": extra.n_params, "macs": extra.macs},  # beside what is predicted
    }
