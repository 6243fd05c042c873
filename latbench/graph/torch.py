"""Lowers a graph to ``torch.nn``: one ``singledispatch`` registration per operator.

The only module of this package that imports torch; nobody imports it at module level.
"""

from __future__ import annotations

import operator
from functools import reduce, singledispatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latbench.errors import GraphError
from latbench.graph import ops
from latbench.graph.ir import Graph, Weights
from latbench.graph.ops import Op, Shape
from latbench.graph.passes import check_weights


def to_module(graph: Graph, weights: Weights | None = None) -> nn.Module:
    """The graph as a module in evaluation mode and in the graph's dtype, with torch's own initial weights by default.

    ``forward`` takes the inputs in order and gives one tensor, or a tuple of several. ``state_dict`` has the graph's
    "node.role" names, and each BatchNorm2d's num_batches_tracked. Raises GraphError where weights are missing, unknown
    or of another shape.
    """
    module = _GraphModule(graph).to(getattr(torch, graph.dtype)).eval()
    if weights is not None:
        check_weights(graph, weights)
        state = module.state_dict()
        with torch.no_grad():
            for name in graph.weight_shapes():
                state[name].copy_(torch.tensor(np.asarray(weights[name])))
    return module


def weights_of(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Weights of a module made by ``to_module``, copied to the host: what ``to_onnx`` and ``fold_batch_norm`` take."""
    state = module.state_dict().items()
    return {k: v.cpu().numpy().copy() for k, v in state if not k.endswith(".num_batches_tracked")}


class _GraphModule(nn.Module):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._inputs = tuple(name for name, _ in graph.inputs)
        self._outputs = graph.outputs
        last = {name: node.name for node in graph.nodes for name in (node.name, *node.inputs)}  # last user of a value
        dead: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
        for name, user in last.items():
            if name not in graph.outputs:
                dead[user].append(name)
        self._steps = tuple((node.name, node.inputs, tuple(dead[node.name])) for node in graph.nodes)
        for node in graph.nodes:
            # add_module would refuse names that nn.Module has as attributes: "half", "float", "type"
            self._modules[node.name] = _lower(node.op, graph.shapes[node.name])

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(self._inputs, inputs, strict=True))
        for name, sources, dead in self._steps:
            layer = self._modules[name]
            assert layer is not None
            values[name] = layer(*(values[source] for source in sources))
            for done in dead:  # a network's activations need not all live at once
                del values[done]
        outputs = tuple(values[name] for name in self._outputs)
        return outputs[0] if len(outputs) == 1 else outputs


@singledispatch
def _lower(op: Op, shape: Shape) -> nn.Module:
    """The layer of one operator; `shape` is its output's."""
    raise GraphError(f"{type(op).__name__} has no lowering in latbench/graph/torch.py: register one there")


@_lower.register
def _conv2d(op: ops.Conv2d, shape: Shape) -> nn.Module:
    return nn.Conv2d(
        op.in_channels,
        op.out_channels,
        op.kernel_size,
        op.stride,
        op.padding,
        dilation=op.dilation,
        groups=op.groups,
        bias=op.bias,
    )


@_lower.register
def _conv_transpose2d(op: ops.ConvTranspose2d, shape: Shape) -> nn.Module:
    return nn.ConvTranspose2d(
        op.in_channels,
        op.out_channels,
        op.kernel_size,
        op.stride,
        op.padding,
        output_padding=op.output_padding,
        groups=op.groups,
        bias=op.bias,
    )


@_lower.register
def _batch_norm2d(op: ops.BatchNorm2d, shape: Shape) -> nn.Module:
    layer = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d  # after a Linear
    return layer(op.num_features, op.eps)


@_lower.register
def _linear(op: ops.Linear, shape: Shape) -> nn.Module:
    return nn.Linear(op.in_features, op.out_features, op.bias)


@_lower.register
def _relu(op: ops.ReLU, shape: Shape) -> nn.Module:
    return nn.ReLU()


@_lower.register
def _relu6(op: ops.ReLU6, shape: Shape) -> nn.Module:
    return nn.ReLU6()


@_lower.register
def _sigmoid(op: ops.Sigmoid, shape: Shape) -> nn.Module:
    return nn.Sigmoid()


@_lower.register
def _hardsigmoid(op: ops.Hardsigmoid, shape: Shape) -> nn.Module:
    return nn.Hardsigmoid()


@_lower.register
def _hardswish(op: ops.Hardswish, shape: Shape) -> nn.Module:
    return nn.Hardswish()


@_lower.register
def _silu(op: ops.SiLU, shape: Shape) -> nn.Module:
    return nn.SiLU()


@_lower.register
def _identity(op: ops.Identity, shape: Shape) -> nn.Module:
    return nn.Identity()


@_lower.register
def _zero(op: ops.Zero, shape: Shape) -> nn.Module:
    return _Zero(op.stride)


@_lower.register
def _max_pool2d(op: ops.MaxPool2d, shape: Shape) -> nn.Module:
    return nn.MaxPool2d(op.kernel_size, op.stride, op.padding)


@_lower.register
def _avg_pool2d(op: ops.AvgPool2d, shape: Shape) -> nn.Module:
    return nn.AvgPool2d(op.kernel_size, op.stride, op.padding, count_include_pad=op.count_include_pad)


@_lower.register
def _adaptive_avg_pool2d(op: ops.AdaptiveAvgPool2d, shape: Shape) -> nn.Module:
    return nn.AdaptiveAvgPool2d(1)


@_lower.register
def _flatten(op: ops.Flatten, shape: Shape) -> nn.Module:
    return nn.Flatten()


@_lower.register
def _add(op: ops.Add, shape: Shape) -> nn.Module:
    return _Add()


@_lower.register
def _mul(op: ops.Mul, shape: Shape) -> nn.Module:
    return _Mul()


@_lower.register
def _concat(op: ops.Concat, shape: Shape) -> nn.Module:
    return _Concat()


@_lower.register
def _channel_shuffle(op: ops.ChannelShuffle, shape: Shape) -> nn.Module:
    return nn.ChannelShuffle(op.groups)


@_lower.register
def _crop(op: ops.Crop, shape: Shape) -> nn.Module:
    return _Crop(op.top, op.left)


class _Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride] * 0


class _Add(nn.Module):
    def forward(self, *terms: Tensor) -> Tensor:
        return reduce(operator.add, terms)


class _Mul(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate


class _Concat(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


class _Crop(nn.Module):
    def __init__(self, top: int, left: int) -> None:
        super().__init__()
        self.top, self.left = top, left

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.top :, self.left :]
