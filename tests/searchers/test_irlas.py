"""IRLAS: its laws as a searcher, its reward by hand, and tasks whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from latbench.backends.roofline import OPTIONS, kernels
from latbench.errors import InfeasibleTargetError, UsageError
from latbench.oracle.base import Constraint
from latbench.oracle.learned import LearnedOracle
from latbench.provenance import Provenance
from latbench.spaces.nsc import IRLASSpace, density
from latbench.tables import LatencyTable, Row
from searchers.base import Problem
from searchers.data import Splits
from searchers.early_stop import EarlyStop, ShortTraining, Standardised
from searchers.evaluators import open_evaluator
from searchers.irlas import IRLAS
from searchers.irlas_blocks import BlockSearch
from searchers.results import read_result
from searchers.testing import SearcherConformance, Watch

SIX = IRLASSpace(stack="cifar", resolution=8, max_index=6)
TINY = IRLASSpace(stack="cifar", resolution=8, max_index=4, widths="4,8", repeats="1,1", num_classes=10)
EXPERT = "(1,1,3,0,0)(2,5,0,0,1)(3,7,0,0,0)"
QUICK = IRLAS(
    experts=EXPERT, iterations=3, samples=4, proxy="space", epochs=1, batch_size=32, restarts=0, finalists=2,
    final_epochs=1, final_batch_size=32,
)  # fmt: skip
TOY = IRLAS(tolerance=1e-2, alpha=0.1, flops_weight=0.0, density_weight=0.0)
TRAINED = TOY.mirror(SIX)


def network_table(space: IRLASSpace, n: int, *, of: str = "ms") -> LatencyTable:
    """Whole networks on the analytic device, or the count of their parameters as if it were one."""
    rng = np.random.default_rng(0)
    archs = dict.fromkeys([(0, 18, 0, 0), *(space.sample(rng) for _ in range(n))])
    options = {name: float(value) for name, value in OPTIONS.items()}
    rows = []
    for arch in archs:
        graph = space.network(arch)
        ms = sum(layer.ms for layer in kernels(graph, options)) if of == "ms" else graph.n_params / 1e3
        rows.append(
            Row(
                key=graph.key, kind="network", signature=graph.signature, space=space.name, arch=arch,
                macs=graph.macs, n_params=graph.n_params, latency_ms=ms, origin="simulated",
            )
        )  # fmt: skip
    provenance = Provenance(
        device="cpu", device_name="roofline", backend="roofline", space=space.name, settings=space.settings()
    )
    return LatencyTable.from_rows(rows, provenance)


def fastest_small(oracle, space: IRLASSpace):
    """The cheapest block of one or two layers, by going through them all."""
    archs = sorted({space.canonical((i, j, 30, 0)) for i in range(8) for j in range(19)})
    ms = oracle.latencies(np.array(archs, np.int64))
    return archs[int(ms.argmin())], float(ms.min())


class TestIRLAS(SearcherConformance):
    """On a fitted model of whole networks: the space does not factor, so the suite's own oracle does not fit it."""

    searcher = QUICK
    space = TINY  # type: ignore[assignment]
    oracles: dict[str, LearnedOracle] = {}  # noqa: RUF012

    def oracle(self, of: str = "ms") -> LearnedOracle:  # type: ignore[override]
        if of not in self.oracles:
            self.oracles[of] = LearnedOracle.fit(network_table(TINY, 30, of=of))
        return self.oracles[of]

    def between(self, oracle, share: float) -> float:
        rng = np.random.default_rng(0)
        high = oracle.latencies(np.array([self.space.sample(rng) for _ in range(200)], np.int64)).max()
        low = fastest_small(oracle, TINY)[1]
        return float(low + share * (high - low))

    def test_an_infeasible_target_is_refused_before_any_training(self, tmp_path: Path) -> None:
        oracle = self.oracle()
        fastest, ms = fastest_small(oracle, TINY)
        problem = Problem((Constraint(oracle, 0.5 * ms),), self.data, tmp_path / "out", max_images=self.max_images)
        watch = Watch()
        with pytest.raises(InfeasibleTargetError, match="the fastest is "):
            self.run(problem, watch)
        sampled = replace(self.searcher, scouts=0)
        with pytest.raises(InfeasibleTargetError, match=TINY.format_arch(fastest)):
            sampled.search(problem, reporter=watch)
        assert watch.steps == 0
        assert not (tmp_path / "out").exists()

    def test_two_budgets_hold_together(self, tmp_path: Path) -> None:
        constraints = tuple(Constraint(o, self.between(o, 0.6)) for o in (self.oracle(), self.oracle("params")))
        problem = Problem(constraints, self.data, tmp_path, max_images=self.max_images)
        result = self.run(problem)
        assert problem.satisfied(result.arch)
        assert len(result.predicted) == 2
        assert read_result(tmp_path).problem.targets == problem.targets

    def test_state_of_another_search_is_refused(self, tmp_path: Path) -> None:
        problem = self.problem(tmp_path)
        self.run(problem)
        with pytest.raises(UsageError, match="other settings"):
            replace(self.searcher, balance=0.7).search(problem)
        again = replace(self.searcher, finalists=1).search(problem, reporter=(watch := Watch()))
        assert watch.steps == 0, "what the search does not depend on may change"
        assert len(again.notes["finalists"]) == 1
        (tmp_path / "search.npz").write_bytes(b"no archive")
        with pytest.raises(UsageError, match="is damaged"):
            self.run(problem)

    def test_a_finished_search_is_ranked_anew_under_other_budgets(self, tmp_path: Path) -> None:
        problem = self.problem(tmp_path)
        first = self.run(problem)
        slower = problem.constraints[0].oracle.seen(first.arch, 1.5 * problem.targets[0])
        corrected = replace(problem, constraints=(Constraint(slower, problem.targets[0]),))
        again = self.run(corrected)
        assert corrected.satisfied(again.arch)
        assert again.arch != first.arch
        assert again.notes["evaluated"] <= first.notes["evaluated"] + 1  # the scout, where none is left
        half = replace(self.searcher, iterations=5)
        with pytest.raises(UsageError, match="other settings"):
            half.search(problem)  # not finished: it would go on under budgets that are not its own

    def test_a_proxy_and_a_confidence_will_do(self, tmp_path: Path) -> None:
        oracle = self.oracle()
        constraint = Constraint(oracle, self.between(oracle, 0.6), 0.8)
        problem = Problem((constraint,), self.data, tmp_path, max_images=self.max_images)
        result = replace(self.searcher, evaluator="synflow", iterations=2, finalists=1).search(problem)
        assert problem.satisfied(result.arch)
        assert float(constraint.bounds(np.array([result.arch]))[0]) > result.predicted[0]

    def test_proxies_are_standardised_and_accuracies_are_not(self, tmp_path: Path) -> None:
        problem, arch = self.problem(tmp_path), self.space.parse_arch(EXPERT)
        for name, as_it_is in (("train:1", True), ("naswot", False)):
            judged = replace(self.searcher, evaluator=name)._evaluator(problem).evaluate(arch)
            assert 0 <= judged <= 1
            plain = open_evaluator(name, problem, held_out=self.searcher.held_out)
            assert (judged == plain.evaluate(arch)) == as_it_is


