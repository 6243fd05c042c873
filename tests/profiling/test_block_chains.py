"""Which chains of blocks are measured, and that they are what they say."""

from __future__ import annotations

import numpy as np

from latbench.profiling.chains import OWN_FIRST, SHARED_FIRST, chain, chains
from latbench.profiling.jobs import jobs_of
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space

SPACE = MobileNetV1Space(resolution=96)


def test_they_reach_from_what_fits_to_the_largest_network():
    totals = sorted(4 * block.n_params * n for block, n in chains(SPACE))
    rng = np.random.default_rng(0)
    largest = max(4 * SPACE.network(SPACE.sample(rng)).n_params for _ in range(101))
    assert totals[0] < 1.3 * OWN_FIRST
    assert np.diff(np.log(totals)).max() < np.log(2.01)
    assert 0.95 < totals[-1] / largest < 1.05


def test_each_class_of_blocks_that_holds_weights_has_one():
    maps = {block.inputs[0][1][2] for block, _ in chains(SPACE)}
    assert maps == {3, 6}  # where 95 % of a MobileNet's weights are


def test_they_grow_as_far_as_networks_do():
    largest = 4 * max(NASBench201Space().network((op,) * 6).n_params for op in range(5))
    totals = [4 * block.n_params * n for block, n in chains(NASBench201Space())]
    assert OWN_FIRST < max(totals) < min(largest, SHARED_FIRST)


def test_spaces_of_small_networks_have_none():
    assert list(chains(MobileNetV1Space(resolution=8, levels=2, min_width=0.1, max_width=0.2, num_classes=10))) == []


def test_a_chain_is_its_block_so_many_times():
    block, n = next(iter(chains(SPACE)))
    graph = chain(block, n)
    assert (graph.macs, graph.n_params) == (n * block.macs, n * block.n_params)
    assert graph.shapes[graph.outputs[0]] == block.inputs[0][1]


def test_jobs_hold_them_alone_in_their_process_with_stubs_of_their_own():
    jobs = jobs_of(SPACE)
    found = [job for job in jobs if job.row.kind == "chain"]
    stubs = {job.row.key for job in jobs if job.row.kind == "stub"}
    assert len(found) == len(list(chains(SPACE)))
    assert all(job.alone and job.row.context == "sandwich" and set(job.row.stubs) <= stubs for job in found)
    assert not [job for job in jobs_of(SPACE, simulated=True) if job.row.kind == "chain"]
    assert not [job for job in jobs_of(SPACE, context="isolated") if job.row.kind == "chain"]
