"""The laws of search spaces."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np

from latbench.graph.ops import Op
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace
from latbench.testing.running import refused, run_onnx, run_torch

MAX_SCOPE = 10_000  # entries of one latency factor


class SpaceConformance:
    """Laws of every search space."""

    space: SearchSpace
    n_networks = 20  # sampled per law
    tolerance = 1e-5  # largest difference between two runtimes' outputs, over the largest output

    def archs(self) -> list[Arch]:
        """The sample that the laws are checked on, the same each time."""
        rng = np.random.default_rng(0)
        return [self.space.sample(rng) for _ in range(self.n_networks)]

    def test_sampled_networks_are_valid(self) -> None:
        for arch in self.archs():
            self.space.check(arch)
            network = self.space.network(arch)
            assert network.dtype == self.space.dtype
            assert network.inputs == (("x", self.space.input_shape),)
            assert all(network.shapes[name][0] == self.space.batch for name in network.outputs)

    def test_sampling_depends_on_the_generator_only(self) -> None:
        assert self.archs() == self.archs()

    def test_size_is_the_product_of_the_options(self) -> None:
        assert self.space.size == math.prod(len(d.options) for d in self.space.decisions)
        assert all(len(set(d.options)) == len(d.options) for d in self.space.decisions), "an option appears twice"
        assert len({d.name for d in self.space.decisions}) == len(self.space.decisions), "a decision's name repeats"

    def test_settings_round_trip_through_json(self) -> None:
        twin = type(self.space).from_settings(json.loads(json.dumps(self.space.settings())))
        assert twin == self.space
        for arch in self.archs():
            assert twin.network(arch).key == self.space.network(arch).key

    def test_unknown_setting_is_refused(self) -> None:
        assert refused(type(self.space).from_settings, {**self.space.settings(), "no_such_setting": 1})

    def test_parse_inverts_format(self) -> None:
        for arch in self.archs():
            assert self.space.parse_arch(self.space.format_arch(arch)) == arch

    def test_random_arch_is_reproducible(self) -> None:
        assert self.space.parse_arch("random:7") == self.space.sample(np.random.default_rng(7))

    def test_published_archs_parse_and_build(self) -> None:
        for name, arch in self.space.published.items():
            assert self.space.parse_arch(name) == arch
            assert self.space.network(arch).macs >= 0

    def test_malformed_archs_are_refused(self) -> None:
        (arch, *_) = self.archs()
        last = len(self.space.decisions[-1].options)
        for wrong in (arch[:-1], (*arch, 0), (*arch[:-1], last), (*arch[:-1], -1)):
            assert refused(self.space.check, wrong), f"{wrong} passes check"
            assert refused(self.space.network, wrong), f"{wrong} builds a network"
            assert refused(self.space.parse_arch, self.space.format_arch(wrong)), f"{wrong} parses"
        for text in ("", "no-such-name", "random:", "random:x", "1.5"):
            assert refused(self.space.parse_arch, text), f"{text!r} parses"

    def test_both_lowerings_agree_folded_and_unfolded(self) -> None:
        import pytest

        pytest.importorskip("torch", reason="the lowering to torch needs it: pip install 'latbench[search]'")
        from latbench.graph.passes import fold_batch_norm, random_weights

        space = replace(self.space, dtype="float32")
        rng = np.random.default_rng(0)
        for arch in self.archs():
            network = space.network(arch)
            weights = random_weights(network, seed=0)
            folded, folded_weights, _ = fold_batch_norm(network, weights)
            x = rng.standard_normal(space.input_shape, dtype=np.float32)
            want = run_torch(network, weights, x)
            scale = float(np.abs(want).max())
            assert np.isfinite(scale), f"{arch}: random weights give {scale}"
            for got in (
                run_onnx(network, weights, x),
                run_torch(folded, folded_weights, x),
                run_onnx(folded, folded_weights, x),
            ):
                difference = float(np.abs(got - want).max())
                assert difference <= self.tolerance * scale, f"{arch}: outputs differ by {difference} of {scale}"


class FactoredSpaceConformance(SpaceConformance):
    """Laws of a space built from sites."""

    space: FactoredSpace
    drops_unread_blocks = False  # True where a network leaves out blocks that its output does not read (cells)

    def test_scopes_are_small_and_ordered(self) -> None:
        for site in self.space.sites:
            assert list(site.scope) == sorted(set(site.scope)), f"{site.name}: scope {site.scope}"
            assert len(self._options(site.scope)) <= MAX_SCOPE, f"{site.name}: too many picks"
            assert site.block_type, f"{site.name} has no block type"
        names = [site.name for site in self.space.sites]
        assert len(set(names)) == len(names), "a site's name repeats"

    def test_all_blocks_are_those_of_every_slot(self) -> None:
        keys = [
            block.key
            for site in self.space.sites
            for picks in self._options(site.scope)
            if (block := self.space.block(site, picks)) is not None
        ]
        assert len(keys) == self.space.n_slots
        assert set(keys) == set(self.space.all_blocks())
        assert all(key == block.key for key, block in self.space.all_blocks().items())

    def test_blocks_of_an_arch_are_in_all_blocks(self) -> None:
        known = self.space.all_blocks()
        for arch in self.archs():
            assert all(block.key in known for block in self.space.blocks(arch))

    def test_blocks_share_the_settings(self) -> None:
        for block in self.space.all_blocks().values():
            assert block.dtype == self.space.dtype
            assert all(shape[0] == self.space.batch for _, shape in block.inputs)
            assert len(block.outputs) == 1

    def test_network_is_its_blocks_and_nothing_else(self) -> None:
        for arch in self.archs():
            inside: dict[str, list[Op]] = {site.name: [] for site in self.space.sites}
            for node in self.space.network(arch).nodes:
                (owner,) = (name for name in inside if node.name.startswith(f"{name}/"))
                inside[owner].append(node.op)
            for site in self.space.sites:
                block = self.space.block(site, self.space.picks(site, arch))
                want = [node.op for node in block.nodes] if block else []
                dropped = self.drops_unread_blocks and not inside[site.name]
                assert dropped or inside[site.name] == want, f"{arch}: {site.name} is not its block"

    def test_macs_and_parameters_add_up(self) -> None:
        for arch in self.archs():
            network, blocks = self.space.network(arch), list(self.space.blocks(arch))
            macs, n_params = sum(b.macs for b in blocks), sum(b.n_params for b in blocks)
            if self.drops_unread_blocks and len(network.nodes) < sum(len(b.nodes) for b in blocks):
                assert network.macs <= macs
                assert network.n_params <= n_params
            else:
                assert (network.macs, network.n_params) == (macs, n_params)

    def test_equal_picks_give_equal_keys(self) -> None:
        twin = type(self.space).from_settings(self.space.settings())
        for arch in self.archs():
            for site in self.space.sites:
                ours = self.space.block(site, self.space.picks(site, arch))
                theirs = twin.block(site, twin.picks(site, arch))
                assert (ours and ours.key) == (theirs and theirs.key)

    def _options(self, scope: tuple[int, ...]) -> list[tuple[int, ...]]:
        return list(product(*(range(len(self.space.decisions[i].options)) for i in scope)))
