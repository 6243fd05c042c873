"""A network in int8: calibrated on the user's data by ONNX Runtime, quantised as the back-end fuses it.

The row's key says scheme and network, not the data: scales move no latency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from latbench.backends.base import Backend
from latbench.backends.onnxruntime import OnnxRuntimeBackend
from latbench.errors import UsageError
from latbench.graph import onnx_model
from latbench.graph.calibration import Run, exposed, ranges, read_batches
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import random_weights
from latbench.graph.quantize import Scheme, quantised_tensors, quantize
from latbench.profiling.jobs import GraphJob, Job, OnnxJob
from latbench.profiling.scratch import scratch


@dataclass(frozen=True)
class Int8Report:
    """How a network was quantised, and what that did to its outputs."""

    scheme: Scheme
    data: str
    n_samples: int
    percentile: float | None  # None: min-max
    n_tensors: int  # activations with a Q/DQ pair
    error: float  # RMS of the change of the outputs over their RMS, on the first batch, by ONNX Runtime


def scheme_of(backend: type[Backend]) -> Scheme:
    """Raises UsageError where a back-end computes no int8."""
    scheme: Scheme | None = getattr(backend, "int8", None)
    if scheme is None:
        raise UsageError(f"{backend.name} runs no int8 networks here: onnxruntime, openvino and tensorrt do")
    return scheme


def in_int8(job: Job, scheme: Scheme, data: Path, percentile: float | None = None) -> tuple[OnnxJob, Int8Report]:
    """The job's network in int8. Raises UsageError where the data do not fit it, ModelError where it cannot be."""
    model = onnx_model.from_bytes(_float_model(job), source=job.row.signature[:80])
    sources = quantised_tensors(model, scheme)
    batches = read_batches(data, model)
    with _running(exposed(model, sources.values())) as run:
        found = ranges(run, batches, sources.values(), percentile)
        before = run(batches[0])
    quantised = quantize(model, found, scheme)
    with _running(quantised) as run:
        after = run(batches[0])
    outputs = [value.name for value in model.graph.output]
    changes = np.concatenate([(after[name] - before[name]).ravel() for name in outputs])
    scale = np.concatenate([before[name].ravel() for name in outputs])
    error = float(np.sqrt(np.square(changes).mean() / max(np.square(scale).mean(), 1e-30)))
    key = hashlib.sha256(f"int8:{scheme};{job.row.key}".encode()).hexdigest()[:16]
    row = replace(job.row, key=key, signature=f"int8:{scheme};{job.row.signature}")
    n_samples = sum(len(next(iter(batch.values()))) for batch in batches)
    report = Int8Report(scheme, str(data), n_samples, percentile, len(sources), error)
    return OnnxJob(quantised.SerializeToString(), row), report


def _float_model(job: Job) -> bytes:
    if isinstance(job, OnnxJob):
        return job.data
    assert isinstance(job, GraphJob)
    return to_onnx(job.graph, random_weights(job.graph))


@contextmanager
def _running(model: Any) -> Iterator[Run]:
    """Inferences of a model, its operators as they stand: fused ones would hide what lies between."""
    with scratch() as folder:
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        with OnnxRuntimeBackend({"optimisation": "none"}).load(path) as runner:
            yield runner.outputs
