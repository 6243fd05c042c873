"""Parsers of latbench's own files, as others may have written them: graphs, tables, spools, models, device profiles."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from contract import Parser
from importing import COLUMNS, of_file
from mutate import NUMBERS, WORDS, damaged, json_text, text

from latbench import devices
from latbench.graph.blocks import conv_bn_act, separable_conv
from latbench.graph.ir import Graph, GraphBuilder
from latbench.measure.base import Measurement
from latbench.oracle import store
from latbench.oracle.base import space_of
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.lut import LutOracle
from latbench.provenance import Provenance, canonical_json
from latbench.signatures import nearest
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spool import Spool
from latbench.tables import LatencyTable, Row

SPACE = MobileNetV1Space(resolution=32, levels=2, num_classes=10)

# ---- graphs and signatures ------------------------------------------------------------------------------------------


def _graphs() -> tuple[Graph, ...]:
    made = []
    for channels in (4, 8):
        b = GraphBuilder()
        x = conv_bn_act(b, b.input("x", (1, 3, 8, 8)), channels, 3, name="conv")
        made.append(b.build(separable_conv(b, x, 6, stride=2, name="sep")))
    return (*made, SPACE.network((0,) * 14))


_GRAPHS = _graphs()
_TREES = tuple(json.loads(graph.to_json()) for graph in _GRAPHS)


def _graph(case: bytes, _: Path) -> object:
    graph = Graph.from_json(case.decode("utf-8", "surrogateescape"))
    return graph.key, graph.macs, graph.n_params, graph.weight_shapes(), Graph.from_json(graph.to_json()) == graph


def _signatures(rng: Random) -> tuple[str, dict[str, str]]:
    known = [graph.signature for graph in _GRAPHS]
    return text(rng, known), {str(i): text(rng, known) for i in range(rng.randrange(1, 5))}


# ---- tables and spools ----------------------------------------------------------------------------------------------


@cache
def table() -> LatencyTable:
    """All blocks of a small space and 30 networks, of made-up latencies."""
    rng = np.random.default_rng(0)
    rows = [
        Row.of(
            graph, "block", space=SPACE.name, site=site.name, latency_ms=float(rng.uniform(0.1, 1)), samples_ms=(0.5,)
        )
        for site, graph in {graph.key: (site, graph) for site, _, graph in SPACE.slots()}.values()
    ]
    rows += [
        Row.of(SPACE.network(arch), "network", arch=arch, latency_ms=float(rng.uniform(4, 6)))
        for arch in sorted({SPACE.sample(rng) for _ in range(30)})
    ]
    provenance = Provenance(
        "cpu", "a CPU", "onnxruntime", space=SPACE.name, settings=SPACE.settings(), command="latbench x"
    )
    return LatencyTable.from_rows(rows, provenance, {"additivity": {"mape": 0.01}})


@cache
def table_bytes() -> bytes:
    with TemporaryDirectory() as folder:
        table().write(Path(folder) / "t.parquet")
        return (Path(folder) / "t.parquet").read_bytes()


@cache
def _small() -> tuple[pa.Table, Any]:
    whole = pq.read_table(io.BytesIO(table_bytes())).slice(0, 6)
    return whole, json.loads(whole.schema.metadata[b"latbench"])


def _table(rng: Random) -> bytes:
    if rng.random() < 0.3:
        return damaged(rng, [table_bytes()])
    whole, meta = _small()
    for _ in range(rng.randrange(3)):
        name, kind = rng.choice(whole.column_names), rng.randrange(5)
        if whole.column_names.count(name) != 1:
            continue
        if kind == 0:
            whole = whole.drop_columns([name])
        elif kind == 1:
            whole = whole.rename_columns([f"{c}x" if c == name else c for c in whole.column_names])
        elif kind == 2:
            whole = whole.append_column(rng.choice(whole.column_names), whole.column(whole.column_names.index(name)))
        else:
            other = rng.choice(COLUMNS)
            column = other if isinstance(other, pa.Array) else pa.array(other)
            column = pa.chunked_array([column, column])
            if rng.random() < 0.7:
                with contextlib.suppress(pa.ArrowException):
                    column = column.cast(whole.schema.field(name).type)
            whole = whole.set_column(whole.column_names.index(name), name, column) if whole.num_rows == 6 else whole
    text_ = json_text(rng, meta) if rng.random() < 0.6 else json.dumps(meta).encode()
    sink = io.BytesIO()
    pq.write_table(whole.replace_schema_metadata({b"latbench": text_}), sink)
    return sink.getvalue()


def _read_table(path: Path) -> object:
    found = LatencyTable.read(path)
    list(found.rows()), found.frame, found.networks(), found.blocks_ms()
    found.missing_entry("x", _GRAPHS[0].signature), found.provenance.conflicts(table().provenance)
    return LutOracle.fit(found).latency((0,) * 14)


_HEADER = {"provenance": table().provenance.to_dict(), "plan": {"runs": 2}}
_RECORD = Measurement("k", 0, 0, samples_ms=(1.0, 1.5), conditions={"launch": "graph"}).to_dict()


def _spool(rng: Random) -> bytes:
    lines = [b'{"pid":"0000000007","header":' + canonical_json(_HEADER).encode() + b"}"]
    lines += [json_text(rng, _RECORD) if rng.random() < 0.5 else json.dumps(_RECORD).encode() for _ in range(3)]
    if rng.random() < 0.3:
        lines[0] = json_text(rng, json.loads(lines[0]))
    whole = b"\n".join(lines) + b"\n" * rng.randrange(2)
    return whole if rng.random() < 0.7 else damaged(rng, [whole])


def _read_spool(path: Path) -> object:
    with Spool(path.with_name("t.parquet"), _HEADER) as spool:
        return spool.records


# ---- models ---------------------------------------------------------------------------------------------------------


@cache
def _models() -> tuple[dict[str, bytes], ...]:
    """The members of each model's archive."""
    found = []
    with TemporaryDirectory() as folder:
        for model in (LutOracle.fit(table()), CalibratedOracle.fit(table())):
            path = Path(folder) / "m.npz"
            store.save(path, model, {"validation": {"n": 3}})
            with zipfile.ZipFile(path) as archive:
                found.append({name: archive.read(name) for name in archive.namelist()})
    return tuple(found)


