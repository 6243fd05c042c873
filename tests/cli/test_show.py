from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from found import make_found

from latbench import cli
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable, Provenance, Row
from searchers.testing import roofline_table

PROVENANCE = Provenance(
    device="cpu",
    device_name="Xeon",
    backend="onnxruntime",
    versions={"onnxruntime": "1.20.0"},
    space="mobilenet_v1",
    settings={"batch": 1, "resolution": 224, "dtype": "float32"},
    options={"threads": 1},
    policy={"context": "sandwich"},
    command="latbench profile --device cpu --space mobilenet_v1 -o t.parquet",
    finished_at="2026-01-02T03:04:05+00:00",
)
ROWS = [
    Row("aa01", "block", "s1", "sandwich", block_type="stem", macs=10_000_000, latency_ms=1.5, latency_ref_ms=1.25,
        ci_low_ms=1.24, ci_high_ms=1.26, n_samples=3, samples_ms=(1.0, 1.5, 2.0), warnings=("noise>ci",)),
    Row("aa02", "block", "s2", "sandwich", latency_ms=-0.001),
    Row("bb01", "block", "s3", "sandwich", status="timeout", stage="load", error="[bold]no answer[/]\nafter 60 s"),
    Row("cc01", "network", "s4", arch=(0, 2, 1), latency_ms=20.0),
    Row("aa01", "stub", "s1", latency_ms=0.5),
]  # fmt: skip
NOTES = {
    "additivity": {"predicted_ms": [1.0], "measured_ms": [1.0], "mape": 0.0087, "bias": -0.004, "spearman": 0.9991}
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    LatencyTable.from_rows(ROWS, PROVENANCE, NOTES).write(tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def show(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["latbench", "show", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_the_summary_comes_before_the_rows(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    status, out, err = show(capsys, path)
    assert (status, err) == (0, "")
    for words in (
        "cpu: Xeon",
        "onnxruntime 1.20.0, 1 thread, batch 1, 224 px, float32, sandwich, 2026-01-02",
        "2 blocks in a sandwich, measured",
        "1 blocks in a sandwich, measured, timeout",
        "noise       median 0.80%",
        "1 x timeout while in load: [bold]no answer[/] after 60 s",
        "1 x noise>ci",
        "1 networks, mean error 0.87%, bias -0.40%, Spearman 0.9991",
        "1.25 ms ± 0.8 %",
        "0,2,1",
    ):
        assert words in out, words
    assert out.index("cpu: Xeon") < out.index("aa01")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = show(capsys, path)
    assert max(map(len, out.splitlines())) <= columns
    assert all(row.key in out for row in ROWS)
    assert "1.25 ms ± 0.8 %" in out  # figures are never cut


def rows_of(out: str) -> list[dict[str, Any]]:
    return list(json.loads(out)["rows"])


def test_json_alone_holds_every_row_exactly(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    _, out, _ = show(capsys, path, "--json")
    facts = json.loads(out)
    samples = ("samples_ms", "block_sizes", "block_run", "block_flags", "probes_us", "probe_at")
    wanted = [{k: v for k, v in asdict(row).items() if k not in samples} for row in ROWS]
    assert facts["rows"] == json.loads(json.dumps(wanted))
    assert facts["provenance"] == PROVENANCE.to_dict()
    assert facts["notes"] == NOTES
    assert sum(c["n"] for c in facts["counts"]) == facts["n_rows"] == len(ROWS)
    assert facts["noise"] == pytest.approx({"median": 0.008, "p95": 0.008})


def test_rows_are_filtered_sorted_and_limited(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    def keys(*args: str) -> list[str]:
        return [row["key"] for row in rows_of(show(capsys, path, "--json", *args)[1])]

    assert keys("--sort", "latency_ms") == ["cc01", "aa01", "aa01", "aa02", "bb01"]
    assert keys("--sort", "key", "--kind", "block") == ["aa01", "aa02", "bb01"]
    assert keys("--status", "timeout") == ["bb01"]
    assert keys("--limit", "2") == ["aa01", "aa02"]
    assert keys("aa", "--kind", "stub") == ["aa01"]
    status, _, err = show(capsys, path, "--sort", "latency")
    assert status == 1
    assert err.startswith("Error: --sort latency: no such column; there are key, kind")


def test_conditions_choose_rows_by_figures_with_units_and_by_texts(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    def keys(*conditions: str) -> list[str]:
        where = [word for condition in conditions for word in ("--where", condition)]
        return [row["key"] for row in rows_of(show(capsys, path, "--json", *where)[1])]

    assert keys("latency_ms>1") == ["aa01", "cc01"]
    assert keys("latency_ms >= 1500us", "kind=block") == ["aa01"]
    assert keys("latency_ms<0") == ["aa02"]
    assert keys("kind!=block", "key~01") == ["cc01", "aa01"]
    assert keys("error~no answer") == ["bb01"]
    for condition, words in (
        ("latency>1", "no such column"),
        ("latency_ms", "write COLUMN, one of"),
        ("macs>many", "'many' is no number"),
        ("kind>block", "holds texts"),
        ("latency_ms>1parsec", "is no duration"),
    ):
        status, out, err = show(capsys, path, "--where", condition)
        assert (status, out) == (1, "")
        assert words in err
    assert "no row meets" in show(capsys, path, "--where", "latency_ms>1s")[1]


def test_reverse_turns_the_order(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    _, out, _ = show(capsys, path, "--json", "--sort", "latency_ms", "--reverse", "--where", "status=ok")
    assert [row["latency_ms"] for row in rows_of(out)] == [-0.001, 0.5, 1.5, 20.0]
    assert "give that too" in show(capsys, path, "--reverse")[2]


def test_cite_is_one_sentence_that_names_the_conditions(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    status, out, _ = show(capsys, path, "--cite")
    assert status == 0
    assert out.count("\n") == 1
    for words in ("2 blocks", "Xeon", "onnxruntime 1.20.0", "batch 1", "float32", "224 px", "1 thread", "0.8%"):
        assert words in out, words
    assert json.loads(show(capsys, path, "--cite", "--json")[1])["citation"] == out.strip()


def test_the_folder_of_a_search_says_what_was_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    space = MobileNetV1Space(resolution=32, levels=2, num_classes=10)
    found_folder = make_found(tmp_path / "run", roofline_table(space))
    status, out, _ = show(capsys, found_folder)
    assert status == 0
    for words in ("made_up on digits, seed 0", "mobilenet_v1", "target 100 µs", "score      0.75", "3 epochs"):
        assert words in out, words
    assert json.loads(show(capsys, found_folder, "--json")[1])["searcher"] == "made_up"
    assert "has no rows to choose from" in show(capsys, found_folder, "--sort", "macs")[2]


def test_a_prefix_of_one_key_shows_its_columns(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    _, out, _ = show(capsys, path, "bb")
    assert "[bold]no answer[/]" in out
    _, out, _ = show(capsys, path, "aa01")
    assert out.count("signature") == 2  # the block and the stub
    assert "3 kept" in out
    assert rows_of(show(capsys, path, "aa01", "--json")[1])[0]["samples_ms"] == [1.0, 1.5, 2.0]


def test_a_key_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    status, out, err = show(capsys, path, "dd")
    assert (status, out) == (1, "")
    assert err == f"Error: no entry for dd on Xeon; to measure it, run: {PROVENANCE.command}\n"
    assert "not with the --kind, --status and --where given" in show(capsys, path, "cc", "--kind", "stub")[2]


def test_command_measures_the_row_or_the_table_again(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    assert show(capsys, path, "--command")[1] == f"{PROVENANCE.command}\n"
    again = "latbench profile --device cpu --space mobilenet_v1 --only cc01 -o cc01.parquet"
    assert show(capsys, path, "cc", "--command")[1] == f"{again}\n"
    assert json.loads(show(capsys, path, "cc", "--command", "--json")[1]) == {"command": again}
    assert "2 keys begin with aa: aa01, aa02" in show(capsys, path, "aa", "--command")[2]


def test_plot_writes_the_picture_and_says_where(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    status, out, _ = show(capsys, path, "--plot", path.with_suffix(".png"))
    assert status == 0
    assert out.endswith(f"picture: {path.with_suffix('.png')}\n")
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert rows_of(show(capsys, path, "--json", "--plot", path.with_suffix(".svg"))[1])


def test_an_empty_table_and_one_of_failures_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for rows in ([], [ROWS[2]], [ROWS[1]]):
        LatencyTable.from_rows(rows, PROVENANCE).write(tmp_path / "t.parquet")
        assert show(capsys, tmp_path / "t.parquet")[0] == 0
        assert show(capsys, tmp_path / "t.parquet", "--json")[0] == 0


def test_what_is_no_table_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("hello")
    for name in ("t", "absent", "."):
        status, out, err = show(capsys, tmp_path / name)
        assert (status, out, err.count("\n")) == (1, "", 1)


def test_importing_the_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, latbench.cli.show; print({'pyarrow', 'pandas', 'numpy', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "set()\n"
