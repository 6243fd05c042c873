"""Tables: what they refuse, and what is found in them."""

from __future__ import annotations

import numpy as np
import pytest
from made_tables import COMMAND, PROVENANCE, row, table

from latbench.errors import MissingEntryError, TableError
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.ops import BatchNorm2d, Conv2d, ReLU
from latbench.tables import LatencyTable, Row


def conv(width: int, side: int, *, act: bool = False) -> Graph:
    b = GraphBuilder()
    x = b.add(Conv2d(16, width, 3, padding=1), b.input("x", (1, 16, side, side)), name="conv")
    x = b.add(BatchNorm2d(width), x, name="bn")
    return b.build(b.add(ReLU(), x, name="act") if act else x)


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