def npy(array: Any) -> bytes:
    """An array as ``.npy``, objects pickled."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.asarray(array), allow_pickle=True)
    return sink.getvalue()


ARRAYS = (
    *(np.zeros(0), np.zeros((0, 7)), np.zeros(()), np.full(3, np.nan), np.full((2, 2), np.inf), np.arange(3) - 2**62),
    *(np.array([{}, None], object), np.array(["a", "b"]), np.array([b"x"]), np.zeros(2, "M8[s]"), np.zeros(2, "f4,i8")),
    *(
        np.zeros(3, complex),
        np.zeros(3, bool),
        np.zeros((1,) * 20),
        np.full(5, 2**63, np.uint64),
        np.full(4, -1, np.int8),
    ),
)


def _model(rng: Random) -> bytes:
    members = dict(rng.choice(_models()))
    head = json.loads(np.lib.format.read_array(io.BytesIO(members["latbench.npy"])).tobytes())
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(members))
        kind = rng.randrange(6)
        if kind == 0:
            del members[name]
            break
        if kind == 1:
            members[name] = npy(rng.choice(ARRAYS))
        elif kind == 2:
            members[name] = damaged(rng, [members[name]])
        elif kind == 3:
            members[rng.choice(WORDS).replace("\udcff", "?") + ".npy"] = members[name]
        elif "latbench.npy" in members:
            members["latbench.npy"] = npy(np.frombuffer(json_text(rng, head), np.uint8))
    sink = io.BytesIO()
    with zipfile.ZipFile(
        sink, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    ) as archive:
        for name, data in members.items():
            archive.writestr(name.partition("\0")[0] or "x", data)
    return sink.getvalue() if rng.random() < 0.8 else damaged(rng, [sink.getvalue()])


def _read_model(path: Path) -> object:
    oracle = store.load(path).oracle
    archs = np.zeros((2, len(oracle.space.decisions)), np.int64)
    return (
        oracle.latency(tuple(archs[0].tolist())),
        oracle.latencies(archs),
        oracle.interval(archs),
        oracle.sources(tuple(archs[0].tolist())),
    )


# ---- device profiles, provenance ------------------------------------------------------------------------------------

_PROFILES = (
    '[mine]\ntitle = "My GPU"\nkind = "gpu"\nmatch = ["My GPU", "RTX .*"]\naliases = ["m"]\npeak_gflops_fp32 = 1e4\n'
    'bandwidth_gbs = 500\nmemory_gb = 12\nclocks = "lockable"\nworker_python = "/opt/python"\n',
    '[titanxp]\ndefault_backend = "torch"\ncompute_capability = "6.1"\n\n["a b"]\ntitle = \'x\'\nkind = "cpu"\n'
    "match = []\n",
)  # fmt: skip


def _profiles(rng: Random) -> bytes:
    made = text(rng, _PROFILES)
    if rng.random() < 0.4:
        word = rng.choice(
            (*map(str, NUMBERS), *WORDS, "{a=1}", "[1,2]", "[" * 3000, "1979-05-27", '"(("', '["a{99999999999}"]')
        )
        made = made.replace(rng.choice(made.split("= ")[1:] or [" "]), f"{word}\n", 1)
    whole = made.encode("utf-8", "surrogatepass")
    return whole if rng.random() < 0.8 else damaged(rng, [whole])


def _provenance(case: Any, _: Path) -> object:
    found = Provenance.from_dict(case) if isinstance(case, dict) else Provenance.from_dict({"device": case})
    return found.env_id, found.conflicts(table().provenance), found.remeasure_command("k"), space_of(found)


PARSERS = (
    Parser("graph in JSON", lambda rng: json_text(rng, rng.choice(_TREES)), _graph),
    Parser("signatures", _signatures, lambda case, _: nearest(*case)),
    Parser("table", _table, of_file("t.parquet", _read_table), gate=60),
    Parser("spool", _spool, of_file("t.parquet.partial.jsonl", _read_spool), gate=200),
    Parser("model", _model, of_file("m.npz", _read_model), gate=25),
    Parser("device profiles", _profiles, of_file("d.toml", devices.profiles)),
    Parser(
        "device name",
        lambda rng: text(rng, ("titanxp", "TITAN Xp", "auto", "cpu")),
        lambda case, _: devices.resolve(case),
    ),
)
