"""Fitted models on disk: one ``.npz`` of numbers and one JSON text inside it. No pickle is written or read."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench import plugins
from latbench.errors import SchemaMismatchError, TableError
from latbench.files import replace_file, why_not
from latbench.oracle.base import Model, space_of
from latbench.provenance import Provenance, canonical_json

SCHEMA_VERSION = 1
_META = "latbench"


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
    text = np.frombuffer(canonical_json(head).encode(), np.uint8)
    try:
        replace_file(path, lambda file: np.savez_compressed(file, allow_pickle=False, **{_META: text, **arrays}))
    except OSError as error:
        raise TableError(why_not(error, path)) from None


def _array(data: bytes) -> NDArray[Any]:
    found: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return found


def load(path: Path) -> StoredModel:
    """Raises TableError where the file cannot be read, SchemaMismatchError where it is no model, or damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}; check the path, or fit the model first") from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            arrays = {name.removesuffix(".npy"): _array(archive.read(name)) for name in archive.namelist()}
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise SchemaMismatchError(f"{path} is no fitted model: {error}") from None
    try:
        head = json.loads(arrays.pop(_META).tobytes().decode())
        version = head["schema"]
    except (KeyError, TypeError, ValueError):
        raise SchemaMismatchError(f"{path} is no fitted model of latbench") from None
    if version != SCHEMA_VERSION:
        raise SchemaMismatchError(
            f"{path} has model schema {version}, this latbench reads {SCHEMA_VERSION}; fit it again, or install the "
            "latbench that wrote it"
        )
    try:
        provenance = Provenance.from_dict(head["provenance"])
        kind: type[Model] = plugins.load("latbench.oracles", head["oracle"])
        return StoredModel(kind.from_state(space_of(provenance), provenance, arrays, head["meta"]), head["notes"])
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaMismatchError(f"{path} is damaged: {error!r}") from None
