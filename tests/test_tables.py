from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latbench.errors import MissingEntryError, ProvenanceConflictError, SchemaMismatchError, TableError
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.ops import BatchNorm2d, Conv2d, ReLU
from latbench.tables import SCHEMA_VERSION, LatencyTable, Provenance, Row

COMMAND = "latbench profile --device cpu --space 'mobilenet v1' -o lookup_tables/cpu.parquet --runs 2"
PROVENANCE = Provenance(
    device="cpu",
    device_name="Xeon",
    backend="onnxruntime",
    versions={"latbench": "0.1.0", "onnxruntime": "1.20.0"},
    space="mobilenet_v1",
    settings={"batch": 1, "resolution": 224},
    options={"threads": 1},
    policy={"runs": 2, "context": "sandwich"},
    environment={"cpu": "Xeon", "affinity": [0, 1]},
    clock_ref_us=10.0,
    command=COMMAND,
    started_at="2026-01-01T00:00:00Z",
    finished_at="2026-01-01T01:00:00Z",
)


def row(key: str, ms: float | None = 1.0, **more: Any) -> Row:
    return Row(key=key, **{"kind": "block", "signature": f"sig {key}", "latency_ms": ms, **more})


def table(*rows: Row, **more: Any) -> LatencyTable:
    return LatencyTable.from_rows(rows, replace(PROVENANCE, **more))


def conv(width: int, side: int, *, act: bool = False) -> Graph:
    b = GraphBuilder()
    x = b.add(Conv2d(16, width, 3, padding=1), b.input("x", (1, 16, side, side)), name="conv")
    x = b.add(BatchNorm2d(width), x, name="bn")
    return b.build(b.add(ReLU(), x, name="act") if act else x)


# ---- the file ----

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


# ---- what a table refuses ----


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row("bad", float("nan")), "latency_ms is not a finite number"),
        (row("bad", p90_ms=float("inf")), "p90_ms is not a finite number"),
        (row("bad", samples_ms=(1.0, float("nan"))), "samples_ms holds a value that is not finite"),
        (row("bad", -1e-9), "latency_ms is negative"),
        (row("bad", -1.0, context="sandwich", kind="network"), "latency_ms is negative"),
        (row("bad", latency_ref_ms=-1.0), "latency_ref_ms is negative"),
        (row("bad", context="sandwich", gross_ms=-1.0), "gross_ms is negative"),
        (row("bad", None), "its status is ok, but it has no latency_ms"),
        (row("bad", status="fine"), "status is none of ok, error, timeout"),
        (row("bad", kind="layer"), "kind is none of block, chain, network, stub"),
    ],
)
def test_an_impossible_row_is_refused_by_name(bad: Row, why: str) -> None:
    with pytest.raises(TableError, match=rf"row 1 \(\w+ bad, \w+\): {why}"):
        table(row("good"), bad)


def test_one_identity_occurs_once() -> None:
    table(row("a"), row("a", kind="network"), row("a", context="sandwich"))
    with pytest.raises(TableError, match=r"row 2 \(block a, isolated\): a second row"):
        table(row("a"), row("b"), row("a"))


def test_an_increment_may_be_negative() -> None:
    assert table(row("a", -0.25, context="sandwich", ci_low_ms=-0.5, ci_high_ms=0.1))["a"] == -0.25


def test_what_json_lacks_is_refused_before_a_file_is_written() -> None:
    with pytest.raises(TableError, match="cannot be kept as JSON"):
        LatencyTable.from_rows([], PROVENANCE, {"mape": float("nan")})


# ---- looking up ----


def test_the_reference_clock_goes_before_the_raw_one() -> None:
    t = table(row("a", 1.0, latency_ref_ms=0.9), row("b", 2.0))
    assert (t["a"], t["b"]) == (0.9, 2.0)
    assert "a" in t
    assert "c" not in t


def test_a_block_goes_before_a_network_before_a_stub_and_a_sandwich_before_isolated() -> None:
    block = [row("a", 1.0, context="sandwich"), row("a", 2.0)]
    others = [row("a", 3.0, kind="network"), row("a", 4.0, kind="stub")]
    rows = [*block, *others]
    for i in range(4):
        for order in (rows[i:], rows[i:][::-1]):
            assert table(*order)["a"] == i + 1
    assert table(*rows).blocks_ms() == {"a": 1.0}
    assert table(*others).blocks_ms() == {}


