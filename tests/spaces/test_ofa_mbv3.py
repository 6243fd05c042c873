"""Once-for-all's space against the published MAC counts, torchvision's squeeze-and-excitation and its own laws."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

from latbench.errors import UsageError
from latbench.graph.passes import random_weights
from latbench.graph.torch import to_module
from latbench.spaces.ofa_mbv3 import PRESENT, OFAMobileNetV3Space, make_divisible
from latbench.testing import FactoredSpaceConformance

SPACE = OFAMobileNetV3Space()
ABSENT = len(PRESENT)
REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "ofa_latency.parquet"


class TestConformance(FactoredSpaceConformance):
    space = OFAMobileNetV3Space(resolution=136, num_classes=10)
    n_networks = 4


def published_row(**changes: int) -> dict[str, int]:
    """Kernel 5 and expansion 4 everywhere, depth 2, side 132."""
    present = [i % 4 < 2 for i in range(20)]
    row = {f"ks{i}": 5 * there for i, there in enumerate(present)}
    row |= {f"e{i}": 4 * there for i, there in enumerate(present)}
    return row | {"r": 132, "d0": 2} | changes


@pytest.mark.skipif(not REFERENCE.exists(), reason="LATBENCH_REFERENCE_DATA names no folder with ofa_latency.parquet")
def test_macs_are_the_published_ones() -> None:
    for row in pd.read_parquet(REFERENCE).head(30).to_dict("records"):
        assert SPACE.network(SPACE.from_columns(row)).macs == row["macs"]


def test_columns_become_option_indices() -> None:
    assert SPACE.from_columns(published_row()) == (1, *(4, 4, ABSENT, ABSENT) * 5)
    assert SPACE.from_columns(published_row(ks0=3, e0=6, ks6=7, e6=3))[1:8] == (2, 4, ABSENT, ABSENT, 4, 4, 6)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ks1": 0, "e1": 0}, "layer 1 cannot have kernel 0"),
        ({"ks3": 4}, "layer 3 cannot have kernel 4"),
        ({"r": 130}, "side 130"),
        ({"r": 124}, "side 124"),
    ],
)
def test_columns_that_are_no_network_are_refused(changes: dict[str, int], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        SPACE.from_columns(published_row(**changes))


def test_a_missing_column_is_named() -> None:
    row = published_row()
    del row["e19"]
    with pytest.raises(UsageError, match="'e19' is missing"):
        SPACE.from_columns(row)


def test_samples_are_once_for_alls() -> None:
    """Depth is uniform over 2, 3, 4, and the fourth layer is there only beside the third."""
    rng = np.random.default_rng(0)
    archs = np.array([SPACE.sample(rng) for _ in range(3000)])[:, 1:].reshape(-1, 4)
    absent = archs == ABSENT
    assert not absent[:, :2].any()
    assert absent[absent[:, 2], 3].all()
    np.testing.assert_allclose(absent[:, 2:].mean(axis=0), [1 / 3, 2 / 3], atol=0.02)


def test_canonical_is_the_same_network() -> None:
    arch = list(SPACE.sample(np.random.default_rng(0)))
    arch[3:5] = [ABSENT, 4]
    moved = SPACE.canonical(tuple(arch))
    assert moved[3:5] == (4, ABSENT)
    assert SPACE.network(moved).key == SPACE.network(tuple(arch)).key
    assert SPACE.canonical(moved) == moved


def test_the_chosen_side_is_what_the_stem_sees() -> None:
    for side, arch in ((128, (0, *(4,) * 20)), (224, (24, *(4,) * 20))):
        network = SPACE.network(arch)
        (stem,) = (node for node in network.nodes if node.name == "stem/conv")
        assert network.shapes[stem.inputs[0]] == (1, 3, side, side)
        assert network.inputs == (("x", (1, 3, 224, 224)),)


def test_width_is_rounded_as_the_mobilenets_do() -> None:
    assert [make_divisible(n) for n in (3, 12, 18, 72, 90, 107)] == [8, 16, 24, 72, 88, 104]


@pytest.mark.parametrize(("unit", "layer", "squeeze", "act", "stride"), [(1, 1, True, "RE", 1), (3, 0, True, "HS", 1)])
def test_layer_is_mobilenet_v3s(unit: int, layer: int, squeeze: bool, act: str, stride: int) -> None:
    """torchvision's block of the same widths, its weights in our names."""
    site = next(site for site in SPACE.sites if site.name == f"unit{unit + 1}/layer{layer + 1}")
    block = SPACE.block(site, (0, PRESENT.index("k5_e4")))
    assert block is not None
    shape, width, out = block.inputs[0][1], 4 * block.inputs[0][1][1], block.shapes[block.outputs[0]][1]
    config = InvertedResidualConfig(shape[1], 5, width, out, squeeze, act, stride, 1, 1.0)
    theirs = InvertedResidual(config, torch.nn.BatchNorm2d).eval()
    weights = random_weights(block, seed=1)
    names = {"expand": "0", "dw": "1", "se": "2", "project": "3"}
    layers = {"conv": "0", "bn": "1", "reduce": "fc1", "expand": "fc2"}
    state = {}
    for name, value in weights.items():
        node, role = name.split(".")
        part, inner = node.split("/")
        state[f"block.{names[part]}.{layers[inner]}.{role}"] = torch.from_numpy(value)
    found = theirs.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
    with torch.inference_mode():
        want = theirs(x)
        got = to_module(block, weights)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("settings", [{"resolution": 130}, {"resolution": 96}, {"num_classes": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="ofa_mbv3: "):
        OFAMobileNetV3Space.from_settings(settings)
