"""InstaNAS's controller: a small network that gives each image its policy, and what it learns from.

Cheng et al., InstaNAS: Instance-aware Neural Architecture Search, AAAI 2020; released code. A *policy* is (L, 5) bits,
one for each module of each layer; a *subset* is the same as one option index per layer of ``InstaNASSpace``. Everything
here but ``Controller`` is a pure function of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latbench.graph.blocks import RELU, RELU6, SIGMOID, classifier, conv_bn_act, under
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.ops import Add, AvgPool2d, Concat, MaxPool2d, Zero
from latbench.oracle.base import LatencyOracle
from latbench.spaces.instanas import MODULES, N_SUBSETS, InstaNASSpace
from searchers.data import LARGE
from searchers.derive import module_of

N_MODULES = len(MODULES)

# ---- policies, and what they cost -----------------------------------------------------------------------------------


def subsets_of(policies: Tensor) -> Tensor:
    """(..., L, 5) bits -> (..., L) option indices."""
    return (policies.long() << torch.arange(N_MODULES, device=policies.device)).sum(-1)


def policies_of(subsets: Tensor) -> Tensor:
    """Inverse of ``subsets_of``: (..., L) -> (..., L, 5) bool."""
    return (subsets[..., None] >> torch.arange(N_MODULES, device=subsets.device) & 1).bool()


def subset_probs(probs: Tensor) -> Tensor:
    """(..., L, 5) independent Bernoullis -> (..., L, 32) probabilities of every subset; differentiable."""
    bits = policies_of(torch.arange(N_SUBSETS, device=probs.device))  # (32, 5)
    p = probs[..., None, :]
    return torch.where(bits, p, 1 - p).prod(-1)


def instance_latency(oracle: LatencyOracle, policies: Tensor) -> Tensor:
    """(B, L, 5) bits -> (B,) in the oracle's unit, float64, stem and head included."""
    found = oracle.latencies(subsets_of(policies).cpu().numpy())
    return torch.from_numpy(found).to(policies.device)


def expected_latency(oracle: LatencyOracle, probs: Tensor) -> Tensor:
    """(B, L, 5) probabilities -> (B,), the exact mean of ``instance_latency`` over policies; differentiable."""
    return oracle.expected_latency(subset_probs(probs))


# ---- the reward -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Latencies that are rewarded, most in the middle: a parabola that is 0 at both ends and beyond.

    Bounds in any unit: rewards do not change where latencies and bounds are scaled or shifted alike.
    """

    lower: float
    upper: float

    @classmethod
    def clamped(cls, lower: float, upper: float, margin: float) -> Window:
        """At least `margin` wide. Theirs lets the upper bound fall below the lower one, where the parabola's meaning
        flips, and divides by zero where they meet."""
        return cls(lower, max(upper, lower + margin))

    @property
    def middle(self) -> float:
        """Where the reward is largest."""
        return 0.5 * (self.lower + self.upper)

    def closeness(self, latencies: Tensor) -> Tensor:
        """(B,) -> (B,) in [0, 1]; all 0 in an empty window."""
        width = self.upper - self.lower
        if width == 0:
            return torch.zeros_like(latencies)
        return (-4 * (latencies - self.upper) * (latencies - self.lower) / width**2).clamp(min=0)


def reward(
    latencies: Tensor, correct: Tensor, window: Window, *, right: float, wrong: float, gamma: float = 1.0
) -> Tensor:
    """(B,) latencies and bool -> (B,): `right` times closeness to the window's middle, `wrong` for a wrong answer."""
    gained = right * window.closeness(latencies) ** gamma
    return torch.where(correct, gained, torch.full_like(gained, wrong))


def linear(start: float, end: float, share: float) -> float:
    """From `start` to `end` as `share` goes from 0 to 1."""
    return start - (start - end) * share


# ---- the gradient ---------------------------------------------------------------------------------------------------


def explore(probs: Tensor, alpha: float) -> Tensor:
    """(...) probabilities drawn towards their opposites: in [1 - alpha, alpha]."""
    return alpha * probs + (1 - alpha) * (1 - probs)