# ---- the reward -----------------------------------------------------------------------------------------------------


def test_the_reward_by_hand() -> None:
    arch = SIX.parse_arch("irlas-mobile")
    mmacs = SIX.block(arch, 32, (1, 32, 32, 32)).macs / 1e6
    none = np.empty(0)
    assert density(SIX.codes(arch)) == pytest.approx(9 / 7)
    full = IRLAS().reward(SIX, arch, 0.6, none, none)
    assert full == pytest.approx((60 - np.log(mmacs) - 8 * np.log(9 / 7)) / 100)
    assert 100 * full + np.log(mmacs) - np.log(20) == pytest.approx(54.994, abs=1e-3), "the worked example: 20 MFLOPs"
    assert IRLAS(flops_weight=0.0, density_weight=0.0).reward(SIX, arch, 0.6, none, none) == pytest.approx(0.6)


def test_a_block_without_convolutions_earns_nothing_by_its_cost() -> None:
    arch = SIX.parse_arch("(1,4,0,0,0)(2,7,0,0,0)")
    assert IRLAS(density_weight=0.0).reward(SIX, arch, 0.5, np.empty(0), np.empty(0)) == pytest.approx(0.5)


def test_a_penalty_falls_with_the_logarithm_of_the_excess() -> None:
    arch, options = SIX.parse_arch("resnext"), replace(TOY, latency_mode="penalty")
    targets = np.array([2.0, 10.0])
    within = options.reward(SIX, arch, 0.5, np.array([1.9, 10.0]), targets)
    beyond = options.reward(SIX, arch, 0.5, np.array([4.0, 30.0]), targets)
    assert within == pytest.approx(0.5)
    assert beyond == pytest.approx((50 - 8 * np.log(2) - 8 * np.log(3)) / 100)


