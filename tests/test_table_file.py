"""The file of a table: what survives it, and what becomes of damage, strangers and full disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tables import PROVENANCE, row, table

from latbench.errors import SchemaMismatchError, TableError
from latbench.tables import SCHEMA_VERSION, LatencyTable, Row

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BY_TYPE: dict[type, st.SearchStrategy[Any]] = {str: TEXT, int: st.integers(-(2**63), 2**63 - 1), float: FINITE}


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    hints = get_type_hints(Row)
    rows = []
    for key in draw(st.lists(TEXT, max_size=5, unique=True)):
        values: dict[str, Any] = {}
        for f in fields(Row):
            hint = hints[f.name]
            if str(hint).startswith("typing.Literal"):
                values[f.name] = draw(st.sampled_from(hint.__args__))
                continue
            inner = [h for h in getattr(hint, "__args__", ()) if h is not type(None)] or [hint]
            is_list = "tuple" in str(hint)
            base = next(t for t in BY_TYPE if t.__name__ in str(inner))
            one = FINITE.map(abs) if base is float and not is_list else BY_TYPE[base]
            value = st.lists(one, max_size=3).map(tuple) if is_list else one
            values[f.name] = draw(st.none() | value if "None" in str(hint) else value)
        values["key"] = key
        if values["status"] == "ok" and values["latency_ms"] is None:
            values["latency_ms"] = 0.0
        rows.append(Row(**values))
    return rows


@given(any_rows(), st.dictionaries(TEXT, st.none() | FINITE | TEXT | st.lists(FINITE, max_size=3), max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_survive_parquet_exactly(tmp_path_factory: pytest.TempPathFactory, rows: list[Row], notes: Any) -> None:
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    LatencyTable.from_rows(rows, PROVENANCE, notes).write(path)
    back = LatencyTable.read(path)
    assert list(back.rows()) == rows
    assert back.provenance == PROVENANCE
    assert back.notes == notes
    assert len(back) == len(rows)


def test_any_parquet_reader_sees_the_columns_and_the_schema_version_first(tmp_path: Path) -> None:
    table(row("a", 1.5, warnings=("noise>ci",)), row("b", None, status="error")).write(tmp_path / "t.parquet")
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert list(frame.columns) == [f.name for f in fields(Row)]
    assert frame["latency_ms"].tolist()[0] == 1.5
    assert np.isnan(frame["latency_ms"].tolist()[1])
    text = pq.read_metadata(tmp_path / "t.parquet").metadata[b"latbench"]
    assert text.startswith(b'{"schema": %d, "provenance": {' % SCHEMA_VERSION)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    t = table(row("a"), row("b", 2.0))
    t.write(tmp_path / "1")
    LatencyTable.read(tmp_path / "1").write(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_an_optional_column_an_older_latbench_did_not_write_reads_as_null(tmp_path: Path) -> None:
    table(row("a", wait_ms=3.0)).write(tmp_path / "new")
    data = pq.read_table(tmp_path / "new")
    pq.write_table(data.drop_columns(["wait_ms"]), tmp_path / "old")
    assert [r.wait_ms for r in LatencyTable.read(tmp_path / "old").rows()] == [None]
    pq.write_table(data.drop_columns(["signature"]), tmp_path / "broken")
    with pytest.raises(SchemaMismatchError, match="missing or of another type: signature"):
        LatencyTable.read(tmp_path / "broken")
    pq.write_table(data.append_column("humidity", pa.array([1.0])), tmp_path / "newer")
    with pytest.raises(SchemaMismatchError, match="humidity is unknown"):
        LatencyTable.read(tmp_path / "newer")


def one_line(caught: pytest.ExceptionInfo[TableError], path: Path) -> str:
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_truncated_at_any_length_is_one_clear_line(tmp_path: Path) -> None:
    table(*(row(f"k{i}", samples_ms=(1.0, 2.0)) for i in range(20))).write(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "t.parquet"
    for size in [*range(0, 64), *range(64, len(whole), 997), *range(len(whole) - 64, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(SchemaMismatchError) as caught:
            LatencyTable.read(path)
        assert any(w in one_line(caught, path) for w in ("truncated", "empty", "no parquet file")), caught.value


def test_a_flipped_byte_never_passes_for_data_and_never_leaves_a_traceback(tmp_path: Path) -> None:
    rows = [row(f"k{i}", float(i), samples_ms=(float(i),) * 8) for i in range(50)]
    table(*rows).write(tmp_path / "whole")
    whole = bytearray((tmp_path / "whole").read_bytes())
    path = tmp_path / "t.parquet"
    rng = np.random.default_rng(0)
    messages: list[str] = []
    for at in rng.integers(4, len(whole) - 8, 150):
        damaged = whole.copy()
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        try:
            back = LatencyTable.read(path)
        except TableError as error:
            messages.append(str(error))
        else:  # the byte lay in statistics or in a text of the footer that no figure depends on
            assert [r.samples_ms for r in back.rows()] == [r.samples_ms for r in rows]
    assert len(messages) > 100
    assert all(str(path) in m and "\n" not in m for m in messages)


def test_what_is_no_table_is_said_so(tmp_path: Path) -> None:
    foreign, text, empty = tmp_path / "foreign.parquet", tmp_path / "notes.txt", tmp_path / "empty"
    pq.write_table(pa.table({"a": [1]}), foreign)
    text.write_text("latency 4 ms\n")
    empty.touch()
    for path, words in {
        foreign: "latbench did not write it",
        text: "no parquet file",
        empty: "is empty",
        tmp_path: "is a directory",
    }.items():
        with pytest.raises(SchemaMismatchError) as caught:
            LatencyTable.read(path)
        assert words in one_line(caught, path)
    with pytest.raises(TableError, match="No such file or directory; check the path"):
        LatencyTable.read(tmp_path / "absent")


@pytest.mark.parametrize(("version", "mend"), [(SCHEMA_VERSION + 1, "upgrade latbench"), (0, "again"), ("x", "again")])
def test_another_schema_version_names_both(tmp_path: Path, version: object, mend: str) -> None:
    table(row("a")).write(tmp_path / "t")
    data = pq.read_table(tmp_path / "t")
    meta = json.loads(data.schema.metadata[b"latbench"])
    pq.write_table(data.replace_schema_metadata({"latbench": json.dumps({**meta, "schema": version})}), tmp_path / "t")
    with pytest.raises(SchemaMismatchError, match=rf"schema {version}, this latbench reads {SCHEMA_VERSION}: .*{mend}"):
        LatencyTable.read(tmp_path / "t")


def test_a_path_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "t", tmp_path / "absent" / "t", tmp_path / "folder"):
        with pytest.raises(TableError, match="cannot write") as caught:
            table(row("a")).write(path)
        one_line(caught, path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only directories")
def test_a_read_only_directory_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TableError, match="Permission denied"):
        table(row("a")).write(tmp_path / "t")


def test_on_a_full_disk_the_old_table_stays_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table(row("old", 7.0)).write(path)
    before = path.read_bytes()
    code = """
import resource, signal, sys
sys.dont_write_bytecode = True
from latbench.errors import TableError
from latbench.tables import LatencyTable, Provenance, Row
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
t = LatencyTable.from_rows([Row(f"{i * 7919 % 10007:x}", "block", str(i), latency_ms=i ** 0.5) for i in range(9000)],
                           Provenance("cpu", "Xeon", "onnxruntime"))
for limit in (0, 1, 100, 5000, 60000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        t.write(sys.argv[1])
    except TableError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(
        line.startswith(f"cannot write {path}: File too large; the file that was there is unch") for line in lines
    )
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "t")
    table(row("a")).write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(LatencyTable.read(tmp_path / "t")) == 1
