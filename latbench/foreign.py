"""Files that others may have written, read without trust: their size bounded before memory is taken, JSON that is not
nested without end, numpy's arrays of numbers only. Nothing here can run what a file holds.

What is refused raises ValueError, its reason on one line; the caller knows which file it was and says so.
"""

from __future__ import annotations

import io
import json
import math
import stat
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

# What a damaged archive or header makes zipfile and numpy raise.
_DAMAGE = (OSError, EOFError, LookupError, NotImplementedError, OverflowError, RuntimeError, SyntaxError, TypeError)
_ARCHIVE = (*_DAMAGE, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes: no pipe, no device that never ends. Raises OSError, ValueError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # a directory has its own OSError
        raise ValueError("it is no regular file")
    if found.st_size > limit:
        raise ValueError(f"it is larger than {limit >> 20} MiB")
    return path.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """One JSON value. Raises ValueError, also where brackets are nested deeper than Python's stack."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_npy(data: bytes) -> Any:
    """The array of an ``.npy`` file: numbers or truth values, and exactly as many as the file holds."""
    import numpy as np

    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        two = version == (2, 0)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format {version[0]}.{version[1]} is for more than plain numbers")
        read_header = np.lib.format.read_array_header_2_0 if two else np.lib.format.read_array_header_1_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a header that Python 2 wrote, or that looks so
            shape, fortran, dtype = read_header(stream)
    except (*_ARCHIVE, ValueError) as error:
        raise ValueError(f"an array's header is damaged: {' '.join(str(error).split())[:120]}") from None
    if dtype.kind not in "fiub":
        raise ValueError(f"an array of {dtype.name}, and only plain numbers are read")
    nbytes, held = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if nbytes != held:  # before room is made for what the header claims
        raise ValueError(f"an array of {nbytes} bytes, of which the file holds {held}")
    array = np.frombuffer(data, dtype, offset=stream.tell()).copy()
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def read_npz(data: bytes, limit: int) -> dict[str, Any]:
    """Name -> array of an ``.npz`` file whose arrays have at most `limit` bytes together."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > limit:
                raise ValueError(f"its arrays have {total} bytes unpacked, more than {limit >> 20} MiB")
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise ValueError("it holds two arrays of one name")
            # bzip2 and lzma would unpack beyond the size that the archive states; numpy writes neither
            if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
                raise ValueError("it is packed in a way that numpy does not write")
            return {member.filename.removesuffix(".npy"): read_npy(_unpacked(archive, member)) for member in members}
    except _ARCHIVE as error:
        raise ValueError(" ".join(str(error).split())[:160] or type(error).__name__) from None


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """As many bytes as the archive states, and no more: ``read()`` unpacks all there is before it looks."""
    with archive.open(member) as file:
        data = file.read(member.file_size)
        if len(data) != member.file_size or file.read(1):
            raise ValueError(f"{member.filename} is not of the size that the archive states")
    return data
