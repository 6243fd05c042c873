"""``Spool``: the file beside a table that a run writes line by line, so that a crash loses one measurement at most.

Line 1 holds the pid of its writer and a header, a JSON mapping of the conditions; every later line is one record. A
line is one synced write and counts once it ends in a newline. Lines carry checksums: a damaged one is dropped, its
measurement taken again. The file is locked (``flock``) while a run has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from latbench.errors import ProvenanceConflictError, TableBusyError, TableError
from latbench.provenance import canonical_json, differences
from latbench.seals import BrokenSealError, check_json, seal_json

# Rewritten in place by each run: digits of one width, so that no half-written pid can break the line. No checksum
# covers it.
_PID = '{"pid":"%010d"'
_N_PID = len(_PID % 0)


class Spool:
    """Progress of one run: ``with Spool(table, header) as spool: spool.append(record)``.

    Entering takes the lock, reads into ``records`` what an earlier run under the same header left, and cuts off a last
    line that was not finished. Read the table after entering, not before: its last writer may just have compacted.
    Raises TableBusyError where another run has it, ProvenanceConflictError where the header is another one, TableError
    where the file cannot be opened or is none of ours.
    """

    def __init__(self, table: Path | str, header: Mapping[str, Any]) -> None:
        self.table = Path(table)
        self.path = self.table.with_name(f"{self.table.name}.partial.jsonl")
        self.header: dict[str, Any] = json.loads(canonical_json(header))  # as it will be read back
        self.records: list[dict[str, Any]] = []  # found on entering
        self.n_dropped = 0  # damaged lines found on entering, an unfinished last one included
        self._fd = -1
        self._end = 0  # offset behind the last whole line

    def __enter__(self) -> Spool:
        try:
            self._fd = self._lock()
            self._load()
        except OSError as error:
            self.close()
            raise TableError(f"cannot open {self.path}: {error.strerror}; choose another -o") from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """One record, on disk when this returns. Raises TableError where there is no room; what was there stays."""
        self._write_line(seal_json(json.dumps(record, separators=(",", ":"), allow_nan=False)))

    def remove(self) -> None:
        """Deletes the file, once its records are in the table; the lock is kept until the spool closes."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the lock back; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last owner may have removed the file between our open and our lock: a lock on a file without a
                # name keeps nobody out, so take the one that has the name now.
                if os.path.samestat(os.fstat(fd), self.path.stat()):
                    return fd
            except FileNotFoundError:
                pass
            except BlockingIOError:
                found = re.match(rb'\{"pid":"0*(\d+)"', os.pread(fd, 64, 0))
                who = f"another run (pid {found[1].decode()})" if found else "another run"
                os.close(fd)
                raise TableBusyError(f"{who} is writing {self.table}; wait for it or choose another -o") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _load(self) -> None:
        text = self.path.read_bytes()
        head, *lines = text.split(b"\n")
        unfinished = lines.pop() if lines else head  # what follows the last newline
        self._end = len(text) - len(unfinished)
        if not self._end:  # new, or killed while it wrote its header
            if unfinished and not b'{"pid":"'.startswith(unfinished[:8]):
                raise self._foreign()
            os.ftruncate(self._fd, 0)
            self._write_line(_PID % os.getpid() + seal_json(f',"header":{canonical_json(self.header)}}}'))
            return
        if not text.startswith(b'{"pid":"'):
            raise self._foreign()
        try:
            check_json(head[_N_PID:])
            written = json.loads(head)
        except BrokenSealError as error:
            raise TableError(f"{self.path}: {error}; restore it, or delete it and run again") from None
        except (ValueError, RecursionError):
            raise self._foreign() from None
        if not isinstance(written.get("header"), dict):
            raise self._foreign()
        conflicts = differences(written["header"], self.header)
        if conflicts:
            raise ProvenanceConflictError(
                f"{self.path} holds {len(lines)} measurements of a run under other conditions (there / now): "
                f"{'; '.join(conflicts)}; finish it with the old options, choose another -o, or delete the file"
            )
        records = [_parse(line, sealed="crc32" in written) for line in lines]
        self.records = [record for record in records if record is not None]
        self.n_dropped = len(records) - len(self.records) + bool(unfinished)
        os.ftruncate(self._fd, self._end)
        os.pwrite(self._fd, (_PID % os.getpid()).encode(), 0)

    def _foreign(self) -> TableError:
        return TableError(f"{self.path} is not the progress of a latbench run: delete it or choose another -o")

    def _write_line(self, text: str) -> None:
        line = text.encode() + b"\n"
        try:
            if os.pwrite(self._fd, line, self._end) != len(line):
                raise OSError(0, "No space left on device")  # a short write; the next one would say so itself
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):  # where this fails too, the next run cuts it off
                os.ftruncate(self._fd, self._end)
            raise TableError(
                f"cannot write {self.path}: {error.strerror}; nothing is lost, the measurements so far are kept in it: "
                "make room and run the same command again"
            ) from None
        self._end += len(line)


def _parse(line: bytes, *, sealed: bool) -> dict[str, Any] | None:
    """The mapping on a line; None where the line is damaged, or lacks the checksum that all of its file have."""
    try:
        check_json(line)
        record = json.loads(line)
    except (ValueError, RecursionError):  # also undecodable bytes, and a checksum that does not fit
        return None
    if not isinstance(record, dict) or (record.pop("crc32", None) is None and sealed):
        return None
    return record
