"""Kills runs of every command at random moments: ``python benchmarks/kills.py --kills 500``.

A run is killed, its command started again, and so on, until it ends before its kill or was killed twelve times; then it
is let end, and what it left is compared with an undisturbed run's. Kills: SIGKILL, SIGTERM, Ctrl-C once and twice, and
SIGKILL of a measuring worker. Told per command: kills, steps and look-ups done twice (the worst kill, and the mean),
processes and temporary files that outlived a run by more than two seconds, results unlike the undisturbed one. Ends
with status 1 where anything but work done twice is above zero.

Runs are forked from a process that has imported torch, so that kills strike work and not imports; every twentieth is a
fresh interpreter. Checkpoints are written after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from kill_commands import Command, commands, prepare

from latbench import cli
from searchers import evaluators, train

MAX_KILLS = 12  # of one run
PATIENCE_S = 2.0  # in which workers and temporary files must be gone
MISSED = 2  # status of verify where the target is missed: no fault
LIMIT_S = 900.0  # of a run that is let end
HOW = ["KILL"] * 6 + ["TERM", "INT", "INT twice", "worker"]


@dataclass
class Tally:
    """Of one command."""

    name: str
    seconds: float = 0.0  # of an undisturbed run
    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    worst: int = 0  # steps and look-ups that one kill cost
    repeated: int = 0  # all of them
    orphans: int = 0
    left: int = 0  # temporary files and folders
    unlike: int = 0  # results
    faults: list[str] = field(default_factory=list)  # tracebacks, wrong exit statuses

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.orphans or self.left or self.unlike or self.faults)


# ---- a run ----------------------------------------------------------------------------------------------------------


def run_here(folder: Path, args: Sequence[str]) -> NoReturn:
    """``latbench ARGS`` in this process; every step and look-up is noted in ``steps`` beside the folder."""
    note = os.open(folder.parent / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tell, ask = train.Loop._tell, evaluators.Lookups.evaluate

    def told(loop: Any, *more: Any) -> None:
        os.write(note, f"{loop.folder.name}/{loop.name} {loop.epoch} {loop.step}\n".encode())
        tell(loop, *more)

    def asked(lookups: Any, arch: Any) -> float:
        new = not lookups.knows(arch)
        value = ask(lookups, arch)
        if new:
            os.write(note, f"look-up {arch}\n".encode())
        return value

    train.Loop._tell, evaluators.Lookups.evaluate = told, asked  # type: ignore[method-assign]
    train.SAVE_EVERY_S = 0.0
    sys.argv[:] = ["latbench", *args]
    status = 1
    try:
        cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Run:
    """One process that runs a command in ``FOLDER/work``; its temporary files lie in ``FOLDER/tmp``."""

    def __init__(self, command: Command, folder: Path, *, fresh: bool) -> None:
        self.work, self.tmp = folder / "work", folder / "tmp"
        self.tmp.mkdir(exist_ok=True)
        self.fresh = fresh
        self.status: int | None = None
        args = [
            (self.work / f"{command.args[1]}.target").read_text() if word == "TARGET" else word for word in command.args
        ]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            self._become(args)
        finally:  # a signal before latbench heeds any: this is a copy of the campaign, which must not go on
            os._exit(130)

    def _become(self, args: list[str]) -> None:
        os.setsid()
        os.environ["TMPDIR"] = str(self.tmp)
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(self.work)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if self.fresh:
            os.execv(sys.executable, [sys.executable, __file__, "--run", str(self.work), *args])
        run_here(self.work, args)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so long."""
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(0.002)
        return True

    def strike(self, how: str) -> bool:
        """Kills it, or its worker; False where there is nobody to be killed."""
        if how == "worker":
            workers = [pid for pid, argv in self.others() if "latbench.measure.worker" in argv]
            for pid in workers[:1]:
                _kill(pid, signal.SIGKILL)
            return bool(workers)
        for _ in range(2 if how == "INT twice" else 1):
            _kill(self.pid, getattr(signal, f"SIG{how.split()[0]}"))
        return True

    def others(self) -> list[tuple[int, str]]:
        """Pid and command line of the living processes that it started: they have its TMPDIR."""
        found, mark = [], f"TMPDIR={self.tmp}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0") and int(path.name) != self.pid:
                    found.append((int(path.name), (path / "cmdline").read_text()))
            except OSError:  # it has just gone
                continue
        return found

    def leftovers(self) -> tuple[list[str], list[str]]:
        """Processes and temporary files that are still there after a while; the processes are ended."""
        end = time.monotonic() + PATIENCE_S
        while True:
            others, files = self.others(), [path.name for path in self.tmp.iterdir()]
            if not others and not files:
                return [], []
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        for pid, _ in others:
            _kill(pid, signal.SIGKILL)
        return [argv.replace("\0", " ")[:80] for _, argv in others], files

    def said(self) -> str:
        """On stderr."""
        path = self.work / "stderr"
        return path.read_text() if path.exists() else ""


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---- the campaign ---------------------------------------------------------------------------------------------------


