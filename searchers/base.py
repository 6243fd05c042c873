"""What every searcher shares: the problem it is given, the result it gives, and the folder that keeps both.

A searcher is one entry point under ``latbench.searchers``; its options are the fields of a frozen dataclass. Nothing
here imports torch.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from latbench import __version__
from latbench.errors import InfeasibleTargetError, UsageError
from latbench.files import replace_file, why_not
from latbench.oracle import store
from latbench.oracle.base import Constraint, LatencyOracle, Model
from latbench.oracle.factors import FactorOracle
from latbench.spaces.base import Arch, FactoredSpace, SearchSpace

SCHEMA_VERSION = 1
RESULT, NETWORK, HISTORY = "result.json", "network.onnx", "search.parquet"  # in a problem's folder
TOLERANCE = 1e-12  # relative: a sum of entries may differ from the target in its last bit
COUNTS = {"parameters": "n_params", "MACs": "macs"}  # unit of a budget that is counted, not measured
Scalar = int | float | str | bool | None


class DataSource(Protocol):
    """Labelled images in two splits. ``searchers.data.open_data`` makes one from a text such as ``digits``."""

    @property
    def name(self) -> str:
        """The text that names it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def mirrored(self) -> bool:
        """Whether an image's mirror image has its label: not for digits."""
        ...

    def labels(self, split: str) -> NDArray[np.int64]:
        """(N,) class indices of "train" or "test", disjoint sets of images."""
        ...

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """(H, W, 3). Raises UsageError, naming the image, where it cannot be decoded."""
        ...


class Reporter(Protocol):
    """Who wants to know how far a search is."""

    def advance(self, done: int, total: int, text: str) -> None:
        """Steps done and in all; the latest figures, for people."""
        ...

    def epoch(self, history: Sequence[Mapping[str, Scalar]]) -> None:
        """One more row: all of them so far."""
        ...


@dataclass(frozen=True)
class Problem:
    """Find the best network for `data` under every constraint.

    `out` keeps checkpoints and results; a search that was cut off goes on from there. Raises UsageError where there is
    no constraint, or their oracles speak of different decisions.
    """

    constraints: tuple[Constraint, ...]
    data: str | DataSource  # "digits", "folder:DIR", "parquet:FILE", "cifar10:DIR"
    out: Path
    seed: int = 0
    max_images: int | None = None  # at most so many training images, a balanced sample

    def __post_init__(self) -> None:
        if not self.constraints:
            raise UsageError("a search needs at least one constraint: an oracle and its target")
        first = self.constraints[0].oracle.space
        for other in (constraint.oracle.space for constraint in self.constraints[1:]):
            if (other.name, other.decisions) != (first.name, first.decisions):
                raise UsageError(
                    f"the constraints speak of different networks: {first.name} with settings {first.settings()}, "
                    f"{other.name} with {other.settings()}; profile both tables with the same ones"
                )
        if self.max_images is not None and self.max_images < 1:
            raise UsageError(f"max_images must be at least 1, got {self.max_images}")

    @property
    def space(self) -> SearchSpace:
        """Of the first constraint: its resolution and batch are those of the network that is found."""
        return self.constraints[0].oracle.space

    @property
    def targets(self) -> tuple[float, ...]:
        """One per constraint, in its oracle's unit."""
        return tuple(constraint.target for constraint in self.constraints)

    @property
    def data_name(self) -> str:
        """The text that names the data wherever one stands: paths are absolute."""
        if not isinstance(self.data, str):
            return self.data.name
        kind, colon, where = self.data.partition(":")
        return f"{kind}:{Path(where).resolve()}" if colon else kind

    def predicted(self, arch: Arch) -> tuple[float, ...]:
        """What each constraint's oracle says of `arch`."""
        return tuple(constraint.oracle.latency(arch) for constraint in self.constraints)

    def satisfied(self, arch: Arch) -> bool:
        """Whether `arch` keeps every constraint, confidence included, up to ``TOLERANCE``."""
        archs = np.array([arch], np.int64)
        return all(float(c.bounds(archs)[0]) <= c.target * (1 + TOLERANCE) for c in self.constraints)

    def budgets(self) -> tuple[float, ...]:
        """The targets as bounds on predictions: lower where a constraint holds with a confidence.

        Raises UsageError where an oracle's interval is not proportional to its prediction: no sum of factors then.
        """
        return tuple(_budget(constraint) for constraint in self.constraints)

    def check_feasible(self) -> None:
        """Raises InfeasibleTargetError, naming the fastest architecture, where a constraint cannot be kept.

        Each constraint by itself; where an oracle cannot tell its fastest network, nothing is raised for it.
        """
        for constraint in self.constraints:
            if not isinstance(constraint.oracle, FactorOracle):
                continue
            arch, _ = constraint.oracle.fastest()
            bound = float(constraint.bounds(np.array([arch], np.int64))[0])
            if bound > constraint.target * (1 + TOLERANCE):
                raise InfeasibleTargetError(infeasible(constraint, arch, bound))


