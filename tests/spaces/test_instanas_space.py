"""InstaNAS's space against the published grid of modules, sizes and rules."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latbench.errors import UsageError
from latbench.graph.ops import Add, Conv2d, ReLU, ReLU6
from latbench.oracle.factors import FactorOracle
from latbench.spaces.instanas import DEFAULT, LAYOUTS, MODULES, N_SUBSETS, SUBSETS, InstaNASSpace
from latbench.testing import FactoredSpaceConformance

GRID = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "instanas_latency.json"
TINY = InstaNASSpace(plan="8x1,12x2s2,16x1", stem_channels=8, head_channels=24, resolution=9, batch=2)


class TestConformance(FactoredSpaceConformance):
    space = TINY
    n_networks = 4


class TestConformanceOfDefaults(FactoredSpaceConformance):
    space = InstaNASSpace()
    n_networks = 1


@pytest.mark.parametrize(
    ("layout", "meta", "meta_macs", "first", "first_macs", "side"),
    [
        ("c10", 9_572_970, 430_447_104, 2_247_530, 98_363_904, 4),
        ("c100", 9_688_260, 430_562_304, 2_362_820, 98_479_104, 4),
        ("tiny", 9_816_360, 583_749_632, 2_490_920, 139_599_872, 4),
        ("imagenet", 10_841_160, 1_788_229_248, 3_515_720, 428_020_608, 7),
    ],
)
def test_published_sizes(layout, meta, meta_macs, first, first_macs, side):
    space = InstaNASSpace(layout=layout)
    assert (space.resolution, space.num_classes) == (LAYOUTS[layout].resolution, LAYOUTS[layout].num_classes)
    whole, narrow = (space.network(space.published[name]) for name in ("meta-graph", "mobilenet-v2"))
    assert (whole.n_params, whole.macs) == (meta, meta_macs)
    assert (narrow.n_params, narrow.macs) == (first, first_macs)
    assert whole.shapes["head/mix/act"] == (1, 1280, side, side)
    assert len(space.layers) == 17
    assert space.size == 2**85 == 38_685_626_227_668_133_590_597_632


@pytest.mark.parametrize("layout", ["C10", "C100", "Tiny", "ImgNet"])
def test_every_module_is_that_of_the_published_grid(layout):
    if not GRID.is_file():
        pytest.skip("needs instanas_latency.json in the folder $LATBENCH_REFERENCE_DATA")
    grid = json.loads(GRID.read_text())["datasets"][layout]
    space = InstaNASSpace(layout={"ImgNet": "imagenet"}.get(layout, layout.lower()))
    assert len(grid["rows"]) == 85
    for row in grid["rows"]:
        site = space.layers[row["layer"]]
        block = space.block(site, (1 << row["action"],))
        assert block is not None
        assert (site.stage, site.first, site.stride) == (row["stage"], row["first_in_stage"], row["stride"])
        assert (site.side, site.in_channels, site.out_channels) == (row["in_res"], row["in_ch"], row["out_ch"])
        assert block.shapes[block.outputs[0]][2] == row["out_res"]
        assert (block.macs, block.n_params) == (row["macs"], row["params"])
        assert any(isinstance(node.op, Add) for node in block.nodes) == row["residual"]


@pytest.mark.parametrize(
    ("layout", "base", "most", "least"),
    [
        ("c10", 90_912_768, 422_995_968, 60_456_960),
        ("tiny", 129_251_328, 573_401_088, 81_690_624),
        ("imagenet", 395_832_192, 1_756_040_832, 250_177_536),
    ],
)
def test_published_sums_of_layers(layout, base, most, least):
    space = InstaNASSpace(layout=layout)
    oracle = FactorOracle.counting(space, "macs")
    ends = sum(block.macs for site in space.sites if not site.scope and (block := space.block(site, ())))
    found = [oracle.latency(space.published[name]) - ends for name in ("mobilenet-v2", "meta-graph", "shallowest")]
    assert found == [base, most, least]


def test_a_subset_is_the_sum_of_its_modules():
    """Bit i is module i, under the same names in every subset; one Add joins them."""
    site = TINY.layers[2]  # its input could be added
    singles = [TINY.block(site, (1 << i,)) for i in range(len(MODULES))]
    for subset in range(1, N_SUBSETS):
        chosen = [single for i, single in enumerate(singles) if subset >> i & 1]
        block = TINY.block(site, (subset,))
        assert SUBSETS[subset] == "+".join(m.name for i, m in enumerate(MODULES) if subset >> i & 1)
        assert block.n_params == sum(single.n_params for single in chosen)
        assert block.weight_shapes() == {k: v for single in chosen for k, v in single.weight_shapes().items()}
        (last,) = (node for node in block.nodes if node.name in block.outputs)
        assert (last.name == "sum") == (len(chosen) > 1)
        assert len(last.inputs) == len(chosen) or len(chosen) == 1


def test_what_nothing_selected_means():
    for site in TINY.layers:
        empty, default = TINY.block(site, (0,)), TINY.block(site, (1 << DEFAULT,))
        assert (empty == default) if site.first else (empty is None)
    assert TINY.canonical((0, 0, 0, 0)) == (16, 16, 0, 16)
    assert TINY.network((0, 0, 0, 0)).key == TINY.network((16, 16, 0, 16)).key
    assert TINY.canonical((1, 31, 0, 2)) == (1, 31, 0, 2)


def test_the_plain_module_ends_in_relu6_and_has_no_residual():
    block = TINY.block(TINY.layers[2], (1 << DEFAULT,))
    assert [type(node.op) for node in block.nodes if isinstance(node.op, ReLU | ReLU6)] == [ReLU, ReLU6]
    assert not any(isinstance(node.op, Add) for node in block.nodes)
    assert all(not node.op.bias for node in block.nodes if isinstance(node.op, Conv2d))


def test_a_map_of_one_pixel_gets_no_residual_at_stride_2():
    space = InstaNASSpace(plan="8x1,8x1s2,8x1s2,8x1s2,8x1s2", stem_channels=8, resolution=8)
    last = space.layers[-1]
    assert (last.side, last.stride) == (1, 2)
    block = space.block(last, (1,))
    assert not any(isinstance(node.op, Add) for node in block.nodes)


def test_a_plan_gives_its_stages_and_settings_their_defaults():
    assert [(s.out_channels, s.n_layers, s.stride) for s in TINY.stages] == [(8, 1, 1), (12, 2, 2), (16, 1, 1)]
    assert [(s.side, s.stride, s.first) for s in TINY.layers] == [(9, 1, 1), (9, 2, 1), (5, 1, 0), (5, 1, 1)]
    assert InstaNASSpace(layout="c100") == InstaNASSpace(layout="c100", resolution=32, num_classes=100)
    assert InstaNASSpace().plan == "16x1,24x2,32x3s2,64x4s2,96x3,160x3s2,320x1"
    assert InstaNASSpace(plan=InstaNASSpace().plan) == InstaNASSpace()
    assert InstaNASSpace.from_settings(TINY.settings()) == TINY


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"layout": "cifar"}, "unknown layout 'cifar': c10, c100, tiny, imagenet"),
        ({"plan": "16"}, "'16' is no stage of a plan: write CHANNELSxLAYERS"),
        ({"plan": "16x1,24x2s3"}, "'24x2s3' is no stage"),
        ({"plan": "16x0"}, "at least one channel and one layer"),
        ({"num_classes": -1}, "num_classes"),
        ({"stem_channels": 0}, "stem_channels"),
        ({"resolution": 4}, "resolution must be at least 8"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, told):
    with pytest.raises(UsageError, match=told):
        InstaNASSpace(**wrong)
