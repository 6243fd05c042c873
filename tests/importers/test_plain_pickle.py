"""Pickles: plain data is what ``pickle`` would give; all else is refused, and nothing runs."""

from __future__ import annotations

import datetime
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latbench.errors import TableError
from latbench.importers import plain_pickle

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=15,
)


@settings(deadline=None)
@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_what_pickle_gives(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert plain_pickle.loads(data, "f.pkl") == pickle.loads(data)


def test_shared_values_are_kept() -> None:
    curve = OrderedDict([(8, 1.5)])
    assert plain_pickle.loads(pickle.dumps({"a": curve, "b": curve}), "f.pkl") == {"a": {8: 1.5}, "b": {8: 1.5}}


def test_python_2_ordered_dicts() -> None:
    data = b"ccollections\nOrderedDict\n((lp0\n(lp1\nS'a'\naF1.5\naatR."
    assert plain_pickle.loads(data, "f.pkl") == {"a": 1.5}


class Evil:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_is_refused_by_name_and_not_made(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made"
    data = pickle.dumps({"base": Evil(os.mkdir, str(target))}, protocol)
    with pytest.raises(TableError, match=r"f\.pkl is refused: it refers to (posix|nt)\.mkdir"):
        plain_pickle.loads(data, "f.pkl")
    assert not target.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1.0), "numpy.*"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (Counter("a"), "collections.Counter"),
        (Fraction(1, 2), "fractions.Fraction"),
        (eval, "builtins.eval|__builtin__.eval"),
        (b"bytes", "SHORT_BINBYTES|codecs.encode"),
        ({1, 2}, "EMPTY_SET"),
        (bytearray(b"x"), "BYTEARRAY8"),
    ],
)
def test_other_types_are_refused_by_name(value: object, name: str) -> None:
    with pytest.raises(TableError, match=name):
        plain_pickle.loads(pickle.dumps(value, 5), "f.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x03})" + b"\x85" * 100_000 + b"K\x01s.",  # a key nested so deep that hashing it overflows the C stack
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",  # a bytearray of a TiB
        b"\x80\x05X\xff\xff\xff\x7f.",  # text of 2 GiB
        b"cos\nsystem\n(S'true'\ntR.",
        b"(i__main__\nX\n.",
        b"\x80\x03ccollections\nOrderedDict\nK\x05\x85R.",
        b"\x80\x03]K\x01R.",
        b"\x80\x03K\x01K\x02K\x03s.",
        b"}K\x01K\x02sK\x01K\x03s.",  # a key twice
        b"\x80\x03(",
        b"\x80\x03}(K\x01u.",
        b"0.",
        b".",
        b"",
        b"PAR1",
        b"\xff" * 100,
    ],
)
def test_what_is_crafted_or_damaged_ends_in_one_line(data: bytes) -> None:
    with pytest.raises(TableError, match=r"\Af\.pkl is .*\Z"):
        plain_pickle.loads(data, "f.pkl")


def test_a_memo_cell_of_any_number_costs_nothing() -> None:
    assert plain_pickle.loads(b"\x80\x03]r\xff\xff\xff\x7f.", "f.pkl") == []


@settings(deadline=None)
@given(PLAIN, st.data())
def test_a_cut_pickle_is_refused(value: Any, data: st.DataObject) -> None:
    whole = pickle.dumps(value, 3)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(TableError):
        plain_pickle.loads(whole[:cut], "f.pkl")


def test_a_pickle_beyond_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MAX_BYTES", 10)
    with pytest.raises(TableError, match="larger than"):
        plain_pickle.loads(pickle.dumps("x" * 20), "f.pkl")
