"""What differs between TensorRT 8.6, 10 and 11, as pure functions of what a version's Python API has.

Members of enumerations go by name: their integers moved between versions (TF32 7 -> 6, STRONGLY_TYPED 1 -> 0). A name
that a version lacks is said, never guessed. No TensorRT is imported here. Workers import this (Python 3.9).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from latbench.errors import MeasurementError, UsageError

ENUMERATIONS = ("BuilderFlag", "TacticSource", "PreviewFeature", "NetworkDefinitionCreationFlag")

EXTERNAL = ("CUBLAS", "CUBLAS_LT", "CUDNN")  # sources of tactics that are libraries of their own
CORE_ONLY = "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"  # on by default, and in 8.6 only

# What a weakly typed network may compute in beside float32, by the types of its tensors: without the flag the builder
# computes a float16 model in float32.
FLAG_OF_TYPE = {"HALF": "FP16", "BF16": "BF16", "FP8": "FP8", "INT8": "INT8", "INT4": "INT4"}

# Support matrices: from that version on, at least and at most this compute capability.
_LEAST = {(8, 0): (5, 0), (10, 0): (7, 0), (10, 5): (7, 5)}
_MOST = {(8, 0): (9, 0), (10, 8): (12, 1)}


@dataclass(frozen=True)
class Api:
    """A TensorRT: its version, and the members of each of ``ENUMERATIONS``."""

    version: str  # "8.6.1"
    members: Mapping[str, Collection[str]]

    @classmethod
    def of(cls, module: Any) -> Api:
        """That of the imported ``tensorrt``. One that lacks an enumeration lacks its members."""
        members = {name: tuple(getattr(getattr(module, name, None), "__members__", ())) for name in ENUMERATIONS}
        return cls(str(module.__version__), members)

    def has(self, enumeration: str, name: str) -> bool:
        return name in self.members[enumeration]

    @property
    def release(self) -> tuple[int, int]:
        """ "10.13.3.9" -> (10, 13)."""
        return release_of(self.version)


@dataclass(frozen=True)
class Settings:
    """How to configure a build. Names of members; all of them are in the version that the settings are for."""

    flags_on: tuple[str, ...]
    flags_off: tuple[str, ...]
    sources_on: tuple[str, ...]  # added to, or taken from, the default tactic sources
    sources_off: tuple[str, ...]
    previews: tuple[tuple[str, bool], ...]
    notes: tuple[str, ...]  # what was asked for and is not in this version


def release_of(version: str) -> tuple[int, int]:
    """Major and minor of a version. Raises MeasurementError where it does not start with two numbers."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    if found is None:
        raise MeasurementError(f"TensorRT calls itself {version!r}: that is no version")
    return int(found[1]), int(found[2])


def typing_of(api: Api, wish: str) -> str:
    """ "weak" or "strong", for "auto", "weak" or "strong": strong where the version can. Raises UsageError."""
    able = [
        typing
        for typing, can in (
            ("strong", api.has("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")),
            ("weak", api.has("BuilderFlag", "FP16")),
        )
        if can
    ]
    if wish == "auto":
        return able[0]
    if wish not in able:
        raise UsageError(f"typing={wish} is not in TensorRT {api.version}: typing={able[0]}")
    return wish


def network_flags(api: Api, typing: str) -> tuple[str, ...]:
    """Flags to create a network with: 8.6 must be told that the batch is a dimension, 10 no longer, 11 cannot be."""
    flags = ["STRONGLY_TYPED"] if typing == "strong" else []
    if api.release < (10, 0):
        flags.append("EXPLICIT_BATCH")
    return tuple(flag for flag in flags if api.has("NetworkDefinitionCreationFlag", flag))


def settings(
    api: Api, typing: str, *, types: Collection[str] = (), tf32: bool = False, external_tactics: bool = False
) -> Settings:
    """Of a build of a network whose tensors have these `types` (members of DataType).

    Float32 means float32: TF32, the versions' default, is off unless asked for. Raises MeasurementError where a weakly
    typed network holds a type that the version has no flag for.
    """
    on: list[str] = []
    off: list[str] = []
    notes: list[str] = []
    if api.has("BuilderFlag", "TF32"):
        (on if tf32 else off).append("TF32")
    elif tf32:
        notes.append(f"tf32 is not in TensorRT {api.version}")
    if typing == "weak":
        for kind in sorted(FLAG_OF_TYPE.keys() & set(types)):
            if not api.has("BuilderFlag", FLAG_OF_TYPE[kind]):
                raise MeasurementError(f"{kind} tensors are not in TensorRT {api.version}")
            on.append(FLAG_OF_TYPE[kind])
    sources = tuple(name for name in EXTERNAL if api.has("TacticSource", name))
    if external_tactics and not sources:
        notes.append(f"external_tactics are not in TensorRT {api.version}")
    previews = ((CORE_ONLY, False),) if external_tactics and api.has("PreviewFeature", CORE_ONLY) else ()
    return Settings(
        tuple(on),
        tuple(off),
        sources if external_tactics else (),
        () if external_tactics else sources,
        previews,
        tuple(notes),
    )


def unsupported(version: str, capability: tuple[int, int], device: str) -> str | None:
    """Why a version does not run on a device, and which would; None where it does."""
    release = release_of(version)
    least = max((since, bound) for since, bound in _LEAST.items() if since <= max(release, (8, 0)))[1]
    most = max((since, bound) for since, bound in _MOST.items() if since <= max(release, (8, 0)))[1]
    said = f"TensorRT {version} does not run on {device} (compute capability {capability[0]}.{capability[1]})"
    if capability < least:
        newest = newest_for(capability)
        mend = (
            f"the newest that does is {newest}: pip install 'tensorrt=={newest}.*'"
            if newest is not None
            else "no version from 8.6 on does: --backend torch, with a torch built for it"
        )
        return f"{said}; {mend}"
    if capability > most:
        since = min((since for since, bound in _MOST.items() if bound >= capability), default=None)
        mend = "pip install --upgrade tensorrt" if since is None else f"pip install 'tensorrt>={since[0]}.{since[1]}'"
        return f"{said}: it is older than the device; run: {mend}"
    return None


def newest_for(capability: tuple[int, int]) -> str | None:
    """The newest version for a compute capability whose support has ended; None: none of ours, or still supported."""
    newest = {(10, 0): "8.6", (10, 5): "10.4"}
    ended = [since for since, bound in _LEAST.items() if capability < bound]
    return newest.get(min(ended)) if ended else None
