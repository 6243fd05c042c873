"""Ctrl-C at any time and twice in a row, SIGTERM, a closed or resized terminal: what could be saved is, and the last
line tells how to go on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import signal
import struct
import termios
import time
from pathlib import Path

import pytest
from runs import KEYS, PROGRAM, Command, Profile, Workers, one_line, soon

from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable
from searchers.results import read_result
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
SEARCH = ["search", "aows", "--table", "t.parquet", "--target", "100us", "--data", "digits", "--max-images", 160]
SEARCH += ["--batch-size", 16, "--set", "adaptive=false", "-o", "found"]
SHOW_CURSOR = b"\x1b[?25h"
# What an interrupted statement had open is closed by the collector, in Python's own import of a module too.
OPEN = {"PYTHONWARNINGS": "error,ignore::ResourceWarning"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("n", [0, 5])
def test_a_profile_ends_in_one_line_and_can_be_gone_on_with(
    tmp_path: Path, workers: Workers, n: int, number: int
) -> None:
    run = Profile(tmp_path, env=OPEN)
    run.wait_for(1 + n)
    run.signal(number)
    status, out, err = run.end()
    assert (status, out) == (STATUS[signal.Signals(number)], "")
    assert err.strip() == f"Error: {WORDS[signal.Signals(number)]}; the same command goes on from here"
    assert workers(run.pid) == []
    assert list(run.tmp.iterdir()) == []
    before = run.records()
    assert len(before) > n
    if number == signal.SIGINT:
        status, _, err = (later := Profile(tmp_path)).end()
        assert (status, err) == (0, "")
        assert set(LatencyTable.read(later.table).frame["key"]) == KEYS


def test_twice_in_a_row_at_any_time(tmp_path: Path, workers: Workers) -> None:
    rng = random.Random(0)
    for wait_s in (0.2, 0.6, 1.2):
        run = Profile(tmp_path, env=OPEN)
        time.sleep(wait_s)
        run.signal(signal.SIGINT)
        time.sleep(rng.choice([0, 0.0005, 0.002, 0.01]))
        run.signal(signal.SIGINT)
        status, out, err = run.end()
        if status == 0:
            assert out
            break
        if status != -signal.SIGINT:  # before there was a program to heed it
            assert status == 130
            assert "Traceback" not in err
            assert err.strip().splitlines()[-1].startswith("Error: interrupted; ")
        assert run.leaves_nothing(workers)
    status, _, err = (last := Profile(tmp_path)).end()
    assert (status, err) == (0, "")
    assert set(LatencyTable.read(last.table).frame["key"]) == KEYS


@pytest.mark.parametrize(
    "place",
    [
        "class Gone:\n  def __del__(self): stop()\nGone()",  # swallows it
        "try: stop()\nexcept BaseException: raise ImportError('initialization failed')",  # has its own word for it
    ],
)
def test_where_exceptions_are_swallowed_or_turned_into_others(tmp_path: Path, place: str) -> None:
    lines = f"def stop():\n  os.kill(os.getpid(), signal.SIGINT); time.sleep(0.001)\n{place}\ntime.sleep(20)"
    program = "import os, signal, time, latbench.cli.target as module\n"
    program += f"def strike(*a, **k): exec({lines!r}, globals())\nmodule.target_of = strike\n" + PROGRAM
    status, out, err = (run := Profile(tmp_path, program=program)).end()
    assert (status, out, err.strip()) == (130, "", "Error: interrupted; the same command goes on from here")
    assert not run.table.exists()


def test_what_was_ignored_from_the_start_stays_so(tmp_path: Path) -> None:
    """nohup, and jobs in a shell's background."""
    run = Profile(tmp_path, program="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " + PROGRAM)
    run.wait_for(3)
    run.signal(signal.SIGHUP)
    status, _, err = run.end()
    assert (status, err) == (0, "")


