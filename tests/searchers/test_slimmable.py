"""A masked, a trimmed and a stand-alone network are one function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toy_space import ToySpace

from latbench.errors import UsageError
from latbench.graph.torch import to_module
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from searchers.slimmable import Slimmable

SPACE = MobileNetV1Space(resolution=32, levels=5, max_width=1.0, num_classes=10)


def trained(space, *, leaky=False):
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    net = Slimmable(space, leaky=leaky)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -1, 1),
            ):
                nn.init.uniform_(tensor, low, high)
    return net.eval()


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("space", [SPACE, ToySpace()], ids=lambda space: space.name)
@torch.inference_mode()
def test_masked_trimmed_and_alone_agree(space):
    net, rng = trained(space), np.random.default_rng(0)
    archs = [space.sample(rng) for _ in range(5)]
    images = torch.randn(5, 3, space.resolution, space.resolution)
    mixed = net(images, torch.tensor(archs))
    for i, arch in enumerate(archs):
        graph = space.network(arch)
        alone = to_module(graph, net.weights(graph))(images)
        assert distance(net(images, arch), alone) < 1e-5
        assert distance(net(images, torch.tensor([arch] * 5)), alone) < 1e-5
        assert distance(mixed[i], alone[i]) < 1e-5
    assert distance(net(images, net.widest), net.body(images)) < 1e-6


@torch.inference_mode()
def test_the_released_masks_let_inactive_channels_through():
    net = trained(SPACE, leaky=True)
    images = torch.randn(2, 3, 32, 32)
    for seed in range(3):
        arch = SPACE.sample(np.random.default_rng(seed))
        graph = SPACE.network(arch)
        alone = to_module(graph, net.weights(graph))(images)
        assert distance(net(images, torch.tensor([arch] * 2)), alone) > 1e-3
        assert distance(net(images, arch), alone) < 1e-5, "trimmed is exact all the same"


def test_trimmed_and_masked_training_have_the_same_gradients():
    images, arch = torch.randn(8, 3, 16, 16), (1, 0, 2)
    gradients = []
    for form in (arch, torch.tensor([arch] * 8)):
        torch.manual_seed(0)
        net = Slimmable(ToySpace()).train()
        net(images, form).logsumexp(-1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        statistics = net.body.get_submodule("conv1/bn").running_mean[:2]
        assert statistics.abs().min() > 0, "a training pass updates the running statistics"
    assert distance(*gradients) < 1e-5


def test_a_space_without_widths_is_refused():
    with pytest.raises(UsageError, match="nasbench201 cannot be trained slimmable"):
        Slimmable(NASBench201Space(resolution=32))
