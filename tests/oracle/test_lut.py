"""Sums of a table's blocks: the laws, and what a missing entry means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latbench.backends.roofline import OPTIONS, kernels
from latbench.errors import MissingEntryError, TableError, UsageError
from latbench.oracle.lut import LutOracle
from latbench.provenance import Provenance
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from latbench.testing import FactorOracleConformance

SMALL = MobileNetV1Space(resolution=64, levels=3)


def provenance(space):
    return Provenance("roofline", "a model", "roofline", space=space.name, settings=space.settings())


def roofline_ms(block):
    """What the analytic back-end says of a block."""
    return sum(layer.ms for layer in kernels(block, {name: float(v) for name, v in OPTIONS.items()}))


def block_rows(space, ms=roofline_ms, **more):
    return [
        Row(key, "block", block.signature, space=space.name, latency_ms=ms(block), **{"origin": "simulated", **more})
        for key, block in space.all_blocks().items()
    ]


def table(space, rows=None):
    return LatencyTable.from_rows(block_rows(space) if rows is None else rows, provenance(space))


def without(full, key):
    return full.take(np.flatnonzero(full.frame["key"] != key))


def an_arch_with(space, key):
    """One that holds the block, and its site."""
    for site, picks, block in space.slots():
        if block.key == key:
            arch = [0] * len(space.decisions)
            for decision, pick in zip(site.scope, picks, strict=True):
                arch[decision] = pick
            return tuple(arch)
    raise AssertionError(key)


class TestMobileNet(FactorOracleConformance):
    oracle = LutOracle.fit(table(SMALL))

    def test_latency_is_the_sum_of_its_blocks(self):
        for arch in self.archs():
            want = sum(roofline_ms(block) for block in SMALL.blocks(tuple(arch.tolist())))
            assert self.oracle.latency(tuple(arch.tolist())) == pytest.approx(want, rel=1e-12)

    def test_its_figures_are_simulated(self):
        assert self.oracle.sources((0,) * 14) == {"simulated": 15}


class TestNASBench201(FactorOracleConformance):
    oracle = LutOracle.fit(table(NASBench201Space(num_cells=2)))

    def test_a_lone_skip_is_absent_and_costs_nothing(self):
        skips = (1, 0, 1, 0, 0, 1)  # 1 <- 0, 2 <- 1, 3 <- 2: nothing but the input
        assert self.oracle.sources(skips)["absent"] == 3 * 2 * 3
        assert self.oracle.latency(skips) == pytest.approx(
            sum(roofline_ms(block) for block in self.oracle.space.blocks(skips))
        )


def test_removing_any_entry_changes_the_source_or_raises():
    full = table(SMALL)
    for key in SMALL.all_blocks():
        arch, holed = an_arch_with(SMALL, key), without(full, key)
        with pytest.raises(MissingEntryError, match=key):
            LutOracle.fit(holed).latency(arch)
        try:
            oracle = LutOracle.fit(holed, missing="interpolate")
            ms, sources = oracle.latency(arch), oracle.sources(arch)
        except MissingEntryError:
            continue
        assert sources["interpolated"] >= 1
        assert ms > 0
        assert sum(sources.values()) == 15


def test_a_removed_entry_touches_no_other_answer():
    key = SMALL.block(SMALL.sites[3], (1, 1)).key
    whole, holed = LutOracle.fit(table(SMALL)), LutOracle.fit(without(table(SMALL), key))
    arch = (0,) * 14
    assert holed.latency(arch) == whole.latency(arch)
    with pytest.raises(MissingEntryError):
        holed.expected_latency(np.full((14, 3), 1 / 3))


def test_interpolation_is_exact_where_the_latency_is_linear():
    def linear(block):
        widths = [node.op.out_channels for node in block.nodes if hasattr(node.op, "out_channels")]
        return 0.01 * (3 + sum(widths))  # of one width at a time: linear along each decision

    space = MobileNetV1Space(resolution=64, levels=5)
    full = table(space, block_rows(space, linear))
    exact = LutOracle.fit(full)
    inner = {space.block(space.sites[i], (2, 2)).key: (i - 1, i) for i in (1, 4, 13)}
    inner[space.block(space.sites[0], (2,)).key] = (0,)
    for key, scope in inner.items():
        oracle = LutOracle.fit(without(full, key), missing="interpolate")
        arch = tuple(2 if d in scope else 0 for d in range(14))
        assert oracle.sources(arch)["interpolated"] == 1
        assert oracle.latency(arch) == pytest.approx(exact.latency(arch), rel=1e-12)


def test_nothing_is_extrapolated():
    corner = SMALL.block(SMALL.sites[1], (0, 0)).key
    with pytest.raises(MissingEntryError, match=corner):
        LutOracle.fit(without(table(SMALL), corner), missing="interpolate").latency((0,) * 14)


def test_an_absent_block_is_no_end_to_interpolate_from():
    space = NASBench201Space(num_cells=1)
    key = space.block(space.sites[1], (2,)).key  # options are names: nothing lies between them
    with pytest.raises(MissingEntryError, match=key):
        LutOracle.fit(without(table(space), key), missing="interpolate").latency((2, 0, 0, 0, 0, 0))


def test_what_is_missing_can_be_measured():
    full, asked = table(SMALL), []
    gone = [SMALL.block(SMALL.sites[i], (0, 0)).key for i in (1, 5)]

    def measure(blocks):
        asked.extend(block.key for block in blocks)
        return {block.key: roofline_ms(block) for block in blocks}

    holed = full
    for key in gone:
        holed = without(holed, key)
    oracle = LutOracle.fit(holed, missing="measure", measure=measure)
    assert sorted(asked) == sorted(gone)
    assert oracle.sources((0,) * 14) == {"measured": 2, "simulated": 13}
    assert oracle.latency((0,) * 14) == pytest.approx(LutOracle.fit(full).latency((0,) * 14))
    with pytest.raises(UsageError, match="something to measure with"):
        LutOracle.fit(holed, missing="measure")
    with pytest.raises(UsageError, match="unknown policy 'zero'"):
        LutOracle.fit(holed, missing="zero")


def test_a_failed_row_is_missing_and_says_why():
    rows = block_rows(SMALL)
    rows[20] = replace(rows[20], latency_ms=None, status="error", stage="load", error="out of memory")
    with pytest.raises(MissingEntryError, match="ended in error while in load: out of memory"):
        LutOracle.fit(table(SMALL, rows)).latency(an_arch_with(SMALL, rows[20].key))


def test_contexts_are_kept_apart():
    isolated = block_rows(SMALL, context="isolated")
    sandwich = block_rows(SMALL, lambda block: 2 * roofline_ms(block), context="sandwich")
    both = table(SMALL, isolated + sandwich)
    arch = SMALL.published["widest"]
    once = sum(map(roofline_ms, SMALL.blocks(arch)))
    assert LutOracle.fit(both).latency(arch) == pytest.approx(2 * once)
    assert LutOracle.fit(both, context="isolated").latency(arch) == pytest.approx(once)
    assert LutOracle.fit(table(SMALL, isolated)).latency(arch) == pytest.approx(once)
    with pytest.raises(TableError, match=r"no sandwich block of mobilenet_v1 \(only isolated\)"):
        LutOracle.fit(table(SMALL, isolated), context="sandwich")
    with pytest.raises(MissingEntryError):  # a sandwich entry is not replaced by an isolated one
        LutOracle.fit(table(SMALL, isolated + sandwich[1:])).latency(an_arch_with(SMALL, sandwich[0].key))


def test_a_table_that_holds_no_blocks_is_refused():
    network = SMALL.network((0,) * 14)
    only = [Row(network.key, "network", network.signature, arch=(0,) * 14, latency_ms=1.0)]
    with pytest.raises(TableError, match="no isolated block of mobilenet_v1; profile"):
        LutOracle.fit(table(SMALL, only))
    nameless = LatencyTable.from_rows(block_rows(SMALL), Provenance("", "", ""))
    with pytest.raises(TableError, match="names no search space"):
        LutOracle.fit(nameless)


def test_a_table_of_other_settings_lacks_the_blocks():
    other = MobileNetV1Space(resolution=96, levels=3)
    mixed = LatencyTable.from_rows(block_rows(SMALL), provenance(other))
    with pytest.raises(MissingEntryError):
        LutOracle.fit(mixed).latency((0,) * 14)
