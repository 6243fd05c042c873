"""IRLAS's space against the published model, counts by hand, and every block of its small spaces."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latbench.errors import UsageError
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.ops import Add, AvgPool2d, BatchNorm2d, Concat, Conv2d, Flatten, Linear, Op, ReLU, Shape
from latbench.graph.passes import fold_batch_norm, fold_structure, random_weights
from latbench.graph.torch import to_module
from latbench.spaces.nsc import (
    IRLAS_BLOCK,
    RESNEXT,
    TERMINAL,
    IRLASSpace,
    density,
    fold_scales,
    format_codes,
    leaves,
    legal_codes,
    parse_codes,
)
from latbench.testing import SpaceConformance

REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", "")) / "irlas_mobile.json"
MOBILE = IRLASSpace()
BLOCK = MOBILE.parse_arch("irlas-mobile")
NETWORK = MOBILE.network(BLOCK)


class TestConformanceOfTheMobileStack(SpaceConformance):
    space = IRLASSpace(resolution=32, widths="4,8,8", repeats="1,2,1", num_classes=5)


class TestConformanceOfTheCifarStack(SpaceConformance):
    space = IRLASSpace(
        batch=2, stack="cifar", resolution=8, max_index=6, widths="4,6", repeats="2,1", conv_kind="dense", num_classes=3
    )


# ---- the published network ------------------------------------------------------------------------------------------


def test_it_has_the_published_size() -> None:
    assert (NETWORK.n_params, NETWORK.macs) == (9_962_600, 1_418_807_296)
    assert fold_structure(NETWORK).n_params == 9_946_760


@pytest.mark.parametrize(
    ("prefix", "n_params"),
    [
        ("stem", 928),
        ("stage1/entry", 9_312),
        ("stage1/block1", 5_504),
        ("stage2/entry", 160_512),
        ("stage2/block1", 71_168),
        ("stage3/entry", 689_664),
        ("stage3/block1", 273_408),
        ("stage3/block2", 1_129_472),
        ("stage3/block4", 1_129_472),
        ("stage4/entry", 2_755_584),
        ("stage4/block1", 1_071_104),
        ("head", 1_537_000),
    ],
)
def test_each_part_has_its_published_size(prefix: str, n_params: int) -> None:
    assert sum(node.op.n_params for node in NETWORK.nodes if node.name.startswith(f"{prefix}/")) == n_params


def test_stages_end_in_the_published_shapes() -> None:
    ends = [NETWORK.shapes[f"stage{i}/block{j}/out"] for i, j in ((1, 1), (2, 1), (3, 4), (4, 1))]
    assert ends == [(1, 96, 56, 56), (1, 384, 28, 28), (1, 768, 14, 14), (1, 1536, 7, 7)]
    assert NETWORK.shapes[NETWORK.outputs[0]] == (1, 1000)


@pytest.mark.skipif(not REFERENCE.is_file(), reason="needs irlas_mobile.json in the folder $LATBENCH_REFERENCE_DATA")
def test_it_computes_what_the_published_layer_list_does() -> None:
    """The list is built as a graph of its own; its weights, in order of appearance, are ours."""
    raw = json.loads(REFERENCE.read_text())
    assert tuple(map(tuple, raw["block_nsc"]["code"])) == IRLAS_BLOCK
    listed = _listed(raw["layers"])
    assert (listed.n_params, listed.macs) == (NETWORK.n_params, NETWORK.macs)
    theirs = random_weights(listed, seed=3)
    ours = NETWORK.weight_shapes()
    # a wide block lists its lift behind the layer that it serves, as we do; so orders agree, and shapes say so
    assert [array.shape for array in theirs.values()] == list(ours.values())
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(MOBILE.input_shape, np.float32))
    with torch.inference_mode():
        want = to_module(listed, theirs)(x)
        got = to_module(NETWORK, dict(zip(ours, theirs.values(), strict=True)))(x)
    assert float((got - want).abs().max()) < 1e-5 * max(1.0, float(want.abs().max()))


def _listed(layers: list[dict[str, Any]]) -> Graph:
    b = GraphBuilder()
    names = {"data": b.input("x", MOBILE.input_shape)}
    for layer in layers:
        sources = [names[source] for source in layer["inputs"]]
        if layer["op"] == "linear":  # the list leaves the flattening out
            sources = [b.add(Flatten(), *sources, name="flatten")]
        op = _op(layer, b.shape(sources[0]))
        names[layer["name"]] = b.add(op, *sources, name=layer["name"].replace(".", "/"))
    return b.build(names[layers[-1]["name"]])


def _op(layer: dict[str, Any], shape: Shape) -> Op:
    kind = layer["op"]
    if kind == "conv":
        window = (layer["kernel"], layer["stride"], layer["padding"])
        return Conv2d(
            layer["in_channels"], layer["out_channels"], *window, groups=layer["groups"], bias=layer["bias"]
        )  # fmt: skip
    if kind == "batchnorm":
        return BatchNorm2d(layer["channels"], layer["eps"])
    if kind == "linear":
        return Linear(shape[1], 1000)
    if kind.startswith("avg"):
        return AvgPool2d(shape[-1], 1)
    plain: dict[str, Op] = {"relu": ReLU(), "add": Add(), "concat": Concat()}
    return plain[kind]


def test_folds_change_no_output() -> None:
    space = IRLASSpace(resolution=64, widths="8,16,16,16", num_classes=7)
    network = space.network(space.parse_arch("irlas-mobile"))
    weights = random_weights(network, seed=1)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(space.input_shape, np.float32))
    scaled = fold_scales(network, weights)
    folded, folded_weights, _ = fold_batch_norm(network, weights)
    for graph, found in (scaled, (folded, folded_weights), fold_scales(folded, folded_weights)):
        with torch.inference_mode():
            want, got = to_module(network, weights)(x), to_module(graph, found)(x)
        assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert scaled[0].key == IRLASSpace(
        resolution=64, widths="8,16,16,16", num_classes=7, scales=False
    ).network(space.parse_arch("irlas-mobile")).key  # fmt: skip


def test_without_scales_it_is_smaller_by_the_published_count() -> None:
    bare = IRLASSpace(scales=False).network(BLOCK)
    assert NETWORK.n_params - bare.n_params == 6_464
    assert NETWORK.macs - bare.macs == 1_455_104


# ---- codes ----------------------------------------------------------------------------------------------------------


def test_legal_codes_are_counted() -> None:
    assert [len(legal_codes(t, 10)) for t in range(1, 9)] == [8, 19, 31, 45, 61, 79, 99, 121]
    assert legal_codes(10, 10) == ((10, TERMINAL, 0, 0, 0),)
    assert all(len(set(legal_codes(t, 10))) == len(legal_codes(t, 10)) for t in range(1, 11))
    assert [len(decision.options) for decision in IRLASSpace(max_index=4).decisions] == [8, 19, 31, 1]


def _all_blocks(space: IRLASSpace) -> set[tuple[int, ...]]:
    return {space.canonical(arch) for arch in product(*(range(len(d.options)) for d in space.decisions))}


def test_small_spaces_are_enumerated_and_every_block_runs() -> None:
    small, larger = IRLASSpace(max_index=3), IRLASSpace(max_index=4)
    blocks = _all_blocks(larger)
    assert (len(_all_blocks(small)), len(blocks)) == (152, 4_472)
    chosen = np.random.default_rng(0).choice(sorted(blocks), 200, replace=False)
    cases = [(small, arch) for arch in sorted(_all_blocks(small))] + [(larger, tuple(map(int, a))) for a in chosen]
    for space, arch in cases:
        graph = space.block(arch, 8, (2, 8, 8, 8))
        with torch.inference_mode():
            output = to_module(graph)(torch.randn(2, 8, 8, 8))
        n_leaves = len(leaves(space.codes(arch)))
        assert output.shape == (2, 8 * n_leaves, 8, 8), f"{arch}: every leaf has the stage's width"
        assert torch.isfinite(output).all()


def test_codes_and_options_translate_into_each_other() -> None:
    rng = np.random.default_rng(5)
    for arch in (MOBILE.sample(rng) for _ in range(100)):
        codes = MOBILE.codes(arch)
        assert MOBILE.encode(codes) == arch == MOBILE.canonical(arch)
        assert MOBILE.parse_arch(format_codes(codes)) == arch
    assert parse_codes(format_codes(IRLAS_BLOCK)) == IRLAS_BLOCK


def test_what_follows_the_terminal_does_not_count() -> None:
    longer = (*BLOCK[:6], 3, 2, 1, 0)
    assert MOBILE.network(longer).key == NETWORK.key
    assert MOBILE.canonical(longer) == BLOCK


def test_density_is_edges_per_node() -> None:
    assert density(IRLAS_BLOCK) == pytest.approx(9 / 7)
    assert density(RESNEXT) == 1.0
    assert leaves(IRLAS_BLOCK) == (1, 4, 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(1,1,3,0,0)", "ends with its terminal"),
        ("(1,1,3,0,0)(2,7,0,0,0)(3,7,0,0,0)", "ends with its terminal"),
        ("(1,1,7,0,0)(2,7,0,0,0)", "cannot be layer 1"),
        ("(1,5,0,0,0)(2,7,0,0,0)", "cannot be layer 1"),
        ("(1,1,3,0,0)(2,5,0,1,0)(3,7,0,0,0)", "cannot be layer 2"),
        ("(1,1,3,0,0) and (2,7,0,0,0)", "is no network structure code"),
        ("(1,1,3,0)", "is no network structure code"),
    ],
)
def test_malformed_codes_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MOBILE.parse_arch(text)


# ---- layers and stacks ----------------------------------------------------------------------------------------------


def _ops(code: str, shape: tuple[int, ...], width: int, **settings: object) -> list[str]:
    space = IRLASSpace(**settings)
    return [str(node.op) for node in space.block(space.parse_arch(code), width, shape).nodes]


def test_kinds_of_convolution() -> None:
    code, shape = "(1,1,3,0,0)(2,7,0,0,0)", (1, 12, 8, 8)
    lifted = [op for op in _ops(code, shape, 4) if op.startswith("Conv2d")]
    assert lifted == [
        "Conv2d(in_channels=12,out_channels=4,bias=1)",
        "Conv2d(in_channels=4,out_channels=4,kernel_size=3,padding=1,groups=4)",
        "Conv2d(in_channels=4,out_channels=4)",
    ]
    dense = [op for op in _ops(code, shape, 4, conv_kind="dense") if op.startswith("Conv2d")]
    assert dense == ["Conv2d(in_channels=12,out_channels=4,kernel_size=3,padding=1)"]


def test_a_sum_lifts_its_narrower_operand() -> None:
    space = IRLASSpace()
    graph = space.block(space.parse_arch("(1,1,3,0,0)(2,5,0,0,1)(3,1,1,2,0)(4,7,0,0,0)"), 4, (1, 12, 8, 8))
    (added,) = (node for node in graph.nodes if isinstance(node.op, Add))
    assert graph.shapes[added.name] == (1, 12, 8, 8)
    assert [str(node.op) for node in graph.nodes if node.name.startswith("layer2/right")] == [
        "Conv2d(in_channels=4,out_channels=12)",
        "BatchNorm2d(num_features=12)",
    ]


def test_stages_do_not_grow_without_bound() -> None:
    """Nine layers that hand the input on: each becomes as wide as the stage, where four blocks would make 9^4 of it."""
    space = IRLASSpace(stack="cifar", resolution=32)
    handed_on = "".join(f"({i},4,0,0,0)" for i in range(1, 10)) + "(10,7,0,0,0)"
    network = space.network(space.parse_arch(handed_on))
    widest = max(shape[1] for shape in network.shapes.values())
    assert widest == 9 * 128


def test_cifar_stack_has_three_stages_of_four() -> None:
    network = IRLASSpace(stack="cifar", resolution=32, num_classes=10).network(BLOCK)
    assert network.shapes["stage1/block4/out"] == (1, 96, 32, 32)
    assert network.shapes["stage3/block4/out"] == (1, 384, 8, 8)
    assert sum(node.name.endswith("/out") for node in network.nodes) == 12


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stack": "imagenet"}, "unknown stack 'imagenet': mobile or cifar"),
        ({"conv_kind": "grouped"}, "unknown conv_kind"),
        ({"max_index": 1}, "max_index must be at least 2"),
        ({"widths": "32,64"}, "2 widths and 4 repeats"),
        ({"widths": "32,-1,2,3"}, "widths must be whole numbers above zero"),
        ({"repeats": "a"}, "repeats must be whole numbers above zero"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"stack": "cifar", "resolution": 8, "widths": "1,1,1,1,1", "repeats": "1,1,1,1,1"}, "cannot be halved"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        IRLASSpace.from_settings(settings)


def test_a_block_is_told_by_its_code():
    space = IRLASSpace()
    assert space.describe(space.published["irlas-mobile"]).startswith("(1,1,1,0,0)(2,1,3,0,0)(3,5,0,0,2)")
