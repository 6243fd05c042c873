"""One network that runs at every width of a space: its first channels (Yu et al., ICLR 2019; Berman et al., CVPR 2020).

A batch runs either with a width of its own per image, by masks, or trimmed to one architecture, by slices of the
weights. Both give what the stand-alone network with these weights gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from latbench.errors import UsageError
from latbench.graph import ops
from latbench.graph.ir import Graph, Node
from latbench.graph.passes import as_dtype
from latbench.graph.torch import to_module
from latbench.spaces.base import Arch, SearchSpace

_POINTWISE = (ops.BatchNorm2d, ops.ReLU, ops.ReLU6, ops.SiLU, ops.Hardswish)


@dataclass(frozen=True)
class _Step:
    """One node of the widest network."""

    node: Node
    layer: nn.Module
    decision: int | None  # whose width its output has; None: no choice changes it
    mask: bool  # whether masked images are cut here


class Slimmable(nn.Module):
    """The widest network of a space whose every decision is a number of channels, the options ascending.

    Masks stand where channels mix (before a dense convolution, a linear layer, the output), not on the way through
    depthwise convolutions and batch norms: what an inactive channel holds there reaches no other, and the batch
    statistics of a depthwise channel are those of the images in which it is computed, undiluted by zeros. `leaky`
    masks where the released code of AOWS does, behind the dense convolutions only, which lets relu(beta - gamma * mean
    / std) of inactive depthwise channels through: the figures are then those of no network of the space.

    Raises UsageError where a decision is not a width.
    """

    def __init__(self, space: SearchSpace, *, leaky: bool = False) -> None:
        super().__init__()
        self.widest: Arch = tuple(len(decision.options) - 1 for decision in space.decisions)
        self.graph = as_dtype(space.network(self.widest), "float32")
        owner = _owners(space, self.graph, self.widest)
        self.body = to_module(self.graph)
        cut = _leaky_cuts(self.graph, owner) if leaky else _cuts(self.graph, owner)
        self._steps = tuple(
            _Step(node, self.body.get_submodule(node.name), owner.get(node.name), node.name in cut)
            for node in self.graph.nodes
        )
        self._options = tuple(tuple(int(option) for option in decision.options) for decision in space.decisions)
        for i, options in enumerate(self._options):
            self.register_buffer(f"width{i}", torch.tensor(options), persistent=False)

    def forward(self, images: Tensor, archs: Tensor | Arch) -> Tensor:
        """(N, 3, H, W) images -> (N, K) logits; `archs`: (N, D) option indices, one per image, or one for all."""
        return self._masked(images, archs) if isinstance(archs, Tensor) else self._trimmed(images, archs)

    def _masked(self, images: Tensor, archs: Tensor) -> Tensor:
        values = {self.graph.inputs[0][0]: images}
        masks: dict[int, Tensor] = {}
        for step in self._steps:
            y = step.layer(*(values[name] for name in step.node.inputs))
            if step.mask and step.decision is not None:
                d = step.decision
                if d not in masks:
                    widths = self.get_buffer(f"width{d}")[archs[:, d]]  # (N,)
                    masks[d] = (torch.arange(y.shape[1], device=y.device) < widths[:, None]).to(y.dtype)  # (N, C)
                y = y * masks[d].reshape(*masks[d].shape, *[1] * (y.ndim - 2))
            values[step.node.name] = y
        return values[self.graph.outputs[0]]

    def _trimmed(self, images: Tensor, arch: Arch) -> Tensor:
        values = {self.graph.inputs[0][0]: images}
        for step in self._steps:
            d = step.decision
            width = None if d is None else self._options[d][arch[d]]
            values[step.node.name] = _sliced(step, width, *(values[name] for name in step.node.inputs))
        return values[self.graph.outputs[0]]

    def weights(self, graph: Graph) -> dict[str, NDArray[Any]]:
        """Of one network of the space: the first channels of each of this one's."""
        return leading(self.body.state_dict(), graph)


