"""InstaNAS: its laws as a searcher, its three stages, what it leaves in its folder and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import run

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.factors import Factor, FactorOracle
from latbench.oracle.lut import LutOracle
from latbench.spaces.instanas import InstaNASSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.base import Problem
from searchers.instanas import InstaNAS, _Run
from searchers.instanas_controller import explore, policies_of, subsets_of
from searchers.instanas_policies import FORBIDDEN, OPEN, Costs
from searchers.instanas_variants import CONTROLLER, HISTOGRAM, IMAGES, VARIANTS, WEIGHTS, read_routed, snapshot_epochs
from searchers.results import read_history, read_result
from searchers.sources import ArraySource
from searchers.testing import SearcherConformance, Watch, roofline_table
from searchers.world import World

SMALL = InstaNASSpace(plan="8x1,12x2s2,16x1s2", stem_channels=8, head_channels=32, resolution=8)
QUICK = InstaNAS(epochs=2, batch_size=32, pretrain_epochs=2, finetune_epochs=1, variants=3, trials=6, cutout=0.0)
SHORT = replace(QUICK, epochs=1, interleaved=True)
N_LAYERS = 4


class TestConformance(SearcherConformance):
    searcher = QUICK
    space = SMALL
    interrupt_after = 7  # of 4 steps of pretraining, 24 of the search, 2 of fine-tuning


@pytest.mark.slow
class TestConformanceOfTheOriginal(SearcherConformance):
    searcher = replace(QUICK, exploration="original", window="paper", latency="modules", interleaved=True)
    space = SMALL
    interrupt_after = 7


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def oracle():
    return LutOracle.fit(roofline_table(SMALL))


def between(oracle, share):
    low, high = oracle.fastest()[1], oracle.latency(SMALL.published["meta-graph"])
    return low + share * (high - low)


def problem_of(out, *constraints, data="digits", max_images=160, **more):
    return Problem(tuple(Constraint(*pair) for pair in constraints), data, out, max_images=max_images, **more)


# ---- options and schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "keep"), [(1, 1), (82, 1), (123, 0.75), (164, 0.5)])
def test_published_shares_of_kept_modules(epoch, keep):
    assert InstaNAS(pretrain_epochs=164).keep(epoch - 1) == pytest.approx(keep)


def test_published_rates_of_pretraining():
    rates = [
        InstaNAS(pretrain_epochs=164, pretrain_lr=0.01).pretrain_rate(epoch) for epoch in (0, 81, 82, 122, 123, 163)
    ]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_exploration_is_annealed_where_it_is_mended():
    assert [InstaNAS(epochs=10).alpha_at(e) for e in (0, 5, 10)] == pytest.approx([0.8, 0.89, 0.98])
    assert [InstaNAS(epochs=10, exploration="original").alpha_at(e) for e in (0, 5, 10)] == [0.8] * 3


def test_snapshots_are_spread_and_end_with_the_run():
    assert snapshot_epochs(5, 40) == [8, 16, 24, 32, 40]
    assert snapshot_epochs(5, 2) == snapshot_epochs(3, 2) == [0, 1, 2]
    assert snapshot_epochs(2, 2) == [1, 2]
    assert snapshot_epochs(1, 7) == [7]


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 1}, {"net_lr": 0.0}, {"alpha": 0.5}, {"aim": 0.0}, {"rest": 1.0}, {"variants": 0},
     {"finetune_epochs": -1}, {"trials": -1}, {"cutout": 1.0}, {"pretrain_keep": 0.0}],
)  # fmt: skip
def test_options_that_contradict_each_other(wrong):
    with pytest.raises(UsageError, match="instanas:"):
        InstaNAS(**wrong)


# ---- three stages ---------------------------------------------------------------------------------------------------


def one_run(problem, options=QUICK):
    return _Run(options, problem, Costs.of(problem, modular=options.latency == "modules"), World.here("cpu"))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Spy:
    """A module that remembers the policies it was given."""

    def __init__(self, module):
        self.module, self.seen = module, []

    def __call__(self, images, policies):
        self.seen.append(policies)
        return self.module(images, policies)


def test_pretraining_drops_modules_of_each_image_by_itself(oracle, tmp_path):
    one = one_run(problem_of(tmp_path, (oracle, between(oracle, 0.5))))
    one.wrapped_graph = spy = Spy(one.graph)
    before = state(one.controller)
    assert one.pretrain(None)[-1]["stage"] == "pretrain"
    assert all(policies.all() for policies in spy.seen[:2]), "none in the first half"
    last = torch.cat(spy.seen[2:])
    assert float(last.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert len(last.flatten(1).unique(dim=0)) > 0.9 * len(last)
    assert same(one.controller, before)
    assert one.graph.dropout.p == 0


def test_the_controller_learns_from_a_meta_graph_at_rest(oracle, tmp_path):
    one = one_run(problem_of(tmp_path, (oracle, between(oracle, 0.5))), SHORT)
    one.joint(None)
    graph, controller = state(one.graph), state(one.controller)
    batch = next(one.examiner.calibration.epoch(0))
    figures = one.controller_step(batch, 0)
    assert same(one.graph, graph)
    assert all(p.grad is None for p in one.graph.parameters())
    assert not same(one.controller, controller)
    assert 0 <= figures["score_map"] <= 30
    rates = [group["lr"] for group in one.controller_update.optimizer.param_groups]
    assert rates == [QUICK.controller_lr]
    one.options = replace(SHORT, lr_step=1)
    one.controller_step(batch, 1)
    assert one.controller_update.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * QUICK.controller_lr)


def test_the_meta_graph_learns_under_shuffled_policies(oracle, tmp_path):
    """The batch's policies, given to other images: as many of each, and the same mean latency."""
    one = one_run(problem_of(tmp_path, (oracle, between(oracle, 0.5))), SHORT)
    one.joint(None)
    one.wrapped_graph = spy = Spy(one.graph)
    batch, before = next(one.examiner.calibration.epoch(0)), state(one.controller)
    torch.manual_seed(5)
    one.graph_step(batch, 1)
    assert same(one.controller, before), "its batch norms too"
    torch.manual_seed(5)
    with torch.no_grad():
        drawn = torch.bernoulli(explore(one.controller.eval()(batch.images), SHORT.alpha_at(1))).bool()
    (given,) = spy.seen
    assert not torch.equal(given, drawn)
    rows = [sorted(map(tuple, subsets_of(p).tolist())) for p in (given, drawn)]
    assert rows[0] == rows[1]
    assert float(one.costs.load(given).mean()) == pytest.approx(float(one.costs.load(drawn).mean()))


