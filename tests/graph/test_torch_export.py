"""latbench.graph.torch_export: real networks, exported, counted and folded, against torch and published figures."""

from __future__ import annotations

import sys

import onnxruntime as ort
import pytest
import torch
from torch import nn
from torchvision import models

from latbench.errors import EnvironmentUnfitError, ModelError, UsageError
from latbench.graph.onnx_model import fold_batch_norm, from_bytes, summarise
from latbench.graph.torch_export import from_module, from_torchvision

# torchvision's own `_docs` figures for 224 x 224: GFLOPS (which are multiply-accumulates) and num_params.
NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "efficientnet_b0",
            "densenet121"]  # fmt: skip


def with_lively_statistics(module: nn.Module) -> nn.Module:
    """Batch norms that would show any error in folding: torch initialises them to the identity."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            assert m.running_mean is not None
            assert m.running_var is not None
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module


def run(model: bytes, x: torch.Tensor) -> torch.Tensor:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # ONNX Runtime folds BN itself
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_computes_what_torch_does(name: str) -> None:
    torch.manual_seed(0)
    module = with_lively_statistics(models.get_model(name, weights=None)).eval()
    x = torch.randn(1, 3, 64, 64)
    exported = from_bytes(from_module(module, (1, 3, 64, 64)))
    folded, report = fold_batch_norm(exported)
    n_batch_norms = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert len(report.folded) + len(report.kept) == n_batch_norms
    assert len(report.kept) == (62 if name == "densenet121" else 0)  # it normalises first
    assert summarise(folded).n_by_op.get("BatchNormalization", 0) == len(report.kept)
    y = run(exported.SerializeToString(), x)
    assert relative_error(y, run(folded.SerializeToString(), x)) < 1e-5
    with torch.no_grad():
        assert relative_error(module(x), y) < 1e-4  # other kernels


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_torchs_before_and_after_folding(name: str) -> None:
    module = models.get_model(name, weights=None)
    exported = from_bytes(from_module(module, (1, 3, 64, 64)))
    assert summarise(exported).n_params == sum(p.numel() for p in module.parameters())
    folded, report = fold_batch_norm(exported)
    # As torch.nn.utils.fuse_conv_bn_eval does: a scale and a bias per channel become one bias.
    shapes = {t.name: t.dims for t in exported.graph.initializer}
    shapes |= {n.output[0]: shapes[n.input[0]] for n in exported.graph.node if n.op_type == "Identity"}
    channels = {n.name: shapes[n.input[1]][0] for n in exported.graph.node if n.op_type == "BatchNormalization"}
    merged = sum(channels[bn] for bn, _ in report.folded)
    assert summarise(folded).n_params == sum(p.numel() for p in module.parameters()) - merged


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_the_published_ones(name: str) -> None:
    published = models.get_model_weights(name).DEFAULT.meta
    summary = summarise(from_bytes(from_torchvision(name)))
    assert summary.macs is not None
    assert summary.macs / 1e9 == pytest.approx(published["_ops"], abs=6e-4)
    assert summary.n_params == published["num_params"]
    assert summary.inputs == (("input", (1, 3, 224, 224), "float32"),)
    assert summary.outputs[0].shape == (1, 1000)


def test_macs_of_known_figures() -> None:
    assert summarise(from_bytes(from_torchvision("mobilenet_v2"))).macs == 300_774_272
    assert summarise(from_bytes(from_torchvision("resnet50", batch=2))).macs == 2 * 4_089_184_256


def test_seed_decides_the_weights_and_leaves_torchs_alone() -> None:
    before = torch.random.get_rng_state()
    first = from_torchvision("squeezenet1_1", 64, seed=1)
    keys = [summarise(from_bytes(data)).key for data in (first, from_torchvision("squeezenet1_1", 64, seed=1))]
    assert keys[0] == keys[1]
    assert keys[0] != summarise(from_bytes(from_torchvision("squeezenet1_1", 64, seed=2))).key
    assert torch.equal(before, torch.random.get_rng_state())


def test_transformers_take_their_resolution() -> None:
    summary = summarise(from_bytes(from_torchvision("vit_b_32", 64)))
    assert summary.inputs[0].shape == (1, 3, 64, 64)
    assert summary.macs is not None


def test_linear_and_transposed_layers_fold() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, groups=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4),
    ]  # fmt: skip
    module = with_lively_statistics(nn.Sequential(*layers)).eval()
    x = torch.randn(2, 3, 10, 10)
    exported = from_bytes(from_module(module, (2, 3, 10, 10)))
    folded, report = fold_batch_norm(exported)
    assert len(report.folded) == 4
    with torch.no_grad():
        assert relative_error(module(x), run(folded.SerializeToString(), x)) < 1e-5


def test_half_precision_module_gives_half_precision_model() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()
    assert summarise(from_bytes(from_module(module, (1, 3, 8, 8)))).inputs[0].dtype == "float16"


def test_export_is_in_eval_mode_and_leaves_the_module_as_it_was() -> None:
    module = with_lively_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()))
    assert isinstance(module, nn.Sequential)
    module[2].eval()
    data = from_module(module, (1, 3, 8, 8))
    assert summarise(from_bytes(data)).n_by_op == {"BatchNormalization": 1, "Conv": 1}
    assert [m.training for m in module.modules()] == [True, True, True, False]


def test_what_torch_cannot_export_is_told_in_its_words() -> None:
    with pytest.raises(ModelError, match=r"cannot export Conv2d at 1x4x8x8: .*expected input") as caught:
        from_module(nn.Conv2d(3, 4, 3), (1, 4, 8, 8))
    assert "\n" not in str(caught.value)


def test_unknown_names_and_sizes_are_usage_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="did you mean resnet50"):
        from_torchvision("resnet5O")
    with pytest.raises(UsageError, match="it has alexnet, "):
        from_torchvision("zzzz")
    with pytest.raises(UsageError, match="must be at least 1"):
        from_torchvision("resnet18", batch=0)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(EnvironmentUnfitError, match=r"pip install 'latbench\[search\]'"):
        from_torchvision("resnet18")