def leading(state: Mapping[str, Tensor], graph: Graph) -> dict[str, NDArray[Any]]:
    """The weights of `graph` cut from larger ones of the same names: the first entries along every axis."""
    cut = {}
    for name, shape in graph.weight_shapes().items():
        whole = state[name].detach().cpu().numpy()
        cut[name] = whole[tuple(slice(n) for n in shape)].astype(graph.dtype)
    return cut


def _owners(space: SearchSpace, widest: Graph, arch: Arch) -> dict[str, int]:
    """Node -> the decision that is its number of output channels."""
    owner: dict[str, int] = {}
    for d, decision in enumerate(space.decisions):
        options = decision.options
        ascending = all(type(o) is int for o in options) and list(options) == sorted(set(options))
        narrow = as_dtype(space.network((*arch[:d], 0, *arch[d + 1 :])), "float32") if ascending else widest
        same = [node.name for node in narrow.nodes] == [node.name for node in widest.nodes]
        changed = [n for n in widest.shapes if same and narrow.shapes[n] != widest.shapes[n]]
        fits = all((narrow.shapes[n][1], widest.shapes[n][1]) == (options[0], options[-1]) for n in changed)
        if len(options) > 1 and not (ascending and changed and fits and not owner.keys() & set(changed)):
            raise UsageError(
                f"{space.name} cannot be trained slimmable: {decision.name} is not the number of channels of its layers"
            )
        owner |= dict.fromkeys(changed, d)
    return owner


def _mixes(op: ops.Op) -> bool:
    """Whether an output channel may depend on several input channels."""
    if isinstance(op, ops.Conv2d):
        return op.groups != op.in_channels
    return isinstance(op, ops.Linear | ops.ConvTranspose2d | ops.Concat | ops.ChannelShuffle)


def _cuts(graph: Graph, owner: Mapping[str, int]) -> set[str]:
    """The nodes whose output some other node mixes."""
    read = {name for node in graph.nodes if _mixes(node.op) for name in node.inputs}
    return {name for name in owner if name in read or name in graph.outputs}


def _leaky_cuts(graph: Graph, owner: Mapping[str, int]) -> set[str]:
    """The last node behind each dense convolution: its batch norm's activation, where there are such."""
    last: dict[str, str] = {}  # node -> the dense layer that it only rescales
    for node in graph.nodes:
        if _mixes(node.op):
            last[node.name] = node.name
        elif isinstance(node.op, _POINTWISE) and node.inputs[0] in last:
            last[node.name] = last[node.inputs[0]]
    ends = {layer: name for name, layer in last.items()}  # in node order: the last one stays
    return {name for name in ends.values() if name in owner}


def _sliced(step: _Step, width: int | None, *inputs: Tensor) -> Tensor:
    """The layer at fewer channels: `width` out, and as many in as come."""
    layer, x = step.layer, inputs[0]
    if isinstance(layer, nn.Conv2d):
        out = layer.out_channels if width is None else width
        depthwise = not _mixes(step.node.op)
        weight = layer.weight[:out, : (1 if depthwise else x.shape[1] // layer.groups)]
        bias = None if layer.bias is None else layer.bias[:out]
        groups = out if depthwise else layer.groups
        return functional.conv2d(
            x, weight, bias, layer.stride, layer.padding, dilation=layer.dilation, groups=groups
        )  # fmt: skip
    if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
        n = x.shape[1]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var = layer.running_mean[:n], layer.running_var[:n]  # views: a training pass updates them in place
        momentum = 0.1 if layer.momentum is None else layer.momentum
        return functional.batch_norm(
            x, mean, var, layer.weight[:n], layer.bias[:n], layer.training, momentum, layer.eps
        )
    if isinstance(layer, nn.Linear):
        out = layer.out_features if width is None else width
        bias = None if layer.bias is None else layer.bias[:out]
        return functional.linear(x, layer.weight[:out, : x.shape[1]], bias)
    y: Tensor = layer(*inputs)
    return y
