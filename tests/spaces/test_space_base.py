"""Laws of the base classes that no built-in space shows, and proof that the conformance suite notices breaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest

from latbench.errors import UsageError
from latbench.graph.blocks import classifier, conv_bn_act
from latbench.graph.ir import Graph, GraphBuilder
from latbench.spaces.base import Arch, Decision, FactoredSpace, SearchSpace, Site
from latbench.testing import FactoredSpaceConformance, SpaceConformance


@dataclass(frozen=True)
class Whole(SearchSpace):
    """Does not factor: measured as whole networks."""

    resolution: int = 8
    name: ClassVar[str] = "whole"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return (Decision("width", (4, 8)), Decision("kernel", (1, 3, 5)))

    @property
    def published(self) -> Mapping[str, Arch]:
        return {"whole-a": (1, 2), "whole-b": (0, 0)}

    def network(self, arch: Arch) -> Graph:
        self.check(arch)
        b = GraphBuilder(self.dtype)
        width, kernel = (4, 8)[arch[0]], (1, 3, 5)[arch[1]]
        return b.build(
            classifier(b, conv_bn_act(b, b.input("x", self.input_shape), width, kernel, name=""), 2, name="")
        )


@dataclass(frozen=True)
class Chain(FactoredSpace):
    """Stem, an optional convolution, a head."""

    resolution: int = 8
    name: ClassVar[str] = "chain"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return (Decision("extra", (False, True)),)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site("stem", (), "stem"), Site("extra", (0,), "conv"), Site("head", (), "head"))

    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        b = GraphBuilder(self.dtype)
        if site.name == "stem":
            return b.build(conv_bn_act(b, b.input("x", self.input_shape), 4, name=""))
        x = b.input("x", (self.batch, 4, self.resolution, self.resolution))
        if site.name == "head":
            return b.build(classifier(b, x, 2, name=""))
        return b.build(conv_bn_act(b, x, 4, 3, name="")) if picks[0] else None


class TestWholeConforms(SpaceConformance):
    space = Whole()
    n_networks = 3


class TestChainConforms(FactoredSpaceConformance):
    space = Chain(batch=3)
    n_networks = 3


def test_space_that_does_not_factor_is_its_own_block() -> None:
    (block,) = Whole().blocks((1, 0))
    assert block == Whole().network((1, 0))


def test_absent_block_passes_its_input_through() -> None:
    space = Chain()
    assert [site.name for site, _, _ in space.slots()] == ["stem", "extra", "head"]
    without, with_extra = space.network((0,)), space.network((1,))
    assert {node.name.split("/")[0] for node in without.nodes} == {"stem", "head"}
    assert len(list(space.blocks((0,)))) == 2
    assert with_extra.macs - without.macs == 8 * 8 * 4 * 4 * 9


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0", r"has 2 option indices \(width to kernel\), got 1"),
        ("0,3", r"kernel has no option 3: 0 to 2 \(1, 3, 5\)"),
        ("-1,0", "width has no option -1"),
        ("whole-c", r"such as 0,0, or random:SEED, or a published name \(whole-a, whole-b\)"),
        ("random:-1", "takes a whole number of 40 digits at most, got '-1'"),
    ],
)
def test_wrong_arch_is_answered_with_what_is_right(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Whole().parse_arch(text)


def test_arch_text_may_hold_spaces() -> None:
    assert Whole().parse_arch(" 1, 2 ") == Whole().parse_arch("whole-a") == (1, 2)


def test_unknown_setting_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="whole has no setting 'width': batch, resolution, dtype"):
        Whole.from_settings({"width": 3})


class _ForgetsBatch(Chain):
    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        return Chain(1, self.resolution, self.dtype).block(site, picks)


class _AddsToTheNetwork(Chain):
    def wire(self, b: GraphBuilder, x: str, arch: Arch) -> str:
        return super().wire(b, conv_bn_act(b, x, 3, name="stem/extra"), arch)


class _BuildsAnything(Chain):
    def check(self, arch: Arch) -> None:
        """Lets everything pass."""


class _HidesBlocks(Chain):
    def all_blocks(self) -> dict[str, Graph]:
        return dict(list(super().all_blocks().items())[:-1])


@pytest.mark.parametrize(
    ("space", "law"),
    [
        (_ForgetsBatch(batch=2), FactoredSpaceConformance.test_blocks_share_the_settings),
        (_AddsToTheNetwork(), FactoredSpaceConformance.test_network_is_its_blocks_and_nothing_else),
        (_AddsToTheNetwork(), FactoredSpaceConformance.test_macs_and_parameters_add_up),
        (_BuildsAnything(), FactoredSpaceConformance.test_malformed_archs_are_refused),
        (_HidesBlocks(), FactoredSpaceConformance.test_all_blocks_are_those_of_every_slot),
    ],
)
def test_conformance_suite_notices(space: FactoredSpace, law: Callable[[FactoredSpaceConformance], None]) -> None:
    suite = FactoredSpaceConformance()
    suite.space = space
    with pytest.raises(AssertionError):
        law(suite)
