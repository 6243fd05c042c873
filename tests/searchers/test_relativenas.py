"""RelativeNAS: its laws as a searcher, the weight store's rule tensor by tensor, its schedules and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_space import ToySpace, three_bits

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.graph.torch import to_module
from latbench.oracle.base import Constraint
from latbench.oracle.factors import FactorOracle
from latbench.spaces.cells import GENOTYPES, RelativeNASSpace, arch_of
from searchers.base import Problem
from searchers.relativenas import RelativeNAS
from searchers.relativenas_judges import Trained, cutout
from searchers.relativenas_supernet import Supernet, drop_paths
from searchers.results import read_result
from searchers.slow_fast import decode, upper_bounds
from searchers.sources import ArraySource
from searchers.testing import SearcherConformance, Watch
from searchers.train import Position
from searchers.world import World

TINY = RelativeNASSpace(resolution=8, channels=4, layers=3)
QUICK = RelativeNAS(population=4, generations=3, channels=4, layers=3, batch_size=32)
PUBLISHED = arch_of(GENOTYPES["relativenas"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


class TestRelativeNAS(SearcherConformance):
    searcher = QUICK
    space = TINY
    max_images = 96


class TestRelativeNASWithAProxy(SearcherConformance):
    searcher = replace(QUICK, evaluator="naswot", population=6)
    space = RelativeNASSpace(resolution=8, channels=4, layers=4)
    max_images = 96


def noise(n=128, side=16, classes=10):
    """Random images and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3), np.uint8)
    labels = np.arange(n) % classes
    halves = {"train": slice(n), "test": slice(0, 16)}
    return ArraySource(
        "noise",
        tuple("abcdefghij"),
        {split: list(images[part]) for split, part in halves.items()},
        {split: labels[part].astype(np.int64) for split, part in halves.items()},
        mirrored=False,
    )


def problem_of(space, out, target=1e12, **more):
    return Problem((Constraint(FactorOracle.counting(space, "macs"), target),), noise(), out, **more)


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "rate"),
    [(0, 0.1), (1, 0.099902), (10, 0.090546), (25, 0.0505), (48, 0.001390), (49, 0.001098)],
)
def test_rates(generation, rate):
    assert RelativeNAS().rate(generation, 50) == pytest.approx(rate, abs=5e-7)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"evaluations": 5}, "bound another evaluator"),
        ({"evaluations": 0, "evaluator": "naswot"}, "at least 1"),
        ({"population": 5}, "even"),
        ({"generations": 0}, "at least 1"),
        ({"lr": 0.0}, "above zero"),
        ({"min_lr": 0.2}, "not above lr"),
        ({"cutout": 1.0}, "shares"),
        ({"held_out": 0.0}, "held_out above 0"),
        ({"batch_size": 1}, "at least 2"),
    ],
)
def test_options_out_of_range_are_refused(wrong, words):
    with pytest.raises(UsageError, match=words):
        RelativeNAS(**wrong)


# ---- the weight store -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "layers", "n_params"), [(4, 3, 78_054), (16, 8, 1_987_194)])
def test_store_has_the_released_size(channels, layers, n_params):
    net = Supernet(RelativeNASSpace(channels=channels, layers=layers))
    assert sum(p.numel() for p in net.parameters()) == n_params


def test_published_genotype_in_the_store_and_alone():
    """Its two equal pairs share a slot in the store and are two operations alone."""
    space = RelativeNASSpace(channels=16, layers=8, keep_unread=True)
    net = Supernet(space)
    assert sum(p.numel() for p in net.parameters_of(PUBLISHED)) == 289_946
    assert space.network(PUBLISHED).n_params == 316_378


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_derived_network_computes_what_the_store_does(stem):
    space = RelativeNASSpace(batch=3, resolution=32, stem=stem, channels=4, layers=5)
    torch.manual_seed(0)
    net = Supernet(space).eval()
    x = torch.randn(space.input_shape)
    for arch in (PUBLISHED, *(space.sample(np.random.default_rng(i)) for i in range(4))):
        graph = space.network(arch)
        with torch.inference_mode():
            torch.testing.assert_close(
                to_module(graph, net.weights(graph, arch))(x), net(x, arch), rtol=1e-4, atol=1e-5
            )


