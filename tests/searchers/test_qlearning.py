"""Q-learning on tasks whose answer is known, its update by hand, and what its memory may do."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from latbench.errors import UsageError
from latbench.spaces.nasbench201 import NASBench201Space
from searchers.qlearning import SCHEDULE, Learner, Process, Rates, epsilons

ENDING = Process((3, 4, 4, 1), (None, 3, 3, 0))  # the last action of a step ends it there


def run(learner: Learner, reward, rates=None) -> Learner:
    for i, epsilon in enumerate(rates or epsilons()):
        learner.iterate(i, epsilon, lambda new: [reward(trajectory) for trajectory in new])
    return learner


def test_the_published_schedule() -> None:
    rates = epsilons()
    assert len(rates) == 178
    assert [rates.count(e / 10) for e in range(10, 0, -1)] == [95, 7, 7, 7, 10, 10, 10, 10, 10, 12]
    assert list(rates) == sorted(rates, reverse=True)


def test_a_schedule_keeps_its_shares_at_another_length() -> None:
    short, long = epsilons(SCHEDULE, 18), epsilons(SCHEDULE, 1780)
    assert (len(short), len(long)) == (18, 1780)
    assert long.count(1.0) == 950
    assert abs(short.count(1.0) - 9.6) < 1
    assert short[-1] == 0.1
    assert epsilons("0.5:3") == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("text", ["", "1.0", "2.0:5", "1.0:-1", "a:b", "1.0:0", "1.0:1.5"])
def test_malformed_schedules_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="exploration schedule"):
        epsilons(text)


def test_an_update_runs_from_the_end_to_the_start() -> None:
    learner = Learner(ENDING, Rates(alpha=0.1, discount=0.9, initial=0.5))
    learner.update((2, 1, 3), 0.9)  # L = 3: 0.3, 0.3, 0.9
    last = 0.9 * 0.5 + 0.1 * 0.9
    middle = 0.9 * 0.5 + 0.1 * (0.3 + 0.9 * last)  # the row's largest value is the one just raised
    first = 0.9 * 0.5 + 0.1 * (0.3 + 0.9 * middle)
    assert learner.tables[2][1, 3] == pytest.approx(last)
    assert learner.tables[1][2, 1] == pytest.approx(middle)
    assert learner.tables[0][0, 2] == pytest.approx(first)
    changed = sum(int((table != 0.5).sum()) for table in learner.tables)
    assert changed == 3


def test_hopeful_values_are_the_best_return_that_ever_followed() -> None:
    bonus = [np.arange(n) / 10 for n in ENDING.n_actions]
    learner = Learner(ENDING, Rates(discount=0.9, initial=0.0, shape_reward=False, hopeful=True), bonus=bonus)
    learner.update((2, 1, 3), 0.5)
    last, first = 0.5 + 0.3, 0.2 + 0.9 * (0.1 + 0.9 * 0.8)
    assert learner.tables[2][1, 3] == pytest.approx(last)
    assert learner.tables[0][0, 2] == pytest.approx(first)
    learner.update((2, 1, 3), 0.1)
    assert learner.tables[0][0, 2] == pytest.approx(first), "nothing falls"
    learner.update((2, 1, 3), 0.9)
    assert learner.tables[2][1, 3] == pytest.approx(0.9 + 0.3)


def test_hopeful_values_learn_new_trajectories_at_once() -> None:
    learner = Learner(Process((5,) * 4), Rates(samples=16, replays=0, initial=0.0, shape_reward=False, hopeful=True))
    learner.iterate(0, 1.0, lambda new: [sum(t) / 16 for t in new])
    best = max(learner.rewards, key=learner.rewards.__getitem__)
    assert learner.tables[0].max() == pytest.approx(learner.rewards[best])
    assert learner.tables[0][0, best[0]] == learner.tables[0].max()


def test_rewards_are_spread_as_published_or_paid_at_the_end() -> None:
    trajectory = (0, 1, 2, 0)
    shaped = Learner(ENDING).parts(trajectory, 0.8)
    np.testing.assert_allclose(shaped, [0.2, 0.2, 0.2, 0.8])
    assert shaped.sum() == pytest.approx(0.8 * (1 + 3 / 4))
    np.testing.assert_allclose(Learner(ENDING, Rates(shape_reward=False)).parts(trajectory, 0.8), [0, 0, 0, 0.8])
    bonus = [np.arange(n) / 10 for n in ENDING.n_actions]
    np.testing.assert_allclose(Learner(ENDING, bonus=bonus).parts((2, 3), 0.6), [0.3 + 0.2, 0.6 + 0.3])


def test_trajectories_end_where_the_process_says() -> None:
    learner = Learner(ENDING, Rates(samples=500))
    sampled = learner.sample(1.0, np.random.default_rng(0))
    assert {len(t) for t in sampled} == {2, 3, 4}
    for trajectory in sampled:
        assert [ENDING.ends(i, a) for i, a in enumerate(trajectory)] == [False] * (len(trajectory) - 1) + [True]
    counts = np.bincount([t[0] for t in sampled], minlength=3)
    assert counts.min() > 120, "uniform: a third of 500 each"


def test_greedy_sampling_follows_the_values_and_breaks_ties_at_random() -> None:
    learner = Learner(Process((4, 4)), Rates(samples=400))
    learner.tables[0][0] = [0.0, 1.0, 1.0, 0.0]
    learner.tables[1][1] = [0.0, 0.0, 0.0, 2.0]
    sampled = learner.sample(0.0, np.random.default_rng(0))
    firsts = [t[0] for t in sampled]
    assert set(firsts) == {1, 2}
    assert 150 < firsts.count(1) < 250
    assert {t[1] for t in sampled if t[0] == 1} == {3}
    assert {t[1] for t in sampled if t[0] == 2} == {0, 1, 2, 3}


def test_it_finds_the_best_of_a_small_task() -> None:
    target = (2, 0, 4, 1)
    for seed in range(3):
        learner = Learner(Process((5,) * 4), Rates(alpha=0.1), seed=seed)
        run(learner, lambda t: sum(a == b for a, b in zip(t, target, strict=True)) / 4)
        assert learner.greedy() == target


def test_values_see_how_neighbours_go_together() -> None:
    """A reward of neighbouring actions, in which the best first action depends on the second; by brute force."""
    pairs = np.random.default_rng(3).random((3, 5, 5))

    def reward(t: tuple[int, ...]) -> float:
        return float(sum(pairs[i, t[i], t[i + 1]] for i in range(3)) / 3)

    worth = sorted((reward(t) for t in product(range(5), repeat=4)), reverse=True)
    for seed in range(3):
        learner = run(Learner(Process((5,) * 4), Rates(alpha=0.1, shape_reward=False), seed=seed), reward)
        assert reward(learner.greedy()) > worth[len(worth) // 5], "in the best fifth"
        late = np.mean([learner.rewards[t] for t in learner.memory[-12 * 64 :]])
        assert late > worth[len(worth) // 5]


def test_it_searches_any_space_of_decisions() -> None:
    space = NASBench201Space()
    learner = Learner(Process.of(space), Rates(samples=10, alpha=0.2))
    run(learner, lambda arch: sum(option == 3 for option in arch) / 6, epsilons(SCHEDULE, 40))
    assert all(len(trajectory) == 6 for trajectory in learner.memory)
    for trajectory in learner.rewards:
        space.check(trajectory)
    late = np.mean([learner.rewards[t] for t in learner.memory[-20:]])
    early = np.mean([learner.rewards[t] for t in learner.memory[:100]])
    assert late > early + 0.2


def test_nothing_is_evaluated_twice() -> None:
    asked: list[tuple[int, ...]] = []

    def evaluate(new):
        asked.extend(new)
        return [0.5] * len(new)

    learner = Learner(ENDING, Rates(samples=32))
    for i in range(20):
        learner.iterate(i, 1.0, evaluate)
    assert len(asked) == len(set(asked)) == len(learner.rewards)
    assert len(learner.memory) == 20 * 32
    assert set(learner.memory) == set(asked)


def test_a_bonus_draws_the_search() -> None:
    bonus = [np.where(np.arange(n) == 1, 1.0, 0.0) for n in (4, 4, 4)]
    process = Process((4, 4, 4))
    plain = run(Learner(process, Rates(alpha=0.1), seed=5), lambda t: 0.5)
    drawn = run(Learner(process, Rates(alpha=0.1), seed=5, bonus=bonus), lambda t: 0.5)
    assert drawn.greedy() == (1, 1, 1)
    assert plain.greedy() != (1, 1, 1)


def test_a_loaded_learner_goes_on_as_if_it_had_never_stopped() -> None:
    def reward(t: tuple[int, ...]) -> float:
        return 0.1 * sum(t) / len(t)

    rates = epsilons(SCHEDULE, 30)
    whole = run(Learner(ENDING, seed=7), reward, rates)
    first = run(Learner(ENDING, seed=7), reward, rates[:13])
    second = Learner(ENDING, seed=7)
    second.load(first.state())
    for i in range(13, 30):
        second.iterate(i, rates[i], lambda new: [reward(trajectory) for trajectory in new])
    assert second.memory == whole.memory
    assert second.rewards == whole.rewards
    for ours, theirs in zip(second.tables, whole.tables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = run(Learner(ENDING, seed=8), reward, rates)
    assert other.memory != whole.memory


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Process(()), "needs steps"),
        (lambda: Process((3, 0)), "needs steps"),
        (lambda: Process((3, 3), (0,)), "one per step"),
        (lambda: Rates(alpha=0.0), "alpha must be in"),
        (lambda: Rates(samples=0), "samples at least 1"),
        (lambda: epsilons(SCHEDULE, 0), "at least 1 iteration"),
        (lambda: Learner(ENDING, bonus=[np.zeros(2)]), "one figure per action"),
        (lambda: Learner(ENDING).load(Learner(Process((2, 2))).state()), "another row of choices"),
    ],
)
def test_what_does_not_fit_is_refused(make, words) -> None:
    with pytest.raises(UsageError, match=words):
        make()
