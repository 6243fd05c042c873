"""``latbench profile``, in this process; faults of whole processes stand in test_faults.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click import Context
from click.testing import CliRunner, Result

from latbench.cli import cli
from latbench.cli.profile import _summary, _told
from latbench.cli.target import assignment
from latbench.errors import UsageError
from latbench.oracle.sampling import METHODS, choose
from latbench.profiling.jobs import jobs_of
from latbench.profiling.profile import Outcome
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable

SMALL = ["--resolution", "32", "--set", "levels=2", "--set", "max_width=0.75", "--set", "num_classes=10"]
ROOFLINE = ["profile", "--device", "cpu", "--backend", "roofline", "--space", "mobilenet_v1", *SMALL]
N_ROWS = len(jobs_of(MobileNetV1Space(resolution=32, levels=2, max_width=0.75, num_classes=10), simulated=True))


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_table_and_its_summary(tmp_path: Path) -> None:
    result = run(*ROOFLINE, "--networks", 3, "-o", tmp_path / "t.parquet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{N_ROWS + 3} rows in {tmp_path}/t.parquet" in result.stdout
    assert "sums of blocks (sandwich) against 3 measured networks, nothing fitted to them: MAPE 0.00%" in result.stdout
    assert len(LatencyTable.read(tmp_path / "t.parquet")) == N_ROWS + 3


def test_json_is_the_same_as_data(tmp_path: Path) -> None:
    result = run(*ROOFLINE, "--networks", 3, "--json", "-o", tmp_path / "t.parquet")
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["wanted"], summary["missing"], summary["failed"]) == (N_ROWS + 3, N_ROWS + 3, 0, 0)
    assert summary["failures"] == {}
    assert summary["additivity"]["n"] == 3
    assert not any(isinstance(value, list) for value in summary["additivity"].values())


def test_a_dry_run_measures_nothing(tmp_path: Path) -> None:
    result = run(*ROOFLINE, "--dry-run", "-o", tmp_path / "t.parquet")
    assert result.exit_code == 0
    assert f"{N_ROWS} rows (" in result.stdout
    plain = json.loads(run(*ROOFLINE, "--dry-run", "--json", "--networks", 2, "-o", tmp_path / "t.parquet").stdout)
    assert plain["rows"] == plain["blocks"] + plain["stubs"] + plain["networks"] == N_ROWS + 2
    assert plain["estimated_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_tables_name_says_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = json.loads(run(*ROOFLINE, "--dry-run", "--json", "--batch", 2, "--dtype", "fp16").stdout)
    assert plain["output"] == "cpu-roofline-mobilenet_v1-r32-b2-fp16.parquet"


def test_a_spent_budget_says_what_is_missing_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    result = run(*ROOFLINE, "--budget", "0s", "-o", out)
    assert result.exit_code == 0
    assert f"{N_ROWS} of {N_ROWS} rows not measured yet: run the same command to go on" in result.stdout
    result = run(*ROOFLINE, "-o", out)
    assert result.exit_code == 0
    assert "not measured yet" not in result.stdout


def test_only_one_key(tmp_path: Path) -> None:
    key = next(iter(MobileNetV1Space(resolution=32, levels=2, max_width=0.75, num_classes=10).all_blocks()))
    summary = json.loads(run(*ROOFLINE, "--only", key[:10], "--json", "-o", tmp_path / "t.parquet").stdout)
    assert summary["wanted"] == 2  # the stem and its stub


def test_every_method_of_sampling_is_offered() -> None:
    (option,) = (p for p in cli.get_command(Context(cli), "profile").params if p.name == "sampling")
    assert tuple(option.type.choices) == METHODS


@pytest.mark.parametrize("method", ["biased", "d_optimal"])
def test_networks_are_chosen_as_asked_and_more_begin_with_the_same(tmp_path: Path, method: str) -> None:
    tables = {}
    for n in (4, 8):
        out = tmp_path / f"{n}.parquet"
        assert run(*ROOFLINE, "--networks", n, "--sampling", method, "--seed", 5, "-o", out).exit_code == 0
        tables[n] = {tuple(arch) for arch in LatencyTable.read(out).networks()[0].tolist()}
    space = MobileNetV1Space(resolution=32, levels=2, max_width=0.75, num_classes=10)
    chosen = choose(space, 8, method, np.random.default_rng(5))
    assert tables[8] == {tuple(arch) for arch in chosen.tolist()}
    assert tables[4] < tables[8]


def test_a_space_without_blocks_has_none_to_choose_by(tmp_path: Path) -> None:
    cells = ["profile", "--device", "cpu", "--backend", "roofline", "--space", "irlas"]
    result = run(*cells, "--networks", 2, "--sampling", "biased", "-o", tmp_path / "t.parquet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: irlas has no blocks to choose networks by: --sampling uniform\n"
    assert list(tmp_path.iterdir()) == []


def test_failed_rows_are_status_2_and_told_by_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other measurement is replaced by a failure: a row that has one says why."""
    from latbench.measure.base import Measurement
    from latbench.measure.launcher import LocalLauncher

    real = LocalLauncher.measure

    def measure(self: LocalLauncher, requests: Any) -> Any:
        for one in real(self, requests):
            bad = one.order % 2 == 0
            yield (
                Measurement(one.key, one.run, one.round, one.order, status="error", stage="load", error="no room")
                if bad
                else one
            )

    monkeypatch.setattr(LocalLauncher, "measure", measure)
    result = run(*ROOFLINE, "-o", tmp_path / "t.parquet")
    assert result.exit_code == 2
    assert "failed: no room" in result.stdout
    assert (LatencyTable.read(tmp_path / "t.parquet").frame["status"] == "error").any()


