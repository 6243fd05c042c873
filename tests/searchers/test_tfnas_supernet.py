"""TF-NAS's supernet: each part equals the network that it stands for, and learns where it should."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from latbench.graph.torch import to_module
from latbench.spaces.mbconv import NONE, OPERATIONS, TFNASSpace
from searchers.tfnas_supernet import ChannelSGD, Choices, Supernet, bi_sample

SPACE = TFNASSpace(width_multiplier=0.25, resolution=32, num_classes=4, width_step=1)
N_SITES, N_OPS = 18, 8


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Supernet(SPACE)


@pytest.fixture
def net(built):
    return copy.deepcopy(built)


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def depths(chosen):
    """(18,) shares: all of a stage's at this depth."""
    shares, n_blocks = [], [2, 3, 4, 4, 4, 1]
    for n, depth in zip(n_blocks, chosen, strict=True):
        shares += [float(b + 1 == depth) for b in range(n)]
    return torch.tensor(shares)


def in_training(graph, weights):
    """A stand-alone network by the batch's statistics."""
    return to_module(graph, weights).train()


@pytest.mark.parametrize(("classes", "count"), [(100, 44_210_460), (1000, 45_363_360)])
def test_weights_are_as_many_as_the_released_supernets(classes, count):
    with torch.device("meta"):
        net = Supernet(TFNASSpace(num_classes=classes))
    assert sum(p.numel() for p in net.parameters()) == count
    if classes == 100:
        inactive = 0
        for row in net.sites:
            for op in row:
                most = op.dw.out_channels
                inactive += sum(p.numel() * (most - op.width) // most for p, _ in op.channel_masks())
        assert count - inactive == 33_295_404
    choices = Choices(TFNASSpace())
    assert choices.alphas.numel() + choices.betas.numel() == 162


@pytest.mark.parametrize("operation", range(N_OPS))
def test_a_masked_operation_is_the_block_of_its_width(net, operation):
    """Of channels in no order: a stage's first block, and a residual one."""
    for i, side in ((2, 8), (9, 2)):
        site, op = SPACE.block_sites[i], net.sites[i][operation]
        assert site.side == side
        width = op.dw.out_channels // 2 + 3
        with torch.no_grad():
            op.dw.weight.mul_(torch.rand(op.dw.out_channels, 1, 1, 1))
        op.resize(width, faithful=True)
        assert not torch.equal(op.index, torch.arange(width))
        graph = SPACE.block(site, SPACE.picks_of(site, operation, width))
        norms = {n: np.full(s, float(n.endswith("weight")), np.float32) for n, s in graph.weight_shapes().items()}
        norms |= {n: np.ones_like(v) for n, v in norms.items() if n.endswith("running_var")}
        block = in_training(graph, {**norms, **{n: v.detach().numpy() for n, v in op.weights().items()}})
        x = torch.randn(4, site.in_channels, side, side)
        torch.testing.assert_close(op(x), block(x), rtol=1e-5, atol=1e-5)


def test_a_path_is_the_derived_network(net, images):
    """Weights, names and depths: the logits of the stand-alone network."""
    rng = np.random.default_rng(0)
    path = rng.integers(0, N_OPS, N_SITES)
    chosen = [1, 3, 2, 4, 1, 1]
    widths = net.widths()
    for i, o in enumerate(path):
        widths[i, o] = rng.integers(widths[i, o] * 2 // 3, widths[i, o] * 4 // 3 + 1)
    net.resize(widths)
    assert (net.widths() == widths).all()
    stages = [[] for _ in range(6)]
    operations = []
    for site, o, width in zip(SPACE.block_sites, path, widths, strict=True):
        present = site.position < chosen[site.stage]
        operations.append(int(o) if present else NONE)
        if present:
            stages[site.stage].append((int(o), int(width[o])))
    graph = SPACE.network(SPACE.encode(stages))
    module = in_training(graph, net.weights(graph, operations))
    (logits,) = net(images, [tuple(path)], depths(chosen))
    torch.testing.assert_close(logits, module(images), rtol=1e-4, atol=1e-5)


def test_a_certain_mixture_is_a_path(net, images):
    path = tuple(int(o) for o in np.random.default_rng(1).integers(0, N_OPS, N_SITES))
    certain = nn.functional.one_hot(torch.tensor(path), N_OPS).float()
    shares = Choices(SPACE).depth_probs().detach()
    mixed, single = net(images, [certain, path], shares)
    torch.testing.assert_close(mixed, single, rtol=1e-5, atol=1e-6)


def test_a_stages_output_is_the_mixture_of_its_blocks(net, images):
    """Gradients reach every depth, and a certain depth is a chain of so many blocks."""
    choices = Choices(SPACE)
    path = (5,) * N_SITES
    (logits,) = net(images, [path], choices.depth_probs())
    logits.square().sum().backward()
    first_of_one = 17  # stage 6 has one depth
    assert (choices.betas.grad[:first_of_one] != 0).all()
    assert choices.betas.grad[first_of_one] == 0
    with torch.no_grad():
        choices.betas.copy_(50 * depths([2, 1, 3, 2, 4, 1]))
    (nearly,) = net(images, [path], choices.depth_probs())
    (exactly,) = net(images, [path], depths([2, 1, 3, 2, 4, 1]))
    torch.testing.assert_close(nearly, exactly, rtol=1e-5, atol=1e-5)


def test_resizing_prefers_what_was_trained(net):
    op = net.sites[4][3]
    most = op.dw.out_channels
    with torch.no_grad():
        op.dw.weight[most * 3 // 4 :] *= 10  # never active, and large
    before = op.index.clone()
    norms = op.dw.weight.abs().sum((1, 2, 3))
    op.resize(most // 2)
    best = set(norms[before].argsort(descending=True)[: most // 2].tolist())
    assert set(op.index.tolist()) == best
    op.resize(most * 3 // 4)
    assert torch.equal(op.index, before), "back to the same width: the same channels"
    op.resize(most * 3 // 4 + 1)
    (new,) = set(op.index.tolist()) - set(before.tolist())
    assert new == int(norms.argmax())
    op.resize(most // 4, faithful=True)
    assert set(op.index.tolist()) == set(norms.argsort(descending=True)[: most // 4].tolist())


def test_inactive_channels_and_unused_operations_rest(net, images):
    masks = net.channel_masks()
    optimizer = ChannelSGD(net.parameters(), masks, lr=0.1, momentum=0.9, weight_decay=0.1)
    path = (7,) * N_SITES

    def train():
        for _ in range(2):
            net(images, [path], depths([2, 3, 4, 4, 4, 1]))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train()
    net.resize(net.widths() - 8)  # some channels have momentum now, and may not move
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train()
    for name, p in net.named_parameters():
        mask = masks.get(p)
        used = "sites" not in name or name.split(".")[2] == "7"
        if not used:
            assert torch.equal(p, before[name]), name
        elif mask is not None:
            still = ~mask.expand_as(p)
            assert still.any()
            assert torch.equal(p[still], before[name][still]), name
            assert not torch.equal(p, before[name]), name


def test_where_all_is_active_it_is_torchs_sgd():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.05}
    everything = {ours.weight: torch.ones(3, 1, dtype=torch.bool)}
    pairs = [(ours, ChannelSGD(ours.parameters(), everything, **options)),
             (theirs, torch.optim.SGD(theirs.parameters(), **options))]  # fmt: skip
    x = torch.randn(7, 5)
    for _ in range(4):
        for module, optimizer in pairs:
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_a_checkpoint_keeps_the_widths(built, net, images):
    net.resize(net.widths() - 2)
    other = copy.deepcopy(built)
    other.load_state_dict(net.state_dict())
    assert (other.widths() == net.widths()).all()
    path, shares = (6,) * N_SITES, depths([1] * 6)
    assert torch.equal(other(images, [path], shares)[0], net(images, [path], shares)[0])


@pytest.mark.parametrize("temperature", [5.0, 0.2])
def test_two_paths_share_nothing(temperature):
    """2,000 draws: the first follows its probabilities, the second is uniform over what is left."""
    rng = np.random.default_rng(3)
    probs = np.exp(rng.normal(0, 1 / temperature, (N_SITES, N_OPS)))
    probs /= probs.sum(axis=1, keepdims=True)
    drawn = np.array([bi_sample(probs, rng) for _ in range(2000)])  # (2000, 2, L)
    first, second = drawn[:, 0], drawn[:, 1]
    assert (first != second).all()
    assert ((drawn >= 0) & (drawn < N_OPS)).all()
    for site in range(N_SITES):
        likely = probs[site] * 2000 >= 5
        if likely.sum() < 2:
            continue
        counts = np.bincount(first[:, site], minlength=N_OPS)
        observed, expected = counts[likely], probs[site][likely]
        assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4
    offsets = (second - first) % N_OPS
    assert chisquare(np.bincount(offsets.ravel(), minlength=N_OPS)[1:]).pvalue > 1e-3


def test_choices_stay_log_probabilities():
    choices = Choices(SPACE)
    assert choices.alphas.exp().detach().numpy() == pytest.approx(1 / 8)
    with torch.no_grad():
        choices.alphas.add_(torch.randn(N_SITES, N_OPS))
        choices.betas.add_(torch.randn(N_SITES))
    before = choices.depth_probs().detach()
    choices.normalise()
    assert choices.alphas.logsumexp(-1).detach().numpy() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(choices.depth_probs().detach(), before)
    assert before.split(choices.depths)[2].sum().item() == pytest.approx(1)


def test_rows_for_an_oracle_hold_the_chance_of_absence():
    choices = Choices(SPACE)
    weights = torch.full((N_SITES, N_OPS), 1 / N_OPS)
    rows = choices.probs(weights, 20).detach()
    assert rows.shape == (2 * N_SITES, 20)
    for site in SPACE.block_sites:
        n_blocks = choices.depths[site.stage]
        operation, width = site.scope
        present = 1 - site.position / n_blocks
        assert rows[operation, :N_OPS].numpy() == pytest.approx(present / N_OPS)
        assert float(rows[operation, NONE]) == pytest.approx(1 - present, abs=1e-6)
        assert not rows[width].any()
    assert math.isclose(float(rows[::2].sum()), N_SITES, rel_tol=1e-6)
    assert len(OPERATIONS) == N_OPS
