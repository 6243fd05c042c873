"""What ``kills.py`` runs and kills: every command that does work, on spaces so small that it ends within seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latbench.backends.roofline import OPTIONS, kernels
from latbench.oracle import store
from latbench.oracle.factors import FactorOracle
from latbench.oracle.learned import LearnedOracle
from latbench.oracle.lut import LutOracle
from latbench.provenance import Provenance
from latbench.spaces.base import FactoredSpace, SearchSpace
from latbench.spaces.cells import RelativeNASSpace
from latbench.spaces.instanas import InstaNASSpace
from latbench.spaces.mbconv import TFNASSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nsc import IRLASSpace
from latbench.tables import LatencyTable, Row
from searchers.results import read_history
from searchers.testing import roofline_table

WIDTHS = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
BLOCKS = IRLASSpace(stack="cifar", resolution=8, max_index=4, widths="4,8", repeats="1,1", num_classes=10)
EXPERT = "(1,1,3,0,0)(2,5,0,0,1)(3,7,0,0,0)"
PROFILE = [
    "profile",
    "--device",
    "cpu",
    "--space",
    "mobilenet_v1",
    "--resolution",
    "32",
    "--ci",
    "20%",
    "-o",
    "t.parquet",
]
PROFILE += [word for one in ("levels=2", "min_width=0.1", "max_width=0.2", "num_classes=10") for word in ("--set", one)]
BENCH = ["--runs", "2", "--max-time", "200ms"]
LEAST = ["--layers", "0", "-o", "t.parquet"]

Outcome = Callable[[Path], Any]


@dataclass(frozen=True)
class Command:
    """One command line, what its folder needs before, and what is compared of what it leaves there."""

    name: str
    args: tuple[str, ...]
    outcome: Outcome  # equal however often it was killed
    needs: tuple[str, ...] = ()  # files and folders of the prepared ones, copied to where it runs


def commands() -> list[Command]:
    """All of them, in the order in which one may need what another leaves."""
    found = [
        Command("profile", (*PROFILE, "--rounds", "1"), _keys),
        Command("profile-roofline", (*PROFILE, "--backend", "roofline", "--networks", "4"), _figures),
        Command("bench", ("bench", "mobilenet_v1:mobilenet-v1", "--resolution", "32", *BENCH, *LEAST), _keys),
        Command("import", ("import", "trtexec", "times.json", "--model", "mobilenet_v1:mobilenet-v1", "--device",
                           "titanxp", "-o", "t.parquet"), _figures, ("times.json",)),
        Command("fit", ("fit", "networks.parquet", "-o", "m.npz", "--hold-out", "10"), _model, ("networks.parquet",)),
        Command("validate", ("validate", "blocks.npz", "networks.parquet", "--all", "--json", "--plot", "v.png"), _said,
                ("blocks.npz", "networks.parquet")),
    ]  # fmt: skip
    data = ("--data", "digits", "--max-images", "160", "-o", "found")
    for name, words in SEARCHES.items():
        table = "blocks.npz" if name == "irlas" else f"{name}.parquet"
        args = ("search", name, "--table", table, "--target", "TARGET", *data, *words)
        found.append(Command(f"search-{name}", args, _search, (table, f"{name}.target")))
    found += [
        Command("train", ("train", "found", "--epochs", "4", "--batch-size", "32", "--set", "warmup_epochs=1"), _search,
                ("found",)),
        Command("verify", ("verify", "found", *BENCH), _search, ("found",)),
        Command("report", ("report", "networks.parquet", "blocks.npz", "found", "-o", "r.html"), _page,
                ("networks.parquet", "blocks.npz", "found")),
    ]  # fmt: skip
    return found


def _set(**options: object) -> tuple[str, ...]:
    return tuple(word for name, value in options.items() for word in ("--set", f"{name}={value}"))


SEARCHES: dict[str, tuple[str, ...]] = {
    "aows": ("--epochs", "3", "--batch-size", "32", *_set(adaptive="false")),
    "tfnas": ("--epochs", "2", "--batch-size", "32", *_set(warmup=0.5)),
    "relativenas": ("--batch-size", "32", *_set(population=4, generations=2, channels=4, layers=3)),
    "instanas": ("--epochs", "1", "--batch-size", "32",
                 *_set(pretrain_epochs=1, finetune_epochs=1, variants=2, cutout=0)),
    "irlas": ("--epochs", "1", "--batch-size", "32",
              *_set(experts=EXPERT, iterations=3, samples=4, proxy="space", restarts=0, finalists=2, final_epochs=1,
                    final_batch_size=32)),
    "random": ("--epochs", "1", "--batch-size", "32", *_set(evaluations=5)),
}  # fmt: skip
SPACES: dict[str, FactoredSpace] = {
    "aows": WIDTHS,
    "tfnas": TFNASSpace(width_multiplier=0.125, resolution=32, width_step=16, num_classes=10),
    "relativenas": RelativeNASSpace(resolution=8, channels=4, layers=3),
    "instanas": InstaNASSpace(plan="8x1,12x2s2,16x1s2", stem_channels=8, head_channels=32, resolution=8),
    "random": WIDTHS,
}


def prepare(folder: Path) -> None:
    """The files that commands need, but for the folder of a search."""
    samples = [{"startComputeMs": i, "computeMs": 1 + 0.001 * (i % 7), "latencyMs": 1.1, "endComputeMs": i + 1}
               for i in range(200)]  # fmt: skip
    (folder / "times.json").write_text(json.dumps(samples))
    networks = _networks(BLOCKS, 60)
    networks.write(folder / "networks.parquet")
    model = LearnedOracle.fit(networks)
    store.save(folder / "blocks.npz", model)
    for name, space in SPACES.items():
        table = roofline_table(space)
        table.write(folder / f"{name}.parquet")
        (folder / f"{name}.target").write_text(f"{_between(LutOracle.fit(table)):.9f}ms")
    rng = np.random.default_rng(0)
    sampled = model.latencies(np.array([BLOCKS.sample(rng) for _ in range(200)], np.int64))
    (folder / "irlas.target").write_text(f"{float(np.quantile(sampled, 0.4)):.9f}ms")


def _networks(space: SearchSpace, n: int) -> LatencyTable:
    """Whole networks on the analytic device."""
    rng = np.random.default_rng(0)
    options = {name: float(value) for name, value in OPTIONS.items()}
    rows = {}
    for arch in dict.fromkeys(space.sample(rng) for _ in range(n)):
        graph = space.network(arch)
        ms = sum(layer.ms for layer in kernels(graph, options))
        rows[graph.key] = Row.of(graph, "network", space=space.name, arch=arch, latency_ms=ms, origin="simulated")
    device = Provenance("cpu", "roofline", "roofline", space=space.name, settings=space.settings())
    return LatencyTable.from_rows(rows.values(), device)


def _between(oracle: FactorOracle) -> float:
    """ms, between the fastest network and the slowest of 200."""
    rng = np.random.default_rng(0)
    high = oracle.latencies(np.array([oracle.space.sample(rng) for _ in range(200)], np.int64)).max()
    low = oracle.fastest()[1]
    return float(low + 0.4 * (high - low))


# ---- what is compared -----------------------------------------------------------------------------------------------


def _keys(folder: Path) -> Any:
    frame = LatencyTable.read(folder / "t.parquet").frame
    return sorted(zip(frame["key"], frame["kind"], frame["context"], frame["status"], strict=True))


def _figures(folder: Path) -> Any:
    rows = sorted(LatencyTable.read(folder / "t.parquet").rows(), key=lambda row: (row.key, row.kind, row.context))
    return [(row.key, row.kind, row.context, row.status, row.latency_ms) for row in rows]


def _model(folder: Path) -> Any:
    found = store.load(folder / "m.npz")
    arrays, meta = found.oracle.state()
    figures = {k: v for k, v in found.notes.items() if k != "fitted_at"}
    return {name: array.tobytes() for name, array in arrays.items()}, meta, json.dumps(figures, sort_keys=True)


def _said(folder: Path) -> Any:
    return (folder / "stdout").read_text(), (folder / "v.png").stat().st_size > 1000


def _search(folder: Path) -> Any:
    where = folder / "found"
    result = json.loads((where / "result.json").read_text())
    result.pop("crc32")
    histories = {path.name: [{k: v for k, v in row.items() if k != "seconds"} for row in read_history(path)]
                 for path in sorted(where.glob("*.parquet"))}  # fmt: skip
    return result, histories, (where / "network.onnx").read_bytes()


def _page(folder: Path) -> Any:
    return (folder / "r.parquet").read_bytes(), sorted(path.name for path in (folder / "r_pictures").iterdir())
