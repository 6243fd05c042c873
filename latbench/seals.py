"""Checksums over whole files, inside them where each format has room: a flipped bit is refused, never read as a number.

* JSON, and lines of it: a last entry ``"crc32"``, over the text before it.
* zip (fitted models, checkpoints): the archive's comment, over all that stands before the comment.
* parquet: over the footer, in the gap before it, where no reader looks. Pages have checksums of their own.

Other tools read such files as ever. What has no checksum passes: another tool wrote it, or an older latbench.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from typing import IO

_JSON_END = re.compile(rb',\s*"crc32":\s*"([0-9a-f]{8})"\s*\}\s*\Z')
_MARK = b"latbench crc32 "
_SEAL = re.compile(_MARK + rb"([0-9a-f]{8})\Z")
_SIZE = len(_MARK) + 8
_ZIP_END, _ZIP_END_SIZE = b"PK\5\6", 22  # of the record that ends an archive without a comment
_CHUNK = 1 << 20


class BrokenSealError(ValueError):
    """The bytes are not those that were written."""

    def __init__(self) -> None:
        super().__init__("its checksum does not fit: it was damaged, or changed, after it was written")


def seal_json(text: str) -> str:
    """The text of a mapping that is not empty, or the rest of one from its first comma on, with its checksum."""
    body = text.rstrip().removesuffix("}").rstrip()
    gap, end = ("\n  ", "\n}") if "\n" in body else ("", "}")
    return f'{body},{gap}"crc32":{" " if gap else ""}"{zlib.crc32(body.encode()):08x}"{end}'


def check_json(data: bytes) -> None:
    """Raises BrokenSealError where it is not the text that was sealed."""
    found = _JSON_END.search(data)
    if found and zlib.crc32(data[: found.start()]) != int(found[1], 16):
        raise BrokenSealError


def seal_zip(data: bytes) -> bytes:
    """An archive that has no comment, with its checksum as comment. Raises ValueError where it is none."""
    if data[-_ZIP_END_SIZE:][:4] != _ZIP_END:
        raise ValueError("no zip archive without a comment")
    head = data[:-2] + _SIZE.to_bytes(2, "little")
    return head + _sealed(zlib.crc32(head))


def check_zip(file: IO[bytes]) -> None:
    """Raises BrokenSealError where the archive is not the one that was sealed. Leaves the file at its start."""
    end = max(0, file.seek(0, os.SEEK_END) - _SIZE)
    file.seek(max(0, end - _ZIP_END_SIZE))
    tail = file.read()
    file.seek(0)
    found = _SEAL.match(tail[-_SIZE:])
    if found is None:
        if _ZIP_END in tail and tail[tail.rindex(_ZIP_END) :][20:22] == _SIZE.to_bytes(2, "little"):
            raise BrokenSealError  # a comment of this length is cut off, or damaged
        return
    crc, left = 0, end
    while left and (chunk := file.read(min(left, _CHUNK))):
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    file.seek(0)
    if crc != int(found[1], 16):
        raise BrokenSealError


def seal_parquet(file: IO[bytes]) -> None:
    """Of a file just written, open for reading and writing too."""
    start = _footer(file)
    file.seek(start)
    footer = file.read()
    file.seek(start)
    file.write(_sealed(zlib.crc32(footer)) + footer)


def check_parquet(file: IO[bytes]) -> bool:
    """Whether the footer is sealed. Raises BrokenSealError where it is not the one that was. Leaves the file at its
    start."""
    start = _footer(file)
    file.seek(max(0, start - _SIZE))
    data = file.read()
    file.seek(0)
    found = _SEAL.match(data[:_SIZE])
    if found and zlib.crc32(data[_SIZE:]) != int(found[1], 16):
        raise BrokenSealError
    # a footer whose length was hit is looked for at the wrong place: its seal is elsewhere near the end
    if found is None and _MARK in data:
        raise BrokenSealError
    return found is not None


def _footer(file: IO[bytes]) -> int:
    """Where a parquet file's footer begins."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 8))
    return max(0, end - 8 - int.from_bytes(file.read(4), "little"))


def _sealed(crc: int) -> bytes:
    return _MARK + b"%08x" % crc


def sealed_bytes(data: bytes) -> bytes:
    """`data` with its checksum where it is a zip archive or a parquet file; else as it is."""
    if data[-_ZIP_END_SIZE:][:4] == _ZIP_END:
        return seal_zip(data)
    if data[:4] == data[-4:] == b"PAR1":
        file = io.BytesIO(data)
        seal_parquet(file)
        return file.getvalue()
    return data
