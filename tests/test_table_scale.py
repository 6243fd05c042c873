"""Tables too large to be read whole: the same answers as from memory, column by column from the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_tables import row, table

from latbench.compare import compare
from latbench.errors import SchemaMismatchError, TableError
from latbench.tables import LatencyTable, Row, stored

N = 70


@pytest.fixture
def from_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of sixteen rows, and none of them read at once."""
    monkeypatch.setattr(stored, "GROUP_ROWS", 16)
    monkeypatch.setattr(stored, "READ_WHOLE_BYTES", 0)


def varied(n: int = N, seed: int = 0) -> list[Row]:
    """Rows of every kind with samples of their own number, and failures."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        sizes = tuple(rng.integers(1, 5, rng.integers(0, 4)).tolist())
        samples = tuple(rng.uniform(1, 2, sum(sizes)).tolist())
        more: dict[str, Any] = {
            "kind": ("block", "network", "stub")[i % 3],
            "context": ("sandwich", "isolated")[i % 2],
            "arch": (i, 1) if i % 3 == 1 else None,
            "latency_ref_ms": float(rng.uniform(1, 2)) if i % 4 else None,
            "n_samples": len(samples),
            "samples_ms": samples,
            "block_sizes": sizes,
            "block_flags": ("",) * len(sizes),
            "warnings": ("noise>ci",) if i % 5 == 0 else (),
        }
        failed = {"status": "error", "stage": "load", "error": "refused"} if i % 7 == 6 else {}
        rows.append(row(f"k{seed}{i}", None if failed else float(rng.uniform(1, 2)), **more, **failed))
    return rows


def written(path: Path, rows: list[Row], **more: Any) -> LatencyTable:
    table(*rows, **more).write(path)
    return LatencyTable.read(path)


@pytest.mark.usefixtures("from_file")
def test_a_table_in_its_file_answers_as_one_in_memory(tmp_path: Path) -> None:
    rows = varied()
    there, here = written(tmp_path / "t", rows), table(*rows)
    assert pq.read_metadata(tmp_path / "t").num_row_groups == -(-N // 16)
    assert isinstance(there.columns.parts[0], stored.Stored)
    assert len(there) == N
    assert list(there.rows()) == rows
    assert list(there.rows(samples=False)) == [replace(r, samples_ms=(), block_sizes=(), block_flags=()) for r in rows]
    assert there.frame.equals(here.frame)
    assert there.data.equals(here.data)
    assert [there[r.key] for r in rows if r.status == "ok"] == [here[r.key] for r in rows if r.status == "ok"]
    assert "k06" not in there
    assert str(there.missing_entry("k06")) == str(here.missing_entry("k06"))
    assert str(there.missing_entry("other", "sig k99")) == str(here.missing_entry("other", "sig k99"))
    for a, b in zip(there.networks(), here.networks(), strict=True):
        assert a.tolist() == b.tolist()
    order = np.random.default_rng(1).permutation(N)[:40]
    assert list(there.take(order).rows()) == [rows[i] for i in order]
    assert list(there.take(order).select(kind="block").take([2, 0, 1]).rows()) == list(
        here.take(order).select(kind="block").take([2, 0, 1]).rows()
    )
    assert list(there.take([]).rows()) == []


@pytest.mark.usefixtures("from_file")
def test_tables_in_files_merge_and_are_written_as_those_in_memory(tmp_path: Path) -> None:
    old, new = varied(), [*varied(30), *varied(20, seed=1)]
    slow = {"clock_ref_us": 12.5}
    there = written(tmp_path / "a", old).merge(written(tmp_path / "b", new, **slow))
    here = table(*old).merge(table(*new, **slow))
    assert list(there.rows()) == list(here.rows())
    assert there.provenance == here.provenance
    twice = there.merge(written(tmp_path / "c", varied(10, seed=2)))
    assert list(twice.rows()) == list(here.merge(table(*varied(10, seed=2))).rows())
    there.write(tmp_path / "there")
    here.write(tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.usefixtures("from_file")
def test_a_table_may_be_replaced_while_it_is_looked_at(tmp_path: Path) -> None:
    rows = varied()
    there = written(tmp_path / "t", rows)
    merged = there.merge(table(row("new")))
    merged.write(tmp_path / "t")
    assert list(there.rows()) == rows
    assert list(LatencyTable.read(tmp_path / "t").rows()) == [*rows, row("new")]


@pytest.mark.usefixtures("from_file")
def test_damage_is_told_where_it_is_read_and_never_passes_for_data(tmp_path: Path) -> None:
    rows = [row(f"k{i}", 1.0 + i, samples_ms=tuple((i + np.arange(60)).tolist())) for i in range(64)]
    written(tmp_path / "whole", rows)
    whole = bytearray((tmp_path / "whole").read_bytes())
    path = tmp_path / "t.parquet"
    messages = []
    for at in np.random.default_rng(0).integers(4, len(whole) - 8, 120):
        damaged = whole.copy()
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        try:
            assert list(LatencyTable.read(path).rows()) == rows
        except TableError as error:
            messages.append(str(error))
    assert len(messages) > 80
    assert all(str(path) in message and "\n" not in message for message in messages)


@pytest.mark.usefixtures("from_file")
def test_an_impossible_value_in_a_file_is_refused_by_name(tmp_path: Path) -> None:
    rows = [row(f"k{i}", samples_ms=(1.0,), p90_ms=1.0) for i in range(40)]
    table(*rows).write(tmp_path / "t")
    data = pq.read_table(tmp_path / "t")
    path = tmp_path / "bad"
    for name, bad, why in (
        ("p90_ms", [-1.0 if i == 33 else 1.0 for i in range(40)], "p90_ms is negative"),
        ("samples_ms", [[np.nan] if i == 33 else [1.0] for i in range(40)], "samples_ms holds a value that is not fin"),
    ):
        at = data.schema.get_field_index(name)
        changed = data.set_column(at, data.schema.field(at), [bad])
        pq.write_table(changed, path, row_group_size=16)
        there = LatencyTable.read(path)
        with pytest.raises(TableError, match=rf"{path}: row 33 \(block k33, isolated\): {why}"):
            list(there.rows())
    pq.write_table(data.set_column(0, data.schema.field(0), [["k"] * 40]), path)
    with pytest.raises(TableError, match=r"row 1 \(block k, isolated\): a second row"):
        LatencyTable.read(path)
    pq.write_table(data.drop_columns(["wait_ms", "probes_us"]), path)
    with pytest.raises(SchemaMismatchError, match="missing or of another type: probes_us"):
        LatencyTable.read(path)
    pq.write_table(data.drop_columns(["wait_ms"]), path)
    assert LatencyTable.read(path).frame["wait_ms"].isna().all()


@pytest.mark.usefixtures("from_file")
def test_tables_in_files_are_compared_as_those_in_memory(tmp_path: Path) -> None:
    def blocks(seed: int) -> list[Row]:
        rng = np.random.default_rng(seed)
        return [replace(one, kind="block", clock="host", **_samples(rng)) for one in varied(N) if one.status == "ok"]

    old, new = blocks(1), blocks(2)
    there = compare(written(tmp_path / "a", old), written(tmp_path / "b", new))
    assert there == compare(table(*old), table(*new))


def _samples(rng: np.random.Generator) -> dict[str, Any]:
    sizes = tuple(rng.integers(3, 9, 4).tolist())
    samples = tuple(rng.normal(1, 0.01, sum(sizes)).tolist())
    return {"samples_ms": samples, "block_sizes": sizes, "block_flags": ("",) * 4, "n_samples": len(samples)}


def test_rows_may_come_from_a_generator() -> None:
    rows = varied()
    made = LatencyTable.from_rows((one for one in rows), table().provenance)
    assert list(made.rows()) == rows
