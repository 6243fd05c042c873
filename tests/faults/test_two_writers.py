"""Two at once: one table, one folder of a search, one file; and readers while it is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runs import KEYS, PROGRAM, Command, Profile, one_line, soon

from latbench.errors import UsageError
from latbench.files import replace_file
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable
from searchers.folders import held
from searchers.results import note, read_json, write_json
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
SEARCH = ["search", "aows", "--table", "t.parquet", "--target", "100us", "--data", "digits", "--max-images", 160]
SEARCH += ["--batch-size", 32, "--epochs", 1, "--set", "adaptive=false", "-o", "found"]
# stops by itself at its first step
STOPS = "import os, searchers.train as t, torch; torch.set_num_threads(1); "
STOPS += "t.Loop._tell = lambda *x: (open('began', 'w').close(), os.kill(os.getpid(), 19)); "


def test_a_second_profile_of_one_table_is_refused(tmp_path: Path) -> None:
    first = Profile(tmp_path)
    first.wait_for(1)
    first.signal(signal.SIGSTOP)  # however long the second takes
    status, out, err = Profile(tmp_path).end()
    first.signal(signal.SIGCONT)
    assert (status, out) == (1, "")
    assert f"another run (pid {first.pid}) is writing" in one_line(err)
    assert first.end()[0] == 0
    assert set(LatencyTable.read(first.table).frame["key"]) == KEYS


def test_a_second_search_in_one_folder_is_refused(tmp_path: Path) -> None:
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    first = Command(tmp_path, *SEARCH, program=STOPS + PROGRAM)
    first.wait_until((tmp_path / "began").exists)
    status, out, err = Command(tmp_path, *SEARCH).end()
    assert (status, out) == (1, "")
    assert f"another run is at work in {tmp_path / 'found'}: wait for it, or choose another -o" in one_line(err)
    first.signal(signal.SIGKILL)
    first.end()
    status, _, err = Command(tmp_path, *SEARCH).end()
    assert (status, err) == (0, ""), "the lock ends with its process"


def test_a_report_while_a_profile_writes(tmp_path: Path) -> None:
    assert Profile(tmp_path, "--backend", "roofline").end()[0] == 0
    done = Profile(tmp_path, "--backend", "roofline", "--networks", "40")
    done.wait_until(done.spool.exists)
    args = ("report", done.table, "-o", "r.html", "--no-pictures", "--json")
    status, out, err = Command(tmp_path, *args).end()
    assert (status, err) == (0, "")
    assert str(tmp_path / "r.html") in json.loads(out)["written"] or "r.html" in json.loads(out)["written"]
    assert done.end()[0] == 0
    assert len(LatencyTable.read(done.table)) > len(KEYS)


# ---- a folder -------------------------------------------------------------------------------------------------------


def test_a_folder_is_held_by_one_process_and_again_within_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    code = f"from pathlib import Path; from searchers.folders import held\nwith held(Path({str(out)!r})): pass"
    other = [sys.executable, "-c", code]
    with held(out):
        with held(out):
            pass
        refused = subprocess.run(other, capture_output=True, text=True)
        assert f"another run is at work in {out}" in refused.stderr
    assert not out.exists(), "nothing was put into it"
    assert subprocess.run(other).returncode == 0
    with pytest.raises(UsageError, match=r"cannot write into .*: Not a directory"), held(Path("/dev/null/x")):
        pass


def test_a_process_that_decodes_images_does_not_keep_the_folder(tmp_path: Path) -> None:
    """It notices the death of its parent seconds later."""
    code = f"""
import os, sys, time
from pathlib import Path
from searchers.folders import held
with held(Path({str(tmp_path)!r})):
    pid = os.fork()
    if not pid:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout)
    try:
        assert Path(f"/proc/{pid}").exists()
        with held(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)


def _note(folder: Path, name: str) -> None:
    for i in range(20):
        while True:
            try:
                note(folder, name, i)
                break
            except UsageError:  # the other one is at it
                pass


def test_two_that_note_something_lose_neither(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"schema": 1})
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_note, args=(tmp_path, name)) for name in ("verified", "rounds")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert read_json(tmp_path / "result.json") == {"schema": 1, "verified": 19, "rounds": 19}


# ---- a file ---------------------------------------------------------------------------------------------------------


def test_writers_of_one_file_leave_one_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "f"
    texts = [bytes([65 + i]) * (100_000 + i) for i in range(4)]

    def write(text: bytes) -> None:
        for _ in range(30):
            replace_file(path, lambda file: file.write(text) and None)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in texts
    assert [found.name for found in tmp_path.iterdir()] == ["f"]


WRITER = """
import sys, time
from pathlib import Path
from latbench.files import replace_file
def put(file):
    file.write(b"half of it")
    file.flush()
    print("at it", flush=True)
    time.sleep(60)
replace_file(Path(sys.argv[1]), put)
"""


def test_what_a_killed_writer_left_goes_with_the_next_and_a_living_ones_stays(tmp_path: Path) -> None:
    path = tmp_path / "f[1].json"  # a name that is a pattern, too
    path.write_bytes(b"old")
    (tmp_path / ".f[1].json.notes").write_text("somebody else's")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"at it\n"
    assert len(list(tmp_path.glob("*.tmp"))) == 2
    writers[0].kill()
    writers[0].wait()
    replace_file(path, lambda file: file.write(b"new") and None)
    assert path.read_bytes() == b"new"
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    writers[1].kill()
    writers[1].wait()
    replace_file(path, lambda file: file.write(b"newer") and None)
    assert sorted(found.name for found in tmp_path.iterdir()) == [".f[1].json.notes", "f[1].json"]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    assert soon(lambda: not list(tmp_path.glob("*.tmp")))
