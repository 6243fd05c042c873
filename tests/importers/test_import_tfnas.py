"""TF-NAS's pickle: published sums, every value bit by bit; small tables made here for what can be wrong."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latbench.errors import TableError, UsageError
from latbench.importers import tfnas
from latbench.importers.base import Source
from latbench.oracle.base import spread
from latbench.oracle.lut import LutOracle
from latbench.spaces.mbconv import NONE, OPERATIONS, STAGES, TFNASSpace
from latbench.tables import LatencyTable

REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", ""))
PUBLISHED = REFERENCE / "tfnas_latency_gpu.pkl"
needs_file = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason="needs tfnas_latency_gpu.pkl in $LATBENCH_REFERENCE_DATA"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """The published GPU table, imported, written and read again."""
    path = tmp_path_factory.mktemp("tfnas") / "t.parquet"
    tfnas.read(Source(PUBLISHED), {}).write(path)
    return LatencyTable.read(path)


@pytest.fixture(scope="module")
def oracle(table: LatencyTable) -> LutOracle:
    return LutOracle.fit(table)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REFERENCE / "tfnas_golden.json").read_text())["gpu"]
    return found


@needs_file
def test_every_value_is_the_published_one(table: LatencyTable) -> None:
    with PUBLISHED.open("rb") as file:
        raw = pickle.load(file)  # the file's own words, by the unrestricted reader
    space = TFNASSpace.from_settings(table.provenance.settings)
    n = 0
    for site in space.block_sites:
        activation = "relu" if site.stage == 0 else "swish"
        for i, operation in enumerate(OPERATIONS):
            key = (
                f"MBInvertedResBlock_{site.side}_{site.in_channels}_{operation.squeeze * site.in_channels}"
                f"_{site.out_channels}_k{operation.kernel_size}_s{site.stride}_{activation}"
            )
            most = operation.max_expansion * site.in_channels
            for mid_channels in range(most // 2, most + 1):
                block = space.block(site, space.picks_of(site, i, mid_channels))
                assert block is not None
                assert table[block.key] == raw[key][mid_channels]  # bit by bit
                n += 1
    assert n == sum(24 * site.in_channels + 8 for site in space.block_sites)
    stem, head = (space.block(site, ()) for site in (space.sites[0], space.sites[-1]))
    assert stem is not None
    assert head is not None
    assert table[stem.key] + table[head.key] == raw["base"]
    assert len(table) == 21_954 + 2
    assert table.notes["left_out"] == 36_480 - 21_954


@needs_file
def test_its_conditions_are_the_published_ones(table: LatencyTable) -> None:
    p = table.provenance
    assert (p.device, p.backend, p.settings["batch"], p.settings["width_step"]) == ("titan_rtx", "pytorch", 32, 1)
    assert set(table.frame["origin"]) == {"imported"}


@needs_file
def test_the_published_network_is_the_published_sum(oracle: LutOracle) -> None:
    arch = oracle.space.published["tfnas-a"]
    assert oracle.latency(arch) == pytest.approx(17.999473, abs=1e-6)
    assert oracle.sources(arch) == {"imported": 20}


@needs_file
@pytest.mark.parametrize("depth", ["uniform", "full"])
def test_the_uniform_expectation_is_the_published_one(oracle: LutOracle, golden: dict[str, Any], depth: str) -> None:
    """Widths settled at their initial value, operations uniform, depths uniform or full."""
    space = oracle.space
    assert isinstance(space, TFNASSpace)
    settled = oracle.condition(
        {s.scope[1]: space.decisions[s.scope[1]].options.index(6 * s.in_channels) for s in space.block_sites}
    )
    probs = np.zeros((len(space.decisions), max(len(d.options) for d in space.decisions)))
    for site in space.block_sites:
        present = 1.0 if depth == "full" else 1 - site.position / STAGES[site.stage].n_blocks
        probs[site.scope[0], :8] = present / 8
        probs[site.scope[0], NONE] = 1 - present
    name = {
        "uniform": "expected_uniform_alpha_uniform_beta_init_width",
        "full": "expected_uniform_alpha_full_depth_init_width",
    }
    assert float(settled.expected_latency(probs)) == pytest.approx(golden[name[depth]], rel=1e-12)


@needs_file
@pytest.mark.parametrize(("end", "share"), [("min_width", 4), ("init_width", 6), ("max_width", 8)])
def test_single_operation_networks_are_the_published_sums(
    oracle: LutOracle, golden: dict[str, Any], end: str, share: int
) -> None:
    space = oracle.space
    assert isinstance(space, TFNASSpace)
    for i, operation in enumerate(OPERATIONS):
        picks = [(i, space.decisions[s.scope[1]].options.index(share * s.in_channels)) for s in space.block_sites]
        arch = tuple(index for pair in picks for index in pair)
        assert oracle.latency(arch) == pytest.approx(golden["full_depth_single_op"][operation.name][end], rel=1e-12)


@needs_file
def test_the_reachable_range_is_the_published_one(oracle: LutOracle) -> None:
    assert oracle.fastest()[1] == pytest.approx(4.088086, abs=1e-6)


@needs_file
def test_knots_and_a_width_between_them_give_the_published_figure(table: LatencyTable, oracle: LutOracle) -> None:
    """A table of the default width step says as much as one of every width: the authors interpolated linearly."""
    coarse = TFNASSpace(batch=32)
    knots = table.take(np.flatnonzero(table.frame["key"].isin(list(coarse.all_blocks()))))
    provenance = replace(table.provenance, settings=coarse.settings())
    at_knots = LutOracle.fit(replace(knots, provenance=provenance))
    rng = np.random.default_rng(0)
    for _ in range(20):
        arch = oracle.space.sample(rng)
        widths = range(1, len(arch), 2)
        options = {d: oracle.space.decisions[d].options[arch[d]] for d in widths}
        even = {d: int(option) // 2 * 2 for d, option in options.items()}  # between two channels of an e3 otherwise
        arch = tuple(oracle.space.decisions[d].options.index(even[d]) if d in even else i for d, i in enumerate(arch))
        settled = at_knots.condition({d: spread(coarse.decisions[d], option) for d, option in even.items()})
        same_operations = tuple(0 if d in even else i for d, i in enumerate(arch))
        assert settled.latency(same_operations) == pytest.approx(oracle.latency(arch), rel=1e-9)


@needs_file
def test_another_batch_than_the_published_is_refused() -> None:
    with pytest.raises(UsageError, match="batch 32, not 1"):
        tfnas.read(Source(PUBLISHED), {"batch": 1})


# -- tables made here: every key of the space, curves linear in the width


def small(tmp_path: Path, change: Callable[[dict[str, Any]], None] = lambda raw: None) -> Source:
    space = TFNASSpace(width_step=1)
    raw: dict[str, Any] = {"base": 2.0}
    for site in space.block_sites:
        for operation in range(len(OPERATIONS)):
            most = OPERATIONS[operation].max_expansion * site.in_channels
            curve = raw.setdefault(tfnas._key(site, operation), {})
            curve.update({m: 0.01 * m for m in range(1, most + 1)})
    change(raw)
    path = tmp_path / "table.pkl"
    path.write_bytes(pickle.dumps(raw))
    return Source(path, device="mine")


KEY = "MBInvertedResBlock_112_16_0_24_k3_s2_relu"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda raw: raw.pop("base"), 'no dict with an entry "base"'),
        (lambda raw: raw.update(base=0.0), r"base: a latency of 0\.0 ms"),
        (lambda raw: raw[KEY].update({40: float("nan")}), f"{KEY}, 40 mid channels: nan is no latency"),
        (lambda raw: raw[KEY].update({40: -1.0}), rf"{KEY}, 40 mid channels: a latency of -1\.0 ms"),
        (lambda raw: raw[KEY].update({40: float("inf")}), f"{KEY}, 40 mid channels"),
        (lambda raw: raw[KEY].update({40: "fast"}), "'fast' is no latency"),
        (lambda raw: raw[KEY].pop(77), f"{KEY}: no entry for 77 mid channels"),
        (lambda raw: raw.pop(KEY), f"{KEY}: no entry"),
        (lambda raw: raw.update({KEY.replace("112", "96"): {1: 1.0}}), "96_16_0_24_k3_s2_relu: no block of tfnas"),
        (lambda raw: raw.update(Conv_1={1: 1.0}), "key 'Conv_1'"),
        (lambda raw: raw.update({KEY: [1.0]}), "no dict of mid channels"),
        (lambda raw: raw.update({KEY: {"32": 1.0}}), "no dict of mid channels"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    source = small(tmp_path, change)
    with pytest.raises(TableError, match=match) as caught:
        tfnas.read(source, {"batch": 32})
    assert str(source.path) in str(caught.value)


def test_a_file_that_is_not_published_needs_its_batch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch"):
        tfnas.read(small(tmp_path), {})


def test_what_no_operation_can_take_is_left_out(tmp_path: Path) -> None:
    def extrapolated(raw: dict[str, Any]) -> None:
        raw[KEY][1] = -0.2  # as in the published files

    table = tfnas.read(small(tmp_path, extrapolated), {"batch": 32})
    assert (table.frame["latency_ms"] > 0).all()
    assert (table.provenance.device, table.provenance.settings["batch"]) == ("mine", 32)
