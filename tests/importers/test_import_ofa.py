"""Once-for-all's YAML: files made here in its format, as the released ``LatencyEstimator`` would ask for their keys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from latbench.errors import LatbenchError
from latbench.importers import ofa
from latbench.importers.base import Source
from latbench.oracle.lut import LutOracle
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space

SIDE = 160
STAGES = [  # out, stride, squeeze, h-swish: OFAMobileNetV3, width multiple 1
    (24, 2, 0, 0),
    (40, 2, 1, 0),
    (80, 2, 0, 1),
    (112, 1, 1, 1),
    (160, 2, 1, 1),
]


def divisible(width: float) -> int:
    new = max(8, int(width + 4) // 8 * 8)
    return new + 8 if new < 0.9 * width else new


def layer(side: int, c_in: int, out: int, mid: int, kernel: int, stride: int, skip: int, se: int, hs: int) -> str:
    end = (side - 1) // stride + 1
    return (
        f"expanded_conv-input:{side}x{side}x{c_in}-output:{end}x{end}x{out}"
        f"-expand:{mid}-kernel:{kernel}-stride:{stride}-idskip:{skip}-se:{se}-hs:{hs}"
    )


def tables() -> dict[str, float]:
    """Every layer of the space at one side, by the format's own keys."""
    side = SIDE // 2
    keys = [f"Conv-input:{SIDE}x{SIDE}x3-output:{side}x{side}x16", layer(side, 16, 16, 16, 3, 1, 1, 0, 0)]
    c_in = 16
    for out, stride, se, hs in STAGES:
        for kernel, expansion in product((3, 5, 7), (3, 4, 6)):
            keys.append(layer(side, c_in, out, divisible(c_in * expansion), kernel, stride, 0, se, hs))
        side = (side - 1) // stride + 1
        for kernel, expansion in product((3, 5, 7), (3, 4, 6)):
            keys.append(layer(side, out, out, divisible(out * expansion), kernel, 1, 1, se, hs))
        c_in = out
    keys += [
        f"Conv_1-input:{side}x{side}x160-output:{side}x{side}x960",
        f"AvgPool2D-input:{side}x{side}x960-output:1x1x960",
        "Conv_2-input:1x1x960-output:1x1x1280",
        "Logits-input:1x1x1280-output:1000",
    ]
    rng = np.random.default_rng(0)
    return {key: float(rng.uniform(0.1, 5)) for key in keys}


def written(tmp_path: Path, figures: dict[str, float], change: Callable[[str], str] = lambda text: text) -> Source:
    path = tmp_path / "160_lookup_table.yaml"
    path.write_text(change("".join(f"{key}: {{count: 50, mean: {ms!r}}}\n" for key, ms in figures.items())))
    return Source(path, device="note10")


def test_a_network_is_the_sum_that_the_released_code_takes(tmp_path: Path) -> None:
    figures = tables()
    table = ofa.read(written(tmp_path, figures), {"resolution": SIDE}, "ms")
    assert table.notes["left_out"] == 0
    assert len(table) == len(figures) - 3  # the head is one row of four layers
    oracle = LutOracle.fit(table)
    space = oracle.space
    assert isinstance(space, OFAMobileNetV3Space)
    rng = np.random.default_rng(1)
    for _ in range(20):
        arch = (len(space.decisions[0].options) - 1, *space.sample(rng)[1:])
        keys = list(figures)[:2] + list(figures)[-4:]
        side, c_in = SIDE // 2, 16
        for unit, (out, stride, se, hs) in enumerate(STAGES):
            for i in range(4):
                option = space.decisions[1 + 4 * unit + i].options[arch[1 + 4 * unit + i]]
                if option == "absent":
                    continue
                kernel, expansion = (int(part[1:]) for part in str(option).split("_"))
                s = 1 if i else stride
                keys.append(layer(side, c_in, out, divisible(c_in * expansion), kernel, s, int(i > 0), se, hs))
                side, c_in = (side - 1) // s + 1, out
        assert oracle.latency(arch) == pytest.approx(sum(figures[key] for key in keys), rel=1e-12)


def test_units_and_origin(tmp_path: Path) -> None:
    source = written(tmp_path, tables())
    ms, us = (ofa.read(source, {"resolution": SIDE}, unit) for unit in ("ms", "us"))
    np.testing.assert_allclose(us.frame["latency_ms"], ms.frame["latency_ms"] / 1000, rtol=1e-15)
    assert set(ms.frame["origin"]) == {"imported"}
    assert ms.provenance.device == "note10"


def test_layers_of_wider_networks_are_left_out(tmp_path: Path) -> None:
    figures = {**tables(), layer(80, 24, 24, 24, 3, 1, 1, 0, 0): 1.0}  # width multiple 1.2
    assert ofa.read(written(tmp_path, figures), {"resolution": SIDE}, "ms").notes["left_out"] == 1


KEY = layer(80, 16, 16, 16, 3, 1, 1, 0, 0)


@pytest.mark.parametrize(
    ("change", "unit", "match"),
    [
        (lambda text: text, None, "does not say its unit"),
        (lambda text: "", "ms", "is empty"),
        (lambda text: "- 1\n", "ms", "no YAML mapping"),
        (lambda text: text[:-5], "ms", "no YAML as once-for-all writes it"),
        (lambda text: text + "\tx", "ms", "no YAML as once-for-all writes it"),
        (lambda text: text + text.splitlines()[1], "ms", "appears twice"),
        (lambda text: f"{KEY}: {{mean: .nan}}\n", "ms", "a latency of nan ms"),
        (lambda text: f"{KEY}: {{mean: 0}}\n", "ms", r"a latency of 0\.0 ms"),
        (lambda text: f"{KEY}: {{mean: -1.5}}\n", "ms", r"a latency of -1\.5 ms"),
        (lambda text: f"{KEY}: {{mean: fast}}\n", "ms", "'fast' is no number"),
        (lambda text: f"{KEY}: {{median: 1.0}}\n", "ms", "has no mean latency"),
        (lambda text: f"{KEY}: 1.0\n", "ms", "has no mean latency"),
        (lambda text: f"{KEY.rpartition('-se')[0]}: {{mean: 1.0}}\n", "ms", "not a layer as once-for-all names it"),
        (lambda text: f"{KEY}: {{mean: 1, mean: 2}}\n", "ms", "mean appears twice"),
        (lambda text: "a: &a [1]\nb: *a\n", "ms", "YAML's references"),
        (lambda text: f"{KEY}: !!python/object/apply:os.getcwd []\n", "ms", "no YAML as once-for-all writes it"),
        (lambda text: f"{layer(56, 16, 16, 16, 3, 1, 1, 0, 0)}: {{mean: 1.0}}\n", "ms", "--resolution"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[str], str], unit: str | None, match: str) -> None:
    source = written(tmp_path, tables(), change)
    with pytest.raises(LatbenchError, match=match) as caught:
        ofa.read(source, {"resolution": SIDE}, unit)
    assert "\n" not in str(caught.value)