def test_a_terminal_resized_and_then_closed_off_by_ctrl_c(tmp_path: Path, workers: Workers) -> None:
    parent, child = pty.openpty()
    run = Profile(tmp_path, stdin=child, stdout=child, stderr=child, start_new_session=True, env=OPEN)
    os.close(child)
    os.set_blocking(parent, False)
    seen = b""
    rng = random.Random(0)

    def look() -> bool:
        nonlocal seen
        with contextlib.suppress(OSError):
            seen += os.read(parent, 65536)
        rows, columns = rng.randint(1, 60), rng.randint(1, 200)
        fcntl.ioctl(parent, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if run.process.poll() is None:
            os.kill(run.pid, signal.SIGWINCH)
        return len(run.records()) >= 8

    run.wait_until(look)
    run.signal(signal.SIGINT)
    assert soon(lambda: look() and run.process.poll() is not None, 20)
    assert run.process.returncode == 130
    look()
    os.close(parent)
    assert b"profile mobilenet_v1" in seen
    assert b"Traceback" not in seen
    assert seen.rfind(SHOW_CURSOR) > seen.rfind(b"\x1b[?25l"), "the cursor is there again"
    assert b"goes on from here" in seen
    assert soon(lambda: not workers(run.pid))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    return tmp_path


@pytest.mark.slow
def test_an_interrupted_training_keeps_every_step(folder: Path) -> None:
    """Without the checkpoint that an interrupt writes, one is written after 30 s."""
    whole = Command(folder, *SEARCH[:-1], "whole", "--epochs", 2, program=_steps("whole.txt"))
    assert whole.end()[0] == 0
    run = Command(folder, *SEARCH, "--epochs", 2, program=_steps("parts.txt"))
    run.wait_until(lambda: _count(folder / "parts.txt") >= 7)
    run.signal(signal.SIGINT)
    status, _, err = run.end()
    assert status == 130
    assert err.strip() == "Error: interrupted; the same command goes on from here"
    taken = (folder / "parts.txt").read_text().split()
    assert len(taken) < _count(folder / "whole.txt")
    assert Command(folder, *SEARCH, "--epochs", 2, program=_steps("parts.txt")).end()[0] == 0
    assert (folder / "parts.txt").read_text() == (folder / "whole.txt").read_text(), "no step was taken twice"
    found, expected = read_result(folder / "found").result, read_result(folder / "whole").result
    assert (found.arch, found.score, found.notes) == (expected.arch, expected.score, expected.notes)
    assert found.network.read_bytes() == expected.network.read_bytes()


def test_a_second_interrupt_does_not_wait_for_the_step(folder: Path) -> None:
    slow = "import searchers.aows as a, time; s = a.sandwich; "
    slow += "a.sandwich = lambda *x: (open('began', 'w'), time.sleep(30), s(*x))[-1]; "
    run = Command(folder, *SEARCH, "--epochs", 1, program=slow + PROGRAM)
    run.wait_until((folder / "began").exists)
    begin = time.monotonic()
    run.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.process.poll() is None, "the first one waits for the end of the step"
    run.signal(signal.SIGTERM)
    status, _, err = run.end()
    assert status == 143
    assert "the same command goes on" in err
    assert time.monotonic() - begin < 20


def test_a_command_that_keeps_nothing_says_so(folder: Path) -> None:
    run = Command(folder, "bench", "mobilenet_v1:mobilenet-v1", "--ci", "0.01%", "-o", "b.parquet")
    run.wait_until(lambda: list(run.tmp.iterdir()))
    run.signal(signal.SIGINT)
    status, out, err = run.end()
    assert (status, out) == (130, "")
    assert "the same command starts again" in one_line(err.lstrip())
    assert not (folder / "b.parquet").exists()
    assert list(run.tmp.iterdir()) == []


def test_while_python_looks_for_a_folder_for_temporary_files(folder: Path) -> None:
    """It tries one with a file of its own."""
    strike = "import os, signal; remove = os.unlink; "
    strike += "os.unlink = lambda path: (os.kill(os.getpid(), signal.SIGINT), remove(path)); "
    run = Command(folder, "bench", "mobilenet_v1:mobilenet-v1", "-o", "b.parquet", program=strike + PROGRAM)
    status, out, err = run.end()
    assert (status, out) == (130, "")
    assert "the same command starts again" in one_line(err.lstrip())
    assert list(run.tmp.iterdir()) == []


def _steps(name: str) -> str:
    """A program that notes every step that is trained."""
    noted = "import os, searchers.train as t, torch; torch.set_num_threads(1); tell = t.Loop._tell; "
    noted += f"notes = os.open({name!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND); "
    noted += (
        "t.Loop._tell = lambda loop, *x: (os.write(notes, f'{loop.epoch}/{loop.step} '.encode()), tell(loop, *x)); "
    )
    return noted + PROGRAM


def _count(path: Path) -> int:
    return len(path.read_text().split()) if path.exists() else 0
