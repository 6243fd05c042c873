"""The folder of a search: ``result.json``, the oracles it was held to, the network, the history. No torch.

Its files carry checksums (``latbench.seals``), and ``result.json`` those of the files it speaks of: what was damaged,
or stems from a run that was killed between two files, is refused.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from latbench import __version__, foreign
from latbench.errors import UsageError, shown
from latbench.files import replace_file, why_not
from latbench.oracle import store
from latbench.oracle.base import Constraint, LatencyOracle, Model
from latbench.oracle.factors import FactorOracle
from latbench.provenance import canonical_json, differences
from latbench.seals import check_json, check_parquet, seal_json, sealed_bytes
from latbench.spaces.base import FactoredSpace
from searchers.base import Problem, Scalar, SearchResult
from searchers.folders import held

SCHEMA_VERSION = 1
MAX_BYTES = 256 * 2**20  # of a JSON file: a million look-ups
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
        "network_crc32": crc32(result.network),
        "notes": dict(result.notes),
    }
    write_json(problem.out / RESULT, text)


def _keep(folder: Path, index: int, constraint: Constraint) -> dict[str, Any]:
    oracle, unit = constraint.oracle, constraint.oracle.unit
    entry = {"unit": unit, "confidence": constraint.confidence, "device": oracle.provenance.device_name}
    if hasattr(oracle, "name"):
        name = f"constraint{index}.npz"
        store.save(folder / name, cast(Model, oracle))
        return {**entry, "oracle": name, "oracle_crc32": crc32(folder / name)}
    if unit in COUNTS and isinstance(oracle, FactorOracle):
        return {**entry, "oracle": f"count:{COUNTS[unit]}"}
    raise UsageError(f"an oracle of class {type(oracle).__name__} cannot be kept in a file: give one with a name")


def read_result(folder: Path) -> Found:
    """Raises UsageError where `folder` holds no result of this schema, or a damaged one."""
    try:
        raw = read_json(folder / RESULT)
        if raw["schema"] != SCHEMA_VERSION:
            raise UsageError(
                f"{folder / RESULT} has schema {shown(raw['schema'])}, this latbench reads {SCHEMA_VERSION}"
            )
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
            network=_beside(folder, raw["network"]),
            notes=dict(raw["notes"]),
        )
        problem.space.check(result.arch)
        return Found(problem, result, dict(raw["settings"]), raw.get("trained"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no search result ({error.filename} is missing): latbench search first"
        ) from None
    except OSError as error:
        raise UsageError(f"{folder / RESULT} names {shown(error.filename)}: {error.strerror or error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / RESULT} is damaged ({error}): search again into the same folder") from None


def _kept(folder: Path, entry: Mapping[str, Any], space: Mapping[str, Any]) -> Constraint:
    from latbench import plugins

    oracle: LatencyOracle
    if entry["oracle"].startswith("count:"):
        kind = plugins.load("latbench.spaces", space["name"])
        counted = kind.from_settings(space["settings"])
        if not isinstance(counted, FactoredSpace):
            raise ValueError(f"{counted.name} does not factor into blocks, so nothing is counted in it")
        oracle = FactorOracle.counting(counted, entry["oracle"].partition(":")[2])
    else:
        path = _beside(folder, entry["oracle"])
        check_file(path, entry.get("oracle_crc32"))
        oracle = store.load(path).oracle
    return Constraint(oracle, entry["target"], entry["confidence"])


def _beside(folder: Path, name: str) -> Path:
    """A file of the folder itself: a result that was sent by others names no other."""
    if Path(name).name != name:
        raise ValueError(f"it names the file {shown(name)}, outside its folder")
    return folder / name


def note(folder: Path, name: str, value: Any) -> None:
    """Sets one more entry of ``result.json``: "verified", "rounds"."""
    with held(folder):
        write_json(folder / RESULT, {**read_json(folder / RESULT), name: value})


def note_training(folder: Path, figures: Mapping[str, Any]) -> None:
    """What training from scratch came to, once its network stands in the folder."""
    with held(folder):
        raw = read_json(folder / RESULT)
        write_json(folder / RESULT, {**raw, "network_crc32": crc32(folder / raw["network"]), "trained": dict(figures)})


def check_network(found: Found) -> Path:
    """The network's file. Raises UsageError where it is not the one that ``result.json`` speaks of."""
    raw = read_json(found.problem.out / RESULT)
    check_file(found.result.network, raw.get("network_crc32"))
    return found.result.network


def check_file(path: Path, crc: int | None) -> None:
    """Raises UsageError where a file's checksum is another one; None: not known."""
    if crc is not None and crc32(path) != crc:
        raise UsageError(
            f"{path} is not the file that {RESULT} beside it speaks of: it is damaged, or a run was killed before it "
            "had written both; run the same latbench search, or train, once more"
        )


def crc32(path: Path) -> int:
    """Of a file's bytes. Raises OSError."""
    return zlib.crc32(path.read_bytes())


# ---- files ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomic, with a checksum. Raises UsageError in the system's words."""
    write_bytes(path, seal_json(json.dumps(value, indent=2, allow_nan=False)).encode() + b"\n")


def check_settings(path: Path, done: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UsageError where `path` was "trained", "filled", ... under another identity than this run's."""
    if canonical_json(dict(found)) != canonical_json(dict(wanted)):
        told = "; ".join(differences(dict(found), dict(wanted))[:4])
        raise UsageError(f"{path} was {done} with other settings (there / here): {told}; use another -o, or remove it")


def read_json(path: Path) -> dict[str, Any]:
    """Inverse of ``write_json``. Raises OSError; ValueError where it is no JSON mapping, or damaged."""
    data = foreign.read_bytes(path, MAX_BYTES)
    check_json(data)
    raw = foreign.parse_json(data)
    if not isinstance(raw, dict):
        raise ValueError("it holds no mapping")
    raw.pop("crc32", None)
    return raw


def write_bytes(path: Path, data: bytes) -> None:
    """Atomic, folders made as needed; with a checksum where the format has room. Raises UsageError in the system's
    words."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: _put(file, sealed_bytes(data)))
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
    columns = pa.table({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(columns, buffer, write_page_checksum=True)
    write_bytes(path, buffer.getvalue())


def read_history(path: Path) -> tuple[Mapping[str, Scalar], ...]:
    """Inverse of ``write_history``. Raises FileNotFoundError; ValueError where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        try:
            check_parquet(file)
            rows = pq.read_table(file, page_checksum_verification=True).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path.name}: {' '.join(str(error).split())[:120]}") from None
    return tuple({name: value for name, value in row.items() if value is not None} for row in rows)