@pytest.mark.parametrize(("half", "told"), [(0.02, False), (0.09, False), (0.3, True)])
def test_a_machine_that_does_not_hold_still_is_told(half: float, told: bool, tmp_path: Path) -> None:
    run(*ROOFLINE, "-o", tmp_path / "t.parquet")
    table = LatencyTable.read(tmp_path / "t.parquet")
    rows = [
        replace(row, ci_low_ms=(1 - half) * row.gross_ms, ci_high_ms=(1 + half) * row.gross_ms)
        for row in table.rows()
        if row.gross_ms is not None
    ]
    outcome = Outcome(LatencyTable.from_rows(rows, table.provenance), tmp_path / "t.parquet", len(rows), 0, 1.0)
    line = "half of the rows are known to no better than that, and 2% was wanted. Why: latbench doctor"
    assert len(rows) > 20
    assert (line in _told(_summary(outcome))) == told


BAD_INPUT = {
    "device": (["--device", "toaster"], "unknown device 'toaster'"),
    "space": (["--space", "mobilenet"], "unknown search space 'mobilenet': did you mean mobilenet_v1?"),
    "back-end": (["--backend", "onnxruntme"], "unknown back-end 'onnxruntme': did you mean onnxruntime?"),
    "dtype": (["--dtype", "fp8"], "unknown dtype 'fp8': fp32 or fp16"),
    "budget without a unit": (["--budget", "10"], "'10' has no unit"),
    "budget of letters": (["--budget", "soon"], "'soon' is no duration"),
    "interval": (["--ci", "wide"], "'wide' is no percentage"),
    "interval of nothing": (["--ci", "0%"], "between 0 and 1"),
    "interval of all": (["--ci", "100%"], "between 0 and 1"),
    "batch": (["--batch", "0"], "0 is not in the range"),
    "resolution": (["--resolution", "1"], "resolution must be at least"),
    "resolution of letters": (["--resolution", "big"], "'big' is not a valid integer"),
    "runs": (["--runs", "0"], "0 is not in the range"),
    "sampling": (["--sampling", "best"], "'best' is not one of"),
    "setting without a value": (["--set", "levels"], "'levels' is no setting: write NAME=VALUE"),
    "setting without a name": (["--set", "=3"], "'=3' is no setting"),
    "unknown setting": (["--set", "depth=3"], "no setting 'depth': "),
    "setting of letters": (["--set", "levels=two"], "levels must be a whole number, got 'two'"),
    "setting that is a list": (["--set", "levels=[2]"], "levels must be a whole number, got a value of type list"),
    "setting out of range": (["--set", "levels=0"], "levels and num_classes must be at least 1"),
    "unknown option": (["--option", "watts=3"], "roofline has no option 'watts'"),
    "option of letters": (["--option", "peak_gflops=fast"], "peak_gflops must be a number above zero"),
    "option of nothing": (["--option", "bandwidth_gbs=0"], "bandwidth_gbs must be a number above zero"),
    "context": (["--context", "alone"], "'alone' is not one of"),
    "key": (["--only", "zzz"], "no block with key zzz"),
    "folder": (["-o", "/no/such/folder/t.parquet"], "/no/such/folder is no directory"),
    "unknown flag": (["--fast"], "No such option"),
}


@pytest.mark.parametrize(("args", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_status_1(args: list[str], words: str, tmp_path: Path) -> None:
    result = run(*ROOFLINE, "-o", tmp_path / "t.parquet", *args)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "two", "1.5", "true"])
def test_threads_as_an_option_are_checked_too(value: str, tmp_path: Path) -> None:
    args = ["profile", "--device", "cpu", "--space", "mobilenet_v1", *SMALL, "--option", f"threads={value}"]
    result = run(*args, "-o", tmp_path / "t.parquet")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "threads must be a whole number from 1" in result.stderr


def test_a_device_that_is_not_here_names_three_ways_on(tmp_path: Path) -> None:
    result = run("profile", "--device", "titanxp", "--space", "mobilenet_v1", "-o", tmp_path / "t.parquet")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)
    for way in ("this machine has", "--device auto", "--fleet", "latbench import"):
        assert way in result.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=0.5", 0.5), ("a=true", True), ("a=fast", "fast"), ("a=", ""), ("a=b=c", "b=c"), ("a=-1", -1)],
)
def test_settings_read_as_numbers_where_they_are(text: str, value: object) -> None:
    name, got = assignment(text)
    assert (name, got, type(got)) == ("a", value, type(value))


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(UsageError, match="write NAME=VALUE"):
        assignment("a")
