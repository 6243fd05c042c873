"""From an architecture to a stand-alone network: its ONNX file, and its training from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latbench.errors import UsageError
from latbench.graph.ir import Graph, Weights
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import as_dtype, fold_batch_norm
from latbench.graph.torch import to_module, weights_of
from latbench.spaces.base import Arch
from searchers.base import Problem, Reporter, Scalar, Searcher, SearchResult
from searchers.data import Batch, Splits, eval_batches, train_batches
from searchers.folders import held
from searchers.options import settings_of
from searchers.results import HISTORY, NETWORK, Found, note_training, save_result, write_bytes, write_history
from searchers.train import Loop, Position, cosine, evaluate, mixup, recalibrate
from searchers.world import Update, World, decayed


def module_of(graph: Graph, weights: Weights | None = None) -> nn.Module:
    """The graph as a float32 module, whatever its dtype: what is trained."""
    return to_module(as_dtype(graph, "float32"), weights)


def write_network(path: Path, graph: Graph, module: nn.Module) -> None:
    """The module's weights in an ONNX file of the graph's dtype, batch norms folded. Raises UsageError."""
    folded, weights, _ = fold_batch_norm(graph, {k: v.astype(graph.dtype) for k, v in weights_of(module).items()})
    write_bytes(path, to_onnx(folded, weights))


def num_classes(graph: Graph) -> int:
    """Logits of a classifier. Raises UsageError where the graph gives anything but (N, K)."""
    shape = graph.shapes[graph.outputs[0]]
    if len(graph.outputs) != 1 or len(shape) != 2:
        raise UsageError(f"a network that is searched gives (N, K) logits, this one {shape}")
    return shape[1]


def inherit(
    problem: Problem, graph: Graph, weights: Weights, splits: Splits, world: World, batch_size: int
) -> tuple[nn.Module, float]:
    """The network with weights cut from a supernet, its batch norms recalibrated; its accuracy on held-out images.

    `batch_size`: of all processes, less where there are fewer images.
    """
    module = world.place(module_of(graph, {name: array.astype("float32") for name, array in weights.items()}))
    batch_size = min(batch_size, len(splits.train) // world.size * world.size)
    recalibrate(module, train_batches(problem, splits, world, batch_size), world)
    module.eval()
    return module, evaluate(module, eval_batches(problem, splits, world, "held_out"), world)["accuracy"]


def publish(
    problem: Problem,
    searcher: Searcher,
    module: nn.Module,
    world: World,
    *,
    arch: Arch,
    score: float,
    history: Sequence[Mapping[str, Scalar]],
    notes: Mapping[str, Any],
) -> SearchResult:
    """The result, written into the problem's folder with its network and history, once for all processes.

    `module`: the found network with its weights. `score`, `notes`: as ``SearchResult``'s.
    """
    result = SearchResult(
        searcher=searcher.name,
        arch=arch,
        predicted=problem.predicted(arch),
        target=problem.targets,
        score=score,
        history=tuple(history),
        network=problem.out / NETWORK,
        notes=notes,
    )
    if world.leads:
        with held(problem.out):
            write_network(result.network, problem.space.network(arch), module)
            write_history(problem.out / HISTORY, result.history)
            save_result(problem, result, settings_of(searcher))
    world.wait()
    return result


@dataclass(frozen=True)
class Recipe:
    """Training from scratch: SGD with Nesterov's momentum, cosine rate, label smoothing, mixup.

    Defaults: Berman et al. 2020, final training (released code), but for `epochs` (theirs: 200 on ImageNet) and
    `batch_size` (1024).
    """

    epochs: int = 60
    batch_size: int = 128
    lr: float = 0.4  # at 1024 images a batch, scaled linearly
    warmup_epochs: float = 5.0
    momentum: float = 0.9
    weight_decay: float = 1e-4  # not on batch norms and biases
    label_smoothing: float = 0.1
    mixup: float = 0.2
    jitter: float = 0.0  # of colours; theirs 0.4

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise UsageError(
                "a recipe needs epochs >= 1, batch_size >= 1 and warmup_epochs from 0 to below epochs, got "
                f"{self.epochs}, {self.batch_size} and {self.warmup_epochs:g}"
            )

    def lasting(self, epochs: int) -> Recipe:
        """The same at another length, of which the warm-up takes at most half. Raises UsageError."""
        return replace(self, epochs=epochs, warmup_epochs=min(self.warmup_epochs, epochs / 2))


def train_network(
    problem: Problem,
    arch: tuple[int, ...],
    recipe: Recipe,
    *,
    folder: Path,
    world: World | None = None,
    reporter: Reporter | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one architecture of the problem's space from scratch on its training images, resumably in `folder`.

    Gives the module in evaluation mode and its figures: "accuracy" and "loss" on the source's test split, the recipe.
    """
    world = world or World.here()
    graph = problem.space.network(arch)
    classes = num_classes(graph)
    splits = Splits.of(problem, classes, held_out=0.0)
    batches = train_batches(problem, splits, world, recipe.batch_size, jitter=recipe.jitter)
    torch.manual_seed(problem.seed)
    module = world.place(module_of(graph)).train()
    update = Update(
        torch.optim.SGD(decayed(module, recipe.weight_decay), lr=recipe.lr, momentum=recipe.momentum, nesterov=True),
        world,
    )
    identity = {
        "recipe": asdict(recipe),
        "arch": list(arch),
        "space": {"name": problem.space.name, **problem.space.settings()},
        "data": [problem.data_name, problem.max_images],
    }
    loop = Loop(
        folder,
        "train",
        {"network": module, "update": update},
        identity=identity,
        epochs=recipe.epochs,
        seed=problem.seed,
        world=world,
        reporter=reporter,
    )
    loop.resume()
    wrapped = world.wrap(module)
    base = recipe.lr * recipe.batch_size / 1024

    def step(batch: Batch, at: Position) -> dict[str, float]:
        images, targets = mixup(batch, classes, recipe.mixup, loop.rng("mixup"))
        with world.autocast():
            logits: Tensor = wrapped(images)
        loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        update.backward(loss)
        update.step(cosine(base, at, warmup=recipe.warmup_epochs))
        return {"loss": float(loss.detach())}

    loop.run(batches, step)
    module.eval()
    figures = evaluate(module, eval_batches(problem, splits, world), world)
    return module, {**figures, "images": len(splits.train), "seed": problem.seed, "recipe": asdict(recipe)}


def train_found(found: Found, recipe: Recipe, *, reporter: Reporter | None = None) -> dict[str, Any]:
    """Trains the network of a result folder from scratch; its weights replace the search's in ``network.onnx``.

    Raises UsageError also where another run is at work in the folder.
    """
    world = World.here()
    problem, arch = found.problem, found.result.arch
    with held(problem.out) if world.leads else nullcontext():
        module, figures = train_network(problem, arch, recipe, folder=problem.out, world=world, reporter=reporter)
        if world.leads:
            write_network(problem.out / NETWORK, problem.space.network(arch), module)
            note_training(problem.out, figures)
    world.wait()
    return figures