def test_the_mirror_parts_of_a_trajectory_add_up() -> None:
    rng = np.random.default_rng(0)
    plain = BlockSearch(replace(TOY, balance=0.0), SIX, TRAINED, lambda arch: 0.5).learner
    guided = BlockSearch(replace(TOY, balance=0.3), SIX, TRAINED, lambda arch: 0.5).learner
    for block in (TRAINED.features.cut(SIX.sample(rng)) for _ in range(100)):
        shaped = plain.parts(block, 0.47)
        np.testing.assert_allclose(shaped, [*[0.47 / len(block)] * (len(block) - 1), 0.47])  # BlockQNN's
        extra = guided.parts(block, 0.47) - shaped
        want = 0.3 * (TRAINED.weights @ TRAINED.features.count(block)) / TRAINED.scale
        assert extra.sum() == pytest.approx(want, abs=1e-9)


# ---- searches whose answer is known ---------------------------------------------------------------------------------


def found_score(balance: float, seed: int) -> tuple[float, int, int]:
    """Mirror score of the greedy block, calls of the evaluator, distinct blocks; accuracy tells nothing."""
    calls = []
    search = BlockSearch(
        replace(TOY, balance=balance), SIX, TRAINED, lambda arch: (calls.append(arch), 0.5)[1], seed=seed
    )
    search.run()
    return TRAINED.score(search.learner.greedy()), len(calls), len(set(search.learner.memory))


def test_guidance_leads_to_the_experts_wiring() -> None:
    plain, guided = ([found_score(balance, seed) for seed in range(5)] for balance in (0.0, 1.0))
    assert np.mean([score for score, _, _ in plain]) < 0.3
    assert np.mean([score for score, _, _ in guided]) > 0.6
    for _, calls, distinct in (*plain, *guided):
        assert calls == distinct
        assert 8_500 < calls < 9_500


COSTS = {  # by type and kernel
    **{(1, 1): 1.0, (1, 3): 2.0, (1, 5): 4.0, (2, 1): 0.5, (3, 1): 0.5, (2, 3): 1.0, (3, 3): 1.0},
    **{(5, 0): 0.5, (6, 0): 1.0},
}


@dataclass(frozen=True)
class ToyOracle:
    """A price per layer."""

    space: IRLASSpace
    unit: str = "ms"

    @property
    def provenance(self) -> Provenance:
        return Provenance("", "", "", space=self.space.name)

    def latency(self, arch: Sequence[int]) -> float:
        return sum(COSTS.get(code[1:3], 0.0) for code in self.space.codes(tuple(int(i) for i in arch)))

    def latencies(self, archs) -> np.ndarray:
        return np.array([self.latency(arch) for arch in archs], np.float64)


def toy_accuracy(arch) -> float:
    kinds = [code[1:3] for code in SIX.codes(arch)]
    n_convs, n_fives = sum(kind == 1 for kind, _ in kinds), kinds.count((1, 5))
    return min(0.9, 0.3 + 0.05 * n_convs + 0.02 * n_fives + 0.05 * ((5, 0) in kinds))


def toy_search(seed: int, budget: float | None, mode: str = "filter") -> tuple[BlockSearch, list[float]]:
    oracle, asked = ToyOracle(SIX), []

    def accuracy(arch) -> float:
        asked.append(oracle.latency(arch))
        return toy_accuracy(arch)

    constraints = (Constraint(oracle, budget),) if budget is not None else ()
    options = replace(TOY, balance=0.2, latency_mode=mode)
    search = BlockSearch(options, SIX, TRAINED, accuracy, constraints, seed=seed)
    search.run()
    return search, asked


def best_of(search: BlockSearch) -> tuple[float, float]:
    """Price and accuracy of the most accurate block that keeps the budget."""
    arch = max((arch for _, arch in search.ranked()), key=toy_accuracy)
    return ToyOracle(SIX).latency(arch), toy_accuracy(arch)


