"""``bench --compare-backends`` and ``--builds``, on real runtimes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from latbench import plugins
from latbench.cli import cli
from latbench.cli.bench_output import build_variance, builds_line
from latbench.tables import Row

SMALL = ["mobilenet_v1:narrowest", "--resolution", "32", "--set", "levels=2", "--set", "num_classes=10"]
QUICK = ["--device", "cpu", "--runs", "1", "--max-time", "50ms", "--ci", "50%"]


def run(*args: str) -> Result:
    result = CliRunner().invoke(cli, ["bench", *SMALL, *QUICK, *args], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def quick_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All registered back-ends but those of torch, which take seconds to start."""
    names = plugins.names
    monkeypatch.setattr(
        "latbench.plugins.names", lambda group: tuple(n for n in names(group) if not n.startswith("torch"))
    )


@pytest.mark.usefixtures("quick_ones")
def test_every_back_end_that_works_stands_in_one_table() -> None:
    pytest.importorskip("openvino", reason="pip install 'latbench[openvino]'")
    found = json.loads(run("--compare-backends", "--json").stdout)["backends"]
    by_name = {one["backend"]: one for one in found}
    assert set(by_name) == {"onnxruntime", "openvino", "tensorrt"}, "a simulation is no competitor"
    assert by_name["onnxruntime"]["status"] == by_name["openvino"]["status"] == "ok"
    figures = [one["latency_ms"] for one in found if "latency_ms" in one]
    assert figures == sorted(figures)
    assert all(min(one["latency_ms"], one["as_measured_ms"]) > 0 for one in found if "latency_ms" in one)


@pytest.mark.usefixtures("quick_ones")
def test_the_table_says_why_the_others_are_not_in_it() -> None:
    said = run("--compare-backends").stdout
    assert "1.00x" in said
    status = json.loads(CliRunner().invoke(cli, ["devices", "--json"]).stdout)["backends"]
    problem = next(one["problem"] for one in status if one["name"] == "tensorrt")
    if problem is not None:
        assert f"tensorrt: {problem}" in " ".join(said.split())


@pytest.mark.parametrize("option", ["--backend=openvino", "--option=threads=2", "--builds=3", "--output=t.parquet"])
def test_what_is_for_one_back_end_is_refused(option: str) -> None:
    result = run("--compare-backends", option)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {option.partition('=')[0]} is for one back-end: leave it out, or leave out --compare-backends\n"
    )


def test_builds_are_told_one_by_one() -> None:
    builds = json.loads(run("--builds", "3", "--json", "--layers", "0").stdout)["builds"]
    assert builds["n"] == len(builds["latency_ms"]) >= 3
    assert min(builds["latency_ms"]) <= builds["median_ms"] <= max(builds["latency_ms"])
    said = builds_line(builds)
    assert said.startswith(f"{builds['n']} builds: ")
    assert f"spread {builds['spread']:.2%}" in said


def test_the_variance_of_builds_is_that_of_their_medians() -> None:
    row = Row("k", "network", "s", samples_ms=(1.0, 1.0, 5.0, 2.0, 2.0, 3.0, 3.0, 3.0), block_sizes=(3, 2, 3))
    figures = build_variance(row)
    assert figures["latency_ms"] == [1.0, 2.0, 3.0]
    assert (figures["n"], figures["median_ms"], figures["spread"], figures["std"]) == (3, 2.0, 1.0, 0.5)
