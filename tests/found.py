"""A search's folder made by hand: everything but the training."""

from __future__ import annotations

from pathlib import Path

from latbench.graph.onnx import to_onnx
from latbench.graph.passes import random_weights
from latbench.oracle.base import Constraint
from latbench.oracle.lut import LutOracle
from latbench.tables import LatencyTable
from searchers.base import Problem, SearchResult
from searchers.results import HISTORY, NETWORK, save_result, write_bytes, write_history

EPOCHS = (
    {"epoch": 0, "loss": 2.3, "score": 0.2, "predicted0": 0.09},
    {"epoch": 1, "loss": 1.1, "score": 0.6, "predicted0": 0.12},
    {"epoch": 2, "loss": 0.9, "score": 0.7, "predicted0": 0.095, "arch": "0,1"},
)


def make_found(folder: Path, table: LatencyTable) -> Path:
    """A result of the searcher "made_up" on the space of `table`, with a target of 0.1 ms and three epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    oracle = LutOracle.fit(table)
    arch = oracle.fastest()[0]
    problem = Problem((Constraint(oracle, 0.1),), data="digits", out=folder)
    result = SearchResult(
        "made_up", arch, problem.predicted(arch), problem.targets, 0.75, EPOCHS, folder / NETWORK, {"accuracy": 0.75}
    )
    graph = problem.space.network(arch)
    write_bytes(result.network, to_onnx(graph, random_weights(graph)))
    write_history(folder / HISTORY, EPOCHS)
    save_result(problem, result, {"epochs": 3})
    return folder