class Campaign:
    """Kills `n` runs of a command."""

    def __init__(self, command: Command, root: Path, prepared: Path, rng: random.Random) -> None:
        self.command, self.root, self.prepared, self.rng = command, root, prepared, rng
        self.tally = Tally(command.name)
        self.n_runs = 0

    def undisturbed(self) -> Any:
        """What the command leaves when nobody kills it."""
        folder = self._folder("whole")
        begin = time.monotonic()
        run = Run(self.command, folder, fresh=False)
        if not run.wait(LIMIT_S) or run.status not in (0, MISSED):
            raise SystemExit(f"{self.command.name} ended with status {run.status}: {run.said()}")
        self.tally.seconds = time.monotonic() - begin
        self.names = _names(folder / "work")
        return self.command.outcome(folder / "work")

    def go(self, n: int) -> Tally:
        """Rounds until there were `n` kills."""
        whole = self.undisturbed()
        while self.tally.kills.total() < n:
            self._round(whole, n)
            self.tally.rounds += 1
        return self.tally

    def _round(self, whole: Any, n: int) -> None:
        folder = self._folder("killed")
        for _ in range(min(MAX_KILLS, n - self.tally.kills.total())):
            run = self._start(folder)
            if run.wait(self.rng.uniform(0, 0.5) * self.tally.seconds):
                break
            how = self.rng.choice(HOW)
            if not run.strike(how):
                run.strike(how := "KILL")
            self.tally.kills[how] += 1
            self._end(run, {"KILL": -9, "TERM": 143, "worker": 0}.get(how, 130))
        else:
            run = self._start(folder)
        if not run.wait(LIMIT_S):
            run.strike("KILL")
            self.tally.faults.append("hangs")
        self._end(run, 0)
        self._count(folder)
        try:
            same = self.command.outcome(folder / "work") == whole
        except Exception as error:  # whatever is wrong with its files is a finding
            self.tally.faults.append(f"{type(error).__name__}: {error}"[:200])
            same = False
        self.tally.unlike += not same
        self.tally.left += len(_names(folder / "work") ^ self.names)

    def _start(self, folder: Path) -> Run:
        self.n_runs += 1
        steps = folder / "steps"
        with steps.open("ab") as file:
            file.write(b"---\n")
        return Run(self.command, folder, fresh=self.n_runs % 20 == 0)

    def _end(self, run: Run, expected: int) -> None:
        """Waits for its end, and for what it started."""
        if not run.wait(LIMIT_S):
            run.strike("KILL")
            self.tally.faults.append("did not heed its signal")
        # before it is latbench that runs, a signal ends an interpreter as ever
        early = expected > 128 and run.status in (128 - expected, 1) and "Error: " not in run.said()
        if early:
            pass
        elif run.status not in (expected, 0, MISSED):
            self.tally.faults.append(f"status {run.status}, not {expected}: {run.said()[-200:]}")
        elif "Traceback" in run.said():
            self.tally.faults.append(run.said()[-300:])
        processes, files = run.leftovers()
        self.tally.orphans += len(processes)
        self.tally.left += len(files)
        self.tally.faults += [f"still there: {words}" for words in processes + files]

    def _count(self, folder: Path) -> None:
        """What was done twice."""
        done: set[str] = set()
        for part in (folder / "steps").read_text().split("---\n"):
            lines = part.splitlines()
            again = sum(line in done for line in lines)
            done.update(lines)
            self.tally.worst, self.tally.repeated = max(self.tally.worst, again), self.tally.repeated + again

    def _folder(self, name: str) -> Path:
        folder = self.root / self.command.name / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "work").mkdir(parents=True)
        for need in self.command.needs:
            source = self.prepared / need
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / "work" / need)
        return folder


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", help="names, comma-separated; default: all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    known = {command.name: command for command in commands()}
    chosen = args.commands.split(",") if args.commands else list(known)
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    tallies = []
    with tempfile.TemporaryDirectory(prefix="latbench-kills-") as name:
        root = Path(name)
        prepared = root / "prepared"
        prepared.mkdir()
        prepare(prepared)
        search = Campaign(known["search-aows"], root, prepared, rng)
        search.undisturbed()
        shutil.copytree(root / "search-aows" / "whole" / "work" / "found", prepared / "found")
        for i, which in enumerate(chosen):
            share = args.kills * (i + 1) // len(chosen) - args.kills * i // len(chosen)
            tallies.append(Campaign(known[which], root, prepared, rng).go(share))
            print(told(tallies[-1]), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps([{**vars(tally), "kills": dict(tally.kills)} for tally in tallies]))
    else:
        print("\n".join(told(tally) for tally in tallies))
    print(f"{sum(tally.kills.total() for tally in tallies)} kills", file=sys.stderr)
    sys.exit(not all(tally.sound for tally in tallies))


def told(tally: Tally) -> str:
    """One line, and a line for every kind of fault."""
    n = tally.kills.total()
    how = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.kills.items()))
    line = (
        f"{tally.name:19} {n:4} kills in {tally.rounds:3} runs of {tally.seconds:4.1f} s: done twice {tally.worst} at "
        f"worst, {tally.repeated / max(n, 1):.2f} a kill; orphans {tally.orphans}, left {tally.left}, unlike "
        f"{tally.unlike} ({how})"
    )
    return "\n".join([line, *(f"    {count} x {fault}" for fault, count in Counter(tally.faults).items())])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        torch.set_num_threads(1)
        run_here(Path(sys.argv[2]), sys.argv[3:])
    main()
