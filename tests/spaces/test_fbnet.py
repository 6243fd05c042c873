"""FBNet's space against the published MAC counts and an independent torch implementation of its layers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as f
from torch import Tensor

from latbench.errors import UsageError
from latbench.graph.passes import random_weights
from latbench.graph.torch import to_module
from latbench.spaces.fbnet import OPTIONS, FBNetSpace
from latbench.testing import FactoredSpaceConformance

SPACE = FBNetSpace()
REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "fbnet_latency.parquet"


class TestConformance(FactoredSpaceConformance):
    space = FBNetSpace()
    n_networks = 8


class TestConformanceElsewhere(FactoredSpaceConformance):
    space = FBNetSpace(batch=2, resolution=18, num_classes=7)
    n_networks = 4


@pytest.mark.skipif(not REFERENCE.exists(), reason="LATBENCH_REFERENCE_DATA names no folder with fbnet_latency.parquet")
def test_macs_are_the_published_ones() -> None:
    for row in pd.read_parquet(REFERENCE).head(50).to_dict("records"):
        assert SPACE.network(SPACE.from_columns(row)).macs == row["macs"]


def test_columns_are_option_indices() -> None:
    row = {f"op{i}": i % 9 for i in range(22)} | {"macs": 1}
    assert SPACE.from_columns(row) == tuple(i % 9 for i in range(22))
    del row["op7"]
    with pytest.raises(UsageError, match="op7 is missing"):
        SPACE.from_columns(row)


def test_skip_costs_nothing_where_the_shape_stays() -> None:
    network = SPACE.network((OPTIONS.index("skip"),) * 22)
    at = {node.name.split("/")[0] for node in network.nodes}
    assert at == {"stem", "head", *(f"layer{i}" for i in (1, 5, 9, 13, 17, 21))}  # the first of each stage but stage 1


def _layer(w: dict[str, Tensor], x: Tensor, groups: int, stride: int) -> Tensor:
    def conv_bn(x: Tensor, name: str, **more: int) -> Tensor:
        x = f.conv2d(x, w[f"{name}/conv.weight"], **more)
        mean, var, weight, bias = (w[f"{name}/bn.{r}"] for r in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)

    h = f.relu(conv_bn(x, "expand", groups=groups))
    if groups > 1:
        n, c, height, width = h.shape
        h = h.view(n, groups, c // groups, height, width).transpose(1, 2).reshape(n, c, height, width)
    kernel = w["dw/conv.weight"].shape[-1]
    h = f.relu(conv_bn(h, "dw", stride=stride, padding=kernel // 2, groups=h.shape[1]))
    h = conv_bn(h, "project", groups=groups)
    return h + x if h.shape == x.shape else h


@pytest.mark.parametrize(("layer", "stride"), [(0, 1), (2, 1), (5, 2)])
@pytest.mark.parametrize("option", OPTIONS[:-1])
def test_layer_is_the_released_one(option: str, layer: int, stride: int) -> None:
    site = SPACE.sites[1 + layer]
    block = SPACE.block(site, (OPTIONS.index(option),))
    assert block is not None
    weights = random_weights(block, seed=1)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(block.inputs[0][1], np.float32))
    with torch.inference_mode():
        groups = 2 if option.endswith("g2") else 1
        want = _layer({k: torch.from_numpy(v) for k, v in weights.items()}, x, groups, stride)
        got = to_module(block, weights)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="num_classes"):
        FBNetSpace(num_classes=0)
