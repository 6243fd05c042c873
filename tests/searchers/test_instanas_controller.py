"""InstaNAS's controller and its pure functions: published sizes and figures, brute force, a mock search."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from latbench.graph.onnx import to_onnx
from latbench.graph.torch import weights_of
from latbench.oracle.factors import FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.instanas import InstaNASSpace
from searchers.instanas_controller import (
    Controller,
    Window,
    controller_graph,
    entropy,
    expected_latency,
    explore,
    instance_latency,
    linear,
    log_prob,
    policies_of,
    policy_loss,
    reward,
    subset_probs,
    subsets_of,
)
from searchers.testing import roofline_table

C10 = InstaNASSpace()
TINY = InstaNASSpace(plan="8x1,12x2s2,16x1", stem_channels=8, head_channels=24, resolution=9)
RIGHT = {"right": 30.0, "wrong": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def macs():
    return FactorOracle.counting(C10, "macs")


def blocks_only(oracle, policies):
    return (instance_latency(oracle, policies) - oracle.chain().constant).tolist()


# ---- policies -------------------------------------------------------------------------------------------------------


def test_subsets_and_bits_are_one_another():
    every = torch.arange(32).reshape(4, 8)
    assert torch.equal(subsets_of(policies_of(every)), every)
    assert policies_of(torch.tensor(18)).tolist() == [False, True, False, False, True]


def test_probabilities_of_subsets_are_products_of_bernoullis():
    p = torch.rand(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = subset_probs(p)
    assert found.sum(-1).numpy() == pytest.approx(1.0)
    for subset, bits in enumerate(itertools.product((0, 1), repeat=5)):
        index = sum(bit << i for i, bit in enumerate(bits))
        want = torch.stack([p[..., i] if bit else 1 - p[..., i] for i, bit in enumerate(bits)]).prod(0)
        assert torch.allclose(found[..., index], want), subset
    torch.autograd.gradcheck(subset_probs, p[:1, :1].requires_grad_())


# ---- T5: latency ----------------------------------------------------------------------------------------------------


def test_published_latencies_of_policies(macs):
    ones, first = torch.ones(1, 17, 5, dtype=torch.bool), torch.zeros(3, 17, 5, dtype=torch.bool)
    first[0, :, 0] = True
    first[2, [s.first for s in C10.layers], 4] = True  # what nothing means there
    assert blocks_only(macs, ones) == [422_995_968]
    assert blocks_only(macs, first) == [90_912_768, 60_456_960, 60_456_960]


def test_an_absent_layer_costs_nothing(macs):
    some = policies_of(torch.randint(32, (8, 17), generator=torch.Generator().manual_seed(0)))
    without = some.clone()
    layer = next(i for i, site in enumerate(C10.layers) if not site.first)
    without[:, layer] = False
    subsets = subsets_of(some)[:, layer].tolist()
    block = [C10.block(C10.layers[layer], (s,)) for s in subsets]
    gone = instance_latency(macs, some) - instance_latency(macs, without)
    assert gone.tolist() == [0 if b is None else b.macs for b in block]


def test_expectations_of_certain_policies_are_latencies(macs):
    policies = policies_of(torch.randint(32, (5, 17), generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(expected_latency(macs, policies.double()), instance_latency(macs, policies), rtol=1e-9)


def test_expectations_are_means_over_samples(macs):
    p = torch.full((1, 17, 5), 0.5, dtype=torch.float64)
    samples = torch.rand(20_000, 17, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    assert float(instance_latency(macs, samples).mean()) == pytest.approx(float(expected_latency(macs, p)), rel=0.01)


def test_expectations_of_modules_follow_the_paper(macs):
    """sum P tau + sum over first layers of tau_4 prod(1 - P), where a subset costs the sum of its modules."""
    p = torch.rand(4, 17, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    chain = macs.chain()
    tau = torch.tensor(np.array(chain.unary)[:, [1, 2, 4, 8, 16]])  # (17, 5)
    first = torch.tensor([s.first for s in C10.layers])
    want = (p * tau).sum((1, 2)) + ((1 - p).prod(-1) * tau[:, 4])[:, first].sum(1) + chain.constant
    found = expected_latency(macs, p)
    assert torch.allclose(found, want, rtol=1e-9)
    ours, theirs = (torch.autograd.grad(x.sum(), p)[0] for x in (found, want))
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_measured_subsets_need_not_be_sums():
    """On a roofline a subset reads its input once per module but starts fewer kernels of its own than the sum says."""
    oracle = LutOracle.fit(roofline_table(TINY))
    p = torch.rand(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    every = torch.tensor(list(itertools.product(range(32), repeat=2)))
    archs = torch.zeros(len(every), 4, dtype=torch.long)
    archs[:, 1:3] = every
    point = p.clone()
    point[:, [0, 3]] = 0
    weights = subset_probs(point)[0]
    chances = weights[1, every[:, 0]] * weights[2, every[:, 1]]
    want = (chances * instance_latency(oracle, policies_of(archs))).sum()
    assert float(expected_latency(oracle, point)[0]) == pytest.approx(float(want), rel=1e-9)


# ---- T3, T4, T13: reward and window ---------------------------------------------------------------------------------


def test_published_rewards():
    window, latencies = Window(0.2, 1.0), torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.2], dtype=torch.float64)
    yes, no = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    want = pytest.approx([0, 22.5, 30, 22.5, 0, 0], abs=1e-9)
    assert reward(latencies, yes, window, **RIGHT).tolist() == want
    assert reward(1000 * latencies + 7, yes, Window(207, 1007), **RIGHT).tolist() == want
    assert reward(latencies, no, window, **RIGHT).tolist() == [0] * 6
    assert reward(latencies, no, window, right=30, wrong=-10).tolist() == [-10] * 6
    assert reward(latencies, yes, window, gamma=2, **RIGHT).tolist() == pytest.approx([0, 16.875, 30, 16.875, 0, 0])
    assert window.middle == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("share", "upper"), [(0, 296.0972), (0.25, 233.4370), (0.5, 170.7768), (0.9, 70.5205), (1, 45.4564)]
)
def test_published_windows(share, upper):
    base, most = 90.912768, 422.995968
    assert linear(0.7 * most, 0.5 * base, share) == pytest.approx(upper, abs=1e-4)


def test_a_window_never_closes():
    """Theirs crosses its lower bound at e/N = 0.94 on MACs, and divides by zero where both meet."""
    window = Window.clamped(60.456960, 45.456384, 0.0909)
    assert window.upper == pytest.approx(60.456960 + 0.0909)
    latencies = torch.tensor([60.0, 60.5, 61.0])
    assert reward(latencies, torch.ones(3, dtype=torch.bool), window, **RIGHT)[[0, 2]].tolist() == [0, 0]
    empty = reward(latencies, torch.ones(3, dtype=torch.bool), Window(60.5, 60.5), **RIGHT)
    assert empty.tolist() == [0, 0, 0]


# ---- T7, T8: exploration and gradient -------------------------------------------------------------------------------


def test_exploration_keeps_away_from_certainty():
    p = torch.tensor([0.0, 0.5, 1.0])
    assert explore(p, 0.8).tolist() == pytest.approx([0.2, 0.5, 0.8])
    assert explore(p, 1.0).tolist() == p.tolist()


def test_the_policy_gradient_is_the_closed_form():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, 5, dtype=torch.float64, generator=rng, requires_grad=True)
    p, alpha = torch.sigmoid(logits), 0.8
    drawn_from = explore(p, alpha)
    sampled = torch.rand(6, 3, 5, generator=rng) < 0.5
    advantage = torch.randn(6, dtype=torch.float64, generator=rng)
    loss, _ = policy_loss(p, sampled, advantage, alpha=alpha, entropy_weight=0.0)
    loss.backward()
    a = advantage[:, None, None]
    slope = a * (sampled.double() - drawn_from) / (drawn_from * (1 - drawn_from)) * (2 * alpha - 1) * p * (1 - p)
    assert torch.allclose(-6 * logits.grad, slope.detach(), rtol=1e-9)


def test_log_probabilities_are_those_of_bernoullis():
    p = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(1))
    bits = policies_of(torch.randint(32, (4, 2), generator=torch.Generator().manual_seed(2)))
    want = torch.distributions.Bernoulli(p).log_prob(bits.float()).sum((1, 2))
    assert torch.allclose(log_prob(p, bits), want)


def test_entropies():
    p = torch.tensor([[[0.0, 0.25, 0.5, 0.75, 1.0]]], dtype=torch.float64)
    full = -sum(x * np.log(x) for x in (0.25, 0.75, 0.5, 0.5, 0.75, 0.25))
    assert float(entropy(p)) == pytest.approx(full, abs=1e-9)
    assert float(entropy(p, one_sided=True)) == pytest.approx(-sum(x * np.log(x) for x in (0.25, 0.5, 0.75)), abs=1e-9)
    q = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None, None]
    assert float(q[entropy(q).argmax()]) == pytest.approx(0.5)
    assert float(q[entropy(q, one_sided=True).argmax()]) == pytest.approx(np.exp(-1), abs=0.01), "pulls towards off"


def test_a_sample_equal_to_the_map_policy_teaches_nothing():
    """Only the entropy is left."""
    p = torch.rand(5, 2, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    sampled = p.detach() >= 0.5
    r = reward(torch.full((5,), 0.5), torch.tensor([1, 0, 1, 1, 0]).bool(), Window(0.0, 1.0), **RIGHT)
    alone, _ = policy_loss(p, sampled, r - r, alpha=0.8, entropy_weight=0.0)
    assert float(alone.detach()) == 0
    (slope,) = torch.autograd.grad(alone, p)
    assert not slope.any()
    loss, mean = policy_loss(p, sampled, r - r, alpha=0.8, entropy_weight=0.8)
    assert float(loss.detach()) == pytest.approx(-0.8 * float(mean.detach()))


# ---- T2: the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "n_params", "macs"),
    [("c10", 80_165, 12_244_288), ("tiny", 80_165, 48_960_832), ("imagenet", 320_421, 20_289_152)],
)
def test_published_controllers(layout, n_params, macs):
    space = InstaNASSpace(layout=layout)
    graph = controller_graph(space)
    assert (graph.n_params, graph.macs) == (n_params, macs)
    controller = Controller(space)
    assert sum(p.numel() for p in controller.parameters()) == n_params
    probs = controller(torch.randn(2, 3, space.resolution, space.resolution))
    assert probs.shape == (2, 17, 5)
    assert ((probs > 0) & (probs < 1)).all()
    assert probs.dtype == torch.float32


@pytest.mark.parametrize("resolution", [8, 15, 32, 45])
def test_controllers_of_odd_sizes_and_their_onnx(resolution):
    space = InstaNASSpace(plan="8x1,12x2s2", resolution=resolution, batch=2)
    torch.manual_seed(0)
    controller = Controller(space).eval()
    x = torch.randn(2, 3, resolution, resolution)
    session = onnxruntime.InferenceSession(
        to_onnx(controller_graph(space), weights_of(controller.body)), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x.numpy()})
    want = controller(x).detach().numpy()
    assert found.reshape(2, 3, 5) == pytest.approx(want, abs=1e-5)


def test_convolutions_start_as_published():
    torch.manual_seed(0)
    body = dict(Controller(C10).body.named_children())
    first = body["block3/first/conv"].weight
    assert float(first.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert (body["block3/first/bn"].weight == 1).all()


# ---- T9: a search without images ------------------------------------------------------------------------------------

N, BATCHES, SIZE = 20, 40, 64
TAU = torch.tensor([6.0, 3.0, 8.0, 4.0, 1.0]).repeat(4, 1)
FIRST_LAYERS = torch.tensor([True, False, True, False])


def mock_latency(policies):
    empty = ~policies.any(-1)
    return (policies * TAU).sum((1, 2)) + (empty & FIRST_LAYERS).sum(1) * TAU[0, 4]


def mock_images(n):
    """x0 says whether an image is hard; a hard one needs module 0 of layer 1."""
    x = 0.3 * torch.randn(n, 8)
    x[:, 0] = torch.randint(2, (n,)) * 2.0 - 1
    return x


def mock_search(seed, *, mended):
    """Accuracy, mean latency of hard and easy images, and mean reward of MAP policies in the end."""
    torch.manual_seed(seed)
    controller = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 20), nn.Sigmoid())
    adam = torch.optim.Adam(controller.parameters(), lr=5e-3)
    most, base, least = float(TAU.sum()), float(TAU[:, 0].sum()), float(TAU[FIRST_LAYERS, 4].sum())

    def judged(x, policies, window):
        latencies, hard = mock_latency(policies), x[:, 0] > 0
        correct = ~hard | policies[:, 1, 0]
        return latencies, correct, reward(latencies, correct, window, **RIGHT)

    for epoch in range(N + 1):
        upper = linear(0.7 * most, 0.5 * base, epoch / N)
        window = Window.clamped(least, upper, 1e-3 * base)
        alpha = linear(0.8, 0.98, epoch / N) if mended else 0.8
        for _ in range(BATCHES):
            x = mock_images(SIZE)
            probs = controller(x).unflatten(1, (4, 5))
            sampled = torch.bernoulli(explore(probs.detach(), alpha)).bool()
            gained = judged(x, sampled, window)[2] - judged(x, probs >= 0.5, window)[2]
            loss, _ = policy_loss(probs, sampled, gained, alpha=alpha, entropy_weight=0.8, one_sided=not mended)
            adam.zero_grad()
            loss.backward()
            adam.step()
    x = mock_images(4000)
    latencies, correct, gained = judged(x, controller(x).unflatten(1, (4, 5)) >= 0.5, window)
    hard = x[:, 0] > 0
    return tuple(float(v.float().mean()) for v in (correct, latencies[hard], latencies[~hard], gained))


@pytest.mark.parametrize("seed", range(2))
def test_the_published_exploration_on_the_mock(seed):
    accuracy, hard, easy, gained = mock_search(seed, mended=False)
    assert accuracy >= 0.99
    assert abs(hard - 8.0) <= 0.9
    assert easy <= 3
    assert 13 <= gained <= 16


def test_the_mended_exploration_on_the_mock():
    """Nearly twice the reward: nothing is sampled above the window in the end."""
    runs = [mock_search(seed, mended=True) for seed in range(2)]
    assert min(accuracy for accuracy, *_ in runs) >= 0.99
    assert statistics.mean(gained for *_, gained in runs) >= 25
