"""No room: full disks, limits on files, outputs that take nothing, read-only folders and files. One line each."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import KEYS, PROGRAM, ROOT, Command, Profile, Workers, is_canary, one_line

from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable
from searchers.testing import roofline_table


def test_no_room_for_a_model_is_one_line(tmp_path: Path, workers: Workers) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "  # less than a model
    status, out, err = (run := Profile(tmp_path, program=limit + PROGRAM)).end()
    assert (status, out) == (1, "")
    assert "cannot write a model to" in one_line(err)
    assert workers(run.pid) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
def test_no_room_for_a_measurement_is_one_line_and_can_be_gone_on_from(tmp_path: Path, workers: Workers) -> None:
    run = Profile(tmp_path)
    run.wait_for(5)
    nbytes = run.spool.stat().st_size + 500
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (nbytes, nbytes))
    status, out, err = run.end()
    assert (status, out) == (1, "")
    assert "nothing is lost, the measurements so far are kept" in one_line(err)
    assert workers(run.pid) == []
    before = run.records()
    assert len(before) >= 5
    status, _, err = (later := Profile(tmp_path)).end()
    assert (status, err) == (0, "")
    table = LatencyTable.read(later.table)
    assert set(table.frame["key"]) == KEYS
    samples = {sample for row in table.rows() for sample in row.samples_ms}
    assert all(set(record["samples_ms"]) <= samples for record in before if not is_canary(record))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "latbench-test", str(folder)]
    try:
        mounted = os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs rights")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_elsewhen(tmp_path: Path, full_disk: Path) -> None:
    (full_disk / "other").write_bytes(bytes(260_000))
    out = full_disk / "t.parquet"
    status, _, err = (run := Profile(tmp_path, output=out)).end()
    assert status == 1
    assert "No space left on device; nothing is lost" in one_line(err)
    assert not out.exists()
    before = run.records()
    assert before
    (full_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=30m", str(full_disk)], check=True)
    status, _, err = Profile(tmp_path, output=out).end()
    assert (status, err) == (0, "")
    assert set(LatencyTable.read(out).frame["key"]) == KEYS
    assert [path.name for path in full_disk.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1 cut off in the mid", b"a,b\n1,2\n", bytes(range(256)) * 9])
def test_a_file_that_is_no_table_is_refused_and_kept(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "t.parquet").write_bytes(data)
    status, out, err = (run := Profile(tmp_path)).end()
    assert (status, out) == (1, "")
    assert "t.parquet" in one_line(err)
    assert run.table.read_bytes() == data
    assert [path.name for path in run.table.parent.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/no/such/folder/t.parquet", "/no/such/folder is no directory: make it, or choose another -o"),
        ("/proc/t.parquet", "cannot open /proc/t.parquet.partial.jsonl"),
        ("/dev/null/t.parquet", "/dev/null is no directory"),
    ],
)
def test_an_output_that_cannot_be_is_one_line(tmp_path: Path, output: str, words: str) -> None:
    status, out, err = Profile(tmp_path, output=Path(output)).end()
    assert (status, out) == (1, "")
    assert words in one_line(err)


@pytest.mark.parametrize("words", ["profile", "fit", "search"])
def test_a_read_only_file_system_is_one_line_before_any_work(full_disk: Path, model: Path, words: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    args: dict[str, tuple[object, ...]] = {
        "profile": ("profile", "--device", "cpu", "--space", "mobilenet_v1", "--backend", "roofline"),
        "fit": ("fit", model, "--oracle", "lut"),
        "search": ("search", "aows", "--table", model, "--target", "1s", "--data", "digits", "--epochs", "900",
                   "--set", "adaptive=false"),
    }  # fmt: skip
    status, out, err = Command(model.parent, *args[words], "-o", full_disk / "new").end()
    assert (status, out) == (1, "")
    assert "Read-only file system" in one_line(err)
    assert list(full_disk.iterdir()) == []


AS_NOBODY = """
import os, sys
from pathlib import Path
from latbench.files import replace_file
os.setuid(65534)
try:
    replace_file(Path(sys.argv[1]), lambda file: file.write(b"new") and None)
except PermissionError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_file_that_is_read_only_is_kept() -> None:
    """A rename needs no right to the file itself."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        (table := Path(name) / "t.parquet").write_bytes(b"precious")
        for mode, told, left in ((0o444, "it is read-only\n", b"precious"), (0o666, "", b"new")):
            table.chmod(mode)
            command = [sys.executable, "-c", AS_NOBODY, str(table)]
            assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout == told
            assert table.read_bytes() == left
        assert [path.name for path in Path(name).iterdir()] == ["t.parquet"]


def test_a_rename_never_puts_a_file_in_a_devices_place(tmp_path: Path, model: Path) -> None:
    """As root, ``-o /dev/null`` would."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    status, out, err = Command(tmp_path, "fit", model, "-o", tmp_path / "link").end()
    assert (status, out) == (1, "")
    assert "it is no regular file" in one_line(err)
    assert (tmp_path / "pipe").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "tmp", "blocks.parquet"}


@pytest.mark.parametrize("args", [("devices",), ("show", "blocks.parquet"), ("predict", "blocks.parquet", "random:1")])
@pytest.mark.parametrize("plain", [True, False])
def test_an_output_that_takes_nothing_is_one_line(
    tmp_path: Path, model: Path, args: tuple[str, ...], plain: bool
) -> None:
    words = args if plain else (*args, "--json")
    with Path("/dev/full").open("w") as full:
        status, _, err = Command(tmp_path, *words, stdout=full).end()
        assert status == 1
        assert "No space left on device" in one_line(err)
        status, _, _ = Command(tmp_path, "show", "none.parquet", stderr=full, stdout=full).end()
        assert status == 1, "where nothing can be told, the status still tells"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A table to fit."""
    path = tmp_path / "blocks.parquet"
    roofline_table(MobileNetV1Space(resolution=8, levels=2, max_width=0.2, min_width=0.1, num_classes=10)).write(path)
    return path
