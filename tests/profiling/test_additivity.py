"""Sums of blocks against networks, by hand-made tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latbench.profiling.additivity import additivity, errors
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable, Provenance, Row

SPACE = MobileNetV1Space(resolution=32, levels=2, max_width=0.75, num_classes=10)
ARCHS = [SPACE.parse_arch(f"random:{seed}") for seed in range(4)]


def table(share: float = 1.0, leave_out: int | None = None) -> LatencyTable:
    """Block i takes i ms; networks take `share` of their blocks' sum."""
    blocks = dict(zip(SPACE.all_blocks(), range(1, 10**6), strict=False))
    rows = [
        Row(k, "block", "s", context="sandwich", latency_ms=float(ms)) for k, ms in blocks.items() if ms != leave_out
    ]
    for arch in ARCHS:
        total_ms = share * sum(blocks[block.key] for block in SPACE.blocks(arch))
        rows.append(Row(SPACE.network(arch).key, "network", "s", arch=arch, latency_ms=total_ms))
    return LatencyTable.from_rows(rows, Provenance("d", "D", "b"))


def test_networks_that_are_their_blocks_have_no_error() -> None:
    found = additivity(table(), SPACE, "sandwich")
    assert found is not None
    assert (found["mape"], found["bias"], found["n"], found["n_incomplete"]) == (0, 0, 4, 0)
    assert found["spearman"] == pytest.approx(1)


def test_errors_are_shares_of_the_measured_latency() -> None:
    found = additivity(table(share=0.8), SPACE, "sandwich")
    assert found is not None
    assert found["mape"] == pytest.approx(0.25)
    assert found["bias"] == pytest.approx(0.25)
    by_hand = errors(np.array([1.0, 3.0]), np.array([2.0, 2.0]))
    assert (by_hand["mape"], by_hand["bias"], by_hand["spearman"]) == (0.5, 0.0, None)


def test_a_network_with_a_block_that_has_no_row_is_counted_not_guessed() -> None:
    stem_of_first = next(SPACE.blocks(ARCHS[0])).key
    position = list(SPACE.all_blocks()).index(stem_of_first) + 1
    without = [arch for arch in ARCHS if next(SPACE.blocks(arch)).key == stem_of_first]
    found = additivity(table(leave_out=position), SPACE, "sandwich")
    if len(without) == len(ARCHS):
        assert found is None
    else:
        assert found is not None
        assert (found["n"], found["n_incomplete"]) == (len(ARCHS) - len(without), len(without))


def test_another_contexts_blocks_do_not_count() -> None:
    assert additivity(table(), SPACE, "isolated") is None


def test_no_networks_no_figures() -> None:
    alone = table().select(kind="block")
    assert additivity(replace(alone), SPACE, "sandwich") is None
