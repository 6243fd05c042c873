"""AOWS's space against the figures of its released code, and against brute force."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from latbench.errors import UsageError
from latbench.graph.ops import AdaptiveAvgPool2d, Conv2d, Flatten, Linear
from latbench.spaces.mobilenet_v1 import BASE_WIDTHS, STRIDES, MobileNetV1Space
from latbench.testing import FactoredSpaceConformance

SPACE = MobileNetV1Space()

# specs of the released code, written out: layers -> candidate widths
CANDIDATES = {
    1: (8, 16, 24, 32, 40, 48),
    2: (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96),
    3: (24, 40, 48, 64, 80, 88, 104, 112, 128, 144, 152, 168, 176, 192),
    5: (48, 80, 104, 128, 152, 176, 208, 232, 256, 280, 304, 336, 360, 384),
    7: (104, 152, 208, 256, 304, 360, 408, 464, 512, 560, 616, 664, 720, 768),
    13: (208, 304, 408, 512, 616, 720, 816, 920, 1024, 1128, 1232, 1328, 1432, 1536),
}


class TestConformance(FactoredSpaceConformance):
    space = MobileNetV1Space(resolution=64)


class TestConformanceInHalfPrecision(FactoredSpaceConformance):
    space = MobileNetV1Space(batch=4, resolution=32, dtype="float16", num_classes=10, levels=3)
    n_networks = 3


def test_candidate_widths_are_the_released_codes() -> None:
    layers = (1, 2, 3, 3, 5, 5, 7, 7, 7, 7, 7, 7, 13, 13)
    assert SPACE.candidates == tuple(CANDIDATES[layer] for layer in layers)
    assert [d.options for d in SPACE.decisions] == list(SPACE.candidates)
    assert sum(map(len, SPACE.candidates)) == 185  # (layer, width) cells
    assert SPACE.size == 6 * 11 * 14**12


def test_vocabulary_is_1612_variables_in_2396_slots() -> None:
    slots: dict[str, int] = {}
    for _, _, block in SPACE.slots():
        slots[block.key] = slots.get(block.key, 0) + 1
    assert (len(slots), SPACE.n_slots) == (1612, 2396)
    assert sorted(slots.values()) == [1] * 1416 + [5] * 196  # stages 8 to 12 share theirs


@pytest.mark.parametrize(("resolution", "n_blocks"), [(224, 1612), (96, 1612), (32, 1612), (16, 1576), (8, 1504)])
def test_distinct_blocks_are_distinct_shapes(resolution: int, n_blocks: int) -> None:
    """Where late maps coincide at 1x1, stages share those blocks whose widths coincide too."""
    shapes: set[tuple[object, ...]] = {("head", width) for width in SPACE.candidates[-1]}
    side = resolution
    for i, ((before, after), stride) in enumerate(zip(pairwise(((3,), *SPACE.candidates)), STRIDES, strict=True)):
        shapes |= {(i == 0, side, stride, *widths) for widths in product(before, after)}
        side = (side + 1) // 2 if stride == 2 else side
    blocks = MobileNetV1Space(resolution=resolution).all_blocks()
    assert len(blocks) == len(shapes) == n_blocks


@pytest.mark.parametrize(
    ("name", "n_params"), [("mobilenet-v1", 4_231_976), ("aows-readme", 1_596_744), ("widest", 8_702_152)]
)
def test_published_networks_have_the_published_parameters(name: str, n_params: int) -> None:
    assert SPACE.network(SPACE.parse_arch(name)).n_params == n_params


def test_mobilenet_v1_has_its_published_multiply_adds() -> None:
    network = SPACE.network(SPACE.published["mobilenet-v1"])
    assert network.macs == 568_740_352  # 569 M in Howard et al. 2017, table 8
    assert SPACE.widths(SPACE.published["mobilenet-v1"]) == BASE_WIDTHS


@pytest.mark.parametrize("resolution", [33, 224])
def test_parameters_and_macs_follow_from_the_widths(resolution: int) -> None:
    space = MobileNetV1Space(resolution=resolution, num_classes=7)
    arch = space.sample(np.random.default_rng(5))
    widths = space.widths(arch)
    side = (resolution + 1) // 2
    params, macs = 29 * widths[0], 27 * widths[0] * side**2
    for before, after, stride in zip(widths[:-1], widths[1:], STRIDES[1:], strict=True):
        side = -(-side // stride)
        params += (9 + 2) * before + (before + 2) * after
        macs += side**2 * (9 * before + before * after)
    network = space.network(arch)
    assert network.n_params == params + 7 * (widths[-1] + 1)
    assert network.macs == macs + 7 * widths[-1]


def test_depthwise_width_is_the_previous_stages() -> None:
    site = SPACE.sites[3]
    block = SPACE.block(site, (2, 5))
    depthwise, pointwise = (node.op for node in block.nodes if isinstance(node.op, Conv2d))
    assert (site.scope, depthwise.groups, depthwise.stride) == ((2, 3), 48, 1)
    assert (pointwise.in_channels, pointwise.out_channels) == (48, 88)


def test_head_is_pool_flatten_linear_with_bias() -> None:
    head = SPACE.block(SPACE.sites[-1], (0,))
    assert [node.op for node in head.nodes] == [AdaptiveAvgPool2d(), Flatten(), Linear(208, 1000)]
    assert head.inputs == (("x", (1, 208, 7, 7)),)


def test_published_names_are_those_that_the_settings_can_express() -> None:
    assert set(SPACE.published) == {"mobilenet-v1", "aows-readme", "narrowest", "widest"}
    coarse = MobileNetV1Space(min_width=0.5, max_width=1.0, levels=2)
    assert set(coarse.published) == {"mobilenet-v1", "narrowest", "widest"}
    assert coarse.widths(coarse.published["mobilenet-v1"]) == BASE_WIDTHS


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 0},
        {"resolution": 7},
        {"dtype": "int8"},
        {"min_width": 0.0},
        {"min_width": 2.0},
        {"levels": 0},
        {"num_classes": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="mobilenet_v1: "):
        MobileNetV1Space.from_settings(settings)
