"""RelativeNAS' training from scratch: its schedules, the auxiliary classifier and dropped paths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from latbench.errors import UsageError
from latbench.graph.torch import to_module, weights_of
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.spaces.cells import GENOTYPES, RelativeNASSpace, arch_of
from latbench.spaces.nasbench201 import NASBench201Space
from searchers.base import Problem
from searchers.relativenas_retraining import CIFAR, IMAGENET, Retraining, dropped, retrain
from searchers.testing import InterruptedRunError, Watch

SPACE = RelativeNASSpace(resolution=32, channels=4, layers=3)
PUBLISHED = arch_of(GENOTYPES["relativenas"])
QUICK = replace(CIFAR, epochs=2, batch_size=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def problem_of(space, out):
    return Problem((Constraint(FactorOracle.counting(space, "macs"), 1e12),), "digits", out, max_images=64)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.1), (4, 0.5), (5, 0.489796), (244, 0.002041), (245, 0.002041), (249, 0.000408)]
)
def test_rates_on_imagenet(epoch, rate):
    assert IMAGENET.rate(epoch) == pytest.approx(rate, abs=5e-7)


def test_rates_on_cifar_are_a_cosine():
    assert CIFAR.rate(0) == 0.025
    assert CIFAR.rate(300) == pytest.approx(0.0125)
    assert 0 < CIFAR.rate(599) < 1e-6


def test_paths_are_dropped_behind_every_operation_but_identities():
    module = to_module(SPACE.network(PUBLISHED)).train()
    chance = dropped(module, SPACE, PUBLISHED)
    hooked = {name.rsplit("/op", 1)[0] for name, layer in module.named_children() if layer._forward_hooks}
    operations = {
        s.name for s in SPACE.sites if s.block_type == "operation" and SPACE.block(s, SPACE.picks(s, PUBLISHED))
    }
    assert hooked == operations
    assert len(operations) == 3 * 8 - 1, "the normal cell has one identity"
    x, state = torch.randn(4, 3, 32, 32), weights_of(module)
    whole = module(x)
    chance(0.5)
    assert not torch.equal(module(x), whole)
    fresh = to_module(SPACE.network(PUBLISHED), state)
    assert torch.equal(to_module(SPACE.network(PUBLISHED), weights_of(module)).train()(x), fresh.train()(x))


def test_a_retrained_network_is_resumed_and_stands_alone(tmp_path):
    whole, figures = retrain(problem_of(SPACE, tmp_path), PUBLISHED, QUICK, folder=tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        retrain(problem_of(SPACE, tmp_path), PUBLISHED, QUICK, folder=tmp_path / "parts", reporter=Watch(2))
    parts, again = retrain(problem_of(SPACE, tmp_path), PUBLISHED, QUICK, folder=tmp_path / "parts")
    assert again == figures
    assert figures["images"] == 60, "six of every class"
    ours, theirs = weights_of(whole), weights_of(parts)
    assert set(ours) == set(SPACE.network(PUBLISHED).weight_shapes()), "no auxiliary classifier"
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    other, _ = retrain(problem_of(SPACE, tmp_path), PUBLISHED, replace(QUICK, auxiliary=0.0), folder=tmp_path / "other")
    assert not np.array_equal(weights_of(other)["stem/conv.weight"], ours["stem/conv.weight"])


def test_what_cannot_be_retrained_is_refused(tmp_path):
    with pytest.raises(UsageError, match="latbench train"):
        retrain(problem_of(NASBench201Space(), tmp_path), (0,) * 6, QUICK, folder=tmp_path)
    with pytest.raises(UsageError, match="more than 5 epochs"):
        Retraining(epochs=5, schedule="linear")
    with pytest.raises(UsageError, match="epochs >= 1"):
        Retraining(epochs=0)
