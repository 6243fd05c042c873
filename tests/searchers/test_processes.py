"""Searches in processes of their own: two that train one network, one that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.results import read_result
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
QUICK = ["--data", "digits", "--max-images", "200", "--epochs", "2", "--batch-size", "32", "--set", "adaptive=false"]


@pytest.mark.slow
def test_two_processes_search_as_one(tmp_path):
    command = shutil.which("latbench", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the latbench command is not installed beside this interpreter")
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    search = ["search", "aows", "--table", str(tmp_path / "t.parquet"), "--target", "55us", *QUICK, "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", command]
    done = subprocess.run(
        [*launch, *search, "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 1, "the first process speaks"
    found = read_result(tmp_path / "out")
    assert list(found.result.arch) == told[0]["arch"]
    assert [row["epoch"] for row in found.result.history] == [0, 1]
    again = subprocess.run([*launch, *search, "-o", str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [json.loads(line) for line in again.stdout.splitlines() if line.startswith("{")] == told


SAVING = "import searchers.train as t; t.SAVE_EVERY_S = 0.0; from latbench.cli import main; main()"


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path):
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    search = ["search", "aows", "--table", str(tmp_path / "t.parquet"), "--target", "55us", *QUICK]
    command = [sys.executable, "-c", SAVING, *search, "-o"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], env=env, check=True, timeout=300, capture_output=True)
    for saved in range(1, 4):  # killed ever later, at whatever it is doing
        with subprocess.Popen([*command, str(tmp_path / "parts")], env=env, stdout=subprocess.DEVNULL) as process:
            checkpoint, end = tmp_path / "parts" / "search.ckpt", time.monotonic() + 120
            while not checkpoint.exists() and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.3 * saved)
            process.send_signal(signal.SIGKILL)
    subprocess.run([*command, str(tmp_path / "parts")], env=env, check=True, timeout=300, capture_output=True)
    whole, parts = (read_result(tmp_path / name) for name in ("whole", "parts"))
    assert whole.result.arch == parts.result.arch
    assert whole.result.notes == parts.result.notes
    assert whole.result.network.read_bytes() == parts.result.network.read_bytes()
    losses = [[row["loss_random"] for row in found.result.history] for found in (whole, parts)]
    assert losses[0] == losses[1]
