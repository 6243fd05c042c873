"""Sessions on a scripted launcher: order, rounds, extra phases, flags, the canary, the deadline, going on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import PROBE_US, Script, ScriptedLauncher, flagged, jobs, steady

from latbench.errors import MeasurementError
from latbench.measure.base import Measurement, Request, SamplingPlan
from latbench.profiling import session as session_module
from latbench.profiling.jobs import GraphJob
from latbench.profiling.profile import Target
from latbench.profiling.rows import finish
from latbench.profiling.session import CANARY, EXTRA_ROUNDS, Session

PLAN = SamplingPlan(canary_every=0)


def session(script: Script = steady, plan: SamplingPlan = PLAN) -> tuple[Session, ScriptedLauncher]:
    launcher = ScriptedLauncher(script)
    return Session(launcher, plan, "graph", PROBE_US), launcher


def visits(launcher: ScriptedLauncher) -> Counter[str]:
    return Counter(request.key for request in launcher.requests)


def test_every_graph_is_visited_rounds_times_runs_and_no_more() -> None:
    one, launcher = session()
    asked = jobs(7)
    assert one.measure(asked)
    assert visits(launcher) == {job.key: PLAN.runs * PLAN.rounds for job in asked}
    assert all(one.complete(job.key) for job in asked)
    places = [(r.run, r.round) for r in launcher.requests]
    assert places == sorted(places)  # run by run, and in it round by round: a row's blocks lie apart
    assert [r.order for r in launcher.requests] == list(range(len(places)))


def test_two_jobs_of_one_graph_are_measured_once() -> None:
    one, launcher = session()
    (job,) = jobs(1)
    one.measure([job, GraphJob(job.graph, replace(job.row, key="another row"))])
    assert visits(launcher) == {job.key: 4}


def test_rounds_are_shuffled_by_the_seed_alone() -> None:
    def order(seed: int) -> list[str]:
        one, launcher = session(plan=replace(PLAN, seed=seed))
        one.measure(jobs(9))
        return [request.key for request in launcher.requests]

    first = order(0)
    assert first == order(0) != order(1)
    assert sorted(first[:9]) == sorted(first[9:18])
    assert first[:9] != first[9:18]


def test_every_measurement_is_recorded() -> None:
    recorded: list[Measurement] = []
    one, launcher = session()
    one.record = recorded.append
    assert one.measure(jobs(3))
    assert [(m.key, m.order) for m in recorded] == [(r.key, r.order) for r in launcher.requests]


@pytest.mark.parametrize("warning", ["foreign_load", "throttled"])
def test_flagged_blocks_are_taken_again_and_left_out_but_kept(warning: str) -> None:
    asked = jobs(3)
    victim = asked[1].key
    one, launcher = session(flagged(warning, when=lambda r, visit: r.key == victim and visit < 2))
    one.measure(asked)
    assert visits(launcher)[victim] == 6
    assert visits(launcher)[asked[0].key] == 4
    row = finish(asked[1].row, one.progress[victim])
    assert row.block_flags == (warning, warning, "", "", "", "")
    assert row.n_samples == 40
    assert len(row.samples_ms) == sum(row.block_sizes) == 60
    assert row.latency_ms == pytest.approx(1.001)
    assert warning in row.warnings
    assert row.stop_reason == "converged"


def test_a_slow_probe_is_throttling_and_is_flagged() -> None:
    def script(request: Request, visit: int) -> Measurement:
        slow = 1.2 if visit == 0 else 1.0
        one = steady(request, visit)
        return replace(one, probes_us=(slow * PROBE_US, slow * PROBE_US))

    one, _ = session(script)
    (job,) = jobs(1)
    one.measure([job])
    assert finish(job.row, one.progress[job.key]).block_flags == ("throttled", "", "", "", "")


def test_a_row_of_flagged_blocks_only_says_so_and_uses_them() -> None:
    one, launcher = session(flagged("throttled", when=lambda r, visit: True))
    (job,) = jobs(1)
    assert one.measure([job])
    assert visits(launcher)[job.key] == PLAN.rounds * PLAN.runs + EXTRA_ROUNDS
    row = finish(job.row, one.progress[job.key])
    assert (row.stop_reason, row.n_samples) == ("throttled", 10 * (PLAN.rounds * PLAN.runs + EXTRA_ROUNDS))
    assert row.latency_ms == pytest.approx(3.003)


def test_a_noisy_row_gets_more_phases_and_an_honest_end() -> None:
    def script(request: Request, visit: int) -> Measurement:
        one = steady(request, visit)
        return replace(one, samples_ms=tuple(s * (1 + visit % 2) for s in one.samples_ms))

    one, launcher = session(script)
    (job,) = jobs(1)
    one.measure([job])
    assert visits(launcher)[job.key] == PLAN.rounds * PLAN.runs + EXTRA_ROUNDS
    row = finish(job.row, one.progress[job.key])
    assert row.stop_reason == "timeout"
    assert "noise>ci" in row.warnings


def test_a_spent_row_is_not_visited_again() -> None:
    def script(request: Request, visit: int) -> Measurement:
        return replace(steady(request, visit), samples_ms=(500.0 * (1 + visit % 2),))

    one, launcher = session(script)
    (job,) = jobs(1)
    one.measure([job])
    assert visits(launcher)[job.key] == 4  # 3 s of inference: max_time_s is 1


def test_a_failure_ends_its_row_and_no_other() -> None:
    asked = jobs(3)

    def script(request: Request, visit: int) -> Measurement:
        one = steady(request, visit)
        return (
            replace(one, samples_ms=(), status="error", stage="load", error="no")
            if request.key == asked[0].key
            else one
        )

    one, launcher = session(script)
    assert one.measure(asked)
    assert visits(launcher)[asked[0].key] <= 2  # the second was in the pipe by then, at most
    row = finish(asked[0].row, one.progress[asked[0].key])
    assert (row.status, row.stage, row.error, row.stop_reason, row.latency_ms) == ("error", "load", "no", "error", None)
    assert all(finish(job.row, one.progress[job.key]).status == "ok" for job in asked[1:])


def test_the_canary_stands_at_both_ends_of_a_run_and_between() -> None:
    one, launcher = session(plan=replace(PLAN, canary_every=4))
    one.measure(jobs(6))
    for run in range(PLAN.runs):
        keys = [r.key == CANARY.key for r in launcher.requests if r.run == run]
        assert keys[0]
        assert keys[-1]
        assert all(any(keys[i : i + 5]) for i in range(len(keys) - 5))
    notes = one.canary_notes()
    assert notes["n"] == visits(launcher)[CANARY.key] == 8
    assert notes["spread"] == notes["worst"] == 0
    assert CANARY.key not in one.finished


def drifting(request: Request, visit: int) -> Measurement:
    """In the fourth run everything takes 10 % longer, whatever the probe says."""
    one = steady(request, visit)
    return replace(one, samples_ms=tuple(1.1 * s for s in one.samples_ms)) if request.run == 3 else one


def test_blocks_between_two_canaries_that_drifted_are_taken_again() -> None:
    one, _ = session(drifting, replace(PLAN, canary_every=2, runs=5))
    asked = jobs(4)
    one.measure(asked)
    for job in asked:
        row = finish(job.row, one.progress[job.key])
        assert row.block_flags == ("",) * 6 + ("drift", "drift") + ("",) * 4
        assert row.latency_ms == pytest.approx(1.001)
    assert one.canary_notes()["worst"] == pytest.approx(0.1)


def test_an_interrupted_session_goes_on_as_if_nothing_had_happened() -> None:
    """Every prefix of what was recorded, restored, leads to the same figures. (A drift that a kill cuts in two may cost
    a row more visits: the canary that would have closed it was never measured.)"""
    plan = replace(PLAN, canary_every=2, runs=5)
    whole, _ = session(drifting, plan)
    recorded: list[Measurement] = []
    whole.record = recorded.append
    asked = jobs(3)
    whole.measure(asked)
    want = {job.key: finish(job.row, whole.progress[job.key]) for job in asked}
    judged = next(m.order for m in recorded if m.run == 4)  # the drift of run 3 has its closing canary
    for n in range(len(recorded) + 1):
        later, second = session(drifting, plan)
        later.restore(recorded[:n])
        assert later.measure(asked)
        for job in asked:
            before = sum(m.key == job.key for m in recorded[:n])
            row = finish(job.row, later.progress[job.key])
            assert row.latency_ms == pytest.approx(want[job.key].latency_ms)
            assert len(row.block_flags) == visits(second)[job.key] + before  # none was lost, none taken twice
            if n >= judged:
                assert row.block_flags == want[job.key].block_flags


def test_a_row_that_is_given_up_stays_given_up_when_a_later_chunk_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "CHUNK_S", 1e-9)  # a chunk a row
    asked = jobs(2)
    slow_orders: set[int] = set()

    def script(request: Request, visit: int) -> Measurement:
        """All but the canary is noisy without end; at some orders all is 10 % slower."""
        one = steady(request, visit)
        noise = 1 if request.key == CANARY.key else 1 + visit % 2
        slow = 1.1 if request.order in slow_orders else 1.0
        return replace(one, samples_ms=tuple(s * noise * slow for s in one.samples_ms))

    def measured() -> tuple[Session, ScriptedLauncher]:
        one, launcher = session(script, replace(PLAN, canary_every=1))
        assert one.measure(asked)
        assert one.finished == {job.key for job in asked}
        return one, launcher

    _, launcher = measured()
    last = [request for request in launcher.requests if request.key != CANARY.key][-1].key
    start = next(request.order for request in launcher.requests if request.key == last)
    slow_orders.update(request.order for request in launcher.requests if request.order > start and request.run == 1)
    one, _ = measured()
    assert any("drift" in block.warnings for block in one.progress[last].blocks)


def test_a_row_that_was_given_up_is_not_visited_after_an_interruption() -> None:
    """Not even by the canary: phases that were done need no worker."""

    def noisy(request: Request, visit: int) -> Measurement:
        one = steady(request, visit)
        return replace(one, samples_ms=tuple(s * (1 + visit % 2) for s in one.samples_ms))

    plan, recorded = replace(PLAN, canary_every=64), list[Measurement]()
    whole, _ = session(noisy, plan)
    whole.record = recorded.append
    (job,) = jobs(1)
    whole.measure([job])
    later, second = session(noisy, plan)
    later.restore(recorded)
    assert later.measure([job])
    assert second.requests == []
    assert later.finished == {job.key}


def test_a_deadline_that_has_passed_measures_nothing() -> None:
    one, launcher = session()
    one.deadline = 0.0
    assert not one.measure(jobs(5))
    assert launcher.requests == []
    assert not one.finished


def test_a_deadline_leaves_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock takes a tenth of a second; chunks hold one row."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr("latbench.profiling.session.time.monotonic", monotonic)
    monkeypatch.setattr(session_module, "CHUNK_S", 1e-9)
    one, _ = session()
    one.deadline = 2.0
    asked = jobs(50)
    assert not one.measure(asked)
    assert 0 < len(one.finished) < 50
    assert set(one.progress) == one.finished
    one.deadline = float("inf")
    assert one.measure(asked)
    assert one.finished == {job.key for job in asked}


def test_a_deadline_leaves_as_much_of_a_chunk_as_there_is_time_for_blocks_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def script(request: Request, visit: int) -> Measurement:
        now[0] += 1.0
        return steady(request, visit)

    monkeypatch.setattr("latbench.profiling.session.time.monotonic", lambda: now[0])
    monkeypatch.setattr(session_module, "ALONE_CHUNK_S", 1e9)
    monkeypatch.setattr(session_module, "estimate_s", lambda job, plan: float(plan.alone_processes))
    plan = replace(PLAN, alone_processes=4)
    one, _ = session(script, plan)
    one.deadline = 8 * 4 * 0.8  # seconds, of the 32 that all of them take
    networks = [replace(job, row=replace(job.row, kind="network"), alone=True) for job in jobs(8)]
    blocks = [replace(job, row=replace(job.row, kind="block")) for job in networks[5:7]]
    assert not one.measure([*networks[:5], *blocks, networks[7]])
    assert {job.key for job in blocks} < one.finished
    assert 4 <= len(one.finished) < 8
    assert set(one.progress) == one.finished


def test_the_reporter_hears_growing_shares_up_to_all() -> None:
    heard: list[tuple[float, float, int, int]] = []

    class Reporter:
        def advance(self, done_s: float, total_s: float, rows: int, n_rows: int) -> None:
            heard.append((done_s, total_s, rows, n_rows))

    one, _ = session()
    one.reporter = Reporter()
    one.measure(jobs(5))
    shares = [done_s / total_s for done_s, total_s, _, _ in heard]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert heard[-1][2:] == (5, 5)


def test_models_are_written_to_a_folder_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: set[Path] = set()

    def script(request: Request, visit: int) -> Measurement:
        seen.add(Path(request.artifact))
        assert Path(request.artifact).read_text().startswith("{")
        return steady(request, visit)

    one, _ = session(script)
    one.measure(jobs(2))
    assert len(seen) == 2
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: GraphJob, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GraphJob, "write", full)
    one, _ = session()
    with pytest.raises(MeasurementError, match=r"cannot write a model to .*: No space left on device; .* TMPDIR"):
        one.measure(jobs(1))


def alone(n: int) -> list[GraphJob]:
    return [replace(job, alone=True) for job in jobs(n)]


def pressed(*shares: float) -> Script:
    """Neighbours that slow every process by a share of its own."""

    def script(request: Request, visit: int) -> Measurement:
        one = steady(request, visit)
        slowed = tuple((1 + shares[visit % len(shares)]) * s for s in one.samples_ms)
        return replace(one, samples_ms=slowed, pid=1000 + request.order, fresh=request.fresh)

    return script


def test_the_quietest_quarter_of_a_networks_processes_counts() -> None:
    plan = replace(PLAN, precision=0.9, alone_processes=8)
    one, launcher = session(pressed(0.2, 0.05, 0.01, 0.3, 0.0, 0.02, 0.1, 0.04), plan)
    network, block = alone(1)[0], jobs(2)[1]
    one.measure([network, block])
    assert visits(launcher) == {network.key: 8, block.key: 4}
    row = finish(network.row, one.progress[network.key])
    assert (row.latency_ms, row.latency_ref_ms) == (pytest.approx(1.006005), pytest.approx(1.006005))  # 0 and 1 % more
    assert (row.n_runs, row.n_blocks, row.n_samples) == (8, 8, 80)  # all are kept and told
    assert row.run_spread == pytest.approx(0.3 / 1.005)
    assert row.mean_ms == pytest.approx(1.0009 * 1.09)
    assert row.ci_low_ms is not None
    assert row.ci_high_ms is not None
    half = row.ci_high_ms - row.latency_ms
    assert row.latency_ms - row.ci_low_ms == pytest.approx(half)
    assert half == pytest.approx(0.04378, rel=0.001)
    other = finish(block.row, one.progress[block.key])  # what is not alone: the lower half of its blocks
    assert (other.latency_ms, other.latency_ref_ms) == (pytest.approx(1.001 * 1.03), pytest.approx(1.001 * 1.03))
    assert (other.n_blocks, other.n_samples) == (4, 40)


def test_as_many_processes_as_the_plan_says_or_the_median_of_the_runs() -> None:
    for processes, n, ms in ((12, 12, 1.001), (7, 7, 1.001), (2, 4, 1.001), (0, 4, 1.001 * 1.125)):
        plan = replace(PLAN, alone_processes=processes, precision=0.9)
        one, launcher = session(pressed(0.2, 0.05, 0.0, 0.3), plan)
        (network,) = alone(1)
        one.measure([network])
        assert visits(launcher) == {network.key: n}
        assert finish(network.row, one.progress[network.key]).latency_ms == pytest.approx(ms)


@pytest.mark.parametrize(("backend", "processes"), [("onnxruntime", 12), ("roofline", 0), ("tensorrt", 0)])
def test_a_devices_own_clock_needs_no_quiet_process(backend: str, processes: int) -> None:
    assert Target("x", "X", backend, {}, PLAN).plan == replace(PLAN, alone_processes=processes)
