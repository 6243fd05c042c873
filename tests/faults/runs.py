"""``latbench`` as its users run it: processes of their own, whose output and temporary files stand in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latbench.profiling.jobs import jobs_of
from latbench.profiling.session import CANARY
from latbench.spaces.mobilenet_v1 import MobileNetV1Space

ROOT = Path(__file__).parents[2]
SETTINGS = {"levels": 2, "min_width": 0.1, "max_width": 0.2, "num_classes": 10}
PROFILE = [
    "profile",
    "--device",
    "cpu",
    "--space",
    "mobilenet_v1",
    "--resolution",
    "32",
    "--rounds",
    "1",
    "--ci",
    "20%",
]
PROFILE += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
KEYS = {job.row.key for job in jobs_of(MobileNetV1Space(resolution=32, **SETTINGS))}  # type: ignore[arg-type]
PROGRAM = "import sys; sys.argv[0] = 'latbench'; from latbench.cli import main; main()"

Workers = Callable[[int], list[int]]


class Command:
    """A ``latbench`` process in a folder; its temporary files are in ``tmp`` there. `program`: what Python runs."""

    def __init__(self, folder: Path, *args: object, program: str = PROGRAM, **more: Any) -> None:
        self.tmp = folder / "tmp"
        self.tmp.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp), "PYTHONWARNINGS": "error"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # nothing that a full disk or a kill cuts short is left to others
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, args)],
            env=environment | more.pop("env", {}),
            text=True,
            preexec_fn=heed_interrupts,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": folder, **more},
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def leaves_nothing(self, workers: Workers) -> bool:
        """Whether its workers and temporary files go after it has ended."""
        return soon(lambda: not workers(self.pid)) and soon(lambda: not list(self.tmp.iterdir()))

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err

    def wait_until(self, there: Callable[[], object]) -> None:
        """Until `there` () is true, or the process has ended, or five minutes are over."""
        end = time.monotonic() + 300
        while not there() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)


class Profile(Command):
    """``latbench profile`` of the smallest real space, into ``out/t.parquet``."""

    def __init__(self, folder: Path, *more: object, output: Path | None = None, **rest: Any) -> None:
        (folder / "out").mkdir(exist_ok=True)
        self.table = output or folder / "out" / "t.parquet"
        self.spool = self.table.with_name(f"{self.table.name}.partial.jsonl")
        super().__init__(folder, *PROFILE, "-o", self.table, *more, **rest)

    def records(self) -> list[dict[str, Any]]:
        """Whole measurements in the spool."""
        if not self.spool.exists():
            return []
        lines = self.spool.read_bytes().split(b"\n")[:-1]
        return [record for record in map(json.loads, lines) if "key" in record]

    def wait_for(self, n: int) -> None:
        """Until n measurements are in the spool, or the process has ended."""
        self.wait_until(lambda: len(self.records()) >= n)


def heed_interrupts() -> None:
    """Shells start background jobs with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_canary(record: dict[str, Any]) -> bool:
    return bool(record["key"] == CANARY.key)


def soon(there: Callable[[], object], seconds: float = 4.0) -> bool:
    """Whether `there` () becomes true."""
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def one_line(err: str) -> str:
    """stderr that is one error in one line."""
    assert err.startswith("Error: "), err
    assert err.count("\n") == 1, err
    return err