def test_drop_path_keeps_the_mean_and_spares_evaluation():
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1, 1)
    dropped = drop_paths(x, 0.3)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert drop_paths(x, 0.0) is x
    net, images = Supernet(TINY).eval(), torch.randn(4, 3, 8, 8)
    assert torch.equal(net(images, PUBLISHED, 0.5), net(images, PUBLISHED))
    net.train()
    assert not torch.equal(net(images, PUBLISHED, 0.5), net(images, PUBLISHED))


def test_identities_are_never_dropped():
    """A genotype of skips keeps its stride-1 paths whole: only factorised reductions lose images."""
    net, images = Supernet(TINY).train(), torch.randn(64, 3, 8, 8)
    skips = (0, 2, 1, 2) * 8
    drawn = []
    for block in net.slots.values():
        block.register_forward_hook(lambda *_: drawn.append(1))
    net(images, skips, 0.5)
    assert len(drawn) == 2 * 8, "two reductions of eight pairs each; identities are no slots"


PAIR = (PUBLISHED, TINY.sample(np.random.default_rng(5)))


@pytest.fixture
def trained(tmp_path):
    """A pair that has been trained, its judge, and the store before: C=4, L=3, 16x16 random images."""
    space = RelativeNASSpace(resolution=16, channels=4, layers=3)
    judge = Trained(QUICK, problem_of(space, tmp_path), World.here("cpu"))
    before = {name: tensor.clone() for name, tensor in judge.net.state_dict().items()}
    losses = judge.losses(PAIR, np.zeros(2), Position(0, 0, 2, 3), seed=1)
    return judge, before, losses


def owner(name):
    """Slot of a tensor; None: shared."""
    return name.split(".")[1] if name.startswith("slots.") else None


def test_training_a_pair_leaves_the_store_as_it_was(trained):
    judge, before, losses = trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in judge.net.state_dict().items())
    assert np.isfinite(losses).all()
    assert losses == pytest.approx(math.log(10), abs=0.3)


@pytest.mark.parametrize("first", [True, False])
def test_weight_store_rule_tensor_by_tensor(trained, first):
    judge, before, _ = trained
    fast, slow = judge.trained if first else judge.trained[::-1]
    used = [judge.net.used(arch) for arch in (PAIR if first else PAIR[::-1])]
    judge.settle(np.array([1.0, 1.0]), first)
    cases = {"shared": 0, "fast": 0, "both": 0, "slow only": 0, "neither": 0}
    for name, tensor in judge.net.state_dict().items():
        place = owner(name)
        if place is None or place in used[0]:
            case, want = "shared" if place is None else "both" if place in used[1] else "fast", fast[name]
        elif place in used[1]:
            case, want = "slow only", slow[name]
        else:
            case, want = "neither", before[name]
        cases[case] += int(not torch.equal(want, before[name])) if case != "neither" else 1
        assert torch.equal(tensor, want), f"{name}: {case}"
    assert min(cases.values()) > 0, f"{cases}: a case was not met, or training changed nothing"


@pytest.mark.parametrize("winner", [0, 1])
def test_a_learner_that_diverged_leaves_nothing_whether_it_wins_or_not(trained, winner):
    """It may win by keeping its budget."""
    judge, before, _ = trained
    sound = judge.trained[0]
    judge.trained[1] = {name: tensor * torch.nan for name, tensor in judge.trained[1].items()}
    judge.settle(np.array([1.0, np.inf]), first=winner == 0)
    used = judge.net.used(PAIR[0])
    for name, tensor in judge.net.state_dict().items():
        place = owner(name)
        want = sound[name] if place is None or place in used else before[name]
        assert torch.equal(tensor, want), name


