"""Training-free estimates of a network's worth, from its initial weights: SynFlow and NASWOT.

``SynFlow``: Tanaka, Kunin, Yamins, Ganguli: Pruning neural networks without any data by iteratively conserving synaptic
flow, NeurIPS 2020, eq. 3 and 6; as a score of networks Abdelfattah, Mehrotra, Dudziak, Lane: Zero-Cost Proxies for
Lightweight NAS, ICLR 2021, sec. 3.2. ``NASWOT``: Mellor, Turner, Storkey, Crowley: Neural Architecture Search without
Training, ICML 2021, sec. 4, eq. 2.

Scores, not accuracies: they rank networks of one space on one data set, and their values mean nothing else.
Differs from the released codes:

* SynFlow is given as the logarithm of 1 + score, which ranks alike: scores of deep networks exceed 1e30.
* NASWOT takes each eigenvalue of its kernel for at least the smallest that float64 tells from 0; theirs is minus
  infinity where two images switch the same units, in narrow networks and large batches.
* Several initialisations can be averaged (`repeats`); initial weights are the seed's, the same for the same network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from latbench.errors import UsageError
from latbench.spaces.base import Arch
from searchers.base import Problem
from searchers.data import Splits, eval_batches
from searchers.derive import module_of, num_classes
from searchers.world import World

SWITCHES = (nn.ReLU, nn.ReLU6)  # units that are on or off


@dataclass(frozen=True)
class SynFlow:
    """Sum over weights of |theta dR/dtheta|, R the sum of the outputs for an image of ones at weights |theta|.

    Batch norms are left out, as in the released code; weights are those of convolutions and linear layers. Given as
    log(1 + sum).
    """

    problem: Problem
    repeats: int = 1

    def evaluate(self, arch: Arch) -> float:
        """As ``Evaluator``; 0 where nothing flows from the input to the output."""
        return _mean(self.problem, arch, self.repeats, self._score)

    def _score(self, module: nn.Module) -> float:
        _drop_batch_norms(module)
        return float(np.log1p(synaptic_flow(module, self.problem.space.input_shape[1:])))


@dataclass(frozen=True)
class NASWOT:
    """log det K, K[i, j] the number of rectifiers that are both on or both off for images i and j of a batch.

    Images are the first of those held out, one batch of `batch_size`; batch norms use the batch's statistics. Raises
    UsageError where the network has no rectifier (hard or smooth swish alone switch nothing).
    """

    problem: Problem
    repeats: int = 1
    batch_size: int = 128

    def evaluate(self, arch: Arch) -> float:
        """As ``Evaluator``."""
        return _mean(self.problem, arch, self.repeats, self._score)

    def _score(self, module: nn.Module) -> float:
        kernel = agreement(module, self._images)
        low = float(np.finfo(np.float64).eps * np.trace(kernel))
        return float(np.log(np.linalg.eigvalsh(kernel).clip(low)).sum())

    @cached_property
    def _images(self) -> Tensor:
        """(N, 3, H, W)."""
        problem, world = self.problem, World.here()
        classes = num_classes(problem.space.network(problem.space.sample(np.random.default_rng(0))))
        batches = eval_batches(problem, Splits.of(problem, classes), World(world.device), "held_out", self.batch_size)
        return next(batches.epoch(0)).images.to(world.device)


def synaptic_flow(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Sum of |theta dR/dtheta| for one input of ones of this shape, (3, H, W). Leaves the module in float64 at |theta|.

    Every layer of a chain without biases carries the same flow, R: the score is R times the number of layers.
    """
    module.double()
    parameters = list(module.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.abs_()
    device = parameters[0].device if parameters else None
    total: Tensor = module(torch.ones((1, *shape), dtype=torch.float64, device=device)).sum()
    total.backward()  # type: ignore[no-untyped-call]
    score = 0.0
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and layer.weight.grad is not None:
            score += float((layer.weight.detach() * layer.weight.grad).abs().sum())
    return score


@torch.no_grad()
def agreement(module: nn.Module, images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(N, 3, H, W) -> (N, N): for each pair of images the rectifiers in the same state. Raises UsageError."""
    kernel = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)
    switches = [layer for layer in module.modules() if isinstance(layer, SWITCHES)]
    if not switches:
        raise UsageError("naswot counts rectifiers that are on, and this network has none: take synflow or train")

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        on = (output > 0).flatten(1).float()  # (N, units); products of 0 and 1 are exact in float32 below 2^24
        off = 1 - on
        kernel.add_((on @ on.T + off @ off.T).double())

    handles = [layer.register_forward_hook(count) for layer in switches]
    module.train()
    try:
        module(images)
    finally:
        for handle in handles:
            handle.remove()
    return kernel.cpu().numpy()


def _mean(problem: Problem, arch: Arch, repeats: int, score: Callable[[nn.Module], float]) -> float:
    """Over initialisations that depend on the problem's seed."""
    if repeats < 1:
        raise UsageError(f"a proxy needs at least 1 initialisation, got {repeats}")
    graph, world, scores = problem.space.network(arch), World.here(), []
    for repeat in range(repeats):
        torch.manual_seed(int(np.random.default_rng((problem.seed, repeat)).integers(1 << 63)))
        scores.append(score(world.place(module_of(graph))))
    return float(np.mean(scores))


def _drop_batch_norms(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                parent._modules[name] = nn.Identity()
