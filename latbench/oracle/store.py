"""Fitted models on disk: numbers and a JSON text in one file (``latbench.archives``)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latbench import archives, plugins
from latbench.errors import MissingEntryError, SchemaMismatchError, TableError, shown
from latbench.files import replace_file, why_not
from latbench.oracle.base import Model, space_of
from latbench.provenance import Provenance, canonical_json

SCHEMA_VERSION = 1
MAX_BYTES = 512 * 2**20  # of a file, and of its arrays unpacked: models of 15,000 networks have 10 MiB


@dataclass(frozen=True)
class StoredModel:
    """A model with the notes kept beside it: how it was fitted, what its validation said."""

    oracle: Model
    notes: Mapping[str, Any] = field(default_factory=dict)


def save(path: Path, model: Model, notes: Mapping[str, Any] | None = None) -> None:
    """Writes atomically: a killed run or a full disk leaves the old file. Raises TableError in the system's words."""
    arrays, meta = model.state()
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} holds {array.dtype}: a model keeps numbers only")
    head = {
        "schema": SCHEMA_VERSION,
        "oracle": model.name,
        "provenance": model.provenance.to_dict(),
        "meta": meta,
        "notes": dict(notes or {}),
    }
    try:
        data = archives.pack(canonical_json(head), arrays)
        replace_file(path, lambda file: file.write(data))
    except OSError as error:
        raise TableError(why_not(error, path)) from None


def load(path: Path) -> StoredModel:
    """Raises TableError where the file cannot be read, SchemaMismatchError where it is no model, or damaged."""
    try:
        arrays = archives.unpack(path, MAX_BYTES)
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}; check the path, or fit the model first") from None
    except ValueError as error:
        raise SchemaMismatchError(f"{path} is no fitted model: {error}") from None
    try:
        head = archives.head_of(arrays)
        version = head["schema"]
    except (KeyError, TypeError, ValueError):
        raise SchemaMismatchError(f"{path} is no fitted model of latbench") from None
    if version != SCHEMA_VERSION:
        raise SchemaMismatchError(
            f"{path} has model schema {shown(version)}, this latbench reads {SCHEMA_VERSION}; fit it again, or install "
            "the latbench that wrote it"
        )
    try:
        provenance = Provenance.from_dict(head["provenance"])
        kind: type[Model] = plugins.load("latbench.oracles", head["oracle"])
        oracle = kind.from_state(space_of(provenance), provenance, arrays, head["meta"])
        _tried(oracle)
        return StoredModel(oracle, dict(head["notes"]))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SchemaMismatchError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _tried(oracle: Model) -> None:
    """Asks once: arrays that do not fit each other fail here, where the file can be named."""
    first = (0,) * len(oracle.space.decisions)
    with np.errstate(all="ignore"), contextlib.suppress(MissingEntryError):
        oracle.latency(first)
        oracle.sources(first)
        oracle.interval(np.array([first], np.int64))
