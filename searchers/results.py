"""The folder of a search: ``result.json``, the oracles it was held to, the network, the history. No torch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from latbench import __version__
from latbench.errors import UsageError
from latbench.files import replace_file, why_not
from latbench.oracle import store
from latbench.oracle.base import Constraint, LatencyOracle, Model
from latbench.oracle.factors import FactorOracle
from latbench.spaces.base import FactoredSpace
from searchers.base import Problem, Scalar, SearchResult

SCHEMA_VERSION = 1
RESULT, NETWORK, HISTORY = "result.json", "network.onnx", "search.parquet"  # in a problem's folder
COUNTS = {"parameters": "n_params", "MACs": "macs"}  # unit of a budget that is counted, not measured


@dataclass(frozen=True)
class Found:
    """A result folder, read back."""

    problem: Problem
    result: SearchResult
    settings: Mapping[str, Any]  # of the searcher
    trained: Mapping[str, Any] | None  # what training from scratch came to


def save_result(problem: Problem, result: SearchResult, settings: Mapping[str, Any]) -> None:
    """Writes ``result.json`` and each constraint's oracle beside it, so that the folder says all by itself.

    Raises UsageError where an oracle cannot be kept in a file, or the folder cannot be written.
    """
    constraints = [_keep(problem.out, i, constraint) for i, constraint in enumerate(problem.constraints)]
    space = problem.space
    text = {
        "schema": SCHEMA_VERSION,
        "latbench": __version__,
        "searcher": result.searcher,
        "settings": dict(settings),
        "space": {"name": space.name, "settings": space.settings()},
        "arch": list(result.arch),
        "choices": {d.name: d.options[i] for d, i in zip(space.decisions, result.arch, strict=True)},
        "constraints": [
            {**kept, "target": target, "predicted": predicted}
            for kept, target, predicted in zip(constraints, result.target, result.predicted, strict=True)
        ],
        "score": result.score,
        "data": {"source": problem.data_name, "max_images": problem.max_images},
        "seed": problem.seed,
        "network": result.network.name,
        "notes": dict(result.notes),
    }
    write_json(problem.out / RESULT, text)


def _keep(folder: Path, index: int, constraint: Constraint) -> dict[str, Any]:
    oracle, unit = constraint.oracle, constraint.oracle.unit
    entry = {"unit": unit, "confidence": constraint.confidence, "device": oracle.provenance.device_name}
    if hasattr(oracle, "name"):
        name = f"constraint{index}.npz"
        store.save(folder / name, cast(Model, oracle))
        return {**entry, "oracle": name}
    if unit in COUNTS and isinstance(oracle, FactorOracle):
        return {**entry, "oracle": f"count:{COUNTS[unit]}"}
    raise UsageError(f"an oracle of class {type(oracle).__name__} cannot be kept in a file: give one with a name")


def read_result(folder: Path) -> Found:
    """Raises UsageError where `folder` holds no result of this schema, or a damaged one."""
    try:
        raw = json.loads((folder / RESULT).read_text())
        if raw["schema"] != SCHEMA_VERSION:
            raise UsageError(f"{folder / RESULT} has schema {raw['schema']}, this latbench reads {SCHEMA_VERSION}")
        constraints = [_kept(folder, entry, raw["space"]) for entry in raw["constraints"]]
        problem = Problem(
            tuple(constraints), raw["data"]["source"], folder, raw["seed"], max_images=raw["data"]["max_images"]
        )
        result = SearchResult(
            searcher=raw["searcher"],
            arch=tuple(raw["arch"]),
            predicted=tuple(entry["predicted"] for entry in raw["constraints"]),
            target=problem.targets,
            score=raw["score"],
            history=read_history(folder / HISTORY),
            network=folder / raw["network"],
            notes=raw["notes"],
        )
        return Found(problem, result, raw["settings"], raw.get("trained"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no search result ({error.filename} is missing): latbench search first"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / RESULT} is damaged ({error!r}): search again into the same folder") from None


def _kept(folder: Path, entry: Mapping[str, Any], space: Mapping[str, Any]) -> Constraint:
    from latbench import plugins

    oracle: LatencyOracle
    if entry["oracle"].startswith("count:"):
        kind = plugins.load("latbench.spaces", space["name"])
        counted = kind.from_settings(space["settings"])
        assert isinstance(counted, FactoredSpace)
        oracle = FactorOracle.counting(counted, entry["oracle"].partition(":")[2])
    else:
        oracle = store.load(folder / entry["oracle"]).oracle
    return Constraint(oracle, entry["target"], entry["confidence"])


def note(folder: Path, name: str, value: Any) -> None:
    """Sets one more entry of ``result.json``: "trained", "verified"."""
    raw = json.loads((folder / RESULT).read_text())
    write_json(folder / RESULT, {**raw, name: value})


def write_json(path: Path, value: Any) -> None:
    """Atomic. Raises UsageError in the system's words."""
    data = json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"
    write_bytes(path, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Atomic, folders made as needed. Raises UsageError in the system's words."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: _put(file, data))
    except OSError as error:
        raise UsageError(why_not(error, path)) from None


def _put(file: IO[bytes], data: bytes) -> None:
    file.write(data)


def write_history(path: Path, rows: Sequence[Mapping[str, Scalar]]) -> None:
    """One parquet row per epoch; a figure that an epoch lacks is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), buffer)
    write_bytes(path, buffer.getvalue())


def read_history(path: Path) -> tuple[Mapping[str, Scalar], ...]:
    """Inverse of ``write_history``."""
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        rows = pq.read_table(file).to_pylist()
    return tuple({name: value for name, value in row.items() if value is not None} for row in rows)