def test_cutout_makes_a_hole_of_its_size_at_random_places():
    torch.manual_seed(0)
    images = torch.ones(500, 3, 16, 16)
    holes = (cutout(images, 0.5) == 0).all(1)  # (500, 16, 16)
    assert not torch.equal(holes, (cutout(images, 0.5) == 0).any(1)), "drawn anew"
    sizes = holes.sum((1, 2))
    assert sizes.max() == 64
    assert sizes.min() >= 16, "a corner keeps a quarter of the hole"
    assert holes.any(0).all(), "every pixel is covered by some"
    assert cutout(images, 0.0) is images


# ---- the search -----------------------------------------------------------------------------------------------------


def vectors_in(checkpoint):
    return np.array(torch.load(checkpoint, weights_only=True)["parts"]["course"]["population"]["vectors"])


def test_mini_search(tmp_path):
    """The specification's: N=4, G=3, C=4, L=3, 64 + 64 random 16x16 images, batches of 32."""
    space = RelativeNASSpace(resolution=16, channels=4, layers=3)
    runs = [QUICK.search(problem_of(space, tmp_path / name)) for name in "ab"]
    rows = [[row["archs"] for row in run.history] for run in runs]
    assert rows[0] == rows[1], "one seed, one course"
    assert runs[0].arch == runs[1].arch
    for row in runs[0].history:
        assert row["loss"] == pytest.approx(math.log(10), abs=0.3)
    vectors = vectors_in(tmp_path / "a" / "search.ckpt")
    assert ((vectors >= 0) & (vectors <= upper_bounds(space))).all()
    for before, after in zip(rows[0], [*rows[0][1:], _spelled(decode(vectors))], strict=True):
        changed = sum(a != b for a, b in zip(before.split(), after.split(), strict=True))
        assert changed <= 2, "half of the population at most"
    told = {",".join(map(str, entry["arch"])) for entry in runs[0].notes["ranking"]}
    assert told == set(_spelled(decode(vectors)).split()), "the whole last generation is ranked"
    assert runs[0].score == -min(entry["loss"] for entry in runs[0].notes["ranking"])
    other = replace(QUICK, generations=1).search(replace(problem_of(space, tmp_path / "c"), seed=1))
    assert other.history[0]["archs"] != runs[0].history[0]["archs"]


def _spelled(archs):
    return " ".join(",".join(map(str, arch)) for arch in archs.tolist())


def test_a_tight_target_is_kept_and_told(tmp_path):
    oracle = FactorOracle.counting(TINY, "macs")
    target = 1.02 * oracle.fastest()[1]
    problem = Problem((Constraint(oracle, target),), "digits", tmp_path, max_images=96)
    result = QUICK.search(problem)
    assert result.predicted[0] <= target
    assert result.notes["chosen_from"] == "nearest to the last generation"
    assert "feasible_start" in result.notes["warning"]
    assert min(entry["predicted"][0] for entry in result.notes["ranking"]) > target


def test_a_first_generation_within_the_budget(tmp_path):
    oracle = FactorOracle.counting(TINY, "macs")
    problem = Problem((Constraint(oracle, 1.1 * oracle.fastest()[1]),), "digits", tmp_path, max_images=96)
    result = replace(QUICK, generations=1, feasible_start=True).search(problem)
    assert result.history[0]["feasible"] == 1.0
    assert problem.satisfied(result.arch)


def test_a_finished_search_answers_another_target(tmp_path):
    oracle = FactorOracle.counting(TINY, "macs")
    first = QUICK.search(Problem((Constraint(oracle, 1e12),), "digits", tmp_path, max_images=96))
    target = min(entry["predicted"][0] for entry in first.notes["ranking"])
    watch = Watch()
    second = QUICK.search(Problem((Constraint(oracle, target),), "digits", tmp_path, max_images=96), reporter=watch)
    assert watch.steps == 0
    assert second.predicted[0] <= target
    assert second.notes["chosen_from"] == "last generation"
    assert "warning" not in second.notes
    assert read_result(tmp_path).result == second


