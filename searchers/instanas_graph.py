"""InstaNAS's meta-graph: all modules of all layers, of which every image of a batch takes its own.

Three ways to run a batch. *dense*: each module on the whole batch, outputs masked; what training does, so that batch
norms see all images, also those that do not select the module. *grouped*: each module on the rows that select it.
*single*: one image after another, each running its modules and nothing else; what is deployed at batch 1. In evaluation
mode all three give the same outputs, and a row's do not depend on the others. A module that no row selects never runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latbench.graph.ir import Graph
from latbench.spaces.instanas import DEFAULT, MODULES, InstaNASSpace
from searchers.derive import module_of

Execution = Literal["dense", "grouped", "single"]
Route = Callable[[Tensor], Tensor]  # (N, 3, H, W) -> (N, L, 5) bool


class MetaGraph(nn.Module):
    """Stem, layers of five modules, head. Each module has one set of weights, shared by all policies."""

    def __init__(self, space: InstaNASSpace) -> None:
        super().__init__()
        stem, head = (space.block(site, ()) for site in space.sites if not site.scope)
        assert stem is not None
        assert head is not None
        self.stem, self.head = module_of(stem), module_of(head)
        self.dropout = nn.Dropout(0.0)  # before the classifier
        self.layers = nn.ModuleList()
        for site in space.layers:
            blocks = [space.block(site, (1 << i,)) for i in range(len(MODULES))]
            self.layers.append(nn.ModuleList(module_of(cast(Graph, block)) for block in blocks))
        self._names = [site.name for site in space.layers]
        self._first = [site.first for site in space.layers]
        dict(self.head.named_children())["linear"].register_forward_pre_hook(lambda _, inputs: self.dropout(inputs[0]))

    def forward(self, images: Tensor, policies: Tensor, execution: Execution | None = None) -> Tensor:
        """(N, 3, H, W) images, (N, L, 5) bits -> (N, K) logits. By default dense in training, else grouped."""
        chosen = self.effective(policies).cpu()
        execution = execution or ("dense" if self.training else "grouped")
        if execution == "single":
            rows = [self._run(image[None], bits[None], _dense) for image, bits in zip(images, chosen, strict=True)]
            return torch.cat(rows)
        return self._run(images, chosen, _dense if execution == "dense" else _grouped)

    def effective(self, policies: Tensor) -> Tensor:
        """(N, L, 5) bits as they are run: a stage's first layer without any module takes the default one."""
        first = torch.tensor(self._first, device=policies.device)
        chosen = policies.bool().clone()
        chosen[..., DEFAULT] |= first & ~chosen.any(-1)
        return chosen

    def _run(
        self, images: Tensor, chosen: Tensor, execute: Callable[[nn.ModuleList, Tensor, Tensor], Tensor]
    ) -> Tensor:
        x: Tensor = self.stem(images)
        for t, modules in enumerate(self.layers):
            if chosen[:, t].any():
                x = execute(cast(nn.ModuleList, modules), x, chosen[:, t])
        logits: Tensor = self.head(x)
        return logits

    def weights(self, graph: Graph) -> dict[str, NDArray[Any]]:
        """Of a network of the space, running statistics included: the modules that it has, as they are here."""
        known: dict[str, Tensor] = {**self.stem.state_dict(prefix="stem/"), **self.head.state_dict(prefix="head/")}
        for name, modules in zip(self._names, self.layers, strict=True):
            for module in cast(nn.ModuleList, modules):
                known |= module.state_dict(prefix=f"{name}/")
        return {name: known[name].detach().cpu().numpy() for name in graph.weight_shapes()}


def _dense(modules: nn.ModuleList, x: Tensor, chosen: Tensor) -> Tensor:
    """Layer output where (N, 5) bits on the host say which module each row takes; rows of none keep their input."""
    total: Tensor | None = None
    for i, module in enumerate(modules):
        if not chosen[:, i].any():
            continue
        y = module(x)
        if not chosen[:, i].all():
            y = y * _column(chosen[:, i], y)
        total = y if total is None else total + y
    assert total is not None
    kept = ~chosen.any(1)
    return total + x * _column(kept, x) if kept.any() else total


def _grouped(modules: nn.ModuleList, x: Tensor, chosen: Tensor) -> Tensor:
    """As ``_dense``, each module on its own rows."""
    total: Tensor | None = None
    for i, module in enumerate(modules):
        rows = chosen[:, i].nonzero()[:, 0].to(x.device)
        if not len(rows):
            continue
        if len(rows) == len(x):
            y = module(x)
            total = y if total is None else total + y
            continue
        y = module(x[rows])
        if total is None:
            total = y.new_zeros(len(x), *y.shape[1:]).contiguous(memory_format=torch.channels_last)
        total = total.index_add(0, rows, y)
    assert total is not None
    kept = (~chosen.any(1)).nonzero()[:, 0].to(x.device)
    return total.index_add(0, kept, x[kept].to(total.dtype)) if len(kept) else total


def _column(mask: Tensor, like: Tensor) -> Tensor:
    """(N,) bits -> (N, 1, 1, 1) in the kind of `like`."""
    return mask.to(like.device, like.dtype)[:, None, None, None]


class Routed(nn.Module):
    """The meta-graph under the policies of a route, as one module; the route's own parameters are not part of it."""

    def __init__(self, graph: MetaGraph, route: Route) -> None:
        super().__init__()
        self.graph, self.route = graph, route

    def forward(self, images: Tensor, execution: Execution | None = None) -> Tensor:
        """(N, 3, H, W) -> (N, K) logits."""
        logits: Tensor = self.graph(images, self.route(images), execution)
        return logits
