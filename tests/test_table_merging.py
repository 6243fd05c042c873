"""Provenance: what tells tables apart, and what becomes of two that are merged."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from made_tables import PROVENANCE, row, table

from latbench.errors import ProvenanceConflictError
from latbench.tables import Row


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
