"""What can be chosen, and the network that a choice means.

A ``SearchSpace`` is a row of decisions; an architecture is one option index per decision. A ``FactoredSpace`` is built
from *sites*: the block at a site depends on the few decisions in its scope, so a network's latency is a sum of small
factors, and tables, oracles and Viterbi all read the same arrays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import product
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np

from latbench.errors import UsageError, shown
from latbench.graph.ir import DType, Graph, GraphBuilder
from latbench.graph.ops import Shape

Scalar = int | float | str | bool
Arch = tuple[int, ...]  # one option index per decision
S = TypeVar("S", bound="SearchSpace")
MAX_SEED_DIGITS = 40  # 128 bits, as numpy draws them itself; Python reads 4,300 at most

# What a table's metadata may say of its space, a foreign one's too: beyond these, counts leave 64 bits and the lists of
# options and blocks leave memory, and no device has measured such a network.
MAX_PIXELS = 2**32  # of one inference, batch times height times width: 48 GiB of input in float32
MAX_CHANNELS = 2**20  # of a layer, classes included
MAX_LAYERS = 1000  # of one kind: stages, cells, candidates; a network of so many takes a second to build

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Decision:
    """One thing to choose."""

    name: str  # "width3", "stage2/block1/op"
    options: tuple[Scalar, ...]


@dataclass(frozen=True)
class SearchSpace(ABC):
    """Decisions and the networks they mean. The fields are the settings, kept in every table.

    Raises UsageError on construction where a setting is out of range.
    """

    batch: int = 1
    resolution: int = 224  # pixels, square RGB input
    dtype: DType = "float32"

    name: ClassVar[str]
    min_resolution: ClassVar[int] = 8
    whole_figures: ClassVar[bool] = False  # whether oracles may read the graphs of whole networks, by the thousand

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"{self.name}: batch must be at least 1, got {shown(self.batch)}")
        if self.resolution < self.min_resolution:
            raise UsageError(
                f"{self.name}: resolution must be at least {self.min_resolution}, got {shown(self.resolution)}"
            )
        if self.batch * self.resolution**2 > MAX_PIXELS:
            raise UsageError(
                f"{self.name}: batch {shown(self.batch)} at resolution {shown(self.resolution)} is more than "
                f"{MAX_PIXELS} pixels"
            )
        if self.dtype not in get_args(DType):
            raise UsageError(f"{self.name}: unknown dtype {shown(self.dtype)}: {' or '.join(get_args(DType))}")

    def _at_most(self, most: float, *names: str) -> None:
        """Raises UsageError where one of these settings is larger."""
        for name in names:
            if not getattr(self, name) <= most:
                raise UsageError(f"{self.name}: {name} must be at most {most}, got {shown(getattr(self, name))}")

    @property
    @abstractmethod
    def decisions(self) -> tuple[Decision, ...]:
        """What can be chosen, in the order of an architecture's indices."""

    @abstractmethod
    def network(self, arch: Arch) -> Graph:
        """The whole network; its input is "x". Raises UsageError as ``check`` does."""

    @property
    def published(self) -> Mapping[str, Arch]:
        """Architectures known by name, as far as these settings can express them."""
        return {}

    @property
    def input_shape(self) -> Shape:
        """(batch, 3, resolution, resolution)."""
        return (self.batch, 3, self.resolution, self.resolution)

    @property
    def size(self) -> int:
        """Number of architectures."""
        return math.prod(len(decision.options) for decision in self.decisions)

    def blocks(self, arch: Arch) -> Iterator[Graph]:
        """The units that are measured for one architecture. Default: the whole network as one."""
        yield self.network(arch)

    def sample(self, rng: np.random.Generator) -> Arch:
        """An architecture, each decision uniform over its options."""
        return tuple(int(rng.integers(len(decision.options))) for decision in self.decisions)

    def canonical(self, arch: Arch) -> Arch:
        """The one spelling of the network that `arch` means, where a space has several. Default: as it is."""
        self.check(arch)
        return arch

    def check(self, arch: Arch) -> None:
        """Raises UsageError, naming the decision, where `arch` has the wrong length or an index out of range."""
        names = [decision.name for decision in self.decisions]
        if len(arch) != len(names):
            raise UsageError(
                f"{self.name}: an architecture has {len(names)} option indices ({names[0]} to {names[-1]}),"
                f" got {len(arch)}"
            )
        for index, decision in zip(arch, self.decisions, strict=True):
            if not 0 <= index < len(decision.options):
                options = ", ".join(map(str, decision.options))
                raise UsageError(
                    f"{self.name}: {decision.name} has no option {index}: 0 to {len(decision.options) - 1} ({options})"
                )

    def parse_arch(self, text: str) -> Arch:
        """ "0,3,5", "random:SEED" or a published name -> architecture. Raises UsageError, saying what is wrong."""
        text = text.strip()
        if text in self.published:
            return self.published[text]
        kind, colon, seed = text.partition(":")
        if kind == "random" and colon:
            if not (seed.isdecimal() and len(seed) <= MAX_SEED_DIGITS):
                raise UsageError(
                    f"{self.name}: random:SEED takes a whole number of {MAX_SEED_DIGITS} digits at most, got "
                    f"{shown(seed)}"
                )
            return self.sample(np.random.default_rng(int(seed)))
        try:
            arch = tuple(int(part) for part in text.split(","))
        except ValueError:
            names = ", ".join(self.published) or "none"
            raise UsageError(
                f"{self.name}: {shown(text)} is no architecture: give {len(self.decisions)} option indices such as"
                f" {self.format_arch((0,) * len(self.decisions))}, or random:SEED, or a published name ({names})"
            ) from None
        self.check(arch)
        return arch

    def format_arch(self, arch: Arch) -> str:
        """Option indices joined by commas; ``parse_arch`` is its inverse."""
        return ",".join(map(str, arch))

    def describe(self, arch: Arch) -> str:
        """What was chosen, for people, on one line. Raises UsageError as ``check``."""
        self.check(arch)
        return ", ".join(f"{d.name} {d.options[i]}" for d, i in zip(self.decisions, arch, strict=True))

    def settings(self) -> dict[str, Scalar]:
        """Field -> value; ``from_settings`` is its inverse."""
        return asdict(self)

    @classmethod
    def from_settings(cls: type[S], settings: Mapping[str, Any]) -> S:
        """The space of these settings, defaults for what is left out. Raises UsageError on an unknown one."""
        known = [field.name for field in fields(cls)]
        for unknown in settings.keys() - set(known):
            raise UsageError(f"{cls.name} has no setting {shown(unknown)}: {', '.join(known)}")
        for field in fields(cls):
            kind, value = type(field.default), settings.get(field.name, field.default)
            if kind in _KINDS and type(value) is not kind and not (kind is float and type(value) is int):
                raise UsageError(f"{cls.name}: {field.name} must be {_KINDS[kind]}, got {shown(value)}")
        return cls(**settings)


