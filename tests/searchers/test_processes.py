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
from typing import Any

import pytest
from command_line import run

from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from searchers.results import read_result
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=8, min_width=0.1, max_width=0.25, levels=3, num_classes=10)
QUICK = ["--data", "digits", "--max-images", "200", "--epochs", "2", "--batch-size", "32", "--set", "adaptive=false"]


TINY: dict[str, tuple[list[str], list[str]]] = {  # of a searcher: what its space is like, what its search is told
    "relativenas": (
        ["channels=4", "layers=3"],
        ["evaluator=supernet", "population=4", "generations=2", "channels=4", "layers=3", "batch_size=32"],
    ),
    "irlas": (
        ["stack=cifar", "widths=4,8", "repeats=1,1", "max_index=8"],
        ["proxy=space", "iterations=2", "samples=3", "epochs=1", "batch_size=32", "finalists=1", "final_epochs=1"],
    ),
    "instanas": (
        ["plan=8x1,12x2s2,16x1s2", "stem_channels=8", "head_channels=32"],
        ["epochs=2", "pretrain_epochs=2", "finetune_epochs=1"],
    ),
}


def searched_by_two(search: list[str]) -> list[dict[str, Any]]:
    """What `latbench search ... --json` prints where two processes train."""
    command = shutil.which("latbench", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the latbench command is not installed beside this interpreter")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", command]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *search, "--json"], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_two_processes_search_as_one(tmp_path):
    roofline_table(SPACE).write(tmp_path / "t.parquet")
    search = ["search", "aows", "--table", str(tmp_path / "t.parquet"), "--target", "55us", *QUICK]
    told = searched_by_two([*search, "-o", str(tmp_path / "out")])
    assert len(told) == 1, "the first process speaks"
    found = read_result(tmp_path / "out")
    assert list(found.result.arch) == told[0]["arch"]
    assert [row["epoch"] for row in found.result.history] == [0, 1]
    assert searched_by_two([*search, "-o", str(tmp_path / "out")]) == told


@pytest.mark.slow
@pytest.mark.parametrize("searcher", list(TINY))
def test_two_processes_find_the_same_each_time(searcher, tmp_path):
    shape, settings = ([word for text in texts for word in ("--set", text)] for texts in TINY[searcher])
    table = tmp_path / "t.parquet"
    simulated = ["--device", "titanxp", "--backend", "roofline", "--space", searcher, "--resolution", "8"]
    run("profile", *simulated, "--set", "num_classes=10", *shape, "--networks", "40", "-o", table)
    if searcher == "irlas":
        run("fit", table, "--oracle", "learned", "-o", table := tmp_path / "t.npz")
    predicted = json.loads(run("predict", table, *(f"random:{n}" for n in range(9)), "--json").stdout)["predictions"]
    target = sorted(one["latency_ms"] for one in predicted)[4]
    search = ["search", searcher, "--table", str(table), "--target", f"{target}ms", "--data", "digits", *settings]
    once, again = (searched_by_two([*search, "--max-images", "400", "-o", str(tmp_path / name)]) for name in "ab")
    assert len(once) == 1
    assert once[0]["predicted"][0] <= target
    assert {**once[0], "network": ""} == {**again[0], "network": ""}
    found = read_result(tmp_path / "a")
    assert list(found.result.arch) == once[0]["arch"]
    assert found.result.network.stat().st_size > 0


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