def test_a_failed_row_is_no_entry_and_says_why() -> None:
    failed = row("a", None, status="timeout", stage="warmup", error="no answer\nafter 60 s")
    t = table(failed, row("b"))
    assert "a" not in t
    with pytest.raises(MissingEntryError) as caught:
        t["a"]
    message = str(caught.value)
    assert "no latency for a on Xeon: its row ended in timeout while in warmup: no answer" in message
    assert f"run: {COMMAND}" in message
    assert "\n" not in message


def test_a_sandwich_that_failed_does_not_hide_the_isolated_row() -> None:
    assert table(row("a", None, context="sandwich", status="error"), row("a", 2.0))["a"] == 2.0


def test_the_nearest_entry_has_the_same_operators_and_the_closest_numbers() -> None:
    graphs = [conv(24, 28), conv(40, 28), conv(32, 14), conv(32, 28, act=True)]
    t = table(*(Row(g.key, "block", g.signature, latency_ms=1.0) for g in graphs))
    wanted = conv(36, 28)
    message = str(t.missing_entry(wanted.key, wanted.signature))
    assert message.startswith(
        f"no entry for {wanted.key} on Xeon [float32;1x16x28x28;Conv2d(in_channels=16,out_channels=36"
    )
    assert f"nearest: {graphs[1].key} (out_channels=40 for out_channels=36, num_features=40 for" in message
    assert message.endswith(f"run: {COMMAND}")
    act = conv(100, 7, act=True)
    assert f"nearest: {graphs[3].key} (1x16x28x28 for 1x16x7x7" in str(t.missing_entry(act.key, act.signature))
    b = GraphBuilder()
    plain = b.build(b.add(ReLU(), b.input("x", (1, 16, 14, 14)), name="act"))
    assert "(other operators: " in str(t.missing_entry(plain.key, plain.signature))
    assert "nearest" not in str(table().missing_entry(plain.key, plain.signature))


def test_networks_are_architectures_beside_their_latencies() -> None:
    t = table(
        row("a", 3.0, kind="network", arch=(0, 1, 2)),
        row("b", 4.0, kind="network", arch=(2, 1, 0), latency_ref_ms=3.5),
        row("c", None, kind="network", arch=(2, 2, 2), status="error"),
        row("d", 5.0, kind="network"),  # imported: no architecture
        row("e", 1.0),
    )
    archs, ms = t.networks()
    assert archs.dtype == np.int64
    assert archs.tolist() == [[0, 1, 2], [2, 1, 0]]
    assert ms.tolist() == [3.0, 3.5]
    archs, ms = table().networks()
    assert archs.shape == (0, 0)
    assert ms.shape == (0,)
    with pytest.raises(TableError, match="different lengths"):
        table(row("a", kind="network", arch=(0,)), row("b", kind="network", arch=(0, 1))).networks()


def test_select_agrees_with_a_filter_over_rows() -> None:
    rows = [
        row(f"k{i}", kind=kind, context=context, status=status)
        for i, (kind, context, status) in enumerate(
            (k, c, s) for k in ("block", "network") for c in ("sandwich", "isolated") for s in ("ok", "error")
        )
    ]
    t = table(*rows)
    assert list(t.select().rows()) == rows
    assert list(t.select(kind="block", status="ok").rows()) == [
        r for r in rows if (r.kind, r.status) == ("block", "ok")
    ]
    assert list(t.select(context="isolated").rows()) == [r for r in rows if r.context == "isolated"]
    assert t.select(kind="stub").frame.empty
    assert list(t.take([3, 0]).rows()) == [rows[3], rows[0]]
    assert len(t.take([])) == 0


# ---- provenance and merging ----


