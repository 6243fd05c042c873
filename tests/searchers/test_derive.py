"""From an architecture to its file and its training."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from toy_space import ToySpace, three_bits

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from searchers.base import Problem
from searchers.data import Splits
from searchers.derive import Recipe, inherit, module_of, train_network, write_network
from searchers.slimmable import Slimmable
from searchers.testing import InterruptedRunError, Watch
from searchers.world import World

WORLD = World(torch.device("cpu"))
ARCH = (2, 1, 0)


def problem(out, space=None):
    oracle = FactorOracle.counting(space or ToySpace(), "macs")
    return Problem((Constraint(oracle, 1e9),), three_bits(), out)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_the_file_is_the_module_folded(tmp_path, dtype, tolerance):
    space = ToySpace(batch=2, dtype=dtype)
    graph = space.network(ARCH)
    torch.manual_seed(0)
    module = module_of(graph)
    module.train()(torch.randn(8, 3, 16, 16))  # running statistics
    module.eval()
    write_network(tmp_path / "n.onnx", graph, module)
    session = onnxruntime.InferenceSession(str(tmp_path / "n.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 16, 16)
    (found,) = session.run(None, {"x": images.numpy().astype(dtype)})
    with torch.no_grad():
        wanted = module(images).numpy()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    assert b"BatchNorm" not in (tmp_path / "n.onnx").read_bytes()


def test_training_from_scratch_learns_and_resumes(tmp_path):
    recipe = Recipe(epochs=6, batch_size=32, lr=3.2, warmup_epochs=1)
    module, figures = train_network(problem(tmp_path), ARCH, recipe, folder=tmp_path / "whole", world=WORLD)
    assert figures["accuracy"] > 0.5
    assert figures["images"] == 576
    assert not module.training
    with pytest.raises(InterruptedRunError):
        train_network(problem(tmp_path), ARCH, recipe, folder=tmp_path / "parts", world=WORLD, reporter=Watch(60))
    twin, again = train_network(problem(tmp_path), ARCH, recipe, folder=tmp_path / "parts", world=WORLD)
    assert again == figures
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))
    with pytest.raises(UsageError, match="trained with other settings"):
        train_network(problem(tmp_path), (0, 0, 0), recipe, folder=tmp_path / "whole", world=WORLD)


def test_inherited_weights_are_the_slimmable_s(tmp_path):
    torch.manual_seed(0)
    one = problem(tmp_path)
    net, graph = Slimmable(ToySpace()), ToySpace().network(ARCH)
    splits = Splits.of(one, 8)
    module, accuracy = inherit(one, graph, net.weights(graph), splits, WORLD, 32)
    assert 0 <= accuracy <= 1
    conv = module.get_submodule("conv3/conv").weight
    torch.testing.assert_close(conv, net.body.get_submodule("conv3/conv").weight[: conv.shape[0], : conv.shape[1]])


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"epochs": 3, "warmup_epochs": 3.0}])
def test_recipes_that_cannot_be_followed(wrong):
    with pytest.raises(UsageError, match="a recipe needs"):
        Recipe(**wrong)
