"""Operators: frozen dataclasses named as in ``torch.nn``, each knowing its output shape, weights and MACs.

Nothing here knows a runtime: ``graph/onnx.py`` and ``graph/torch.py`` each lower every operator of ``OPS`` by one
``singledispatch`` registration.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from latbench.errors import GraphError

Shape = tuple[int, ...]  # NCHW or NC, batch included, always static
Size2 = int | tuple[int, int]  # (height, width); an int means a square

OPS: dict[str, type[Op]] = {}


def pair(value: Size2) -> tuple[int, int]:
    """An int or (height, width) -> (height, width)."""
    return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Op:
    """One operator. Its fields are its attributes; names, shapes and weights live elsewhere."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            OPS[cls.__name__] = cls

    def infer(self, *inputs: Shape) -> Shape:
        """Output shape of these input shapes. Raises GraphError, naming operator and shapes, where they do not fit."""
        (shape,) = self.expect(inputs, 1)
        return shape

    def weights(self) -> dict[str, Shape]:
        """Weight role -> shape, in the order that both lowerings take them."""
        return {}

    def macs(self, *inputs: Shape) -> int:
        """Multiply-accumulates of one execution on these input shapes (convolutions and matrix products only)."""
        return 0

    @property
    def n_params(self) -> int:
        """Trainable parameters: ``torch.nn.Module.parameters()`` of the same layer (running statistics left out)."""
        return sum(math.prod(s) for role, s in self.weights().items() if not role.startswith("running_"))

    def attributes(self) -> dict[str, Any]:
        """Field -> value, those that differ from their default only: a field added later keeps old keys valid."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }

    def __str__(self) -> str:
        inside = ",".join(f"{k}={_text(v)}" for k, v in self.attributes().items())
        return f"{type(self).__name__}({inside})"

    def expect(self, inputs: tuple[Shape, ...], n: int, rank: int | None = None) -> tuple[Shape, ...]:
        """The inputs, after checking their number and rank; raises GraphError otherwise."""
        if len(inputs) != n or any(rank is not None and len(s) != rank for s in inputs):
            want = f"{n} input(s)" + (f" of rank {rank}" if rank else "")
            raise GraphError(f"{self} takes {want}, got shapes {list(inputs)}")
        return inputs

    def fail(self, inputs: tuple[Shape, ...], why: str) -> GraphError:
        return GraphError(f"{self} does not fit {list(inputs)}: {why}")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    return repr(value) if isinstance(value, float) else str(value)


def _square(op: Op, *names: str) -> None:
    """Store equal pairs as one int, so that equal operators compare equal: (3, 3) -> 3. Refuses what is no size."""
    for name in names:
        value = getattr(op, name)
        least = 0 if "padding" in name else 1
        if any(not isinstance(n, int) or n < least for n in pair(tuple(value) if isinstance(value, list) else value)):
            raise GraphError(f"{type(op).__name__}: {name} must be at least {least}, got {value}")
        if isinstance(value, (tuple, list)):
            h, w = value
            object.__setattr__(op, name, h if h == w else (h, w))


def _window(op: Op, shape: Shape, kernel: Size2, stride: Size2, padding: Size2, dilation: Size2 = 1) -> tuple[int, int]:
    out = []
    for n, k, s, p, d in zip(shape[2:], pair(kernel), pair(stride), pair(padding), pair(dilation), strict=True):
        side = (n + 2 * p - d * (k - 1) - 1) // s + 1
        if side < 1:
            raise op.fail((shape,), "the window is larger than the padded input")
        out.append(side)
    return out[0], out[1]


@dataclass(frozen=True)
class Conv2d(Op):
    """Convolution; ``groups == in_channels`` is depthwise."""

    in_channels: int
    out_channels: int
    kernel_size: Size2 = 1
    stride: Size2 = 1
    padding: Size2 = 0
    dilation: Size2 = 1
    groups: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        _square(self, "kernel_size", "stride", "padding", "dilation")
        if min(self.in_channels, self.out_channels, self.groups) < 1:
            raise GraphError(f"{self}: channels and groups must be positive")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise GraphError(f"{self}: channels are not divisible by groups")

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 4)
        if shape[1] != self.in_channels:
            raise self.fail(inputs, f"{shape[1]} channels")
        side = _window(self, shape, self.kernel_size, self.stride, self.padding, self.dilation)
        return (shape[0], self.out_channels, *side)

    def weights(self) -> dict[str, Shape]:
        weight = (self.out_channels, self.in_channels // self.groups, *pair(self.kernel_size))
        return {"weight": weight, **({"bias": (self.out_channels,)} if self.bias else {})}

    def macs(self, *inputs: Shape) -> int:
        return math.prod(self.infer(*inputs)) * math.prod(self.weights()["weight"][1:])


@dataclass(frozen=True)
class ConvTranspose2d(Op):
    """Transposed convolution, weight (in, out / groups, kh, kw)."""

    in_channels: int
    out_channels: int
    kernel_size: Size2 = 1
    stride: Size2 = 1
    padding: Size2 = 0
    output_padding: Size2 = 0
    groups: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        _square(self, "kernel_size", "stride", "padding", "output_padding")
        if min(self.in_channels, self.out_channels, self.groups) < 1:
            raise GraphError(f"{self}: channels and groups must be positive")
        if any(o >= s for o, s in zip(pair(self.output_padding), pair(self.stride), strict=True)):
            raise GraphError(f"{self}: output_padding must be below stride")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise GraphError(f"{self}: channels are not divisible by groups")

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 4)
        if shape[1] != self.in_channels:
            raise self.fail(inputs, f"{shape[1]} channels")
        sides = [
            (n - 1) * s - 2 * p + k + o
            for n, k, s, p, o in zip(
                shape[2:],
                pair(self.kernel_size),
                pair(self.stride),
                pair(self.padding),
                pair(self.output_padding),
                strict=True,
            )
        ]
        if min(sides) < 1:
            raise self.fail(inputs, "the output would be empty")
        return (shape[0], self.out_channels, *sides)

    def weights(self) -> dict[str, Shape]:
        weight = (self.in_channels, self.out_channels // self.groups, *pair(self.kernel_size))
        return {"weight": weight, **({"bias": (self.out_channels,)} if self.bias else {})}

    def macs(self, *inputs: Shape) -> int:
        return math.prod(inputs[0]) * math.prod(self.weights()["weight"][1:])


@dataclass(frozen=True)
class BatchNorm2d(Op):
    """Batch normalisation in evaluation mode: running statistics are weights."""

    num_features: int
    eps: float = 1e-5

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1)
        if len(shape) not in (2, 4) or shape[1] != self.num_features:
            raise self.fail(inputs, f"expects {self.num_features} channels")
        return shape

    def weights(self) -> dict[str, Shape]:
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (self.num_features,))


@dataclass(frozen=True)
class Linear(Op):
    """Matrix product on (N, in) -> (N, out)."""

    in_features: int
    out_features: int
    bias: bool = True

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 2)
        if shape[1] != self.in_features:
            raise self.fail(inputs, f"{shape[1]} features")
        return (shape[0], self.out_features)

    def weights(self) -> dict[str, Shape]:
        return {
            "weight": (self.out_features, self.in_features),
            **({"bias": (self.out_features,)} if self.bias else {}),
        }

    def macs(self, *inputs: Shape) -> int:
        return inputs[0][0] * self.in_features * self.out_features


@dataclass(frozen=True)
class ReLU(Op):
    """max(x, 0)."""


@dataclass(frozen=True)
class ReLU6(Op):
    """min(max(x, 0), 6)."""


@dataclass(frozen=True)
class Sigmoid(Op):
    """1 / (1 + exp(-x))."""


@dataclass(frozen=True)
class Hardsigmoid(Op):
    """ReLU6(x + 3) / 6."""


@dataclass(frozen=True)
class Hardswish(Op):
    """x * ReLU6(x + 3) / 6."""


@dataclass(frozen=True)
class SiLU(Op):
    """x * sigmoid(x): swish."""


@dataclass(frozen=True)
class Identity(Op):
    """x."""


@dataclass(frozen=True)
class Zero(Op):
    """x[:, :, ::stride, ::stride] * 0, as NAS-Bench-201 and DARTS run their operation ``none``."""

    stride: int = 1

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 4)
        return (*shape[:2], -(-shape[2] // self.stride), -(-shape[3] // self.stride))


@dataclass(frozen=True)
class _Pool(Op):
    kernel_size: Size2
    stride: Size2
    padding: Size2 = 0

    def __post_init__(self) -> None:
        _square(self, "kernel_size", "stride", "padding")
        if any(2 * p > k for p, k in zip(pair(self.padding), pair(self.kernel_size), strict=True)):
            raise GraphError(f"{self}: padding is more than half of the window")

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 4)
        return (*shape[:2], *_window(self, shape, self.kernel_size, self.stride, self.padding))


@dataclass(frozen=True)
class MaxPool2d(_Pool):
    """Maximum over a window."""


@dataclass(frozen=True)
class AvgPool2d(_Pool):
    """Mean over a window."""

    count_include_pad: bool = False


@dataclass(frozen=True)
class AdaptiveAvgPool2d(Op):
    """Mean over the whole map: (N, C, H, W) -> (N, C, 1, 1), torch's AdaptiveAvgPool2d(1)."""

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 4)
        return (*shape[:2], 1, 1)