@dataclass(frozen=True)
class Site:
    """A place in the network whose block depends on the decisions in `scope` only."""

    name: str  # "stage3"; prefixes its nodes in the network
    scope: tuple[int, ...]  # decision indices, ascending; () where nothing is chosen
    block_type: str  # for people: "stem", "separable conv s1", "head"


@dataclass(frozen=True)
class FactoredSpace(SearchSpace):
    """A space whose networks are composed of the blocks of its sites, nothing added."""

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """In the order of execution."""

    @abstractmethod
    def block(self, site: Site, picks: tuple[int, ...]) -> Graph | None:
        """The block at `site` where its scope takes `picks`; None where it is absent and its input passes through."""

    def picks(self, site: Site, arch: Arch) -> tuple[int, ...]:
        """The indices of `arch` in the site's scope."""
        return tuple(arch[decision] for decision in site.scope)

    def blocks(self, arch: Arch) -> Iterator[Graph]:
        """The blocks of `arch` in order, absent ones left out: what a sum of block latencies runs over."""
        self.check(arch)
        for site in self.sites:
            block = self.block(site, self.picks(site, arch))
            if block is not None:
                yield block

    def network(self, arch: Arch) -> Graph:
        """The blocks of `arch`, wired; node names are the blocks' under their site's name."""
        self.check(arch)
        b = GraphBuilder(self.dtype)
        x = b.input("x", self.input_shape)
        return b.build(self.wire(b, x, arch))

    def wire(self, b: GraphBuilder, x: str, arch: Arch) -> str:
        """Appends the blocks of `arch` to `b` and gives the output's name. Default: a chain."""
        for site in self.sites:
            block = self.block(site, self.picks(site, arch))
            if block is not None:
                (x,) = b.inline(block, x, prefix=site.name)
        return x

    def slots(self) -> Iterator[tuple[Site, tuple[int, ...], Graph]]:
        """Every (site, picks, block) whose block is present."""
        for site in self.sites:
            for picks in product(*(range(len(self.decisions[i].options)) for i in site.scope)):
                block = self.block(site, picks)
                if block is not None:
                    yield site, picks, block

    @cached_property
    def n_slots(self) -> int:
        """Number of (site, picks) whose block is present."""
        return sum(1 for _ in self.slots())

    def all_blocks(self) -> dict[str, Graph]:
        """Every distinct block by key, in order of first appearance: what ``latbench profile`` measures."""
        blocks: dict[str, Graph] = {}
        for _, _, block in self.slots():
            blocks.setdefault(block.key, block)
        return blocks
