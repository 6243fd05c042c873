"""A network in int8: calibrated on the user's data by ONNX Runtime, quantised as the back-end fuses it.

The row's key says scheme and network, not the data: scales move no latency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Int8Report:
    """How a network was quantised, and what that did to its outputs."""

    scheme: Scheme
    data: str
    n_samples: int
    percentile: float | None  # None: min-max
    n_tensors: int  # activations with a Q/DQ pair
    error: float  # RMS of the change of the outputs over their RMS, on the first batch, computed in float32
    error_here: float | None  # by the back-end's own kernels on this host; None: tensorrt's were not asked


def scheme_of(backend: type[Backend]) -> Scheme:
    """Raises UsageError where a back-end computes no int8."""
    scheme: Scheme | None = getattr(backend, "int8", None)
    if scheme is None:
        raise UsageError(f"{backend.name} runs no int8 networks here: onnxruntime, openvino and tensorrt do")
    return scheme


def in_int8(
    job: Job, backend: type[Backend], data: Path, percentile: float | None = None
) -> tuple[OnnxJob, Int8Report]:
    """The job's network in int8, as `backend` runs it.

    Raises UsageError where that computes no int8 or the data do not fit the network, ModelError where it cannot be.
    """
    scheme, plain = scheme_of(backend), OnnxRuntimeBackend({"optimisation": "none"})  # all in float32, nothing fused
    model = onnx_model.from_bytes(_float_model(job), source=job.row.signature[:80])
    sources = quantised_tensors(model, scheme)
    batches = read_batches(data, model)
    with _running(exposed(model, sources.values()), plain) as run:
        found = ranges(run, batches, sources.values(), percentile)
        before = run(batches[0])
    exact = {value.name: before[value.name] for value in model.graph.output}
    quantised = quantize(model, found, scheme)
    error = _change(quantised, plain, batches[0], exact)
    error_here = None if scheme == "tensorrt" else _change(quantised, backend({}), batches[0], exact)
    key = hashlib.sha256(f"int8:{scheme};{job.row.key}".encode()).hexdigest()[:16]
    row = replace(job.row, key=key, signature=f"int8:{scheme};{job.row.signature}")
    n_samples = sum(len(next(iter(batch.values()))) for batch in batches)
    report = Int8Report(scheme, str(data), n_samples, percentile, len(sources), error, error_here)
    return OnnxJob(quantised.SerializeToString(), row), report


def _float_model(job: Job) -> bytes:
    if isinstance(job, OnnxJob):
        return job.data
    assert isinstance(job, GraphJob)
    return to_onnx(job.graph, random_weights(job.graph))


def _change(quantised: Any, backend: Backend, batch: Tensors, exact: Tensors) -> float:
    """RMS of what `backend`'s outputs are off by, over that of the exact ones."""
    with _running(quantised, backend) as run:
        found = run(batch)
    apart = np.concatenate([(found[name] - value).ravel() for name, value in exact.items()])
    size = np.concatenate([value.ravel() for value in exact.values()])
    return float(np.sqrt(np.square(apart).mean() / max(np.square(size).mean(), 1e-30)))


@contextmanager
def _running(model: Any, backend: Backend) -> Iterator[Run]:
    """Inferences of a model."""
    with scratch() as folder:
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        with backend.load(path) as runner:
            yield runner.outputs
