"""What a runtime must offer: load an artifact, run it, tell its time by its own clock.

Imported by workers: standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Union

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError

Scalar = Union[int, float, str, bool]  # noqa: UP007  (evaluated, and workers run on Python 3.9 too)

MAX_THREADS = 1024


@dataclass(frozen=True)
class LayerTime:
    """One kernel of a loaded model, after the runtime's own fusions."""

    name: str
    op: str
    ms: float


class Runner(Protocol):
    """A loaded artifact on a device, inputs resident, ready to run."""

    def sample(self, repeat: int) -> float:
        """Milliseconds for `repeat` back-to-back inferences, synchronised, on the back-end's own clock."""
        ...

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One inference on given inputs, for conformance tests; never timed."""
        ...

    def layers(self) -> list[LayerTime] | None:
        """Per-layer times of a separate pass; None where the runtime has no profiler."""
        ...


class Backend(Protocol):
    """A runtime on one device. Constructed in the worker with the back-end's options."""

    name: ClassVar[str]
    artifact: ClassVar[Literal["onnx", "graph"]]  # what load() reads: an ONNX file, or a Graph as JSON
    clock: ClassVar[Literal["host", "cuda_event", "model"]]
    kinds: ClassVar[tuple[str, ...]]  # of devices that it runs on: "cpu", "gpu"

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        """Raises UsageError on unknown options."""
        ...

    @classmethod
    def available(cls) -> None:
        """Raises BackendUnavailableError, with the command that would mend it, where the runtime cannot run here."""
        ...

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Runtime and driver versions: what can move a number."""
        ...

    def load(self, artifact: Path) -> AbstractContextManager[Runner]:
        """Raises MeasurementError with the runtime's words."""
        ...


def checked(
    backend: str,
    defaults: Mapping[str, Scalar],
    options: Mapping[str, Scalar],
    *,
    counts: Mapping[str, tuple[int, int]] = {},
    choices: Mapping[str, Collection[str]] = {},
    flags: Collection[str] = (),
) -> dict[str, Scalar]:
    """`options` over a back-end's `defaults`. Raises UsageError on one that it does not have, or of a wrong value.

    counts: least and most of options that are whole numbers. choices: words to choose from. flags: true or false.
    """
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise UsageError(f"{backend} has no option {unknown[0]!r} (it has: {', '.join(defaults)})")
    whole = {**defaults, **options}
    for name, (least, most) in counts.items():
        value = whole[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UsageError(f"{backend}: {name} must be a whole number from {least} to {most}, got {value!r}")
    for name, words in choices.items():
        if whole[name] not in words:
            raise UsageError(f"{backend}: {name} must be {' or '.join(words)}, got {whole[name]!r}")
    for name in flags:
        if not isinstance(whole[name], bool):
            raise UsageError(f"{backend}: {name} must be true or false, got {whole[name]!r}")
    return whole


_NOISE = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)


def aligned_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Seeded noise on a page boundary: where a buffer lies decides cache conflicts, so it is always the same.

    Floats are normal, integers 0 to 7: never all zeros or ones, on which some kernels are quicker.
    """
    kind = np.dtype(dtype)
    n = int(np.prod(shape, dtype=np.int64))
    room = np.empty(n * kind.itemsize + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    array: NDArray[Any] = room[start : start + n * kind.itemsize].view(kind)
    noise: NDArray[Any] = _NOISE
    if kind.kind != "f":
        noise = np.abs(noise * 4).astype(np.int64) % (2 if kind.kind == "b" else 8)
    whole = n - n % len(noise)
    array[:whole].reshape(-1, len(noise))[...] = noise
    array[whole:] = noise[: n - whole]
    return array.reshape(shape)


class Buffers:
    """Input and output memory that a back-end keeps from model to model: allocated, filled and touched once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, str], NDArray[Any]] = {}

    def get(self, role: str, position: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array for one input or output; what the role "input" gives holds noise, and nobody writes to it."""
        n = int(np.prod(shape, dtype=np.int64))
        kept = self._kept.get((role, position, dtype))
        if kept is None or len(kept) < n:
            kept = self._kept[role, position, dtype] = aligned_array((n,), dtype)
        return kept[:n].reshape(shape)
