"""Ray nodes on this machine for tests, as ``ray start`` makes them: processes of their own, killed by their ids."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from latbench.measure.fleet import PREFIX, wait_for

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
QUIET = {**os.environ, "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
QUIET["RAY_raylet_start_wait_time_s"] = "300"  # on a machine that is busy
QUIET.pop("PYTHONWARNINGS", None)
QUIET.pop("RAY_ADDRESS", None)


class Cluster:
    """A head node, and nodes that join it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = free_ports(2)
        self.address, self.client = f"127.0.0.1:{ports[0]}", f"ray://127.0.0.1:{ports[1]}"
        self.groups: list[list[int]] = []  # pids of each node

    def add(self, devices: Sequence[str]) -> None:
        """One more node; the first is the head."""
        port, client_port = self.address.rpartition(":")[2], self.client.rpartition(":")[2]
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client_port}", f"--temp-dir={self.folder}"]
        words = [f"--address={self.address}"] if self.groups else [*head, "--include-dashboard=false"]
        self._start([*words, "--node-ip-address=127.0.0.1"], devices)
        if len(self.groups) == 1:
            wait_for(self.client, 120.0)  # `ray start` returns before its clients' server listens

    def _start(self, words: Sequence[str], devices: Sequence[str]) -> None:
        resources = json.dumps({PREFIX + name: 1 for name in devices})
        limits = ["--num-cpus=1", f"--object-store-memory={100 << 20}", f"--resources={resources}"]
        before = set(self.pids())
        done = subprocess.run([RAY, "start", *words, *limits], env=QUIET, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        self.groups.append([pid for pid in self.pids() if pid not in before])

    def pids(self) -> list[int]:
        """Every process of this cluster: all of them name its folder, or are children of one that does."""
        found = {pid: argv for pid, argv in processes() if str(self.folder) in argv or self.address in argv}
        children = {pid for pid, _ in processes() if parent(pid) in found}
        return sorted(found.keys() | children)

    def client_servers(self) -> list[int]:
        """Processes that the head has started for its clients, one each."""
        port = self.address.rpartition(":")[2]
        return [pid for pid, argv in processes() if "--mode=specific-server" in argv and f":{port} " in argv]

    def measurers(self) -> list[int]:
        """Processes that hold a device; Ray names them after their class, which hides their arguments."""
        raylets = {pid for pid, argv in processes() if "raylet" in argv and str(self.folder) in argv}
        return [pid for pid, argv in processes() if "NodeMeasurer" in argv and parent(pid) in raylets]

    def kill_node(self, index: int) -> None:
        """As a machine that loses its power: with what its raylet has started since, which would go on for a while."""
        group = set(self.groups[index])
        for pid in [*group, *(pid for pid, _ in processes() if parent(pid) in group)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends every process of it."""
        for _ in range(50):
            pids = self.pids()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextmanager
def cluster(folder: Path, nodes: Sequence[Sequence[str]]) -> Iterator[Cluster]:
    """A running cluster; `folder` must be short, as sockets lie in it."""
    made = Cluster(folder)
    try:
        for devices in nodes:
            made.add(devices)
        yield made
    finally:
        made.stop()


def processes() -> Iterator[tuple[int, str]]:
    """(pid, command line) of everything that runs and is no zombie."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if argv:
                yield int(folder.name), argv


def parent(pid: int) -> int:
    """Its parent's pid; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return int((Path(f"/proc/{pid}/stat")).read_text().rpartition(")")[2].split()[1])
    return 0


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
