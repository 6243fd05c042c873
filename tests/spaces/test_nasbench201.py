"""NAS-Bench-201's space against published counts and an independent torch implementation of the released networks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as f
from torch import Tensor

from latbench.errors import UsageError
from latbench.graph.ops import Zero
from latbench.graph.passes import random_weights
from latbench.graph.torch import to_module
from latbench.spaces.base import Arch
from latbench.spaces.nasbench201 import EDGES, OPTIONS, NASBench201Space
from latbench.testing import FactoredSpaceConformance

SPACE = NASBench201Space()
ONE_CELL = NASBench201Space(num_cells=1, channels=4, resolution=8)
ALL_ARCHS = list(product(range(5), repeat=6))
REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "nb201_search.parquet"


class TestConformance(FactoredSpaceConformance):
    space = NASBench201Space()
    drops_unread_blocks = True


class TestConformanceOfOneCell(FactoredSpaceConformance):
    space = NASBench201Space(batch=2, num_cells=1, channels=8, resolution=16)
    drops_unread_blocks = True
    n_networks = 5


@pytest.mark.parametrize(
    ("cell", "num_classes", "millions"),
    [  # extremes of the released tables, to every published digit
        ("all_c3x3", 10, 1.531546),
        ("all_idnt", 10, 0.073306),
        ("all_c3x3", 100, 1.537396),
        ("all_idnt", 100, 0.079156),
    ],
)
def test_parameters_are_the_published_ones(cell: str, num_classes: int, millions: float) -> None:
    space = NASBench201Space(num_classes=num_classes)
    assert space.network(space.parse_arch(cell)).n_params == round(millions * 1e6)


@pytest.mark.parametrize(("cell", "millions"), [("all_c3x3", 220.11969), ("all_idnt", 7.78305)])
def test_macs_are_the_published_flops(cell: str, millions: float) -> None:
    bias_adds = SPACE.num_classes  # the released counter adds them
    assert SPACE.network(SPACE.parse_arch(cell)).macs + bias_adds == round(millions * 1e6)


def test_distinct_blocks_are_the_multisets_of_operations() -> None:
    """Per stage: 4 operations taken 1, 2 or 3 times over, without the lone skip, and Zero; stem, 2 reductions, head."""
    multisets = {tuple(sorted(picks)) for n in (1, 2, 3) for picks in product(range(1, 5), repeat=n)}
    assert len(SPACE.all_blocks()) == 3 * (len(multisets) - 1 + 1) + 4 == 106
    assert len(SPACE.sites) == 3 * 5 * 3 + 4
    assert SPACE.n_slots == 15 * (5 - 1 + 25 - 2 + 125 - 3) + 4  # a lone skip is absent


@pytest.mark.parametrize(
    "arch", [(0,) * 6, (3, 0, 0, 0, 0, 0), (1, 1, 1, 0, 1, 0), (0, 2, 4, 3, 1, 2), (4, 3, 2, 1, 3, 4)]
)
def test_network_is_the_released_one(arch: Arch) -> None:
    space = NASBench201Space(batch=2, resolution=16, num_cells=2, channels=4, num_classes=3)
    network = space.network(arch)
    weights = {name: torch.from_numpy(w) for name, w in random_weights(network, seed=1).items()}
    x = np.random.default_rng(0).standard_normal(space.input_shape, np.float32)
    with torch.inference_mode():
        want = _released_network(weights, arch, torch.from_numpy(x)).numpy()
        got = to_module(network, {k: w.numpy() for k, w in weights.items()})(torch.from_numpy(x)).numpy()
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def _released_network(w: Mapping[str, Tensor], arch: Arch, x: Tensor) -> Tensor:
    """TinyNetwork of the released code with 2 cells per stage: every edge run, ``none`` and dead nodes included."""

    def bn(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (w[f"{name}.{r}"] for r in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)

    def relu_conv_bn(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = w[f"{name}/conv.weight"]
        return bn(f.conv2d(f.relu(x), weight, stride=stride, padding=weight.shape[-1] // 2), f"{name}/bn")

    def edge(op: str, x: Tensor, name: str) -> Tensor:
        if op == "none":
            return x * 0.0
        if op == "skip_connect":
            return x
        if op == "avg_pool_3x3":
            return f.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        read = f"{name}/conv.weight" in w  # our network holds no weights for nodes that its output does not read
        return relu_conv_bn(x, name) if read else x

    x = bn(f.conv2d(x, w["stem/conv.weight"], padding=1), "stem/bn")
    for stage in (1, 2, 3):
        if stage > 1:
            name = f"reduction{stage - 1}"
            h = relu_conv_bn(relu_conv_bn(x, f"{name}/conv_a", stride=2), f"{name}/conv_b")
            x = f.conv2d(f.avg_pool2d(x, 2), w[f"{name}/shortcut/conv.weight"]) + h
        for cell in (1, 2):
            nodes = [x]
            for node in (1, 2, 3):
                terms = [
                    edge(OPTIONS[arch[i]], nodes[source], f"stage{stage}/cell{cell}/node{node}/edge{source}")
                    for i, (target, source) in enumerate(EDGES)
                    if target == node
                ]
                nodes.append(torch.stack(terms).sum(0))
            x = nodes[-1]
    x = f.relu(bn(x, "head/bn")).mean((2, 3))
    return f.linear(x, w["head/linear.weight"], w["head/linear.bias"])


def test_canonical_is_the_same_network() -> None:
    rng = np.random.default_rng(0)
    for arch in (ONE_CELL.sample(rng) for _ in range(300)):
        canonical = ONE_CELL.canonical(arch)
        assert ONE_CELL.network(canonical).key == ONE_CELL.network(arch).key
        assert ONE_CELL.canonical(canonical) == canonical


def test_canonical_keeps_exactly_the_edges_on_paths_to_the_output() -> None:
    for arch in ALL_ARCHS:
        live = {i for i in range(6) if _reaches_output(i, arch)}
        assert ONE_CELL.canonical(arch) == tuple(option if i in live else 0 for i, option in enumerate(arch))


def _reaches_output(edge: int, arch: Arch) -> bool:
    node = EDGES[edge][0]
    return node == 3 or any(
        source == node and arch[i] != 0 and _reaches_output(i, arch) for i, (_, source) in enumerate(EDGES)
    )


def test_path_of_lone_skips_leaves_the_bare_skeleton() -> None:
    network = ONE_CELL.network((1, 0, 1, 0, 0, 1))
    assert {node.name.split("/")[0] for node in network.nodes} == {"stem", "reduction1", "reduction2", "head"}


def test_dead_cell_is_its_input_times_zero() -> None:
    (node,) = (node for node in ONE_CELL.network((3, 3, 3, 0, 0, 0)).nodes if node.name.startswith("stage2/"))
    assert node.op == Zero()
    assert node.inputs[0].startswith("reduction1/")


def test_cell_text_is_read_edge_by_edge() -> None:
    text = "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|"
    assert SPACE.parse_arch(text) == (0, 1, 2, 3, 4, 0)


@pytest.mark.skipif(not REFERENCE.exists(), reason="LATBENCH_REFERENCE_DATA names no folder with nb201_search.parquet")
def test_cell_text_of_the_benchmark_is_understood() -> None:
    cells = pd.read_parquet(REFERENCE)
    want = cells[[f"e{i}" for i in range(6)]].to_numpy()
    assert [SPACE.parse_arch(text) for text in cells["arch_str"]] == [tuple(row) for row in want]
    assert len(cells) == SPACE.size


@pytest.mark.parametrize(
    "text",
    [
        "|nor_conv_3x3~0|",
        "|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|",
        "|none~0|+|none~1|none~0|+|none~0|none~1|none~2|",
        "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|none~2|",
        "|none~0|rest+|none~0|none~1|+|none~0|none~1|none~2|",
    ],
)
def test_malformed_cell_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no cell"):
        SPACE.parse_arch(text)


@pytest.mark.parametrize("settings", [{"resolution": 30}, {"num_cells": 0}, {"channels": 0}, {"num_classes": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="nasbench201: "):
        NASBench201Space.from_settings(settings)
