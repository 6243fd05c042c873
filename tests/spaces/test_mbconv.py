"""TF-NAS's space against its published network, counts and block shapes."""

from __future__ import annotations

import json
import math
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from latbench.errors import UsageError
from latbench.graph.ops import Add, Conv2d, Linear
from latbench.oracle.factors import FactorOracle
from latbench.spaces.mbconv import NONE, OPERATION_NAMES, OPERATIONS, PUBLISHED, STAGES, TFNASSpace
from latbench.testing import MAX_SCOPE, FactoredSpaceConformance

SPACE = TFNASSpace()
EXACT = TFNASSpace(width_step=1, batch=32)  # whose graphs the importer's tests have in the cache
MODELS = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "tfnas_models.json"


class TestConformance(FactoredSpaceConformance):
    space = TFNASSpace(resolution=48, batch=2, width_step=64, num_classes=10)
    n_networks = 3


class TestConformanceOfDefaults(FactoredSpaceConformance):
    space = SPACE
    n_networks = 1


def test_scopes_are_small_at_exact_widths() -> None:
    sizes = [math.prod(len(EXACT.decisions[d].options) for d in site.scope) for site in EXACT.sites]
    assert max(sizes) == 6921 <= MAX_SCOPE


def test_the_published_network_has_the_published_size() -> None:
    network = SPACE.network(SPACE.parse_arch("tfnas-a"))
    assert network.n_params == 8_757_527
    assert network.macs == 456_675_855
    convolutions = [node for node in network.nodes if isinstance(node.op, Conv2d)]
    bias_adds = sum(math.prod(network.shapes[node.name]) for node in convolutions if node.op.bias)
    bias_adds += sum(node.op.out_features for node in network.nodes if isinstance(node.op, Linear))
    pooled = 1280 * 7 * 7  # the released counter counts additions of biases and of the last pool
    assert network.macs + bias_adds + pooled == 456_747_736


def test_the_published_network_is_that_of_the_reference_file() -> None:
    if not MODELS.is_file():
        pytest.skip("needs tfnas_models.json in the folder $LATBENCH_REFERENCE_DATA")
    blocks = json.loads(MODELS.read_text())["models"]["TF-NAS-A"]["blocks"]
    ours = [pair for stage in PUBLISHED["tfnas-a"] for pair in stage]
    assert ours == [(b["op_index"], b["mid_ch"]) for b in blocks]
    for site, (operation, mid_channels), b in zip(SPACE.block_sites, ours, blocks, strict=True):
        block = SPACE.block(site, SPACE.picks_of(site, operation, mid_channels))
        assert block is not None
        assert (site.side, site.in_channels, site.out_channels) == (b["in_res"], b["in_ch"], b["out_ch"])
        assert block.n_params == b["params"]


def test_exact_widths_are_all_that_the_published_tables_reach() -> None:
    assert len(EXACT.all_blocks()) - 2 == 21_954  # stem and head


@pytest.mark.parametrize("space", [SPACE, EXACT, TFNASSpace(width_step=100)])
def test_one_width_option_is_one_share_of_every_operations_range(space: TFNASSpace) -> None:
    for site in space.block_sites:
        c, options = site.in_channels, space.decisions[site.scope[1]].options
        ends = (options[0], options[-1])
        assert ends == (4 * c, 8 * c)
        assert 6 * c in options
        for operation, (low, initial, high) in product(range(8), [(0.5, 0.75, 1.0)]):
            most = OPERATIONS[operation].max_expansion * c
            for share in (low, initial, high):
                _, pick = space.picks_of(site, operation, int(share * most))
                assert options[pick] == share * 8 * c


def test_squeeze_follows_the_operation_not_the_width() -> None:
    site = EXACT.block_sites[1]  # 24 input channels
    for operation, channels in ((4, 24), (5, 48), (0, None)):
        for width in (0, 40):
            block = EXACT.block(site, (operation, width))
            assert block is not None
            reduced = [n.op.out_channels for n in block.nodes if n.name == "se/reduce" and isinstance(n.op, Conv2d)]
            assert reduced == ([] if channels is None else [channels])


def test_residuals_are_those_of_later_blocks() -> None:
    for site in SPACE.block_sites:
        block = SPACE.block(site, (0, 0))
        assert block is not None
        assert any(isinstance(node.op, Add) for node in block.nodes) == (site.position > 0)