def infeasible(constraint: Constraint, arch: Arch, bound: float) -> str:
    """One line on a target below the fastest architecture."""
    space, unit = constraint.oracle.space, constraint.oracle.unit
    sure = "" if constraint.confidence is None else f" with confidence {constraint.confidence:g}"
    return (
        f"no {space.name} network meets {constraint.target:.6g} {unit}{sure}: the fastest is {space.format_arch(arch)}"
        f" at {bound:.6g} {unit}; raise the target above that, or profile a space with smaller options"
    )


def _budget(constraint: Constraint) -> float:
    if constraint.confidence is None:
        return constraint.target
    space, rng = constraint.oracle.space, np.random.default_rng(0)
    archs = np.array([space.sample(rng) for _ in range(16)], np.int64)
    widening = constraint.bounds(archs) / constraint.oracle.latencies(archs)
    if float(np.ptp(widening)) > 1e-9 * float(widening.max()):
        raise UsageError("a confidence needs an oracle whose intervals are proportional to its predictions: lut or fit")
    return constraint.target / float(widening.max())


@dataclass(frozen=True)
class SearchResult:
    """A network that keeps the budget, and how it was found."""

    searcher: str
    arch: Arch
    predicted: tuple[float, ...]  # per constraint, in its oracle's unit
    target: tuple[float, ...]
    score: float  # the searcher's own estimate of quality, larger is better; its docstring says of what
    history: tuple[Mapping[str, Scalar], ...]  # one row per epoch
    network: Path  # ONNX, batch norms folded, with the weights that the search gave it
    notes: Mapping[str, Any] = field(default_factory=dict)  # JSON: what else the searcher tells


class Searcher(Protocol):
    """Finds an architecture. Options are dataclass fields. One conformance suite: ``testing.SearcherConformance``."""

    name: ClassVar[str]

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """Raises InfeasibleTargetError, with the fastest architecture, before any training; UsageError where the space
        or the data do not fit.

        Writes `problem.out` (``save_result``). Called again on the same folder it goes on where it was and ends in the
        same result; nothing is trained twice. A target may differ from the one trained for where the searcher can
        answer it from what it trained, else UsageError.
        """
        ...


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


S = TypeVar("S")


def settings_of(searcher: Any) -> dict[str, Scalar]:
    """Option -> value; ``from_settings`` is its inverse."""
    return dataclasses.asdict(searcher)


def from_settings(kind: type[S], settings: Mapping[str, Any]) -> S:
    """The searcher, or other frozen dataclass of plain values, with these options, defaults for what is left out.

    Raises UsageError on an unknown or unfit one.
    """
    options = {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    title = getattr(kind, "name", kind.__name__.lower())
    hints = typing.get_type_hints(kind)
    for name, value in settings.items():
        if name not in options:
            raise UsageError(f"{title} has no option {name!r}: {', '.join(options)}")
        if not _fits(value, hints[name]):
            raise UsageError(f"{title}: {name} must be {_told(hints[name])}, got {value!r}")
    return kind(**settings)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    kinds = typing.get_args(hint) or (hint,)
    if type(value) in kinds:
        return not isinstance(value, float) or math.isfinite(value)
    return (value is None and type(None) in kinds) or (type(value) is int and float in kinds)


def _told(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(kind, str(kind)) for kind in (typing.get_args(hint) or (hint,)))
