"""TensorRT's timing cache on disk."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latbench.backends import tensorrt_cache
from latbench.errors import MeasurementError


def test_a_timing_cache_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.timing"
    with tensorrt_cache.opened(path) as cache:
        assert (cache.data, cache.digest) == (b"", "empty")
        cache.replace(b"tactics\n" * 100)
        after = cache.digest
    with tensorrt_cache.opened(path) as cache:
        assert (cache.data, cache.digest) == (b"tactics\n" * 100, after)
        stamp = path.stat().st_mtime_ns
        cache.replace(cache.data)
        assert path.stat().st_mtime_ns == stamp
    assert sorted(p.name for p in path.parent.iterdir()) == ["t.timing", "t.timing.lock"]


@pytest.mark.parametrize(
    "harm", [lambda raw: raw[:-1], lambda raw: b"x" + raw, lambda raw: b"", lambda raw: raw + b"x"]
)
def test_a_corrupt_timing_cache_names_itself_and_the_command(harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "t.timing"
    with tensorrt_cache.opened(path) as cache:
        cache.replace(b"tactics")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(MeasurementError, match=r"t\.timing is corrupt; run: rm '"), tensorrt_cache.opened(path):
        pass


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeasurementError, match="choose another file"), tensorrt_cache.opened(tmp_path / "file" / "t"):
        pass


def _append(path: Path) -> None:
    for _ in range(20):
        with tensorrt_cache.opened(path) as cache:
            data = cache.data
            time.sleep(0.001)
            cache.replace(data + b"+")


def test_two_builds_at_once_lose_no_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(tmp_path / "t",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with tensorrt_cache.opened(tmp_path / "t") as cache:
        assert cache.data == b"+" * 40


def test_a_cache_is_of_one_version_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    path = tensorrt_cache.default_path("8.6.1", "NVIDIA TITAN Xp", (6, 1))
    assert str(path) == "/c/latbench/tensorrt/8.6.1-NVIDIA-TITAN-Xp-sm61.timing"
