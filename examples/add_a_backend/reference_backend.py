"""A back-end of your own: onnx's reference evaluator, plain numpy, as slow as it is simple.

Install it (``pip install -e examples/add_a_backend``) and every command knows it: ``latbench bench MODEL --backend
reference``, ``latbench profile --backend reference``. A back-end is constructed in the worker process; import its
runtime in ``load``, not above, and hold it to the laws that ours keep::

    class TestReference(latbench.testing.BackendConformance):
        backend = ReferenceBackend
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latbench.backends.base import LayerTime, Scalar, checked
from latbench.errors import MeasurementError


class ReferenceBackend:
    """Options: `threads`, which numpy does not heed beyond the worker's affinity, and `seed` of the inputs."""

    name: ClassVar[str] = "reference"
    artifact: ClassVar[Literal["onnx", "graph"]] = "onnx"
    clock: ClassVar[Literal["host", "cuda_event", "model"]] = "host"
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        counts = {"threads": (1, 1024), "seed": (0, 2**31)}
        self.options = checked(self.name, {"threads": 1, "seed": 0}, options, counts=counts)

    @classmethod
    def available(cls) -> None:
        """Always: onnx comes with latbench."""

    @classmethod
    def versions(cls) -> dict[str, str]:
        import onnx

        return {"reference": onnx.__version__}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[ReferenceRunner]:
        """Raises MeasurementError where onnx cannot read the file, or has no such operator."""
        from onnx.reference import ReferenceEvaluator

        try:
            session = ReferenceEvaluator(str(artifact))
        except Exception as error:  # whatever a runtime raises on a bad model becomes a failed row
            raise MeasurementError(f"{type(error).__name__}: {error}") from error
        yield ReferenceRunner(session, int(self.options["seed"]))


class ReferenceRunner:
    """A loaded model with its inputs, made once: never inside the timing."""

    def __init__(self, session: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._session = session
        self._feed = {}
        for value in session.proto_.graph.input:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            self._feed[value.name] = rng.standard_normal(shape).astype(np.float32)

    def sample(self, repeat: int) -> float:
        """Milliseconds of `repeat` inferences."""
        begin = time.perf_counter_ns()
        for _ in range(repeat):
            self._session.run(None, self._feed)
        return (time.perf_counter_ns() - begin) / 1e6

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(self._session.output_names, self._session.run(None, dict(inputs)), strict=True))

    def layers(self) -> list[LayerTime] | None:
        return None  # the evaluator has no profiler
