from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latbench.errors import ProvenanceConflictError, TableBusyError, TableError
from latbench.spool import Spool

HEADER = {"device": "cpu", "policy": {"runs": 2, "context": "sandwich"}}


def fill(table: Path, n: int) -> Path:
    with Spool(table, HEADER) as spool:
        for i in range(n):
            spool.append({"key": f"k{i}", "samples_ms": [0.1 * i]})
        return spool.path


def test_a_second_run_finds_what_the_first_one_appended(tmp_path: Path) -> None:
    path = fill(tmp_path / "t.parquet", 3)
    assert path.name == "t.parquet.partial.jsonl"
    with Spool(tmp_path / "t.parquet", HEADER) as spool:
        assert [r["key"] for r in spool.records] == ["k0", "k1", "k2"]
        assert spool.n_dropped == 0
        spool.append({"key": "k3"})
    with Spool(tmp_path / "t.parquet", HEADER) as spool:
        assert [r["key"] for r in spool.records] == ["k0", "k1", "k2", "k3"]


def test_tuples_in_a_header_equal_the_lists_that_are_read_back(tmp_path: Path) -> None:
    for _ in range(2):
        with Spool(tmp_path / "t", {"cpus": (0, 1), "threads": 1}) as spool:
            assert spool.records == []


@pytest.mark.parametrize("n", [0, 1, 2])
def test_killed_at_any_byte_the_file_keeps_every_whole_line(tmp_path: Path, n: int) -> None:
    path = fill(tmp_path / "t", n)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        expected = max(whole[:size].count(b"\n") - 1, 0)
        with Spool(tmp_path / "t", HEADER) as spool:
            assert len(spool.records) == expected
            spool.append({"key": "after"})
        with Spool(tmp_path / "t", HEADER) as spool:
            assert [r["key"] for r in spool.records] == [*(f"k{i}" for i in range(expected)), "after"]
            assert spool.n_dropped == 0  # the unfinished line was cut off, not left in the middle


def test_damaged_middle_lines_cost_themselves_only(tmp_path: Path) -> None:
    path = fill(tmp_path / "t", 4)
    lines = path.read_bytes().split(b"\n")
    lines[2], lines[3] = b"\x00\xff garbage", b"[1, 2]"
    path.write_bytes(b"\n".join(lines))
    with Spool(tmp_path / "t", HEADER) as spool:
        assert [r["key"] for r in spool.records] == ["k0", "k3"]
        assert spool.n_dropped == 2


def test_another_header_is_refused_with_every_field_that_differs(tmp_path: Path) -> None:
    path = fill(tmp_path / "t", 2)
    before = path.read_bytes()
    other = {"device": "titanxp", "policy": {"runs": 3, "context": "sandwich"}}
    with pytest.raises(ProvenanceConflictError) as caught, Spool(tmp_path / "t", other):
        pass
    message = str(caught.value)
    assert "device: cpu / titanxp; policy.runs: 2 / 3;" in message
    assert "context" not in message
    assert "delete the file" in message
    assert "\n" not in message
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["hello", "hello\nworld\n", '{"a": 1}\n', '{"pid":"0000000001","header":3}\n', "\n\n"])
def test_a_file_of_something_else_is_neither_read_nor_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.partial.jsonl"
    path.write_text(text)
    with pytest.raises(TableError, match="not the progress of a latbench run"), Spool(tmp_path / "t", HEADER):
        pass
    assert path.read_text() == text


def test_a_path_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match=r"cannot open .*file/t\.partial\.jsonl: Not a directory"):
        Spool(tmp_path / "file" / "t", HEADER).__enter__()


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


WRITER = """
import sys
from latbench.spool import Spool
with Spool(sys.argv[1], {"device": "cpu"}) as spool:
    print("ready", len(spool.records), flush=True)
    for i in range(len(spool.records), 10**9):
        spool.append({"i": i, "pad": "x" * (i * 37 % 5000)})
        print(i, flush=True)
"""


