"""TF-NAS's supernet: every operation of every block at its largest width, of which some channels are active.

Hu et al., ECCV 2020, section 3; layers as in the released code. A batch runs along paths, one operation per block, or
through a mixture of all; a stage's output is the mixture of its blocks' outputs ("sink-connecting", section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from latbench.graph import ops
from latbench.graph.ir import Graph
from latbench.graph.passes import as_dtype
from latbench.graph.torch import to_module
from latbench.spaces.mbconv import NONE, OPERATIONS, TFNASSpace

Path = Sequence[int]  # an operation per site
EPS = 1e-5  # of batch norms


def normalised(x: Tensor) -> Tensor:
    """(N, C, H, W), by the batch's own statistics: a supernet's norms have no affine parameters and no running ones."""
    return functional.batch_norm(x, None, None, training=True, eps=EPS)


def without_statistics(graph: Graph) -> nn.Module:
    """The graph as a module whose batch norms are ``normalised``."""
    module = to_module(as_dtype(graph, "float32"))
    for node in graph.nodes:
        if isinstance(node.op, ops.BatchNorm2d):
            bare = nn.BatchNorm2d(node.op.num_features, eps=EPS, affine=False, track_running_stats=False)
            module.register_module(node.name, bare)
    return module.train()


class Elastic(nn.Module):
    """An inverted residual of M mid channels; the active ones run and learn, the others keep what they hold."""

    active: Tensor  # (M,) bool
    known: Tensor  # (M,) bool: has been active
    index: Tensor  # (m,) the active ones

    def __init__(self, widest: Graph, width: int) -> None:
        """`widest`: a block of the space; its first `width` channels are active."""
        super().__init__()
        body = without_statistics(widest)
        named = dict(body.named_children())
        self.expand = cast(nn.Conv2d, named["expand/conv"])
        self.dw = cast(nn.Conv2d, named["dw/conv"])
        self.reduce = cast("nn.Conv2d | None", named.get("se/reduce"))
        self.raise_ = cast("nn.Conv2d | None", named.get("se/expand"))
        self.project = cast(nn.Conv2d, named["project/conv"])
        self.residual = "add" in named
        self.act: Callable[[Tensor], Tensor] = functional.silu if _is_silu(widest) else functional.relu
        channels = torch.arange(self.dw.out_channels)
        self.register_buffer("active", channels < width)
        self.register_buffer("known", channels < width)
        self.register_buffer("index", channels[:width], persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module._reindex())  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        dw, index = self.dw, self.index
        h = self.act(normalised(functional.conv2d(x, self.expand.weight[index])))
        weight = dw.weight[index]
        h = functional.conv2d(h, weight, stride=dw.stride, padding=dw.padding, groups=len(weight))
        h = self.act(normalised(h))
        if self.reduce is not None and self.raise_ is not None:
            s = functional.conv2d(h.mean((2, 3), keepdim=True), self.reduce.weight[:, index], self.reduce.bias)
            assert self.raise_.bias is not None
            s = functional.conv2d(self.act(s), self.raise_.weight[index], self.raise_.bias[index])
            h = h * s.sigmoid()
        h = normalised(functional.conv2d(h, self.project.weight[:, index]))
        return h + x if self.residual else h

    @property
    def width(self) -> int:
        """Active channels."""
        return len(self.index)

    @torch.no_grad()
    def resize(self, width: int, *, faithful: bool = False) -> None:
        """Keeps the channels whose depthwise kernels are largest by L1 norm.

        Narrower: among the active ones. Wider: these, and the largest of the others, those that were active before
        first. `faithful`: the largest of all, trained or not.
        """
        norms = self.dw.weight.abs().sum((1, 2, 3))  # (M,)
        if not faithful:
            keep = self.active.to(norms.dtype) + (self.known.to(norms.dtype) if width > self.width else 0)
            norms = norms / (1 + norms.max()) + keep  # ranks within each class
        chosen = norms.argsort(descending=True, stable=True)[:width]
        self.active.zero_()
        self.active[chosen] = True
        self.known |= self.active
        self._reindex()

    def channel_masks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter that has mid channels, with what of it is active, broadcastable."""
        rows, columns = self.active.view(-1, 1, 1, 1), self.active.view(1, -1, 1, 1)
        yield self.expand.weight, rows
        yield self.dw.weight, rows
        yield self.project.weight, columns
        if self.reduce is not None and self.raise_ is not None:
            assert self.raise_.bias is not None
            yield self.reduce.weight, columns
            yield self.raise_.weight, rows
            yield self.raise_.bias, self.active

    def weights(self) -> dict[str, Tensor]:
        """Of the block at its present width, by the names of its graph; batch norms left out."""
        i = self.index
        found = {"expand/conv.weight": self.expand.weight[i], "dw/conv.weight": self.dw.weight[i]}
        if self.reduce is not None and self.raise_ is not None:
            assert self.reduce.bias is not None
            assert self.raise_.bias is not None
            found |= {"se/reduce.weight": self.reduce.weight[:, i], "se/reduce.bias": self.reduce.bias}
            found |= {"se/expand.weight": self.raise_.weight[i], "se/expand.bias": self.raise_.bias[i]}
        return {**found, "project/conv.weight": self.project.weight[:, i]}

    def _reindex(self) -> None:
        self.index = self.active.nonzero()[:, 0]


