"""Training-free proxies against arithmetic done another way, and against published accuracies."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from toy_space import ToySpace, three_bits

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.spaces.nasbench201 import NASBench201Space
from searchers.base import Problem
from searchers.derive import module_of
from searchers.proxies import NASWOT, SynFlow, _mean, agreement, synaptic_flow

REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", ""))
NETWORKS = REFERENCE / "nb201_search.parquet"
SMALL_CELLS = NASBench201Space(resolution=16, num_cells=1, channels=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def problem_of(space, data="digits", seed=0, out="unused"):
    return Problem((Constraint(FactorOracle.counting(space, "macs"), 1e12),), data, Path(out), seed)


# ---- synaptic flow --------------------------------------------------------------------------------------------------


def test_flow_of_a_chain_is_its_output_times_its_layers():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 2, bias=False), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(4 * 9, 2, bias=False))
    kernels = [p.detach().double().abs() for p in net.parameters()]
    x = nn.functional.conv2d(torch.ones(1, 3, 6, 6, dtype=torch.float64), kernels[0])
    output = float((nn.functional.conv2d(x, kernels[1]).flatten() @ kernels[2].T).sum())
    assert synaptic_flow(net, (3, 6, 6)) == pytest.approx(3 * output)


def test_flow_of_two_branches_adds_up_what_passes_each():
    torch.manual_seed(1)

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            return self.left(x) + self.right(x)

    net = Fork()
    stem, left, right = (p.detach().double().abs()[:, :, 0, 0] for p in net.parameters())
    passed = stem @ torch.ones(3, dtype=torch.float64)
    through = float((left @ passed).sum() + (right @ passed).sum())
    assert synaptic_flow(net, (3, 1, 1)) == pytest.approx(
        2 * through
    )  # the stem carries all, the branches together too


def test_flow_is_of_magnitudes_and_not_of_biases():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    mirrored = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    mirrored.load_state_dict({name: -value for name, value in net.state_dict().items()})
    first, bias, second, _ = (p.detach().double().abs() for p in net.parameters())
    hidden = first.sum(1)
    expected = float((second @ hidden).sum() + (second @ (hidden + bias)).sum())  # a bias feeds the layer after it
    assert synaptic_flow(net, (3, 1, 1)) == pytest.approx(expected)
    assert synaptic_flow(mirrored, (3, 1, 1)) == pytest.approx(expected)


def test_nothing_flows_through_a_cell_without_edges():
    synflow = SynFlow(problem_of(SMALL_CELLS))
    assert synflow.evaluate((0,) * 6) == 0
    assert synflow.evaluate((3,) * 6) > synflow.evaluate((1,) * 6) > 0


def test_a_wider_network_has_more_flow():
    synflow = SynFlow(problem_of(ToySpace()), repeats=3)
    assert synflow.evaluate((2, 2, 3)) > synflow.evaluate((0, 0, 0))


# ---- agreement of rectifiers ----------------------------------------------------------------------------------------


def test_kernel_counts_rectifiers_in_the_same_state():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU6(), nn.Flatten(), nn.LazyLinear(3))
    images = torch.randn(6, 3, 5, 5)
    first = net[0](images)
    second = net[2](first.relu())
    codes = torch.cat([(first > 0).flatten(1), (second > 0).flatten(1)], 1).numpy()
    kernel = agreement(net, images)
    assert kernel.shape == (6, 6)
    assert (np.diag(kernel) == codes.shape[1]).all()
    for i, j in combinations(range(6), 2):
        assert kernel[i, j] == kernel[j, i] == codes.shape[1] - (codes[i] != codes[j]).sum()


def test_naswot_is_the_kernels_log_determinant():
    problem = problem_of(ToySpace(), three_bits())
    naswot = NASWOT(problem, batch_size=8)
    arch = (2, 2, 3)
    torch.manual_seed(int(np.random.default_rng((problem.seed, 0)).integers(1 << 63)))
    kernel = agreement(module_of(problem.space.network(arch)), naswot._images)
    assert naswot.evaluate(arch) == pytest.approx(np.linalg.slogdet(kernel)[1])


def test_equal_images_are_the_worst_and_still_a_number():
    class Same(type(three_bits())):
        def image(self, split, index):
            return super().image(split, 0)

    source = three_bits()
    same = Same(source.name, source.classes, source.images, source.targets, source.mirrored)
    told_apart = NASWOT(problem_of(ToySpace(), source), batch_size=8).evaluate((2, 2, 3))
    alike = NASWOT(problem_of(ToySpace(), same), batch_size=8).evaluate((2, 2, 3))
    assert np.isfinite(alike)
    assert alike < told_apart - 100


def test_networks_without_rectifiers_are_refused():
    with pytest.raises(UsageError, match="this network has none: take synflow or train"):
        agreement(nn.Sequential(nn.Conv2d(3, 2, 1), nn.SiLU()), torch.zeros(2, 3, 4, 4))


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SynFlow, NASWOT])
def test_scores_depend_on_the_seed_and_not_on_the_order(kind):
    space = ToySpace()
    archs = [(0, 1, 2), (2, 2, 0), (1, 0, 3)]
    there, back = kind(problem_of(space, three_bits())), kind(problem_of(space, three_bits()))
    forward = [there.evaluate(arch) for arch in archs]
    torch.rand(7)  # whatever others draw
    assert [back.evaluate(arch) for arch in archs[::-1]] == forward[::-1]
    assert kind(problem_of(space, three_bits(), seed=1)).evaluate(archs[0]) != forward[0]


def test_several_initialisations_are_averaged():
    problem, drawn = problem_of(ToySpace(), three_bits()), []

    def score(module):
        drawn.append(float(next(module.parameters()).detach().sum()))
        return drawn[-1]

    assert _mean(problem, (1, 1, 1), 3, score) == pytest.approx(np.mean(drawn))
    assert len(set(drawn)) == 3
    with pytest.raises(UsageError, match="at least 1 initialisation"):
        SynFlow(problem, repeats=0).evaluate((1, 1, 1))


@pytest.mark.skipif(not NETWORKS.is_file(), reason="needs nb201_search.parquet in the folder $LATBENCH_REFERENCE_DATA")
@pytest.mark.parametrize(("kind", "least"), [(SynFlow, 0.6), (NASWOT, 0.6)])
def test_scores_rank_published_cells(kind, least):
    """Both rank real cells by their published CIFAR-10 accuracies, at a fraction of the published size."""
    table = pq.read_table(NETWORKS).to_pandas().sample(60, random_state=0)
    evaluator = kind(problem_of(SMALL_CELLS))
    scores = [evaluator.evaluate(SMALL_CELLS.parse_arch(text)) for text in table["arch_str"]]
    assert spearmanr(scores, table["c10_test_200ep"]).statistic > least
