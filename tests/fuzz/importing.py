"""Parsers of what others publish: pickles, AOWS's lines, once-for-all's YAML, arrays, trtexec's times."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from contract import Parser
from mutate import NUMBERS, WORDS, damaged, json_text, text, tree, value

from latbench.graph.blocks import conv_bn_act
from latbench.graph.ir import GraphBuilder
from latbench.importers import aows, arrays, ofa, plain_pickle, tfnas, trtexec
from latbench.importers.base import Source
from latbench.importers.tfnas import _key
from latbench.spaces.mbconv import OPERATIONS, TFNASSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.ofa_mbv3 import OFAMobileNetV3Space
from latbench.tables import Row


def of_file(name: str, read: Callable[[Path], object]) -> Callable[[Any, Path], object]:
    """A parser of a file: the case is its bytes."""

    def parse(case: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(case)
        return read(path)

    return parse


# ---- pickles --------------------------------------------------------------------------------------------------------

_TFNAS = {"width_multiplier": 0.01, "batch": 1, "resolution": 32}  # the smallest of its kind: 2,592 entries


@cache
def tfnas_table() -> dict[str, Any]:
    """A whole table in TF-NAS's format, of narrow networks."""
    space = TFNASSpace.from_settings({**_TFNAS, "width_step": 1})
    raw: dict[str, Any] = {"base": 1.5}
    for site in space.block_sites:
        for i, operation in enumerate(OPERATIONS):
            most = operation.max_expansion * site.in_channels
            raw.setdefault(_key(site, i), {}).update({mid: 0.001 * mid for mid in range(most // 2, most + 1)})
    return raw


class Evil:
    """Unpickled by Python's own reader, it calls what it likes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1/0",)


_PLAIN = ({"base": 1.5, "a": OrderedDict([(8, 0.5), (9, 0.6)])}, [1, 2.5, "x", None, True], ((), ((1,),)), 10**40)
_OPCODES = (
    *(b"(", b".", b"0", b"1", b"2", b"N", b"]", b"}", b")", b"l", b"d", b"t", b"a", b"e", b"s", b"u", b"R", b"o", b"b"),
    *(b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x81", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"Q"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n", b"ios\nsystem\n", b"i__main__\nX\n"),
    *(
        b"I01\n",
        b"I5\n",
        b"I-\n",
        b"L" + b"9" * 5000 + b"L\n",
        b"F1.5\n",
        b"Fnan\n",
        b"S'a'\n",
        b"S'\n",
        b"Va\\u00e9\n",
    ),
    *(b"p0\n", b"g0\n", b"g7\n", b"Pid\n", b"K\x05", b"M\x05\x01", b"J\xff\xff\xff\x7f", b"\x8a\x02\xff\x00", b"q\x00"),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"\x8d" + b"\x7f" * 8, b"h\x00"),
    *(b"X\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a", b"\x8c\x01a", b"\x8c\x02\xed\xa0", b"T\xff\xff\xff\xff", b"U\x01a"),
    *(
        b"G" + struct.pack(">d", 1.5),
        b"G\x7f\xf8\0\0\0\0\0\0",
        b"\x82\x01",
        b"\x83\x01\x00",
        b"\x84\x01\0\0\0",
        b"j\0\0\0\0",
    ),
    *(
        b"r\xff\xff\xff\x7f",
        b"\x80\x05",
        b"\x80\xff",
        b"\x95" + b"\xff" * 8,
        b"B\xff\xff\xff\x7f",
        b"C\x01a",
        b"\x96" + b"\xff" * 8,
    ),
    *(b"\x97", b"\x98", b"\x8fK\x01\x90", b"]" * 3000, b")" + b"\x85" * 3000, b"(" * 3000, b"2" * 3000, b"\x942l" * 40),
)


def _pickle(rng: Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return b"".join(rng.choice(_OPCODES) for _ in range(rng.randrange(1, 24))) + b"." * rng.randrange(2)
    if kind == 1:
        whole = pickle.dumps(rng.choice(_PLAIN), rng.randrange(6))
        at = rng.randrange(len(whole) + 1)
        return whole[:at] + b"".join(rng.choice(_OPCODES) for _ in range(rng.randrange(1, 4))) + whole[at:]
    if kind == 2:
        return pickle.dumps(tree(rng, {"base": 1.5, "a": {"b": [1, 2, Evil()]}}), rng.randrange(6))
    return damaged(rng, [pickle.dumps(each, rng.randrange(6)) for each in _PLAIN])


def _tfnas(rng: Random) -> bytes:
    raw = dict(tfnas_table())
    for _ in range(rng.randrange(3)):
        key = rng.choice(list(raw))
        kind = rng.randrange(6)
        if kind == 0:
            del raw[key]
        elif kind == 1:
            raw[text(rng, [key])] = raw[key]
        elif kind == 2 or not isinstance(raw.get(key), dict):
            raw[key] = value(rng)
        else:
            curve = dict(raw[key])
            curve[rng.choice((*curve, *NUMBERS))] = rng.choice((*NUMBERS, *WORDS, None, True, [1]))
            raw[key] = curve
    whole = pickle.dumps(raw if rng.random() < 0.9 else tree(rng, {"base": 1, "a": {}}), rng.randrange(6))
    return whole if rng.random() < 0.8 else damaged(rng, [whole])


# ---- lines, YAML, arrays --------------------------------------------------------------------------------------------

_MOBILE = {"resolution": 32, "levels": 3}


@cache
def _aows_lines() -> tuple[Any, ...]:
    space = MobileNetV1Space.from_settings({"batch": aows.BATCH, **_MOBILE})
    samples = [[list(space.widths((i,) * 14)), 1.5 + i] for i in range(3)]
    model = [[vars(variable), 0.5] for variable in list(aows._variables(space))[:4]]
    return samples, model


def _aows(rng: Random) -> bytes:
    lines = rng.choice(_aows_lines())
    made = [json_text(rng, line) if rng.random() < 0.3 else json.dumps(line).encode() for line in lines]
    return b"\n".join(made) if rng.random() < 0.9 else damaged(rng, [b"\n".join(made)])


@cache
def _ofa_keys() -> tuple[str, ...]:
    space = OFAMobileNetV3Space(resolution=128)
    return tuple({name: 0 for site, graph in ofa._blocks(space) for name in ofa.layers_of(site, graph)})[:12]


def _ofa(rng: Random) -> bytes:
    lines = []
    for key in rng.sample(_ofa_keys(), 4):
        name = text(rng, [key]) if rng.random() < 0.15 else key
        figure = (
            "1.25"
            if rng.random() < 0.8
            else rng.choice((".inf", "-1", "1e400", "~", "[", "{mean: 1}", "!!python/object:os.system x", *WORDS))
        )
        lines.append(
            rng.choice((f"{name}: {{mean: {figure}}}", f"{name}:\n  mean: {figure}", f"? {name}\n: mean: {figure}"))
        )
    if rng.random() < 0.2:
        extra = (
            "a: &a [1,1]",
            "b: *a",
            "<<: {a: 1}",
            "[" * 2000,
            "? " * 500,
            "- 1",
            "%YAML 9.9",
            "---",
            "2001-01-01: 1",
            "0o7: 1",
        )
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(extra))
    whole = "\n".join(lines).encode("utf-8", "surrogatepass")
    return whole if rng.random() < 0.7 else damaged(rng, [whole])


_HEADER = [f"e{i}" for i in range(6)]


def _csv(rng: Random) -> bytes:
    rows = [",".join([*_HEADER, "pixel3_ms"])]
    rows += [",".join([*(str(rng.randrange(5)) for _ in _HEADER), "1.5"]) for _ in range(3)]
    rows[rng.randrange(4)] = text(rng, rows)
    whole = rng.choice(("\n", "\r\n", "\r")).join(rows).encode("utf-8", "surrogatepass")
    return whole if rng.random() < 0.7 else damaged(rng, [whole])


def _parquet(rng: Random) -> bytes:
    columns: dict[str, Any] = {name: [rng.randrange(5) for _ in range(3)] for name in _HEADER}
    columns["pixel3_ms"] = [1.5, 2.5, 0.5]
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(columns))
        kind = rng.randrange(4)
        if kind == 0:
            del columns[name]
        elif kind == 1:
            columns[rng.choice(WORDS).encode("ascii", "replace").decode()] = columns[name]
        else:
            columns[name] = rng.choice(COLUMNS)
    return parquet(rng, columns)


COLUMNS: tuple[Any, ...] = (
    *([None] * 3, ["a", "b", "c"], [[1], [2], []], [{"a": 1}] * 3, [b"\xff"] * 3, [True, False, None], [2**63 - 1] * 3),
    *(
        [float("nan"), float("inf"), -1.0],
        [1.5, 2.5, 1e308],
        [0.0, 0.0, 0.0],
        pa.array(["a", "b", "a"]).dictionary_encode(),
    ),
    *(
        pa.array([1, 2, 3], pa.timestamp("us")),
        pa.array([1, 2, 3], pa.decimal128(38, 10)),
        pa.array([1, 2, 3], pa.duration("s")),
    ),
    *(
        pa.array([2**64 - 1] * 3, pa.uint64()),
        pa.array([0, 1, 2], pa.float16()),
        pa.array([None] * 3, pa.list_(pa.float64())),
    ),
)


def parquet(rng: Random, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None) -> bytes:
    """A parquet file of these columns, now and then damaged."""
    table = pa.table({name: pa.array(each) if isinstance(each, list) else each for name, each in columns.items()})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, store_schema=rng.random() < 0.8)
    return sink.getvalue() if rng.random() < 0.6 else damaged(rng, [sink.getvalue()])


def _network() -> Row:
    b = GraphBuilder()
    return Row.of(b.build(conv_bn_act(b, b.input("x", (1, 3, 8, 8)), 4, name="conv")), "network")


_TIMES = [{"startMs": 0, "inMs": 0.1, "computeMs": 1.5, "latencyMs": 1.75}, {"computeMs": 1.25, "latencyMs": 1.5}]
_ROW = _network()

PARSERS = (
    Parser("pickle", _pickle, lambda case, _: plain_pickle.loads(case, "f.pkl")),
    Parser("import tfnas", _tfnas, of_file("f.pkl", lambda path: tfnas.read(Source(path), _TFNAS)), gate=20),
    Parser("import aows", _aows, of_file("f.jsonl", lambda path: aows.read(Source(path), _MOBILE)), gate=100),
    Parser(
        "import ofa", _ofa, of_file("f.yaml", lambda path: ofa.read(Source(path), {"resolution": 128}, "ms")), gate=100
    ),
    Parser(
        "import csv",
        _csv,
        of_file("f.csv", lambda path: arrays.read(Source(path), "nasbench201", {}, "pixel3_ms", None)),
        gate=150,
    ),
    Parser(
        "import parquet",
        _parquet,
        of_file("f.parquet", lambda path: arrays.read(Source(path), "nasbench201", {}, "pixel3_ms", None)),
        gate=100,
    ),
    Parser(
        "import trtexec",
        lambda rng: json_text(rng, _TIMES),
        of_file("f.json", lambda path: trtexec.read(Source(path), _ROW, None, None)),
        gate=100,
    ),
)