def test_two_runs_cannot_write_one_table(tmp_path: Path) -> None:
    writer = python(WRITER, tmp_path / "t")
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline().startswith("ready")
        with pytest.raises(TableBusyError, match=rf"another run \(pid {writer.pid}\) is writing .*/t; wait for it"):
            Spool(tmp_path / "t", {"device": "cpu"}).__enter__()
    finally:
        writer.kill()
        writer.communicate()
    with Spool(tmp_path / "t", {"device": "cpu"}):  # the lock died with its owner
        pass


def test_killed_while_appending_it_loses_no_line_it_reported(tmp_path: Path) -> None:
    reported = -1
    for round_ in range(8):
        writer = python(WRITER, tmp_path / "t")
        assert writer.stdout is not None
        assert writer.stdout.readline().split()[0] == "ready"
        time.sleep(0.01 * round_)
        writer.send_signal(signal.SIGKILL)
        out, _ = writer.communicate()
        whole = out[: out.rfind("\n") + 1].split()
        reported = max([reported, *map(int, whole)])
        with Spool(tmp_path / "t", {"device": "cpu"}) as spool:
            assert [r["i"] for r in spool.records] == list(range(len(spool.records)))
            assert reported < len(spool.records) <= reported + 2  # one written but not yet reported, at most
    assert reported > 0


def test_a_run_that_opened_a_file_just_removed_takes_the_one_with_the_name(tmp_path: Path) -> None:
    first = Spool(tmp_path / "t", HEADER).__enter__()
    ghost = first.path.stat().st_ino
    keep = os.open(first.path, os.O_RDONLY)  # so that the inode's number is not given out again
    first.remove()
    first.close()
    with Spool(tmp_path / "t", HEADER) as second:
        assert second.path.stat().st_ino != ghost
        with pytest.raises(TableBusyError):
            Spool(tmp_path / "t", HEADER).__enter__()
    os.close(keep)


RACER = """
import sys
from latbench.errors import TableBusyError
from latbench.spool import Spool
wins = 0
while wins < 150:
    try:
        with Spool(sys.argv[1], {}) as spool:
            assert not spool.records, spool.records  # the winner before us removed its file
            with open(sys.argv[1] + ".owner", "x"): pass  # fails where two hold the lock
            spool.append({"pid": 1})
            __import__("os").unlink(sys.argv[1] + ".owner")
            spool.remove()
        wins += 1
    except TableBusyError:
        pass
"""


def test_lock_and_removal_race_never_lets_two_in(tmp_path: Path) -> None:
    racers = [python(RACER, tmp_path / "t") for _ in range(3)]
    for racer in racers:
        _, err = racer.communicate(timeout=60)
        assert racer.returncode == 0, err


def test_on_a_full_disk_the_measurements_so_far_are_kept(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
sys.dont_write_bytecode = True
from latbench.errors import TableError
from latbench.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
n = 0
try:
    with Spool(sys.argv[1], {"device": "cpu"}) as spool:
        while True:
            spool.append({"i": n, "pad": "x" * 100})
            n += 1
except TableError as error:
    print(n, error)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    out, err = python(code, tmp_path / "t").communicate(timeout=60)
    assert not err
    n, message = out.split(maxsplit=1)
    assert "nothing is lost" in message
    assert str(tmp_path / "t.partial.jsonl") in message
    with Spool(tmp_path / "t", {"device": "cpu"}) as spool:
        assert [r["i"] for r in spool.records] == list(range(int(n)))
        assert spool.n_dropped == 0
        assert int(n) > 5


def test_a_line_is_json_that_any_tool_reads(tmp_path: Path) -> None:
    path = fill(tmp_path / "t", 2)
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in (head, *lines):
        assert len(line.pop("crc32")) == 8
    assert head == {"pid": f"{os.getpid():010d}", "header": HEADER}
    assert lines == [{"key": "k0", "samples_ms": [0.0]}, {"key": "k1", "samples_ms": [0.1]}]
