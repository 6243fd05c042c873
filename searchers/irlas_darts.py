"""The mirror stimuli function in a differentiable search: DARTS, its cells drawn towards an expert's wiring.

Guo et al., CVPR 2019 (IRLAS): guidance carries over to other searches. Host: Liu, Simonyan, Yang: DARTS, ICLR 2019,
first order. The loss of the architecture is

    L_val - mirror_weight * w . mu(alpha) / kappa + latency_weight * E_alpha[ms] / budget_ms

where mu(alpha) is the expected feature count of the normal cell: node i reads the two inputs 0 and 1 and the nodes
before it, an edge's operation counts as a layer code at index i (separable and dilated convolutions of kernel k as
conv k, pools of 3, skip as identity, none as nothing), weighted by its probability and by q, how likely the edge is one
of the two that its node keeps::

    mu(alpha) = sum_i gamma^i sum_(j<i) q_ij sum_(o != none) p_ij(o) phi(i, o, j)
    q_ij = min(1, 2 s_ij / sum_j s_ij),    s_ij = 1 - p_ij(none)

Neither the formula nor its host were published: all of it is decided here. A node's own sum, an add, is the same for
every alpha and left out. With both weights 0 this is DARTS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from latbench.errors import UsageError
from latbench.graph.blocks import batch_norm, darts_op, factorized_reduce, relu_conv_bn
from latbench.graph.ir import GraphBuilder
from latbench.graph.ops import Shape
from latbench.graph.torch import to_module
from latbench.spaces.nsc import AVG_POOL, CONV, IDENTITY, MAX_POOL
from searchers.base import Problem, Reporter, Scalar
from searchers.data import Batch, Batches, Splits, train_batches
from searchers.mirror import Mirror
from searchers.train import Loop, Position, cosine
from searchers.world import Update, World, to_device

OPS: Mapping[str, tuple[int, int] | None] = {  # DARTS' name: type and kernel of the layer code
    "none": None,
    "max_pool_3x3": (MAX_POOL, 3),
    "avg_pool_3x3": (AVG_POOL, 3),
    "skip_connect": (IDENTITY, 0),
    "sep_conv_3x3": (CONV, 3),
    "sep_conv_5x5": (CONV, 5),
    "dil_conv_3x3": (CONV, 3),
    "dil_conv_5x5": (CONV, 5),
}
INPUTS = 2  # of a cell: the outputs of the two before it
KEPT = 2  # edges per node of the derived cell
NONE = tuple(OPS).index("none")
Genotype = tuple[tuple[str, int, int], ...]  # (operation, from, to) of every edge that is kept


def edges(nodes: int) -> tuple[tuple[int, int], ...]:
    """(node, source) of a cell, in the order of alpha's rows; nodes are numbered behind the inputs."""
    return tuple((i, j) for i in range(INPUTS, INPUTS + nodes) for j in range(i))


# ---- terms ----------------------------------------------------------------------------------------------------------


def kept_share(probs: Tensor, nodes: int) -> Tensor:
    """(E, 8) probabilities of operations -> (E,): how likely each edge is one of the two that its node keeps."""
    strength = 1 - probs[:, NONE]  # (E,)
    target = torch.tensor([i - INPUTS for i, _ in edges(nodes)], device=probs.device)
    total = torch.zeros(nodes, dtype=probs.dtype, device=probs.device).index_add(0, target, strength)
    return (KEPT * strength / total.clamp_min(1e-12)[target]).clamp(max=1.0)


def expected(alpha: Tensor, values: Tensor, nodes: int) -> Tensor:
    """(E, 8) logits and what each operation on each edge is worth -> (): the sum over a cell. Differentiable."""
    probs = alpha.softmax(-1)
    return (kept_share(probs, nodes)[:, None] * probs * values).sum()


def mirror_values(trained: Mirror, nodes: int = 4) -> NDArray[np.float64]:
    """(E, 8): gamma^i w . phi(i, o, j) / kappa of an operation on an edge; 0 for none.

    Raises UsageError where the mirror's blocks are shorter than the cell.
    """
    features = trained.features
    if features.max_index < INPUTS + nodes - 1:
        raise UsageError(f"a cell of {nodes} nodes needs a mirror of max_index {INPUTS + nodes - 1} or more")
    found = np.zeros((len(edges(nodes)), len(OPS)))
    for row, (i, j) in enumerate(edges(nodes)):
        for column, code in enumerate(OPS.values()):
            if code is not None:
                bits = list(features.bits((i, *code, j, 0)))
                found[row, column] = features.gamma**i * trained.weights[bits].sum() / trained.scale
    return found


# ---- the supernet ---------------------------------------------------------------------------------------------------


def _module(shape: Shape, grow: Any) -> nn.Module:
    """A graph of one input as a module whose batch norms have no parameters of their own: alpha is the only scale."""
    b = GraphBuilder()
    module = to_module(b.build(grow(b, b.input("x", shape))))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.requires_grad_(False)
            layer.bias.requires_grad_(False)
    return module