def test_ids_cover_what_moves_a_number_and_nothing_else() -> None:
    p = PROVENANCE
    neither: dict[str, Any] = {
        "clock_ref_us": 9.0,
        "started_at": "x",
        "finished_at": "y",
        "host": "h",
        "command": "c",
        "commit": "d",
        "seed": 5,
    }
    assert (replace(p, **neither).env_id, replace(p, **neither).policy_id) == (p.env_id, p.policy_id)
    moves: list[dict[str, Any]] = [{"device_name": "x"}, {"backend": "x"}, {"versions": {}}, {"environment": {}}]
    for change in moves:
        other = replace(p, **change)
        assert other.env_id != p.env_id
        assert other.policy_id == p.policy_id
    makes: list[dict[str, Any]] = [{"policy": {}}, {"options": {}}]
    for change in makes:
        other = replace(p, **change)
        assert other.policy_id != p.policy_id
        assert other.env_id == p.env_id
    text = '[{"context":"sandwich","runs":2},{"threads":1}]'
    assert p.policy_id == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_merging_different_conditions_names_every_field_with_both_values() -> None:
    a = table(row("a"))
    b = table(
        row("b"),
        versions={"latbench": "0.1.0", "onnxruntime": "1.21.0"},
        policy={"runs": 2, "context": "isolated"},
        environment={"cpu": "Xeon"},
        host="elsewhere",
    )
    with pytest.raises(ProvenanceConflictError) as caught:
        a.merge(b)
    message = str(caught.value)
    assert "environment.affinity: [0,1] / (absent)" in message
    assert "policy.context: sandwich / isolated" in message
    assert "versions.onnxruntime: 1.20.0 / 1.21.0" in message
    assert "latbench:" not in message
    assert "host" not in message
    forced = a.merge(b, force=True)
    assert [r.key for r in forced.rows()] == ["a", "b"]
    assert len(forced.notes["mixed"]) == 3


def test_of_two_rows_the_ok_one_wins_then_the_better_sampled_then_the_later() -> None:
    def merged(first: Row, second: Row) -> list[Row]:
        return list(table(first).merge(table(second)).rows())

    ok, failed = row("a", 1.0, n_samples=10), row("a", None, status="error", n_samples=99)
    assert merged(ok, failed) == [ok]
    assert merged(failed, ok) == [ok]
    assert merged(failed, replace(failed, error="again")) == [replace(failed, error="again")]
    more, unknown = replace(ok, n_samples=20), replace(ok, n_samples=None)
    assert merged(more, ok) == [more]
    assert merged(ok, more) == [more]
    assert merged(unknown, ok) == [ok]
    assert merged(ok, replace(ok, latency_ms=2.0)) == [replace(ok, latency_ms=2.0)]
    alone = row("a", context="sandwich")
    assert merged(ok, alone) == [ok, alone]


def test_a_merge_keeps_the_whole_span_and_both_parents() -> None:
    a, b = table(row("a"), parents=("1",)), table(row("b"), parents=("1", "2"), finished_at="2026-01-02T00:00:00Z")
    p = a.merge(b).provenance
    assert (p.started_at, p.finished_at, p.parents) == (PROVENANCE.started_at, "2026-01-02T00:00:00Z", ("1", "2"))


def test_a_merge_restates_the_other_tables_reference_clock() -> None:
    # the second session's reference clock was 25 % slower (its probe took 12.5 us, not 10): same block, same work
    a = table(row("a", 1.0, latency_ref_ms=1.0))
    b = table(
        row("b", 1.3, latency_ref_ms=1.25, ci_low_ms=1.125, ci_high_ms=1.375, gross_ref_ms=2.5),
        row("raw", 1.3, ci_low_ms=1.2, ci_high_ms=1.4),
        clock_ref_us=12.5,
    )
    merged = {r.key: r for r in a.merge(b).rows()}
    restated = merged["b"]
    assert restated.latency_ms == 1.3
    assert (restated.latency_ref_ms, restated.gross_ref_ms) == (1.0, 2.0)
    assert restated.ci_low_ms == pytest.approx(0.9)
    assert restated.ci_high_ms == pytest.approx(1.1)
    assert merged["raw"] == row("raw", 1.3, ci_low_ms=1.2, ci_high_ms=1.4)


def test_the_command_for_one_row_keeps_every_option_but_the_output() -> None:
    again = "latbench profile --device cpu --space 'mobilenet v1' --runs 2 --only k7 -o k7.parquet"
    assert PROVENANCE.remeasure_command("k7") == again
    assert replace(PROVENANCE, command=again).remeasure_command("k7") == again
    assert replace(PROVENANCE, command="latbench profile x --output=y.parquet").remeasure_command("k") == (
        "latbench profile x --only k -o k.parquet"
    )
    assert (
        replace(PROVENANCE, command="latbench import aows f -o t").remeasure_command("k")
        == "latbench import aows f -o t"
    )
