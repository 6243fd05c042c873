"""The topology term in a differentiable search: its gradient, what it leaves alone, and where it leads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_space import ToySpace, three_bits

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.spaces.nsc import IRLASSpace
from searchers.base import Problem
from searchers.data import Batch
from searchers.irlas_darts import (
    NONE,
    OPS,
    DifferentiableIRLAS,
    Supernet,
    edges,
    expected,
    genotype,
    kept_share,
    mirror_values,
)
from searchers.mirror import Features, Mirror, train
from searchers.testing import InterruptedRunError, Watch

TOY = FactorOracle.counting(ToySpace(), "macs")
TINY = DifferentiableIRLAS(cells=3, channels=4, nodes=2, epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def trained() -> Mirror:
    return train(Features(10), [IRLASSpace().parse_arch("resnext")], tolerance=1e-2)


def toy_problem(out) -> Problem:
    return Problem((Constraint(TOY, 1e12),), three_bits(384), out, max_images=256)


def test_edges_are_darts_own() -> None:
    assert len(edges(4)) == 14
    assert edges(2) == ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2))


def test_the_term_is_the_sum_that_it_says(trained: Mirror) -> None:
    """Written out with loops and the features of single codes."""
    rng = np.random.default_rng(0)
    alpha = rng.standard_normal((14, 8))
    probs = np.exp(alpha) / np.exp(alpha).sum(1, keepdims=True)
    total, row = 0.0, 0
    for i in range(2, 6):
        strengths = 1 - probs[row : row + i, NONE]
        for j in range(i):
            q = min(1.0, 2 * strengths[j] / strengths.sum())
            for o, code in enumerate(OPS.values()):
                if code is not None:
                    phi = np.zeros(trained.features.size)
                    phi[list(trained.features.bits((i, *code, j, 0)))] = 1
                    total += 0.9**i * q * probs[row + j, o] * (trained.weights @ phi) / trained.scale
        row += i
    got = expected(torch.tensor(alpha), torch.tensor(mirror_values(trained)), 4)
    assert float(got) == pytest.approx(total, rel=1e-9)


def test_its_gradient_is_that_of_central_differences(trained: Mirror) -> None:
    values = torch.tensor(mirror_values(trained))
    alpha = torch.tensor(np.random.default_rng(1).standard_normal((14, 8)), requires_grad=True)
    (gradient,) = torch.autograd.grad(expected(alpha, values, 4), alpha)
    h = 1e-5
    with torch.no_grad():
        for i in range(14):
            for o in range(8):
                step = torch.zeros_like(alpha)
                step[i, o] = h
                slope = (expected(alpha + step, values, 4) - expected(alpha - step, values, 4)) / (2 * h)
                assert float(gradient[i, o]) == pytest.approx(float(slope), abs=1e-4)
    assert float(gradient.abs().max()) > 1e-3


def test_two_edges_of_a_node_are_kept_on_average() -> None:
    share = kept_share(torch.full((14, 8), 1 / 8, dtype=torch.float64), 4)
    want = [2 / i for i, _ in edges(4)]
    np.testing.assert_allclose(share.numpy(), want)
    dead = torch.full((5, 8), 1 / 8)
    dead[0] = torch.eye(8)[NONE]
    assert kept_share(dead, 2)[:2].tolist() == [0.0, 1.0], "an edge that is none is not kept, and no share exceeds 1"


def net_and_batch() -> tuple[Supernet, Batch]:
    torch.manual_seed(0)
    net = Supernet(cells=3, channels=4, nodes=2, resolution=16, num_classes=8)
    return net, Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 5, 7]))


def test_with_weights_of_zero_it_is_darts(trained: Mirror) -> None:
    net, batch = net_and_batch()
    values = torch.tensor(mirror_values(trained, 2)).float()
    ms = torch.rand(5, 8)
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(net(batch.images), batch.labels), list(net.alphas))
    silent = replace(TINY, mirror_weight=0.0)
    off = torch.autograd.grad(silent.alpha_loss(net, batch, values=values, ms=ms), list(net.alphas))
    on = torch.autograd.grad(TINY.alpha_loss(net, batch, values=values, ms=ms), list(net.alphas))
    for ours, theirs in zip(off, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(on[0], plain[0])
    torch.testing.assert_close(on[1], plain[1], rtol=0, atol=0)  # the reduction cell is not guided


def test_latency_adds_its_expectation(trained: Mirror) -> None:
    net, batch = net_and_batch()
    ms = torch.rand(5, 8)
    options = replace(TINY, mirror_weight=0.0, latency_weight=0.3, budget_ms=2.0)
    with torch.no_grad():
        plain, dear = (float(o.alpha_loss(net, batch, ms=ms)) for o in (replace(options, latency_weight=0.0), options))
        assert dear - plain == pytest.approx(0.3 * float(expected(net.alphas[0], ms, 2)) / 2.0, abs=1e-5)


def test_only_weights_and_alphas_are_trained() -> None:
    net, batch = net_and_batch()
    torch.nn.functional.cross_entropy(net(batch.images), batch.labels).backward()
    assert all(p.grad is not None for p in (*net.weights(), *net.alphas))
    scales = [m.weight for m in net.cells.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert scales
    assert not any(scale.requires_grad for scale in scales), "alpha is the only scale within a cell"


def test_a_genotype_keeps_two_edges_of_each_node() -> None:
    alpha = torch.zeros(5, 8)
    alpha[:, NONE] = 9.0  # never chosen
    alpha[0, list(OPS).index("sep_conv_5x5")] = 3.0
    alpha[1, list(OPS).index("skip_connect")] = 1.0
    alpha[3, list(OPS).index("max_pool_3x3")] = 2.0
    alpha[4, list(OPS).index("dil_conv_3x3")] = 4.0
    assert genotype(alpha, 2) == (
        ("sep_conv_5x5", 0, 2),
        ("skip_connect", 1, 2),
        ("max_pool_3x3", 1, 3),
        ("dil_conv_3x3", 2, 3),
    )


def test_guidance_raises_the_cells_score(trained: Mirror, tmp_path) -> None:
    torch.set_num_threads(1)
    eager = replace(TINY, alpha_lr=0.1)
    _, plain = replace(eager, mirror_weight=0.0).search(toy_problem(tmp_path / "a"), trained, num_classes=8)
    cells, guided = replace(eager, mirror_weight=5.0).search(toy_problem(tmp_path / "b"), trained, num_classes=8)
    assert guided[-1]["mirror"] > plain[-1]["mirror"] + 0.05
    assert [len(cell) for cell in cells] == [4, 4]


def test_a_search_that_was_cut_off_ends_as_one_that_was_not(trained: Mirror, tmp_path, monkeypatch) -> None:
    torch.set_num_threads(1)
    whole = TINY.search(toy_problem(tmp_path / "whole"), trained, num_classes=8)
    monkeypatch.setattr("searchers.train.SAVE_EVERY_S", 0.0)
    with pytest.raises(InterruptedRunError):
        TINY.search(toy_problem(tmp_path / "parts"), trained, num_classes=8, reporter=Watch(3))
    parts = TINY.search(toy_problem(tmp_path / "parts"), trained, num_classes=8)
    assert parts[0] == whole[0]
    told = [[{k: v for k, v in row.items() if k != "seconds"} for row in history] for _, history in (whole, parts)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DifferentiableIRLAS(mirror_weight=-1.0), "must not be negative"),
        (lambda: DifferentiableIRLAS(budget_ms=0.0), "budget_ms above zero"),
        (lambda: Supernet(cells=3, channels=4, nodes=2, resolution=10, num_classes=2), "divide by 4"),
    ],
)
def test_bad_input_is_refused(make, words) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_a_mirror_of_short_blocks_does_not_fit_a_cell() -> None:
    expert = IRLASSpace(max_index=4).parse_arch("(1,1,3,0,0)(2,5,0,0,1)(3,7,0,0,0)")
    with pytest.raises(UsageError, match="max_index 5 or more"):
        mirror_values(train(Features(4), [expert], tolerance=1e-2))