def test_a_network_of_another_size_gets_no_weights_of_the_store(tmp_path):
    space = replace(TINY, channels=8, layers=4)
    oracle = FactorOracle.counting(space, "n_params")
    result = replace(QUICK, generations=1).search(
        Problem((Constraint(oracle, 1e9),), "digits", tmp_path, max_images=96)
    )
    assert result.notes["inherited"] is False
    assert 0 <= result.notes["accuracy"] <= 1
    assert result.predicted == (oracle.latency(result.arch),), "of the space's network, not of the trained one"


def test_budgets_that_exclude_each_other_end_before_any_training(tmp_path):
    oracle = FactorOracle.counting(TINY, "macs")
    odd = replace(oracle, factors=tuple(replace(f, values=1e6 - f.values) for f in oracle.factors))
    both = (Constraint(oracle, 1.001 * oracle.fastest()[1]), Constraint(odd, 1.0001 * odd.fastest()[1]))
    problem = Problem(both, "digits", tmp_path / "out")
    with pytest.raises(InfeasibleTargetError, match="not all of them together"):
        QUICK.search(problem)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(tmp_path):
    toy = FactorOracle.counting(ToySpace(), "macs")
    with pytest.raises(UsageError, match="another evaluator"):
        QUICK.search(Problem((Constraint(toy, 1e12),), "digits", tmp_path))
    problem = Problem((Constraint(FactorOracle.counting(TINY, "macs"), 1e12),), "digits", tmp_path, max_images=96)
    with pytest.raises(UsageError, match="smaller lr"):
        replace(QUICK, lr=1e30, clip=1e30, generations=1).search(problem)
    with pytest.raises(UsageError, match="do not fill one batch"):
        replace(QUICK, batch_size=256).search(problem)


def test_other_spaces_are_searched_with_an_evaluator(tmp_path):
    oracle = FactorOracle.counting(ToySpace(), "macs")
    problem = Problem((Constraint(oracle, 0.6 * oracle.latency((2, 2, 3))),), three_bits(), tmp_path)
    result = replace(QUICK, evaluator="naswot", population=8).search(problem)
    assert problem.satisfied(result.arch)
    assert result.notes["inherited"] is False
    lookups = json.loads((tmp_path / "evaluations.json").read_text())["lookups"]
    kept = [value for arch, value, _ in lookups if problem.satisfied(tuple(arch))]
    assert result.score == max(kept)
    assert result.notes["evaluations"] == len(lookups)


def test_populations_follow_each_other_until_the_evaluations_are_spent(tmp_path):
    oracle = FactorOracle.counting(ToySpace(), "macs")
    problem = Problem((Constraint(oracle, 0.6 * oracle.latency((2, 2, 3))),), three_bits(), tmp_path / "one")
    search = replace(QUICK, evaluator="synflow", population=4, generations=60)
    every = search.search(problem)
    alone = replace(search, renewal=False).search(replace(problem, out=tmp_path / "alone"))
    assert alone.notes["evaluations"] < every.notes["evaluations"], "one population agrees and asks no more"
    few = replace(problem, out=tmp_path / "few")
    bounded = replace(search, evaluations=alone.notes["evaluations"] + 1)
    first = bounded.search(few)
    assert first.notes["evaluations"] == bounded.evaluations
    assert bounded.search(few).arch == first.arch, "again from its folder"
    assert problem.satisfied(first.arch)
    lookups = json.loads((few.out / "evaluations.json").read_text())["lookups"]
    assert first.score == max(value for arch, value, _ in lookups if problem.satisfied(tuple(arch)))
