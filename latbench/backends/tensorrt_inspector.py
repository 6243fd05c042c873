"""What TensorRT's engine inspector says of an engine, in the JSON of 8.6 and 10 and in that of 11.

Imported by workers: standard library only, Python 3.9.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from latbench.errors import MeasurementError


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, after fusion: a ForeignNode stays one, however many operators it holds."""

    name: str  # as the profiler reports it
    op: str  # "CaskConvolution", "Reformat", "Myelin"; "" where the engine holds names only
    tactic: str  # the kernel chosen; "" where the engine does not say


@dataclass(frozen=True)
class EngineInfo:
    """Layers in execution order, and the names of inputs and outputs."""

    layers: tuple[EngineLayer, ...]
    tensors: tuple[str, ...]


def parse(text: str) -> EngineInfo:
    """Of ``get_engine_information(JSON)``. Raises MeasurementError where it is none of the known forms."""
    try:
        raw = json.loads(text)
        layers = tuple(_layer(one) for one in raw["Layers"])
        # Until 10 names only; from 11 on objects: docs.nvidia.com, "Migrating IEngineInspector Usage"
        names = raw["Bindings"] if "Bindings" in raw else [one["Name"] for one in raw["I/O Tensors"]]
        tensors = tuple(str(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MeasurementError(
            f"the engine inspector's JSON has no known form: {type(error).__name__}: {error}"
        ) from error
    return EngineInfo(layers, tensors)


def _layer(raw: Any) -> EngineLayer:
    if isinstance(raw, str):  # profiling verbosity LAYER_NAMES_ONLY
        return EngineLayer(raw, "", "")
    return EngineLayer(
        str(raw["Name"]), str(raw.get("LayerType", "")), str(raw.get("TacticName") or raw.get("TacticValue") or "")
    )
