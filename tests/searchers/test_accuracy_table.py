"""Tables of published accuracies: spellings, units that are never guessed, and errors that name the place."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latbench.errors import TableError, UsageError
from latbench.spaces.nasbench201 import NASBench201Space
from searchers.accuracy_table import AccuracyTable

SPACE = NASBench201Space()
RESNET = "|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|skip_connect~2|"
REFERENCE = Path(os.environ.get("LATBENCH_REFERENCE_DATA", ""))


def written(folder, archs=("3,3,3,3,3,3", "1,1,1,1,1,1"), column="accuracy", values=(0.9, 0.5), spelling="arch"):
    path = folder / "table.parquet"
    pq.write_table(pa.table({spelling: list(archs), column: list(values)}), path)
    return path


def test_three_spellings_of_one_architecture(tmp_path):
    values = (0.9, 0.5)
    texts = AccuracyTable.named(str(written(tmp_path, ("3,0,3,1,0,1", "all_idnt"))), SPACE)
    lists = AccuracyTable.named(str(written(tmp_path, ([3, 0, 3, 1, 0, 1], [1] * 6))), SPACE)
    cells = AccuracyTable.named(str(written(tmp_path, (RESNET, "all_idnt"), spelling="arch_str")), SPACE)
    for table in (texts, lists, cells):
        assert (table.evaluate((3, 0, 3, 1, 0, 1)), table.evaluate((1,) * 6)) == values


def test_a_spelling_that_is_missing_has_the_accuracy_of_its_network(tmp_path):
    table = AccuracyTable.named(str(written(tmp_path, ("0,0,0,3,0,0", "3,0,0,3,0,0"), values=(0.6, 0.4))), SPACE)
    assert table.evaluate((2, 0, 0, 3, 0, 0)) == 0.6
    assert table.evaluate((3, 0, 0, 3, 0, 0)) == 0.4  # as it stands there


def test_what_is_missing_is_named(tmp_path):
    table = AccuracyTable.named(str(written(tmp_path)), SPACE)
    with pytest.raises(TableError, match=r"no accuracy of nasbench201:2,2,2,2,2,2 \(2 others\)"):
        table.evaluate((2,) * 6)
    with pytest.raises(UsageError, match="no option 9"):
        table.evaluate((9,) * 6)


@pytest.mark.parametrize(
    ("values", "suffix", "unit", "best"),
    [
        ((0.9, 0.5), "", "fraction", 0.9),
        ((90.0, 1.0), "", "percent", 0.9),
        ((90.0, 0.9999999), "", "percent", 0.9),
        ((90.0, 0.0), "", "percent", 0.9),
        ((0.9, 0.5), ":accuracy:percent", "percent", 0.009),
        ((90.0, 0.5), ":accuracy:percent", "percent", 0.9),
        ((90, 50), ":accuracy", "percent", 0.9),
        ((0.01, 0.005), ":accuracy:fraction", "fraction", 0.01),
    ],
)
def test_units(tmp_path, values, suffix, unit, best):
    table = AccuracyTable.named(f"{written(tmp_path, values=values)}{suffix}", SPACE)
    assert table.unit == unit
    assert table.evaluate((3,) * 6) == pytest.approx(best)


@pytest.mark.parametrize(
    ("values", "suffix", "told"),
    [
        ((90.0, 0.5), "", "90 is a percentage and row 1, 0.5, could be a fraction: say which by :percent"),
        ((0.01, 0.005), "", "its best is 0.01, a poor fraction or a poor percentage"),
        ((90.0, 50.0), ":accuracy:fraction", "row 0: 90 is no fraction; say .*:accuracy:percent"),
        ((90.0, 101.0), "", "row 1: 101 is no accuracy"),
        ((-0.1, 0.5), "", "row 0: -0.1 is no accuracy"),
        ((0.5, None), "", "row 1: nan is no accuracy"),
        ((0.5, 0.6), ":top5", "no column top5 of numbers: name one behind the file .*: accuracy"),
    ],
)
def test_values_that_are_refused(tmp_path, values, suffix, told):
    with pytest.raises(TableError, match=told):
        AccuracyTable.named(f"{written(tmp_path, values=values)}{suffix}", SPACE)


@pytest.mark.parametrize(
    ("archs", "told"),
    [
        (("3,3,3,3,3,3", "3,3,3"), "row 1: nasbench201: an architecture has 6 option indices"),
        (("3,3,3,3,3,7", "1,1,1,1,1,1"), "row 0: nasbench201: .* has no option 7"),
        (("3,3,3,3,3,3", "all_c3x3"), "row 1: 3,3,3,3,3,3 stands there twice, unlike before"),
        (([3] * 6, None), "row 1: "),
    ],
)
def test_architectures_that_are_refused(tmp_path, archs, told):
    with pytest.raises(TableError, match=told):
        AccuracyTable.named(str(written(tmp_path, archs)), SPACE)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(TableError, match="cannot be read"):
        AccuracyTable.named(str(tmp_path / "missing.parquet"), SPACE)
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(TableError, match="cannot be read"):
        AccuracyTable.named(str(tmp_path / "text.parquet"), SPACE)
    with pytest.raises(TableError, match="has no column arch or arch_str: network, accuracy"):
        AccuracyTable.named(str(written(tmp_path, spelling="network")), SPACE)
    with pytest.raises(TableError, match="holds no row"):
        AccuracyTable.named(str(written(tmp_path, pa.array([], pa.string()), values=pa.array([], pa.float64()))), SPACE)


def test_published_accuracies():
    path = REFERENCE / "nb201_search.parquet"
    if not path.is_file():
        pytest.skip("needs nb201_search.parquet in the folder $LATBENCH_REFERENCE_DATA")
    table = AccuracyTable.named(f"{path}:c100_test_200ep", SPACE)
    assert table.unit == "percent"
    assert len(table.accuracies) == SPACE.size
    assert max(table.accuracies.values()) == pytest.approx(0.735133, abs=1e-6)