def test_only_later_blocks_can_be_absent() -> None:
    for site in SPACE.block_sites:
        options = SPACE.decisions[site.scope[0]].options
        assert options == (*OPERATION_NAMES, *(("none",) if site.position else ()))
        if site.position:
            assert SPACE.block(site, (NONE, 3)) is None


def test_depths_are_counted_once_among_canonical_architectures() -> None:
    """Operations and depths: 72 * 584 * 4680**3 * 8, as the paper's space has them."""
    per_stage = [sum(8**depth for depth in range(1, stage.n_blocks + 1)) for stage in STAGES]
    assert math.prod(per_stage) == 34_480_447_193_088_000


@pytest.mark.parametrize("space", [SPACE, EXACT])
def test_canonical_is_the_same_network_spelled_once(space: TFNASSpace) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        arch = tuple(int(rng.integers(len(d.options))) for d in space.decisions)  # absent blocks anywhere
        spelled = space.canonical(arch)
        assert space.network(spelled).key == space.network(arch).key
        assert space.canonical(spelled) == spelled
        for stage in range(len(STAGES)):
            absent = [spelled[s.scope[0]] == NONE for s in space.block_sites if s.stage == stage]
            assert absent == sorted(absent)


def test_every_depth_is_sampled() -> None:
    rng = np.random.default_rng(0)
    depths = [[len(stage) for stage in SPACE.decode(SPACE.sample(rng))] for _ in range(2000)]
    for stage, found in zip(STAGES, zip(*depths, strict=True), strict=True):
        counts = np.bincount(found, minlength=stage.n_blocks + 1)[1:]
        assert np.abs(counts - 2000 / stage.n_blocks).max() < 5 * np.sqrt(2000 / stage.n_blocks)


def test_encode_inverts_decode() -> None:
    assert EXACT.decode(EXACT.published["tfnas-a"]) == PUBLISHED["tfnas-a"]
    short = (((0, 40),), ((1, 100),), ((2, 100),), ((3, 400),), ((4, 300),), ((5, 800),))
    assert EXACT.decode(EXACT.encode(short)) == short


def test_what_is_no_network_is_refused() -> None:
    good = [list(stage) for stage in PUBLISHED["tfnas-a"]]
    with pytest.raises(UsageError, match="6 stages"):
        EXACT.encode(good[:-1])
    with pytest.raises(UsageError, match="stage1 has 1 to 2 blocks, got 0"):
        EXACT.encode([[], *good[1:]])
    with pytest.raises(UsageError, match=r"stage1/block1 has no k3_e6_se of 63 channels: 64 to 128"):
        EXACT.encode([[(5, 63)], *good[1:]])
    with pytest.raises(UsageError, match="width_step"):
        SPACE.encode([[(5, 65)], *good[1:]])
    with pytest.raises(UsageError, match="width_step"):
        TFNASSpace(width_step=0)


def test_a_mixture_of_depths_is_a_choice_of_none() -> None:
    """E = base + sum over blocks of P(depth >= b) * sum over o of w[b, o] * cost(b, o, m): spec of TF-NAS, 2.5."""
    space = TFNASSpace(resolution=32, width_step=1000)
    oracle = FactorOracle.counting(space, "macs")
    rng = np.random.default_rng(0)
    probs = np.zeros((len(space.decisions), max(len(d.options) for d in space.decisions)))
    blocks = {site.name: [space.block(site, (o, 1)) for o in range(8)] for site in space.block_sites}
    want = sum(float(g.macs) for s in space.sites if not s.scope and (g := space.block(s, ())) is not None)
    for stage, (_, n_blocks, _, _) in enumerate(STAGES):
        depths = rng.dirichlet(np.ones(n_blocks))
        for site in (s for s in space.block_sites if s.stage == stage):
            chosen = rng.dirichlet(np.ones(8))
            present = depths[site.position :].sum()
            want += present * sum(w * g.macs for w, g in zip(chosen, blocks[site.name], strict=True) if g)
            operation, width = site.scope
            probs[operation, :8] = present * chosen
            if site.position:
                probs[operation, NONE] = 1 - present
            probs[width, 1] = 1
    assert oracle.expected_latency(probs) == pytest.approx(want, rel=1e-12)


def test_it_is_a_chain() -> None:
    oracle = FactorOracle.counting(TFNASSpace(width_step=1000), "n_params")
    chain = oracle.chain()
    assert sum(1 for pair in chain.pairwise if pair.any()) == 18