@pytest.mark.parametrize("seed", range(5))
def test_a_filter_keeps_the_budget_and_trains_nothing_beyond_it(seed: int) -> None:
    search, asked = toy_search(seed, 6.0)
    assert max(asked) <= 6.0
    price, accuracy = best_of(search)
    assert price <= 6.0
    assert accuracy == pytest.approx(0.55)
    filtered = set(search.learner.rewards) - set(search.accuracies)
    assert filtered
    assert {search.learner.rewards[block] for block in filtered} == {0.0}
    memory = search.learner.memory
    early, late = (np.mean([block in filtered for block in part]) for part in (memory[: 95 * 64], memory[-12 * 64 :]))
    assert late < 0.5 * early, "it learns to stay within"
    free, _ = toy_search(seed, None)
    price, accuracy = best_of(free)
    assert 16.5 <= price <= 20
    assert 0.63 - 1e-9 <= accuracy <= 0.65 + 1e-9


def test_hopeful_values_lead_to_rewards_sooner() -> None:
    oracle = ToyOracle(SIX)
    options = replace(TOY, balance=0.0, iterations=40, samples=16, replays=0, initial=0.0)
    found = []
    for hopeful in (False, True):
        search = BlockSearch(
            replace(options, hopeful=hopeful), SIX, TRAINED, toy_accuracy, (Constraint(oracle, 6.0),), seed=0
        )
        search.run()
        found.append(np.mean([search.learner.rewards[block] for block in search.learner.memory[-160:]]))
    assert found[1] > found[0] + 0.05, "what it samples at the end"


def test_foresight_follows_the_most_promising_blocks_within_the_budget() -> None:
    oracle = ToyOracle(SIX)
    options = replace(
        TOY, balance=0.0, iterations=12, samples=8, replays=0, initial=0.0, hopeful=True, schedule="0.5:1"
    )
    found = []
    for foresight in (1, 32):
        search = BlockSearch(
            replace(options, foresight=foresight), SIX, TRAINED, toy_accuracy, (Constraint(oracle, 6.0),), seed=0
        )
        search.run()
        found.append(search)
    plain, foreseeing = found
    assert set(plain.learner.rewards) - set(plain.accuracies), "without it budgets are broken"
    assert foreseeing.n_evaluated == len(foreseeing.learner.rewards) == 12 * 8, "all within, all new"
    assert all(oracle.latency(foreseeing.arch(block)) <= 6.0 for block in foreseeing.accuracies)
    late = [np.mean(list(search.accuracies.values())[-30:]) for search in found]
    assert late[1] > late[0]


def test_foresight_takes_what_there_is_where_nothing_new_keeps_the_budget() -> None:
    options = replace(TOY, balance=0.0, iterations=3, samples=4, foresight=4)
    search = BlockSearch(options, SIX, TRAINED, toy_accuracy, (Constraint(ToyOracle(SIX), 1e-6),), seed=0)
    history = search.run()
    assert search.n_evaluated == 0
    assert [row["reward"] for row in history] == [0.0] * 3


def test_a_penalty_trains_what_is_beyond_and_never_returns_it() -> None:
    search, asked = toy_search(0, 6.0, "penalty")
    assert max(asked) > 6.0
    assert all(ToyOracle(SIX).latency(arch) <= 6.0 for _, arch in search.ranked())


def test_penalties_of_a_finished_search_follow_the_budgets_of_now() -> None:
    search, _ = toy_search(0, 5.0, "penalty")
    oracle = search.constraints[0].oracle
    beyond = [block for block in search.accuracies if oracle.latency(search.arch(block)) > 5.1]
    assert beyond
    before = {block: search.score(block) for block in beyond}
    search.constraints, search.targets = (Constraint(oracle, 1e6),), np.array([1e6])
    search._reward_again()
    assert all(search.score(block) > before[block] for block in beyond)


