"""The meta-graph's three executions against each other and against the space's own networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from latbench.graph.passes import random_weights
from latbench.spaces.instanas import DEFAULT, InstaNASSpace
from searchers.derive import module_of
from searchers.instanas_controller import policies_of
from searchers.instanas_graph import MetaGraph, Routed

SPACE = InstaNASSpace(plan="8x1,12x3s2,16x2s2", stem_channels=8, head_channels=24, resolution=16)
N_LAYERS = 6
FIRST = [0, 1, 4]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def graph():
    """With weights and statistics of no special values."""
    found = MetaGraph(SPACE)
    whole = SPACE.network(SPACE.published["meta-graph"])
    weights = random_weights(whole, 1)
    for prefix, module in (("stem", found.stem), ("head", found.head)):
        load(module, weights, prefix)
    for site, modules in zip(SPACE.layers, found.layers, strict=True):
        for module in modules:
            load(module, weights, site.name)
    return found.eval()


def load(module, weights, prefix):
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(weights[f"{prefix}/{name}"]))


def images(n, seed=0):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def drawn(n, seed=0, share=0.4):
    """Policies of which some rows, some layers and one whole image are empty."""
    rng = torch.Generator().manual_seed(seed)
    policies = torch.rand(n, N_LAYERS, 5, generator=rng) < share
    policies[0] = False
    policies[1 % n, :3] = False
    return policies


def close(a, b):
    return float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@torch.no_grad()
def test_three_executions_agree(graph):
    x, policies = images(16), drawn(16)
    dense, grouped, single = (graph(x, policies, how) for how in ("dense", "grouped", "single"))
    assert dense.shape == (16, 10)
    assert close(dense, grouped)
    assert close(single, grouped)
    assert torch.equal(graph(x, policies), grouped), "what evaluation takes"


@torch.no_grad()
@pytest.mark.parametrize("how", ["dense", "grouped", "single"])
def test_a_row_does_not_depend_on_the_others(graph, how):
    x, policies = images(16), drawn(16)
    together = graph(x, policies, how)
    for rows in ([0], [1, 0], [5], [15, 3, 0]):
        assert close(graph(x[rows], policies[rows], how), together[rows])


@torch.no_grad()
@pytest.mark.parametrize("how", ["dense", "grouped", "single"])
def test_each_image_runs_the_network_of_its_policy(graph, how):
    """Also where nothing at all is selected: the space's own networks are the truth."""
    x, policies = images(6, 1), drawn(6, 1)
    found = graph(x, policies, how)
    for image, bits, logits in zip(x, policies, found, strict=True):
        arch = tuple((bits * 2 ** torch.arange(5)).sum(-1).tolist())
        network = SPACE.network(arch)
        module = module_of(network, graph.weights(network))
        assert close(logits[None], module(image[None]))


@torch.no_grad()
@pytest.mark.parametrize("how", ["dense", "grouped", "single"])
def test_a_batch_of_empty_policies_runs_the_default_modules(graph, how):
    x, nothing = images(3), torch.zeros(3, N_LAYERS, 5, dtype=torch.bool)
    default = nothing.clone()
    default[:, FIRST, DEFAULT] = True
    assert torch.equal(graph(x, nothing, how), graph(x, default, how))
    assert torch.equal(graph.effective(nothing), default)
    assert torch.isfinite(graph(x[:1], nothing[:1], how)).all()


class Counted:
    """How many rows each module has seen."""

    def __init__(self, graph):
        self.rows = torch.zeros(N_LAYERS, 5, dtype=torch.long)
        for t, modules in enumerate(graph.layers):
            for i, module in enumerate(modules):
                module.register_forward_hook(self.hook(t, i))

    def hook(self, t, i):
        def count(_, inputs, output):
            self.rows[t, i] += len(output)

        return count


@torch.no_grad()
@pytest.mark.parametrize("how", ["dense", "grouped", "single"])
def test_a_module_sees_the_rows_that_its_execution_says(graph, how):
    counted, policies = Counted(graph), drawn(12, 2, share=0.15)
    policies[:, 5, 2] = True
    policies[:, 3] = False
    graph(images(12), policies, how)
    wanted = graph.effective(policies).sum(0)
    assert (wanted == 0).any(), "some modules are skipped by all"
    if how == "dense":
        assert torch.equal(counted.rows, torch.where(wanted > 0, 12, 0))
    else:
        assert torch.equal(counted.rows, wanted)


def test_training_sees_all_images_in_its_statistics(graph):
    """Batch norms of a module average over the batch, whichever rows select it."""
    graph.train()
    x = images(8)
    norm = dict(graph.layers[0][1].named_children())["ir_k3_e3/expand/bn"]
    seen = []
    for rows in ([0], [0, 1, 2, 3, 4, 5, 6, 7]):
        norm.reset_running_stats()
        policies = torch.zeros(8, N_LAYERS, 5, dtype=torch.bool)
        policies[rows, 0, 1] = True
        graph(x, policies)
        seen.append(norm.running_mean.clone())
    assert torch.allclose(*seen, rtol=1e-5, atol=1e-7)
    assert seen[0].abs().max() > 0


def test_gradients_reach_what_is_selected_only(graph):
    graph.train()
    policies = torch.zeros(4, N_LAYERS, 5, dtype=torch.bool)
    policies[0, 1, 2] = True
    graph(images(4), policies).square().sum().backward()
    touched = {
        (t, i)
        for t, modules in enumerate(graph.layers)
        for i, module in enumerate(modules)
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    }
    assert touched == {(1, 2), *((t, DEFAULT) for t in FIRST)}


def test_dropout_stands_before_the_classifier(graph):
    graph.train()
    graph.dropout.p = 0.999999
    x, policies = images(2), policies_of(torch.full((2, N_LAYERS), 1))
    bias = dict(graph.head.named_children())["linear"].bias
    assert torch.allclose(graph(x, policies), bias.expand(2, -1))
    assert not torch.allclose(graph.eval()(x, policies), bias.expand(2, -1))


@torch.no_grad()
def test_a_route_is_no_part_of_what_it_routes(graph):
    controller = nn.Linear(1, 1)
    policies = drawn(5, 3)

    def route(batch):
        assert controller is not None
        return policies[: len(batch)]

    routed = Routed(graph, route)
    assert len(list(routed.parameters())) == len(list(graph.parameters()))
    assert torch.equal(routed(images(5)), graph(images(5), policies))
    assert close(routed(images(5), "single"), routed(images(5), "dense"))


def test_weights_are_those_of_the_network(graph):
    network = SPACE.network((3, 31, 0, 8, 0, 16))
    found = graph.weights(network)
    assert set(found) == set(network.weight_shapes())
    assert all(found[name].shape == shape for name, shape in network.weight_shapes().items())
    assert np.array_equal(
        found["stage2/layer1/ir_k5_e6/dw/conv.weight"],
        dict(graph.layers[1][2].named_children())["ir_k5_e6/dw/conv"].weight.detach().numpy(),
    )