class Mixed(nn.Module):
    """All operations on one edge, weighted; pools are followed by a batch norm, as DARTS has it."""

    def __init__(self, shape: Shape, stride: int) -> None:
        super().__init__()

        def grow(op: str) -> Any:
            def of(b: GraphBuilder, x: str) -> str:
                y = darts_op(b, op, x, stride=stride, name="op")
                return batch_norm(b, y, name="bn") if "pool" in op else y

            return of

        identity = {"skip_connect"} if stride == 1 else set()
        self.ops = nn.ModuleList(
            nn.Identity() if op in identity else _module(shape, grow(op)) for op in OPS if op != "none"
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """(N, C, H, W), (operations,) -> (N, C, H', W')."""
        chosen = [weight for k, weight in enumerate(weights) if k != NONE]
        terms = [weight * op(x) for weight, op in zip(chosen, self.ops, strict=True)]
        return torch.stack(terms).sum(0)


class Cell(nn.Module):
    """Four nodes, each the sum of all edges that lead to it; the output is their concatenation."""

    def __init__(self, shapes: tuple[Shape, Shape], width: int, nodes: int, *, reduction: bool) -> None:
        super().__init__()
        (n, _, side, _), last = shapes[1], shapes[0]
        halved = last[2] != side  # the cell before the last one stood before a reduction
        self.first = _module(
            last,
            (lambda b, x: factorized_reduce(b, x, width, name="pre"))
            if halved
            else (lambda b, x: relu_conv_bn(b, x, width, name="pre")),
        )
        self.second = _module(shapes[1], lambda b, x: relu_conv_bn(b, x, width, name="pre"))
        self.edges, self.nodes = edges(nodes), nodes
        stride = 2 if reduction else 1
        inner = -(-side // stride)
        self.mixed = nn.ModuleList(
            Mixed((n, width, side, side), stride) if j < INPUTS else Mixed((n, width, inner, inner), 1)
            for _, j in self.edges
        )
        self.shape: Shape = (n, nodes * width, inner, inner)

    def forward(self, before: Tensor, last: Tensor, probs: Tensor) -> Tensor:
        """(N, C, H, W) of the two cells before, (edges, operations) -> (N, nodes * C, H', W')."""
        states = [self.first(before), self.second(last)]
        for node in range(INPUTS, INPUTS + self.nodes):
            terms = [
                mixed(states[j], row)
                for (i, j), mixed, row in zip(self.edges, self.mixed, probs, strict=True)
                if i == node
            ]
            states.append(torch.stack(terms).sum(0))
        return torch.cat(states[INPUTS:], 1)


class Supernet(nn.Module):
    """(N, 3, H, W) -> (N, K) logits; a third and two thirds down stand cells that halve the map. H must divide by 4."""

    def __init__(self, *, cells: int, channels: int, nodes: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        if resolution % 4 or cells < 1:
            raise UsageError(f"a DARTS supernet needs cells, and sides that divide by 4, got {cells}, {resolution}")
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(3 * channels))
        shapes: tuple[Shape, Shape] = ((1, 3 * channels, resolution, resolution),) * 2
        built = []
        for i in range(cells):
            reduction = cells >= 3 and i in (cells // 3, 2 * cells // 3)
            channels = 2 * channels if reduction else channels
            cell = Cell(shapes, channels, nodes, reduction=reduction)
            built.append((cell, reduction))
            shapes = (shapes[1], cell.shape)
        self.cells = nn.ModuleList(cell for cell, _ in built)
        self.reduces = [reduction for _, reduction in built]
        self.classifier = nn.Linear(shapes[1][1], num_classes)
        self.alphas = nn.ParameterList(nn.Parameter(1e-3 * torch.randn(len(edges(nodes)), len(OPS))) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes) logits."""
        before = last = self.stem(images)
        probs = [alpha.softmax(-1) for alpha in self.alphas]
        for cell, reduction in zip(self.cells, self.reduces, strict=True):
            before, last = last, cell(before, last, probs[int(reduction)])
        logits: Tensor = self.classifier(last.mean((2, 3)))
        return logits

    def weights(self) -> list[nn.Parameter]:
        """All trained parameters but the alphas."""
        return [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("alphas")]


def genotype(alpha: Tensor, nodes: int = 4) -> Genotype:
    """The derived cell: each edge's best operation but none, and of each node's edges the two whose best is largest."""
    probs = alpha.detach().softmax(-1).clone()
    probs[:, NONE] = -1.0
    worth, best = probs.max(-1)
    kept: list[int] = []
    for node in range(INPUTS, INPUTS + nodes):
        rows = [row for row, (i, _) in enumerate(edges(nodes)) if i == node]
        kept += sorted(sorted(rows, key=lambda row: -float(worth[row]))[:KEPT])
    names, ends = tuple(OPS), edges(nodes)
    return tuple((names[int(best[row])], ends[row][1], ends[row][0]) for row in kept)


# ---- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DifferentiableIRLAS:
    """Options; DARTS' but for the two weights. Raises UsageError where they contradict each other."""

    mirror_weight: float = 0.1  # lambda_d
    latency_weight: float = 0.0  # nu_d
    budget_ms: float = 1.0
    nodes: int = 4
    cells: int = 8
    channels: int = 16
    epochs: int = 50
    batch_size: int = 64
    lr: float = 0.025
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    alpha_lr: float = 3e-4
    alpha_weight_decay: float = 1e-3
    held_out: float = 0.5  # of the training images: alpha learns from them

    def __post_init__(self) -> None:
        if min(self.mirror_weight, self.latency_weight) < 0 or not self.budget_ms > 0 or not 0 < self.held_out < 1:
            raise UsageError("irlas_darts: weights must not be negative, budget_ms above zero, held_out in (0, 1)")

    def alpha_loss(
        self, net: Supernet, batch: Batch, *, values: Tensor | None = None, ms: Tensor | None = None
    ) -> Tensor:
        """The loss of the architecture on one batch; `values` as ``mirror_values``, `ms` (E, 8) of each operation."""
        loss = functional.cross_entropy(net(batch.images), batch.labels)
        if self.mirror_weight and values is not None:
            loss = loss - self.mirror_weight * expected(net.alphas[0], values, self.nodes)
        if self.latency_weight and ms is not None:
            loss = loss + self.latency_weight * expected(net.alphas[0], ms, self.nodes) / self.budget_ms
        return loss

    def search(
        self, problem: Problem, trained: Mirror | None = None, *, op_ms: Sequence[Sequence[float]] | None = None,
        num_classes: int, reporter: Reporter | None = None,
    ) -> tuple[tuple[Genotype, Genotype], tuple[Mapping[str, Scalar], ...]]:  # fmt: skip
        """Normal and reduction cell, and the history; on the problem's images at its resolution, resumable.

        `op_ms`: (E, 8) latencies of the normal cell's operations, for `latency_weight`.
        """
        world, splits = World.here(), Splits.of(problem, num_classes, held_out=self.held_out)
        torch.manual_seed(problem.seed)
        shape = {"cells": self.cells, "channels": self.channels, "nodes": self.nodes}
        net = Supernet(**shape, resolution=problem.space.resolution, num_classes=num_classes).to(world.device)
        values = None if trained is None else torch.tensor(mirror_values(trained, self.nodes)).float().to(world.device)
        ms = None if op_ms is None else torch.tensor(np.asarray(op_ms)).float().to(world.device)
        sgd = torch.optim.SGD(net.weights(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        adam = torch.optim.Adam(
            net.alphas.parameters(), lr=self.alpha_lr, betas=(0.5, 0.999), weight_decay=self.alpha_weight_decay
        )
        updates = {"weights": Update(sgd, world, clip=self.clip), "alphas": Update(adam, world)}
        told = {**asdict(self), "mirror": None if values is None else values.tolist(), "ms": op_ms and list(op_ms)}
        loop = Loop(
            problem.out, "darts", {"network": net, **updates}, identity={"searcher": told, "data": problem.data_name},
            epochs=self.epochs, seed=problem.seed, world=world, reporter=reporter,
        )  # fmt: skip
        loop.resume()
        batches = train_batches(problem, splits, world, self.batch_size)
        others = _Endless(replace(batches, indices=splits.held_out, seed=problem.seed + 1), world)

        def step(batch: Batch, at: Position) -> dict[str, float]:
            updates["alphas"].backward(self.alpha_loss(net, others.at(at), values=values, ms=ms))
            sgd.zero_grad(set_to_none=True)
            updates["alphas"].step()
            loss = functional.cross_entropy(net(batch.images), batch.labels)
            updates["weights"].backward(loss)
            adam.zero_grad(set_to_none=True)
            updates["weights"].step(self.lr_min + cosine(self.lr - self.lr_min, at))
            score = 0.0 if values is None else float(expected(net.alphas[0].detach(), values, self.nodes))
            return {"loss": float(loss.detach()), "mirror": score}

        net.train()
        loop.run(batches, step)
        cells = (genotype(net.alphas[0], self.nodes), genotype(net.alphas[1], self.nodes))
        return cells, tuple(loop.history)


class _Endless:
    """Batches of the other half, one for each step, the same whether a run was cut off or not."""

    def __init__(self, batches: Batches, world: World) -> None:
        self.batches, self.world = batches, world
        self.next: tuple[int, int] | None = None
        self.left: Iterator[Batch] = iter(())

    def at(self, at: Position) -> Batch:
        place = at.epoch * at.steps + at.step
        epoch, step = divmod(place, len(self.batches))
        if step == 0 or self.next != (epoch, step):
            self.left = to_device(self.batches.epoch(epoch, step), self.world.device)
        self.next = (epoch, step + 1)
        return next(self.left)
