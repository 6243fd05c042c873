"""Arrays of numbers and one JSON text in one sealed ``.npz``: what fitted models and searches are kept in. No pickle is
written or read; a damaged archive is refused (``latbench.seals``)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latbench import foreign
from latbench.seals import check_zip, seal_zip

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEAD = "latbench"  # name of the array that holds the text


def pack(head: str, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The archive of a JSON text and named arrays, compressed and sealed."""
    import numpy as np

    buffer = io.BytesIO()
    text = np.frombuffer(head.encode(), np.uint8)
    np.savez_compressed(buffer, allow_pickle=False, **{HEAD: text, **arrays})
    return seal_zip(buffer.getvalue())


def unpack(path: Path, limit: int) -> dict[str, NDArray[Any]]:
    """All arrays, the text among them (``head_of``), of at most `limit` bytes. Raises OSError, ValueError."""
    data = foreign.read_bytes(path, limit)
    check_zip(io.BytesIO(data))
    return foreign.read_npz(data, limit)


def head_of(arrays: dict[str, NDArray[Any]]) -> Any:
    """Takes the text out of the arrays and reads it. Raises KeyError where there is none, ValueError."""
    return foreign.parse_json(arrays.pop(HEAD).tobytes().decode())
