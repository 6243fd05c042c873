"""RelativeNAS' weight store: one network that holds every operation on every edge, of which a genotype runs some.

Tan et al., TNNLS 2021, "weight set"; shapes and the update as in the released code. There every candidate builds the
whole store anew; here candidates take turns in one module and what they touch is kept and put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latbench.graph.ir import Graph
from latbench.graph.passes import as_dtype
from latbench.graph.torch import to_module
from latbench.spaces.base import Arch
from latbench.spaces.cells import NODES, OPERATIONS, Cell, CellSite, RelativeNASSpace, operation

Tensors = dict[str, Tensor]


class Supernet(nn.Module):
    """Stem, head and preprocessing, which all genotypes share, and a slot per cell, node, earlier state and operation.

    Two equal pairs of a node are one slot, counted twice; in a derived network they are two operations.
    """

    def __init__(self, space: RelativeNASSpace) -> None:
        super().__init__()
        self.space = space
        self.sites = {site.name: site for site in space.sites}
        self.shared = nn.ModuleDict()
        self.slots = nn.ModuleDict()
        for site in space.sites:
            if not isinstance(site, CellSite) or site.block_type == "preprocessing":
                block = space.block(site, ())
                assert block is not None
                self.shared[site.name] = _module(block)
        for cell in space.cells:
            for node, state, op in ((n, s, o) for n in NODES for s in range(n) for o in OPERATIONS):
                side = cell.side_of(state)
                found = operation((1, cell.channels, side, side), op, cell.stride(state), "float32")
                if found is not None:
                    self.slots[slot(cell, node, state, op)] = _module(found)

    def forward(self, images: Tensor, arch: Arch, drop_path: float = 0.0) -> Tensor:
        """(N, 3, H, W) -> (N, K) logits of one genotype.

        `drop_path`: the chance that an image loses an operation's output, identities excepted, while training.
        """
        shared = self.shared
        if self.space.stem == "imagenet":
            before = shared["stem0"](images)
            last = shared["stem1"](before)
        else:
            before = last = shared["stem"](images)
        for cell in self.space.cells:
            before, last = last, self._cell(cell, (before, last), arch, drop_path if self.training else 0.0)
        logits: Tensor = shared["head"](last)
        return logits

    def _cell(self, cell: Cell, sources: tuple[Tensor, Tensor], arch: Arch, drop_path: float) -> Tensor:
        read = {state for _, state, _ in _pairs(cell, arch)}
        states: list[Tensor | None] = [
            self.shared[f"{cell.name}/pre{i}"](sources[i]) if i in read else None for i in (0, 1)
        ]
        for node in NODES:
            terms = []
            for _, state, op in (pair for pair in _pairs(cell, arch) if pair[0] == node):
                x = states[state]
                assert x is not None
                name = slot(cell, node, state, op)
                terms.append(drop_paths(self.slots[name](x), drop_path) if name in self.slots else x)
            states.append(terms[0] + terms[1])
        return torch.cat([x for x in states[2:] if x is not None], 1)

    # -- the weight set

    def used(self, arch: Arch) -> frozenset[str]:
        """Slots that a genotype runs."""
        names = (slot(cell, *pair) for cell in self.space.cells for pair in _pairs(cell, arch))
        return frozenset(name for name in names if name in self.slots)

    def parameters_of(self, arch: Arch) -> list[nn.Parameter]:
        """Shared ones and those of its slots: what its training changes."""
        used = sorted(self.used(arch))
        return [*self.shared.parameters(), *(p for name in used for p in self.slots[name].parameters())]

    def copy_of(self, slots: Iterable[str], *, shared: bool = True) -> Tensors:
        """Parameters and buffers of these slots and of the shared part, as they are now."""
        wanted = set(slots)
        return {
            name: tensor.clone()
            for name, tensor in self.state_dict().items()
            if (name.startswith("slots.") and name.split(".")[1] in wanted) or (shared and name.startswith("shared."))
        }

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts copies back."""
        state = self.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

    def weights(self, graph: Graph, arch: Arch) -> dict[str, NDArray[np.float32]]:
        """The derived network's, by "node.role"."""
        where = {
            site.name: f"slots.{slot(site.cell, *_pair_of(site, arch))}"
            if isinstance(site, CellSite) and site.block_type == "operation"
            else f"shared.{site.name}"
            for site in self.sites.values()
        }
        state = self.state_dict()
        found = {}
        for name in graph.weight_shapes():
            owner = max((site for site in where if name.startswith(f"{site}/")), key=len)
            tensor = state[f"{where[owner]}.{name[len(owner) + 1 :]}"]
            found[name] = tensor.detach().float().cpu().numpy().copy()
        return found


def slot(cell: Cell, node: int, state: int, op: str) -> str:
    """Name of a place of the store."""
    return f"{cell.name}/node{node}/state{state}/{op}"


def drop_paths(x: Tensor, chance: float) -> Tensor:
    """(N, C, H, W): zero for some images, larger for the others, the same in the mean.

    Huang et al., Deep Networks with Stochastic Depth, ECCV 2016, as DARTS has it.
    """
    if chance == 0:
        return x
    keep = torch.empty((len(x), 1, 1, 1), device=x.device, dtype=x.dtype).bernoulli_(1 - chance)
    return x * keep / (1 - chance)


def settle(net: Supernet, before: Tensors, fast: Tensors, slow: Tensors, *, sound: bool = True) -> None:
    """The store after a pair: the shared part and its own slots from the fast learner, the slots that only the slow one
    ran from it, the rest as `before`.

    `sound` false: the slow learner's loss was not finite, and nothing of it stays.
    """
    kept = {name: tensor for name, tensor in slow.items() if name.startswith("slots.")} if sound else {}
    net.put({**before, **kept, **fast})


def _module(graph: Graph) -> nn.Module:
    return to_module(as_dtype(graph, "float32")).train()


def _pairs(cell: Cell, arch: Arch) -> list[tuple[int, int, str]]:
    """(node, state, operation), two a node."""
    at = ((node, cell.decision(node, pair)) for node in NODES for pair in (0, 1))
    return [(node, arch[i], OPERATIONS[arch[i + 1]]) for node, i in at]


def _pair_of(site: CellSite, arch: Arch) -> tuple[int, int, str]:
    """(node, state, operation) of an operation's site."""
    state, op = (arch[i] for i in site.scope)
    return int(site.name.split("/node")[1][0]), state, OPERATIONS[op]