def test_without_a_mode_the_oracle_changes_nothing() -> None:
    silent, _ = toy_search(3, 6.0, "none")
    alone, _ = toy_search(3, None)
    assert silent.learner.memory == alone.learner.memory
    for ours, theirs in zip(silent.learner.tables, alone.learner.tables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert {arch for _, arch in silent.ranked()} < {arch for _, arch in alone.ranked()}


def test_the_scout_stands_in_where_no_evaluated_block_fits() -> None:
    constraint = (Constraint(ToyOracle(SIX), 0.25),)  # identities and sums only
    options = replace(TOY, schedule="1.0:1", samples=2)
    scout = options.scout(SIX, constraint)
    assert ToyOracle(SIX).latency(scout) <= 0.25
    search = BlockSearch(options, SIX, TRAINED, toy_accuracy, constraint)
    search.run()
    assert search.ranked() == []
    ((score, arch),) = search.consider([scout])
    assert arch == scout
    assert score == pytest.approx(0.3 + 0.2 * TRAINED.score(scout))


# ---- a block's short training ---------------------------------------------------------------------------------------


def early_stop(tmp_path: Path, **training) -> EarlyStop:
    problem = Problem((Constraint(ToyOracle(TINY), 99.0),), "digits", tmp_path)
    return EarlyStop(problem, TINY, Splits.of(problem, 10), ShortTraining(batch_size=32, **training))


def test_a_short_training_learns_and_depends_on_the_block_alone(tmp_path: Path) -> None:
    evaluator = early_stop(tmp_path, epochs=3, lr=2e-2)
    conv, handed_on = (TINY.parse_arch(code) for code in (EXPERT, "(1,4,0,0,0)(2,7,0,0,0)"))
    first = evaluator.evaluate(conv)
    assert first > 0.4
    evaluator.evaluate(handed_on)
    assert evaluator.evaluate(conv) == first


def test_a_first_epoch_below_chance_is_tried_again_at_a_lower_rate(tmp_path: Path, monkeypatch) -> None:
    rates = []

    def trained(self, arch, lr, attempt):
        rates.append(lr)
        return attempt == 2, 0.7

    monkeypatch.setattr(EarlyStop, "_train", trained)
    assert early_stop(tmp_path).evaluate(TINY.parse_arch(EXPERT)) == 0.7
    assert rates == pytest.approx([1e-3, 4e-4, 1.6e-4])


def test_the_last_try_goes_on_whatever_it_taught(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(EarlyStop, "_accuracy", lambda self, module, world: 0.05)
    evaluator, arch = early_stop(tmp_path, epochs=2, restarts=1), TINY.parse_arch(EXPERT)
    assert evaluator._train(arch, 1e-3, 0) == (False, 0.0)
    assert evaluator._train(arch, 1e-3, 1) == (True, 0.05)
    assert evaluator.evaluate(arch) == 0.05


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"finalists": 0}, "finalists"),
        ({"final_lr": 0.0}, "final_lr"),
        ({"balance": -1.0}, "must not be negative"),
        ({"held_out": 1.0}, "held_out must lie"),
        ({"epochs": 0}, "a short training needs"),
        ({"lr": 0.0}, "a rate and its decays"),
        ({"alpha": 2.0}, "alpha must be in"),
        ({"schedule": "fast"}, "exploration schedule"),
        ({"iterations": 0}, "at least 1 iteration"),
    ],
)
def test_options_out_of_range(settings, words) -> None:
    with pytest.raises(UsageError, match=words):
        IRLAS(**settings)


def test_what_does_not_fit_the_space_is_refused(tmp_path: Path) -> None:
    from latbench.oracle.factors import FactorOracle
    from latbench.spaces.nasbench201 import NASBench201Space

    other = FactorOracle.counting(NASBench201Space(num_cells=1, channels=4, resolution=8), "macs")
    with pytest.raises(UsageError, match="searches network structure codes, not nasbench201"):
        IRLAS().search(Problem((Constraint(other, 1e9),), "digits", tmp_path))
    with pytest.raises(UsageError, match="cannot be layer"):
        replace(QUICK, experts="(1,1,9,0,0)").mirror(TINY)
    with pytest.raises(UsageError, match="'resnext' is no architecture"):
        IRLAS().mirror(TINY)


def test_a_standardised_proxy_ranks_as_it_did() -> None:
    class Length:
        def evaluate(self, arch) -> float:
            return 40.0 + 3.0 * len(SIX.codes(arch))

    scaled = Standardised(Length(), SIX)
    archs = [SIX.parse_arch(code) for code in ("(1,1,3,0,0)(2,7,0,0,0)", "resnext", "irlas-mobile")]
    values = [scaled.evaluate(arch) for arch in archs]
    assert 0 < values[0] < values[1] < values[2] < 1