def entropy(probs: Tensor, *, one_sided: bool = False) -> Tensor:
    """(B, L, 5) -> (B,) nats, summed over decisions.

    `one_sided` is the released -p log p, whose maximum at p = 1/e pulls modules off; the full one pulls nowhere.
    """
    p = probs.clamp(torch.finfo(probs.dtype).eps, 1 - torch.finfo(probs.dtype).eps)
    found: Tensor = torch.special.entr(p)
    if not one_sided:
        found = found + torch.special.entr(1 - p)
    return found.sum((-2, -1))


def log_prob(probs: Tensor, policies: Tensor) -> Tensor:
    """(B, L, 5) Bernoullis and bits -> (B,) log-probability of the bits."""
    return torch.where(policies, probs, 1 - probs).log().sum((-2, -1))


def policy_loss(
    probs: Tensor,
    sampled: Tensor,
    advantage: Tensor,
    *,
    alpha: float,
    entropy_weight: float,
    one_sided: bool = False,
) -> tuple[Tensor, Tensor]:
    """The self-critical policy gradient: REINFORCE with the reward of the MAP policy as its baseline, and entropy.

    (B, L, 5) probabilities, (B, L, 5) bits drawn from their ``explore``, (B,) advantage -> scalars: loss, entropy.
    """
    drawn_from = explore(probs, alpha)
    mean_entropy = entropy(drawn_from, one_sided=one_sided).mean()
    gain = (advantage.to(probs.dtype) * log_prob(drawn_from, sampled)).mean()
    return -gain - entropy_weight * mean_entropy, mean_entropy


# ---- the network ----------------------------------------------------------------------------------------------------


class Controller(nn.Module):
    """(N, 3, H, W) -> (N, L, 5) probabilities, each of one module's being on."""

    def __init__(self, space: InstaNASSpace) -> None:
        super().__init__()
        self.body = module_of(controller_graph(space))
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                size = layer.kernel_size[0] * layer.kernel_size[1]
                nn.init.normal_(layer.weight, 0, (2 / (size * layer.out_channels)) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, 5) logits, in float32."""
        flat: Tensor = self.body(images)
        return flat.float().reshape(len(flat), -1, N_MODULES)


def controller_graph(space: InstaNASSpace) -> Graph:
    """The controller as a graph that gives (N, 5 L) probabilities: what it costs a deployed network.

    Three stages of 16 to 64 channels for small images, four of 16 to 128 behind a stem that shrinks eightfold from
    ``LARGE`` pixels on. A global pool lets it take any size.
    """
    b = GraphBuilder(space.dtype)
    x = b.input("x", space.input_shape)
    large = space.resolution >= LARGE
    if large:
        x = b.add(AvgPool2d(2, 2), x, name="shrink")
        x = conv_bn_act(b, x, 16, 7, stride=2, name="stem")
        x = b.add(MaxPool2d(3, 2, 1), x, name="pool")
    else:
        x = conv_bn_act(b, x, 16, 3, name="stem")
    for i, channels in enumerate((16, 32, 64, 128) if large else (16, 32, 64)):
        x = _residual(b, x, channels, stride=2 if i else 1, projected=large, name=f"block{i + 1}")
    x = classifier(b, x, N_MODULES * len(space.layers), name="decide")
    return b.build(b.add(SIGMOID, x, name="probabilities"))


def _residual(b: GraphBuilder, x: str, channels: int, *, stride: int, projected: bool, name: str) -> str:
    """The pair of 3x3 convolutions of module 4, which ends in ReLU6, plus a shortcut; ReLU."""
    y = conv_bn_act(b, x, channels, 3, stride=stride, name=under(name, "first"))
    y = conv_bn_act(b, y, channels, 3, activation=RELU6, name=under(name, "second"))
    if stride == 2 and projected:
        x = conv_bn_act(b, x, channels, stride=2, activation=None, name=under(name, "shortcut"))
    elif stride == 2:
        x = b.add(AvgPool2d(2, 2, b.shape(x)[2] % 2), x, name=under(name, "shortcut"))
        zeros = b.add(Zero(), x, name=under(name, "zeros"))  # as many channels again
        x = b.add(Concat(), x, zeros, name=under(name, "padded"))
    return b.add(RELU, b.add(Add(), x, y, name=under(name, "add")), name=under(name, "act"))