@dataclass(frozen=True)
class Flatten(Op):
    """(N, ...) -> (N, prod(...))."""

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1)
        return (shape[0], math.prod(shape[1:]))


@dataclass(frozen=True)
class Add(Op):
    """Sum of two or more tensors of one shape."""

    def infer(self, *inputs: Shape) -> Shape:
        if len(inputs) < 2 or len(set(inputs)) != 1:
            raise self.fail(inputs, "wants two or more tensors of one shape")
        return inputs[0]


@dataclass(frozen=True)
class Mul(Op):
    """Product of two tensors; the second may be (N, C, 1, 1): squeeze-and-excitation's gate."""

    def infer(self, *inputs: Shape) -> Shape:
        a, b = self.expect(inputs, 2)
        if a != b and not (len(a) == len(b) == 4 and b == (*a[:2], 1, 1)):
            raise self.fail(inputs, "shapes neither equal nor a channel gate")
        return a


@dataclass(frozen=True)
class Concat(Op):
    """Concatenation along the channels."""

    def infer(self, *inputs: Shape) -> Shape:
        if len(inputs) < 2 or len({(s[:1], s[2:]) for s in inputs}) != 1:
            raise self.fail(inputs, "wants two or more tensors that differ in channels only")
        return (inputs[0][0], sum(s[1] for s in inputs), *inputs[0][2:])


@dataclass(frozen=True)
class ChannelShuffle(Op):
    """Channels (g, c / g) transposed to (c / g, g), as in ShuffleNet."""

    groups: int

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 4)
        if shape[1] % self.groups:
            raise self.fail(inputs, "channels are not divisible by groups")
        return shape


@dataclass(frozen=True)
class Crop(Op):
    """x[:, :, top:, left:]: the shifted path of DARTS' factorised reduction."""

    top: int = 1
    left: int = 1

    def infer(self, *inputs: Shape) -> Shape:
        (shape,) = self.expect(inputs, 1, 4)
        if shape[2] <= self.top or shape[3] <= self.left:
            raise self.fail(inputs, "nothing would remain")
        return (*shape[:2], shape[2] - self.top, shape[3] - self.left)
