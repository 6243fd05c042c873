"""``latbench search``, ``train`` and ``verify``, from a table to a verified network, and what they refuse."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import refused, run

from latbench import verify
from latbench.errors import EnvironmentUnfitError, UsageError
from latbench.oracle.additive import AdditiveOracle
from latbench.oracle.lut import LutOracle
from latbench.profiling.bench import BENCH_PLAN
from latbench.provenance import Provenance
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import LatencyTable, Row
from latbench.verify import target_of
from searchers.results import read_result
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
BENCH = ["--runs", 1, "--max-time", "20ms"]
QUICK = ["--data", "digits", "--max-images", 200, "--epochs", 1, "--batch-size", 32, "--set", "adaptive=false"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    roofline_table(SPACE).write(path)
    return path


@pytest.fixture(scope="module")
def ms(table):
    """The fastest network and the widest."""
    oracle = LutOracle.fit(roofline_table(SPACE))
    return oracle.fastest()[1], oracle.latency(SPACE.published["widest"])


def us(value):
    return f"{value * 1000:.3f}us"


def test_from_a_table_to_a_trained_and_verified_network(table, ms, tmp_path):
    target = 0.5 * (ms[0] + ms[1])
    out = tmp_path / "run"
    result = run("search", "aows", "--table", table, "--target", us(target), *QUICK, "-o", out, "--plot", out / "p.svg")
    assert (result.exit_code, result.stderr) == (0, "")
    for words in ("found mobilenet_v1:", "width14", "on roofline, target", f"next: latbench verify {out}"):
        assert words in result.stdout
    assert (out / "p.svg").read_text().count("<svg") == 1
    found = read_result(out)
    assert found.result.predicted[0] <= target
    assert found.settings["epochs"] == 1
    before = found.result.network.read_bytes()

    train = ["train", out, "--epochs", 1, "--batch-size", 64]
    assert "warmup_epochs from 0 to below epochs, got 1, 64 and 1" in refused(*train, "--set", "warmup_epochs=1")
    trained = json.loads(run(*train, "--json").stdout)
    assert trained["recipe"]["warmup_epochs"] == 0.5  # at most half of the run
    assert 0 <= trained["accuracy"] <= 1
    found = read_result(out)
    assert found.trained == trained
    assert found.result.network.read_bytes() != before
    assert "accuracy" in run(*train).stdout

    (verified,) = json.loads(run("verify", out, *BENCH, "--json").stdout)["rounds"][0]
    assert 0.003 < verified["measured"] - verified["predicted"] < 0.004, "the roofline's 3 us a call, and folded biases"
    assert verified["simulated"]
    assert "simulated" in run("verify", out, *BENCH).stdout


def test_a_missed_target_is_corrected_until_it_is_met(table, ms, tmp_path):
    target = 0.6 * ms[0] + 0.4 * ms[1]
    assert run("search", "aows", "--table", table, "--target", us(target), *QUICK, "-o", tmp_path).exit_code == 0
    first = read_result(tmp_path).result
    missed = run("verify", tmp_path, *BENCH)
    assert missed.exit_code == 2
    assert "MISSED" in missed.stdout
    met = run("verify", tmp_path, "--until-met", *BENCH)
    assert met.exit_code == 0
    assert "round 2" in met.stdout
    found = read_result(tmp_path)
    assert found.result.arch != first.arch
    assert found.result.target == first.target
    assert found.problem.constraints[0].oracle.latency(first.arch) > first.predicted[0], "the oracle was corrected"
    assert run("verify", tmp_path, *BENCH).exit_code == 0


def test_a_target_that_nothing_meets_once_it_is_corrected(table, ms, tmp_path):
    assert run("search", "aows", "--table", table, "--target", us(1.001 * ms[0]), *QUICK, "-o", tmp_path).exit_code == 0
    told = refused("verify", tmp_path, "--until-met", *BENCH)
    assert re.search(r"ms measured where [\d.]+ was predicted; corrected by that, no mobilenet_v1 network meets", told)
    assert "predicted" in run("verify", tmp_path, *BENCH).stdout, "the folder is as it was"


@pytest.fixture(scope="module")
def slow_networks(tmp_path_factory):
    """Networks that take 1.3 times the sum of their blocks, which is what the simulated device runs them in."""
    return slowed(1.3, tmp_path_factory.mktemp("table") / "slow.parquet", 12)


def slowed(by, path, n):
    """A table with `n` networks that take `by` times the sum of their blocks."""
    table, rng = roofline_table(SPACE), np.random.default_rng(0)
    archs = np.array([SPACE.sample(rng) for _ in range(n)], np.int64)
    latencies = by * LutOracle.fit(table).latencies(archs)
    rows = [
        Row(f"net{i}", "network", "", arch=tuple(map(int, arch)), latency_ms=float(ms))
        for i, (arch, ms) in enumerate(zip(archs, latencies, strict=True))
    ]
    LatencyTable.from_rows([*table.rows(), *rows], table.provenance).write(path)
    return path


def test_measured_networks_correct_the_sums(slow_networks, ms, tmp_path):
    target = 1.3 * (0.5 * ms[0] + 0.5 * ms[1])
    done = run("search", "aows", "--table", slow_networks, "--target", us(target), *QUICK, "-o", tmp_path)
    assert done.exit_code == 0, done.stderr
    first = read_result(tmp_path)
    oracle = first.problem.constraints[0].oracle
    assert isinstance(oracle, AdditiveOracle)
    sums = LutOracle.fit(roofline_table(SPACE)).latency(first.result.arch)
    assert first.result.predicted[0] == pytest.approx(1.3 * sums, rel=0.02)
    # here they mislead: the simulated device has no such overhead, and a budget would be left unused
    assert run("verify", tmp_path, *BENCH).exit_code == 0
    rounds = json.loads(run("verify", tmp_path, "--until-met", "--within", "3%", *BENCH, "--json").stdout)["rounds"]
    assert [one["met"] for (one,) in rounds] == [True] * len(rounds)
    assert abs(rounds[-1][0]["error"]) <= 0.03 < 0.15 < abs(rounds[0][0]["error"])
    assert LutOracle.fit(roofline_table(SPACE)).latency(read_result(tmp_path).result.arch) > 1.1 * sums
    model = tmp_path / "m.npz"
    assert run("fit", slow_networks, "-o", model).exit_code == 0
    args = ["search", "aows", "--table", model, "--target", us(target), *QUICK, "-o", tmp_path / "twin"]
    assert run(*args).exit_code == 0
    assert read_result(tmp_path / "twin").result.arch == first.result.arch


@pytest.mark.parametrize("oracle", ["calibrated", "learned"])
@pytest.mark.parametrize("by", [1.3, 0.75])
def test_oracles_that_are_no_sums_are_corrected_too(table, ms, oracle, by, tmp_path):
    """The simulated device runs networks in the sum of their blocks; these are said to take more, or less."""
    path, model, out = slowed(by, tmp_path / "t.parquet", 40), tmp_path / "m.npz", tmp_path / "found"
    assert run("fit", path, "--oracle", oracle, "-o", model).exit_code == 0
    target = 0.5 * (ms[0] + ms[1])
    few = ["--set", "evaluator=synflow", "--set", "evaluations=20", "--data", "digits", "--max-images", 200]
    assert run("search", "random", "--table", model, "--target", us(target), *few, "-o", out).exit_code == 0
    done = run("verify", out, "--until-met", *BENCH, "--json")
    rounds = [one for (one,) in json.loads(done.stdout)["rounds"]]
    assert abs(rounds[0]["error"]) > 0.15
    assert rounds[0]["met"] == (by > 1)
    assert done.exit_code == 0
    assert rounds[-1]["met"]
    assert abs(rounds[-1]["error"]) < abs(rounds[0]["error"])
    kept = read_result(out)
    assert kept.problem.constraints[0].oracle.latency(kept.result.arch) == pytest.approx(kept.result.predicted[0])


def test_a_network_that_met_its_target_is_kept_when_a_nearer_one_misses(table, ms, tmp_path, monkeypatch):
    target = 0.5 * (ms[0] + ms[1])
    assert run("search", "aows", "--table", table, "--target", us(target), *QUICK, "-o", tmp_path).exit_code == 0
    first = read_result(tmp_path).result
    shares = iter([0.8, 1.01])  # measured, of the target: the second network is slower than one of its like was

    def measured(found, arch, constraint, plan, reporter):
        at = next(shares) * target
        predicted = constraint.oracle.latency(arch)
        return verify.Verified("x", "ms", constraint.target, predicted, at, at, at, at, simulated=True)

    monkeypatch.setattr(verify, "_verify", measured)
    rounds = verify.until_met(tmp_path, rounds=2)
    assert [one.met for (one,) in rounds] == [True, False, True]
    assert rounds[2] == rounds[0]
    assert read_result(tmp_path).result.arch == first.arch
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["verified"] == [rounds[0][0].to_dict()]
    assert len(told["rounds"]) == 3


def test_parameters_are_a_second_budget(table, ms, tmp_path):
    args = ["--table", table, "--target", us(ms[1]), "--max-params", "60k", *QUICK, "-o", tmp_path, "--json"]
    plain = json.loads(run("search", "aows", *args).stdout)
    assert plain["unit"] == ["ms", "parameters"]
    assert SPACE.network(tuple(plain["arch"])).n_params == plain["predicted"][1] <= 60_000
    rounds = json.loads(run("verify", tmp_path, *BENCH, "--json").stdout)["rounds"]
    assert [one["unit"] for one in rounds[0]] == ["ms", "parameters"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--target", "1us"], "no mobilenet_v1 network meets 0.001 ms: the fastest is 0,0,0,0"),
        (["--target", "1ms", "--data", "nothing"], "unknown data 'nothing'"),
        (["--target", "1ms", "--target", "2ms"], "every --table needs its --target: got 1 and 2"),
        (["--target", "1ms", "--max-params", "many"], "is no count above zero"),
        (["--target", "1ms", "--confidence", "90%"], "cannot say what holds with confidence"),
        (["--target", "1ms", "--set", "speed=9"], "aows has no option 'speed': epochs"),
        (["--target", "1ms", "--set", "adaptive=maybe"], "adaptive must be true or false"),
        (["--target", "1ms", "--set", "adaptive=true"], "temperatures need 11 epochs"),
        (["--target", "1ms", "--batch-size", "1000"], "do not fill one batch of 1000"),
    ],
)
def test_what_is_refused_before_training(table, tmp_path, words, told):
    assert told in refused("search", "aows", "--table", table, *QUICK, "-o", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "search.ckpt").exists()


def test_what_is_no_searcher_or_no_result(table, tmp_path):
    args = ["--table", table, "--target", "1ms", "--data", "digits", "-o", tmp_path]
    assert "did you mean aows" in refused("search", "aow", *args)
    assert "latbench search first" in refused("train", tmp_path)
    assert "latbench search first" in refused("verify", tmp_path)
    (tmp_path / "result.json").write_text("{}")
    assert "is damaged" in refused("verify", tmp_path)


def test_a_table_that_is_not_for_this_searcher(tmp_path):
    roofline_table(NASBench201Space(resolution=8, num_classes=10)).write(tmp_path / "cells.parquet")
    args = ["--target", "9ms", *QUICK, "-o", tmp_path / "out"]
    assert "nasbench201 is no chain" in refused("search", "aows", "--table", tmp_path / "cells.parquet", *args)
    assert "No such file" in refused("search", "aows", "--table", tmp_path / "none.parquet", *args)


def test_tables_of_different_spaces(table, tmp_path):
    other = tmp_path / "other.parquet"
    roofline_table(replace(SPACE, levels=2)).write(other)
    args = ["--table", table, "--target", "1ms", "--table", other, "--target", "1ms", *QUICK, "-o", tmp_path / "out"]
    assert "different networks" in refused("search", "aows", *args)


def test_what_cannot_be_measured_again():
    with pytest.raises(UsageError, match="come from TF-NAS and cannot be measured again"):
        target_of(Provenance("titanrtx", "TITAN RTX", "TF-NAS"), BENCH_PLAN)
    with pytest.raises(EnvironmentUnfitError, match="was measured on Another CPU, this is"):
        target_of(Provenance("cpu", "Another CPU", "onnxruntime"), BENCH_PLAN)