@pytest.mark.parametrize("share", [0.05, 0.99])
def test_fine_tuning_leaves_the_controller_alone(oracle, tmp_path, share):
    published = replace(SHORT, finetune_epochs=2, finetune_lr=1e-3)
    one = one_run(problem_of(tmp_path, (oracle, between(oracle, share))), published)
    one.joint(None)
    chosen = max(one.variants(), key=lambda variant: variant.epoch)
    assert bool(chosen.prices.any()) == (share == 0.05)
    one.examiner.restore(chosen)
    before = state(one.controller)
    one.wrapped_graph = spy = Spy(one.graph)
    rates = []
    sgd = one._sgd

    def watched(*args):
        update = sgd(*args)
        step = update.step
        update.step = lambda lr: (rates.append(lr), step(lr))
        return update

    one._sgd = watched
    one.finetune(chosen, None)
    assert same(one.controller, before), "parameters and statistics, bit for bit"
    images = next(one._batches(QUICK.finetune_batch_size).epoch(0)).images
    probs = one.controller.eval()(images)
    assert torch.equal(spy.seen[0], one.costs.decode(probs, chosen.prices))
    assert share == 0.05 or torch.equal(spy.seen[0], probs >= 0.5), "MAP policies and nothing else"
    assert rates[0] == pytest.approx(1e-3)
    assert rates[len(rates) // 2] == pytest.approx(5e-4), "half way down the cosine"


@pytest.mark.slow
def test_defaults_teach_the_meta_graph_what_digits_are(oracle, tmp_path):
    problem = problem_of(tmp_path, (oracle, between(oracle, 0.3)), max_images=None)
    assert InstaNAS().search(problem).notes["test"]["accuracy"] > 0.9


def test_layers_that_repay_no_choice_give_all_images_one_subset(oracle, tmp_path):
    """The trials keep the budget in the mean, give all images what was fixed, and the best has the smallest loss."""
    problem = problem_of(tmp_path, (oracle, between(oracle, 0.3)))
    run = one_run(problem, replace(QUICK, trials=12))
    run.pretrain(None)
    run.joint(None)
    chosen = max(run.variants(), key=lambda variant: variant.kept.accuracy)
    assert chosen.fixed == (OPEN,) * N_LAYERS
    tried = []
    settled = run.examiner.settled

    def spied(prices):
        tried.append((prices, settled(prices)))
        return tried[-1][1]

    object.__setattr__(run.examiner, "settled", spied)
    best = run.fixing(chosen)
    assert len(tried) == 12
    assert best.kept.loss == min(chosen.kept.loss, *(exam.loss for _, exam in tried))
    for prices, exam in tried:
        assert run.costs.kept(exam.policies)
        held = (prices >= FORBIDDEN / 2).sum(1) == 31
        assert held.any(), "something is fixed in every trial"
        assert (exam.policies[:, held] == exam.policies[:1, held]).all()
    assert len({tuple(prices.flatten().tolist()) for prices, _ in tried}) == 12
    if best is not chosen:
        assert any(subset != OPEN for subset in best.fixed)
    again = run.fixing(chosen)
    assert again.fixed == best.fixed
    assert run.examiner.fixing(chosen, 0, np.random.default_rng(0)) is chosen


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    """A finished search."""
    out = tmp_path_factory.mktemp("search") / "out"
    QUICK.search(problem_of(out, (oracle, between(oracle, 0.6))))
    return out


def test_the_folder_holds_what_was_found(folder):
    result = read_result(folder).result
    notes = result.notes
    assert notes["latency"][0]["mean"] <= result.target[0] * (1 + 1e-12)
    assert sum(entry["share"] for entry in notes["policies"]) <= 1 + 1e-9
    assert len(notes["variants"]) >= 3
    assert any(variant["pareto"] for variant in notes["variants"])
    assert list(read_history(folder / VARIANTS)) == notes["variants"]
    rows = read_history(folder / IMAGES)
    assert np.mean([row["predicted0"] for row in rows]) == pytest.approx(notes["latency"][0]["mean"])
    assert np.mean([row["correct"] for row in rows]) == result.score
    assert (folder / HISTOGRAM).read_text().count("<svg") == 1
    assert {row["stage"] for row in result.history} == {"pretrain", "search", "finetune"}
    assert set(torch.load(folder / WEIGHTS, weights_only=True)) == {"controller", "graph", "prices"}


def test_what_is_read_back_answers_as_the_network_that_is_deployed(folder):
    result, routed = read_result(folder).result, read_routed(folder)
    x = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(routed(x, "single"), routed(x, "dense"), rtol=1e-4, atol=1e-4)
        policy = policies_of(torch.tensor(result.arch))[None]
        want = routed.graph(x[:1], policy, "single").numpy()
    session = onnxruntime.InferenceSession(str(folder / CONTROLLER), providers=["CPUExecutionProvider"])
    probs = np.concatenate([session.run(None, {"x": image[None].numpy()})[0] for image in x])
    assert probs.reshape(12, N_LAYERS, 5) == pytest.approx(routed.route.probabilities(x).numpy(), abs=1e-5)
    network = onnxruntime.InferenceSession(str(result.network), providers=["CPUExecutionProvider"])
    (found,) = network.run(None, {"x": x[:1].numpy()})
    assert found == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_another_target_is_answered_by_fine_tuning_alone(folder, oracle, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    first, watch, target = read_result(folder).result, Watch(), between(oracle, 0.05)
    other = QUICK.search(problem_of(out, (oracle, target)), reporter=watch)
    assert watch.steps == 2, "one epoch of fine-tuning"
    assert other.notes["latency"][0]["mean"] <= target * (1 + 1e-12)
    assert first.notes["latency"][0]["mean"] > target
    searched = [[row for row in r.history if row["stage"] == "search"] for r in (first, other)]
    assert searched[0] == searched[1]


def test_what_does_not_fit_a_folder_is_refused(folder, oracle, tmp_path):
    problem = problem_of(shutil.copytree(folder, tmp_path / "out"), (oracle, between(oracle, 0.6)))
    with pytest.raises(UsageError, match=r"search\.ckpt was trained with other settings"):
        replace(QUICK, exploration="original").search(problem)
    with pytest.raises(UsageError, match=r"pretrain\.ckpt was trained with other settings"):
        replace(QUICK, pretrain_lr=0.02).search(problem)
    (problem.out / "variant1.pt").write_bytes(b"no weights")
    with pytest.raises(UsageError, match=r"variant1\.pt holds no weights of this search"):
        QUICK.search(problem)


def colours(n=192):
    """Two classes: red stripes upright, blue ones lying, in noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    stripes = np.where(np.arange(32) // 4 % 2, 80.0, -80.0)
    pattern = np.zeros((n, 32, 32, 3))
    pattern[labels == 0, :, :, 0] = stripes[None, :]
    pattern[labels == 1, :, :, 2] = stripes[:, None]
    images = np.clip(128 + pattern + rng.normal(0, 20, pattern.shape), 0, 255).astype(np.uint8)
    split = n * 4 // 5
    return ArraySource(
        "colours",
        ("red", "blue"),
        {"train": list(images[:split]), "test": list(images[split:])},
        {"train": labels[:split].astype(np.int64), "test": labels[split:].astype(np.int64)},
        mirrored=True,
    )


def test_a_toy_is_learned_from_end_to_end(tmp_path):
    """Pretraining, search and fine-tuning: right, within the target, and faster than it began."""
    space = InstaNASSpace(plan="8x1,8x1s2,8x1s2", stem_channels=8, head_channels=32, num_classes=2)
    oracle = LutOracle.fit(roofline_table(space))
    searcher = InstaNAS(
        epochs=2, pretrain_epochs=2, finetune_epochs=1, variants=3, pretrain_batch_size=16, batch_size=16,
        pretrain_lr=0.05, finetune_batch_size=16, controller_lr=5e-3, net_lr=0.02,
    )  # fmt: skip
    target = oracle.fastest()[1] + 0.2 * (oracle.latency((31, 31, 31)) - oracle.fastest()[1])
    result = searcher.search(Problem((Constraint(oracle, target),), colours(), tmp_path, seed=1))  # begins above it
    assert result.score >= 0.9
    assert result.notes["latency"][0]["mean"] <= target
    loads = [row["predicted_map"] for row in result.history if "predicted_map" in row]
    assert loads[-1] < 0.9 * loads[0]
    figures = [v for row in result.history for v in row.values() if isinstance(v, float)]
    assert np.isfinite(figures).all()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_cannot_be_searched_is_refused(oracle, tmp_path):
    other = FactorOracle.counting(MobileNetV1Space(resolution=32), "macs")
    with pytest.raises(UsageError, match="searches the space instanas, not mobilenet_v1"):
        QUICK.search(problem_of(tmp_path, (other, 1e9)))
    joined = replace(oracle, factors=(*oracle.factors, Factor("between", (0, 1), np.ones((32, 32)))))
    with pytest.raises(UsageError, match="joins neighbouring ones"):
        QUICK.search(problem_of(tmp_path, (joined, 1e9)))

    class Opaque:
        space, unit = SMALL, "ms"

    with pytest.raises(UsageError, match="instanas needs sums over sites, not Opaque"):
        QUICK.search(problem_of(tmp_path, (Opaque(), 1.0)))
    with pytest.raises(UsageError, match="do not fill one batch of 512"):
        replace(QUICK, batch_size=512).search(problem_of(tmp_path, (oracle, 1.0)))
    with pytest.raises(UsageError, match="loss is no longer finite"):
        replace(QUICK, pretrain_lr=1e30).search(problem_of(tmp_path, (oracle, 1.0)))


def test_budgets_that_exclude_each_other_end_at_once(oracle, tmp_path):
    odd = replace(oracle, factors=tuple(replace(f, values=1.0 - f.values) for f in oracle.factors))
    both = ((oracle, 1.001 * oracle.fastest()[1]), (odd, 1.001 * odd.fastest()[1]))
    with pytest.raises(InfeasibleTargetError, match="not all of them together"):
        QUICK.search(problem_of(tmp_path / "out", *both))
    assert not (tmp_path / "out").exists()


def test_the_command(oracle, tmp_path):
    roofline_table(SMALL).write(tmp_path / "t.parquet")
    target = between(oracle, 0.4)
    words = ["search", "instanas", "--table", tmp_path / "t.parquet", "--target", f"{1000 * target:.5f}us",
             "--data", "digits", "--max-images", 160, "--epochs", 1, "--set", "pretrain_epochs=1",
             "--set", "finetune_epochs=0", "--set", "variants=1"]  # fmt: skip
    done = run(*words, "--max-params", "1M", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["predicted"][0] <= target * 1.0001
    assert told["notes"]["latency"][0]["mean"] <= target * 1.0001
    assert read_result(tmp_path / "out").settings["finetune_epochs"] == 0