def _is_silu(graph: Graph) -> bool:
    return any(isinstance(node.op, ops.SiLU) for node in graph.nodes)


class Supernet(nn.Module):
    """All operations of all sites of a space, between stem and head. Widths start at three quarters of the largest."""

    def __init__(self, space: TFNASSpace) -> None:
        super().__init__()
        stem, head = (space.block(site, ()) for site in space.sites if not site.scope)
        assert stem is not None
        assert head is not None
        self.stem, self.head = without_statistics(stem), without_statistics(head)
        self.sites = nn.ModuleList()
        for site in space.block_sites:
            operations = nn.ModuleList()
            for o, operation in enumerate(OPERATIONS):
                most = operation.max_expansion * site.in_channels
                block = space.block(site, space.picks_of(site, o, most))
                assert block is not None
                operations.append(Elastic(as_dtype(block, "float32"), most * 3 // 4))
            self.sites.append(operations)
        self._names = [site.name for site in space.block_sites]
        self._stages = [[i for i, s in enumerate(space.block_sites) if s.stage == k] for k in _stages(space)]

    def forward(self, images: Tensor, mixes: Sequence[Path | Tensor], depths: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) -> (N, K) logits for each of `mixes`.

        A mix is an operation per site, run with weight 1, or (L, O) weights of all. `depths`: (L,) shares of the
        blocks' outputs in their stage's, each stage's sum 1.
        """
        return tuple(self._run(images, mix, depths) for mix in mixes)

    def _run(self, images: Tensor, mix: Path | Tensor, depths: Tensor) -> Tensor:
        x: Tensor = self.stem(images)
        for stage in self._stages:
            outputs = []
            for i in stage:
                x = self._mixed(i, x, mix)
                outputs.append(depths[i].to(x.dtype) * x)
            x = cast(Tensor, sum(outputs))
        logits: Tensor = self.head(x)
        return logits

    def _mixed(self, i: int, x: Tensor, mix: Path | Tensor) -> Tensor:
        if isinstance(mix, Tensor):
            return cast(Tensor, sum(w.to(x.dtype) * op(x) for w, op in zip(mix[i], self._operations(i), strict=True)))
        y: Tensor = self._operations(i)[mix[i]](x)
        return y

    def _operations(self, i: int) -> list[Elastic]:
        return cast("list[Elastic]", list(cast(nn.ModuleList, self.sites[i])))

    def widths(self) -> NDArray[np.int64]:
        """(L, O) active channels."""
        return np.array([[op.width for op in self._operations(i)] for i in range(len(self.sites))], np.int64)

    def resize(self, widths: NDArray[np.int64], *, faithful: bool = False) -> None:
        """To (L, O) active channels; operations that have theirs are left as they are."""
        for i, row in enumerate(widths.tolist()):
            for op, width in zip(self._operations(i), row, strict=True):
                if op.width != width:
                    op.resize(width, faithful=faithful)

    def channel_masks(self) -> dict[Tensor, Tensor]:
        """As ``Elastic.channel_masks``, of all operations; views that follow every change of widths."""
        found: dict[Tensor, Tensor] = {}
        for i in range(len(self.sites)):
            for op in self._operations(i):
                found |= dict(op.channel_masks())
        return found

    def weights(self, graph: Graph, operations: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Of the network of these operations (``NONE``: absent) at their widths; norms without statistics."""
        known: dict[str, Tensor] = {**self.stem.state_dict(prefix="stem/"), **self.head.state_dict(prefix="head/")}
        for i, o in enumerate(operations):
            if o != NONE:
                known |= {f"{self._names[i]}/{key}": value for key, value in self._operations(i)[o].weights().items()}
        return {name: _weight(known, name, shape) for name, shape in graph.weight_shapes().items()}


def _weight(known: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if name in known:
        return known[name].detach().cpu().numpy()
    return np.full(shape, float(name.endswith((".weight", ".running_var"))), np.float32)


def _stages(space: TFNASSpace) -> range:
    return range(space.block_sites[-1].stage + 1)


class ChannelSGD(torch.optim.Optimizer):
    """SGD with momentum that leaves inactive channels, and parameters without a gradient, as they are.

    `masks`: what is active of a parameter, read at each step. The momentum of an inactive channel rests too.
    """

    def __init__(
        self,
        parameters: Any,
        masks: Mapping[Tensor, Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._masks = masks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        masks = self._masks
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                change = p.grad.add(p, alpha=group["weight_decay"])
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                moved = change.add_(buffer, alpha=group["momentum"])
                if p in masks:
                    buffer.copy_(torch.where(masks[p], moved, buffer))
                    moved = moved * masks[p]
                else:
                    buffer.copy_(moved)
                p.add_(moved, alpha=-group["lr"])


class Choices(nn.Module):
    """What is searched: 18 x 8 log-probabilities of operations, 18 of depths (a stage's in its blocks' places)."""

    def __init__(self, space: TFNASSpace) -> None:
        super().__init__()
        self.depths = [sum(s.stage == k for s in space.block_sites) for k in _stages(space)]
        n_sites, n_ops = len(space.block_sites), len(OPERATIONS)
        self.alphas = nn.Parameter(torch.full((n_sites, n_ops), -float(np.log(n_ops))))
        self.betas = nn.Parameter(torch.zeros(n_sites))

    def depth_probs(self) -> Tensor:
        """(L,)."""
        return torch.cat([part.softmax(0) for part in self._stages(self.betas)])

    @torch.no_grad()
    def normalise(self) -> None:
        """Makes both log-probabilities again, after an update."""
        self.alphas.copy_(self.alphas.log_softmax(-1))
        self.betas.copy_(torch.cat([part.log_softmax(0) for part in self._stages(self.betas)]))

    def probs(self, weights: Tensor, n_options: int) -> Tensor:
        """(L, O) weights of operations -> (2 L, n_options): the rows that an oracle's expected latency takes.

        A block is absent with the probability of a smaller depth; the rows of widths, which are settled, stay 0.
        """
        stages = self._stages(self.depth_probs())
        present = torch.cat([part.flip(0).cumsum(0).flip(0) for part in stages])  # (L,)
        rows = torch.cat([present[:, None] * weights, 1 - present[:, None]], dim=1)  # (L, O + 1)
        rows = functional.pad(rows, (0, n_options - rows.shape[1]))
        return torch.stack([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)

    def _stages(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, self.depths)


def bi_sample(probs: NDArray[np.float64], rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(L, O) probabilities -> a path drawn from them, and one that differs at every site, uniform over the others.

    Section 3.2. Theirs draws the first by Gumbel's trick at a temperature, which an argmax does not feel.
    """
    n_sites, n_ops = probs.shape
    bounds = probs.cumsum(axis=1)
    first = (rng.random((n_sites, 1)) * bounds[:, -1:] >= bounds).sum(axis=1).clip(max=n_ops - 1)
    second = (first + rng.integers(1, n_ops, n_sites)) % n_ops
    return tuple(first.tolist()), tuple(second.tolist())
