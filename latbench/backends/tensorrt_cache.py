"""TensorRT's timing cache on disk: one per version and device, under a lock, written whole or not at all.

Without it two builds of one model may choose different kernels. Imported by workers: standard library, Python 3.9.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latbench.errors import MeasurementError

MAGIC = b"latbench timing cache 1\n"


class TimingCache:
    """The entries of one file. Use ``opened``: it holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _read(path)

    @property
    def digest(self) -> str:
        """8 hex digits over the entries; "empty" where there are none."""
        return hashlib.sha256(self.data).hexdigest()[:8] if self.data else "empty"

    def replace(self, data: bytes) -> None:
        """Writes other entries, atomically; the same ones leave the file alone."""
        if data == self.data:
            return
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)  # noqa: PTH105  (beside os.fdopen and mkstemp)
        except BaseException:
            os.unlink(name)  # noqa: PTH108
            raise
        self.data = data


@contextmanager
def opened(path: Path) -> Iterator[TimingCache]:
    """The cache, nobody else's until the block ends: another build waits, and would disturb the timing anyway.

    Raises MeasurementError where the file is corrupt or cannot be written.
    """
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "wb")  # noqa: SIM115, PTH123  (held for the whole block; never removed)
    except OSError as error:
        raise MeasurementError(
            f"timing cache {path}: {error.strerror}; choose another file: --option timing_cache=FILE, or off"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back when this process dies
        yield TimingCache(path)


def default_path(version: str, device: str, capability: tuple[int, int]) -> Path:
    """~/.cache/latbench/tensorrt/8.6.1-NVIDIA-TITAN-Xp-sm61.timing: a cache fits one version and one device."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    device = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return Path(root) / "latbench" / "tensorrt" / f"{version}-{device}-sm{capability[0]}{capability[1]}.timing"


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise MeasurementError(f"timing cache {path}: {error.strerror}") from error
    magic, digest, data = raw[: len(MAGIC)], raw[len(MAGIC) : len(MAGIC) + 64], raw[len(MAGIC) + 65 :]
    if magic != MAGIC or hashlib.sha256(data).hexdigest().encode() != digest:
        raise MeasurementError(f"timing cache {path} is corrupt; run: rm '{path}'")
    return data
