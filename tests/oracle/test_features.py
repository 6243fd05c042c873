"""Physical features against the graphs they are read from."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from latbench.graph.ir import GraphBuilder
from latbench.graph.ops import AdaptiveAvgPool2d, Conv2d, Crop, Flatten, Linear, ReLU
from latbench.oracle.base import one_hot
from latbench.oracle.features import QUANTITIES, costs, identity, kind, live_cells, physical, views
from latbench.spaces.fbnet import FBNetSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space

SPACES = [FBNetSpace(), OFAMobileNetV3Space(), MobileNetV1Space(resolution=64), NASBench201Space(num_cells=2)]
CELLS = NASBench201Space(num_cells=1, channels=4, resolution=8)
ALL_CELLS = np.array(list(product(range(5), repeat=6)))


def sample(space, n=20):
    rng = np.random.default_rng(0)
    return np.array([space.sample(rng) for _ in range(n)])


def column(space, name):
    return physical(space).names.index(name)


def test_a_block_costs_what_its_kernels_do():
    b = GraphBuilder("float16")
    x = b.add(Crop(1, 1), b.input("x", (2, 4, 9, 9)), name="crop")
    x = b.add(Conv2d(4, 8, 3, padding=1, bias=True), x, name="conv")
    x = b.add(ReLU(), x, name="act")
    x = b.add(Flatten(), b.add(AdaptiveAvgPool2d(), x, name="pool"), name="flat")
    found = list(costs(b.build(b.add(Linear(8, 3), x, name="fc"))))
    assert [(what, side) for what, side, _ in found] == [
        ("dense", 8), ("ReLU", 8), ("AdaptiveAvgPool2d", 1), ("Linear", 1)
    ]  # fmt: skip
    inside, outside = 2 * 4 * 64, 2 * 8 * 64
    want = [
        (1, 9 * 4 * outside, 2 * (inside + outside + 296), 296),
        (1, 0, 2 * (outside + outside), 0),
        (1, 0, 2 * (outside + 16), 0),
        (1, 2 * 8 * 3, 2 * (16 + 6 + 27), 27),
    ]
    np.testing.assert_array_equal([values for *_, values in found], want)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (Conv2d(8, 16), "pointwise"),
        (Conv2d(8, 16, 3), "dense"),
        (Conv2d(8, 8, 3, groups=8), "depthwise"),
        (Conv2d(8, 16, groups=2), "grouped pointwise"),
        (Conv2d(8, 16, 3, groups=2), "grouped dense"),
        (Conv2d(1, 16, 3), "dense"),
        (ReLU(), "ReLU"),
    ],
)
def test_kinds_of_kernels(op, name):
    assert kind(op) == name


@pytest.mark.parametrize("space", SPACES[:3], ids=lambda s: s.name)
def test_sums_over_sites_are_the_networks(space):
    archs = sample(space)
    found = physical(space).of(archs)
    for arch, row in zip(archs, found, strict=True):
        network = space.network(tuple(arch.tolist()))
        want = np.sum([values for *_, values in costs(network)], axis=0)
        np.testing.assert_allclose(row[[column(space, f"total/{q}") for q in QUANTITIES]], want)
        assert row[column(space, "total/macs")] == network.macs


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_kinds_levels_and_blocks_each_add_up_to_the_total(space):
    names, found = physical(space).names, physical(space).of(sample(space))
    for q, prefix in product(QUANTITIES, ("kind/", "level", "block")):
        columns = [i for i, name in enumerate(names) if name.startswith(prefix) and name.endswith(f"/{q}")]
        if prefix == "block" and (q == "weights" or space.name == "mobilenet_v1"):
            assert not columns  # its widths make too many blocks
        else:
            np.testing.assert_allclose(found[:, columns].sum(axis=1), found[:, column(space, f"total/{q}")])


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_expectation_is_exact(space):
    archs, figures = sample(space, 6), physical(space)
    np.testing.assert_allclose(figures.expected(one_hot(space, archs)), figures.of(archs))
    n_options = [len(d.options) for d in space.decisions]
    rng = np.random.default_rng(1)
    mixed = one_hot(space, archs[:1])[0]
    left, right = (int(d) for d in rng.choice(len(n_options), 2, replace=False))
    mixed[[left, right]] = 0
    mixed[left, : n_options[left]] = rng.dirichlet(np.ones(n_options[left]))
    mixed[right, : n_options[right]] = rng.dirichlet(np.ones(n_options[right]))
    want = np.zeros(len(figures.names))
    for i, j in product(range(n_options[left]), range(n_options[right])):
        arch = archs[:1].copy()
        arch[0, [left, right]] = i, j
        want += mixed[left, i] * mixed[right, j] * figures.of(arch)[0]
    np.testing.assert_allclose(figures.expected(mixed), want, atol=1e-9)


def test_combinations_and_parts_of_the_figures():
    space, archs = SPACES[0], sample(SPACES[0])
    figures, rng = physical(space), np.random.default_rng(0)
    matrix, shift = rng.standard_normal((len(figures.names), 3)), rng.standard_normal(3)
    np.testing.assert_allclose(figures.combine(matrix, shift).of(archs), figures.of(archs) @ matrix + shift)
    some = figures.take([5, 2])
    assert some.names == (figures.names[5], figures.names[2])
    np.testing.assert_array_equal(some.of(archs), figures.of(archs)[:, [5, 2]])


def test_one_block_at_two_resolutions_has_one_identity():
    space = OFAMobileNetV3Space()
    site = next(site for site in space.sites if site.name == "unit2/layer1")
    small, large, other = space.block(site, (0, 3)), space.block(site, (24, 3)), space.block(site, (0, 4))
    assert identity(small) == identity(large) != identity(other)


def test_live_cells_are_the_canonical_ones():
    cells, _ = live_cells(ALL_CELLS)
    assert [tuple(cell) for cell in cells.tolist()] == [CELLS.canonical(tuple(arch)) for arch in ALL_CELLS.tolist()]


def test_a_cell_is_connected_where_a_way_leads_through():
    _, connected = live_cells(ALL_CELLS)
    ways = ((3,), (0, 4), (1, 5), (0, 2, 5))
    want = [any(all(arch[i] for i in way) for way in ways) for arch in ALL_CELLS]
    np.testing.assert_array_equal(connected, want)


def test_the_live_view_counts_what_the_network_holds():
    everything, live = views(CELLS)
    archs = sample(CELLS, 300)
    cells, connected = live_cells(archs)
    kernels = live.figures(archs)[1][:, column(CELLS, "total/kernels")]
    for arch, found, through in zip(archs, kernels, connected, strict=True):
        network = CELLS.network(tuple(arch.tolist()))
        assert found == (sum(1 for _ in costs(network)) if through else 0)
    np.testing.assert_array_equal(live.figures(archs)[0], cells)
    np.testing.assert_array_equal(everything.figures(archs)[0], archs)


def test_other_spaces_have_one_view():
    assert [view.name for view in views(SPACES[0])] == ["all"]
