"""RelativeNAS' space against the published sizes and an independent torch implementation of the released cells."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as f
from torch import nn

from latbench.errors import GraphError, UsageError
from latbench.graph.passes import random_weights
from latbench.graph.torch import to_module, weights_of
from latbench.spaces.cells import GENOTYPES, OPERATIONS, RelativeNASSpace, arch_of, genotype_of
from latbench.testing import FactoredSpaceConformance

SMALL = RelativeNASSpace(resolution=8, channels=4, layers=3, num_classes=5)
CIFAR = {"resolution": 32, "stem": "cifar", "channels": 36, "layers": 20}
IMAGENET = {"resolution": 224, "stem": "imagenet", "channels": 46, "layers": 14, "num_classes": 1000}
REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "relativenas_genotypes.json"


class TestConformance(FactoredSpaceConformance):
    space = RelativeNASSpace(resolution=16, channels=8, layers=5)
    drops_unread_blocks = True
    n_networks = 5


class TestConformanceWithTheImageNetStem(FactoredSpaceConformance):
    space = RelativeNASSpace(batch=2, resolution=64, stem="imagenet", channels=4, layers=4, num_classes=7)
    drops_unread_blocks = True
    n_networks = 3


# ---- published sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "n_params", "with_auxiliary", "macs"),
    [
        (CIFAR, "relativenas-cifar10", 3_928_222, 4_404_648, 616_832_640),
        ({**CIFAR, "num_classes": 100}, "relativenas-cifar100", 3_980_152, 4_525_788, 616_884_480),
        (IMAGENET, "relativenas-imagenet", 5_050_029, 6_306_709, 562_973_760),
    ],
)
def test_networks_have_the_published_sizes(settings, name, n_params, with_auxiliary, macs):
    space = RelativeNASSpace(**settings, keep_unread=True)
    arch = space.parse_arch(name)
    network = space.network(arch)
    assert (network.n_params, network.macs) == (n_params, macs)
    assert sum(p.numel() for p in to_module(network).parameters()) == n_params
    both = space.with_auxiliary(arch)
    assert both.n_params == with_auxiliary
    assert [both.shapes[name] for name in both.outputs] == [(1, settings.get("num_classes", 10))] * 2


@pytest.mark.parametrize(
    ("settings", "name", "n_params", "macs"),
    [
        (CIFAR, "darts-v1", 3_169_414, 500_987_520),
        (CIFAR, "darts-v2", 3_349_342, 528_359_040),
        ({**IMAGENET, "channels": 48}, "darts-v1", 4_510_432, 505_864_704),
        ({**IMAGENET, "channels": 48}, "darts-v2", 4_718_752, 529_911_552),
    ],
)
def test_darts_cells_on_the_skeleton(settings, name, n_params, macs):
    space = RelativeNASSpace(**settings, keep_unread=True)
    network = space.network(space.parse_arch(name))
    assert (network.n_params, network.macs) == (n_params, macs)


@pytest.mark.parametrize(("settings", "unread"), [(CIFAR, 52_272), (IMAGENET, 85_192)])
def test_states_that_no_node_reads(settings, unread):
    kept, dropped = (RelativeNASSpace(**settings, keep_unread=keep) for keep in (True, False))
    arch = GENOTYPES["relativenas"]
    sizes = [space.network(arch_of(arch)).n_params for space in (kept, dropped)]
    assert sizes[0] - sizes[1] == unread


def test_kept_states_get_no_gradient():
    space = RelativeNASSpace(**{**CIFAR, "resolution": 8}, batch=2, keep_unread=True)
    module = to_module(space.network(space.parse_arch("relativenas"))).train()
    module(torch.randn(space.input_shape)).sum().backward()
    idle = {n: p.numel() for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert {n: k for n, k in idle.items() if "/pre0/" in n} == idle
    assert sum(idle.values()) == 52_272


def test_kept_states_change_no_output():
    kept, dropped = (RelativeNASSpace(resolution=8, channels=4, layers=3, keep_unread=keep) for keep in (True, False))
    arch = arch_of(GENOTYPES["relativenas"])
    graph = kept.network(arch)
    weights = random_weights(graph, seed=0)
    x = torch.randn(kept.input_shape)
    few = {name: weights[name] for name in dropped.network(arch).weight_shapes()}
    assert len(few) < len(weights)
    with torch.inference_mode():
        torch.testing.assert_close(
            to_module(graph, weights)(x), to_module(dropped.network(arch), few)(x), rtol=1e-5, atol=1e-6
        )


@pytest.mark.skipif(
    not REFERENCE.exists(), reason="LATBENCH_REFERENCE_DATA names no folder with relativenas_genotypes.json"
)
def test_genotypes_and_every_cell_are_the_recorded_ones():
    reference = json.loads(REFERENCE.read_text())
    assert list(OPERATIONS) == reference["primitives"]
    assert [len(d.options) for d in SMALL.decisions] == reference["encoding"]["upper"]
    for ours, theirs in (("relativenas", "RelativeNAS"), ("darts-v1", "DARTS_V1"), ("darts-v2", "DARTS_V2")):
        recorded = reference["genotypes"][theirs]
        assert genotype_of(arch_of(GENOTYPES[ours])) == {
            kind: [(op, state) for op, state in recorded[kind]] for kind in ("normal", "reduce")
        }
    for name, settings in (("cifar10", CIFAR), ("imagenet", IMAGENET)):
        space = RelativeNASSpace(**settings, keep_unread=True)
        sizes = dict.fromkeys((cell.name for cell in space.cells), 0)
        for node in space.network(arch_of(GENOTYPES["relativenas"])).nodes:
            cell = node.name.split("/")[0]
            if cell in sizes:
                sizes[cell] += node.op.n_params
        cells = reference["genotypes"]["RelativeNAS"]["networks"][name]["cells"]
        assert list(sizes.values()) == [cell["params"] for cell in cells]
        assert [(c.channels, c.reduction) for c in space.cells] == [
            (c["channels"], c["type"] == "reduce") for c in cells
        ]
        assert [[c for c, _ in cell.sources] for cell in space.cells] == [
            [c["c_prev_prev"], c["c_prev"]] for c in cells
        ]


# ---- against the released cells -------------------------------------------------------------------------------------


class Reference:
    """The released final networks, run from our weights: operations, cells and stems as their code has them."""

    def __init__(self, space, arch, weights):
        self.space, self.arch, self.w = space, arch, {k: torch.from_numpy(v) for k, v in weights.items()}

    def bn(self, x, name):
        mean, var, weight, bias = (self.w[f"{name}.{r}"] for r in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)

    def half_separable(self, x, name, kernel, stride, dilation=1):
        c, pad = x.shape[1], dilation * (kernel - 1) // 2
        x = f.conv2d(f.relu(x), self.w[f"{name}/dw.weight"], None, stride, pad, dilation, groups=c)
        return self.bn(f.conv2d(x, self.w[f"{name}/pw.weight"]), f"{name}/bn")

    def reduced(self, x, name):
        x = f.relu(x)
        parts = [f.conv2d(x[:, :, i:, i:], self.w[f"{name}conv{i + 1}.weight"], stride=2) for i in (0, 1)]
        return self.bn(torch.cat(parts, 1), f"{name}bn")

    def preprocessed(self, x, name):
        if f"{name}/conv1.weight" in self.w:
            return self.reduced(x, f"{name}/")
        read = f"{name}/conv.weight" in self.w
        return self.bn(f.conv2d(f.relu(x), self.w[f"{name}/conv.weight"]), f"{name}/bn") if read else None

    def operation(self, x, op, stride, name):
        if op == "max_pool_3x3":
            return f.max_pool2d(x, 3, stride, 1)
        if op == "avg_pool_3x3":
            return f.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
        if op == "skip_connect":
            return x if stride == 1 else self.reduced(x, f"{name}/op/")
        kernel = int(op[-1])
        if op.startswith("dil"):
            return self.half_separable(x, f"{name}/op", kernel, stride, 2)
        return self.half_separable(self.half_separable(x, f"{name}/op/1", kernel, stride), f"{name}/op/2", kernel, 1)

    def __call__(self, x):
        if self.space.stem == "cifar":
            s0 = s1 = self.bn(f.conv2d(x, self.w["stem/conv.weight"], padding=1), "stem/bn")
        else:
            x = f.relu(self.bn(f.conv2d(x, self.w["stem0/first/conv.weight"], None, 2, 1), "stem0/first/bn"))
            s0 = self.bn(f.conv2d(x, self.w["stem0/second/conv.weight"], None, 2, 1), "stem0/second/bn")
            s1 = self.bn(f.conv2d(f.relu(s0), self.w["stem1/conv.weight"], None, 2, 1), "stem1/bn")
        genotype, layers = genotype_of(self.arch), self.space.layers
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            states = [self.preprocessed(s, f"cell{i}/pre{k}") for k, s in enumerate((s0, s1))]
            for j in range(4):
                total = 0
                for k, (op, source) in enumerate(genotype["reduce" if reduction else "normal"][2 * j : 2 * j + 2]):
                    stride = 2 if reduction and source < 2 else 1
                    total = total + self.operation(states[source], op, stride, f"cell{i}/node{j + 2}/{'ab'[k]}")
                states.append(total)
            s0, s1 = s1, torch.cat(states[2:], 1)
        return f.linear(s1.mean((2, 3)), self.w["head/linear.weight"], self.w["head/linear.bias"])


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("arch", ["relativenas", "darts-v2", "random:1", "random:2"])
def test_network_is_the_released_one(stem, arch):
    space = RelativeNASSpace(batch=2, resolution=64, stem=stem, channels=4, layers=4, num_classes=5, keep_unread=True)
    arch = space.parse_arch(arch)
    module = to_module(space.network(arch), random_weights(space.network(arch), seed=3))
    x = torch.randn(space.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want, got = Reference(space, arch, weights_of(module))(x), module(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_auxiliary_classifier_reads_behind_the_second_reduction():
    space = RelativeNASSpace(channels=4, layers=6, num_classes=5)
    graph = space.with_auxiliary(space.parse_arch("relativenas"))
    assert {node.name: node for node in graph.nodes}["auxiliary/act"].inputs == ("cell4/concat/out",)
    logits, auxiliary = to_module(graph)(torch.randn(space.input_shape))
    assert logits.shape == auxiliary.shape == (1, 5)
    assert not torch.equal(logits, auxiliary)
    with pytest.raises(GraphError, match="larger than the padded input"):
        SMALL.with_auxiliary(SMALL.parse_arch("relativenas"))


# ---- the space itself -----------------------------------------------------------------------------------------------


def test_few_distinct_blocks_stand_at_many_sites():
    """Per stage: 6 operations that compute, sum and concatenation; per reduction 7 operations at stride 2; two widths
    of input for each preprocessing, more where a cell follows a reduction; stem and head."""
    space = RelativeNASSpace()
    types = {}
    for site, _, block in space.slots():
        types.setdefault(site.block_type, set()).add(block.key)
    found = {kind: len(keys) for kind, keys in types.items()}
    assert found == {"stem": 1, "preprocessing": 8, "operation": 32, "sum": 3, "concatenation": 3, "head": 1}
    assert len(space.all_blocks()) == 48
    assert len(space.sites) == 2 + 20 * (2 + 3 * 4 + 1)


def test_canonical_orders_the_pairs_of_a_node():
    rng = np.random.default_rng(0)
    for arch in (SMALL.sample(rng) for _ in range(50)):
        nodes = np.array(arch).reshape(8, 2, 2)
        swapped = np.where(rng.random((8, 1, 1)) < 0.5, nodes[:, ::-1], nodes)
        other = tuple(swapped.ravel().tolist())
        assert SMALL.canonical(other) == SMALL.canonical(arch) == SMALL.canonical(SMALL.canonical(arch))
        assert SMALL.network(other).key == SMALL.network(arch).key


def test_equal_pairs_of_a_node_are_two_operations():
    arch = (0, 3, 0, 3, *SMALL.parse_arch("relativenas")[4:])
    names = [n.name for n in SMALL.network(arch).nodes if n.name.startswith("cell0/node2/") and n.name.endswith("1/dw")]
    assert names == ["cell0/node2/a/op/1/dw", "cell0/node2/b/op/1/dw"]


def test_published_names_need_their_settings():
    assert RelativeNASSpace().parse_arch("relativenas-cifar10") == arch_of(GENOTYPES["relativenas"])
    with pytest.raises(
        UsageError, match=r"--set stem=imagenet --set channels=46 --set layers=14 --set num_classes=1000"
    ):
        RelativeNASSpace().parse_arch("relativenas-imagenet")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stem": "tiny"}, "unknown stem"),
        ({"resolution": 30}, "multiple of 4"),
        ({"stem": "imagenet", "resolution": 48}, "multiple of 32"),
        ({"layers": 2}, "layers must be at least 3"),
        ({"channels": 5}, "channels even"),
        ({"num_classes": 0}, "num_classes 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        RelativeNASSpace.from_settings(settings)


def test_every_parameter_of_a_trained_network_learns():
    space = RelativeNASSpace(batch=4, resolution=8, channels=4, layers=3)
    module = to_module(space.network(space.parse_arch("random:0"))).train()
    nn.functional.cross_entropy(module(torch.randn(space.input_shape)), torch.arange(4)).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_genotype_is_told_node_by_node():
    space = RelativeNASSpace()
    told = space.describe(space.published["relativenas-cifar10"])
    assert told.startswith("normal sep_conv_3x3(0) + dil_conv_5x5(1) | ")
    assert "; reduce avg_pool_3x3(1) + max_pool_3x3(1) | " in told
