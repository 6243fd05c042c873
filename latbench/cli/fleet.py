"""``latbench fleet``: what machines a fleet has, and how a machine joins one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench import devices
from latbench.cli import measuring
from latbench.errors import EnvironmentUnfitError, LatbenchError, UsageError, one_line

if TYPE_CHECKING:
    from latbench.measure.fleet import Fleet

CLIENT_PORT = 10001  # Ray's own choice
HEAD_LIMIT_S = 30.0  # for a head to answer its clients


@click.group("fleet")
def command() -> None:
    """Machines that hold devices, joined by Ray: measure on all of them with `latbench profile --fleet ADDRESS`.

    Addresses are Ray's: ray://HOST:10001 from any machine, auto on a machine of the fleet.
    """


@command.command("status")
@click.argument("address", default="auto", envvar="RAY_ADDRESS")
@measuring.JSON
def status(address: str, as_json: bool) -> None:
    """The nodes at ADDRESS, the devices they announce, and which are free."""
    from latbench.measure.fleet import connect

    with connect(address) as fleet:
        nodes = nodes_in_json(fleet)
    if as_json:
        click.echo(json.dumps({"address": address, "nodes": nodes}, indent=2, ensure_ascii=False))
        return
    _print(address, nodes)


def nodes_in_json(fleet: Fleet) -> list[dict[str, Any]]:
    """Every node with its devices: free or busy, and what works there."""
    from latbench.cli.fleet_nodes import described

    places = fleet.nodes()
    answers = fleet.ask_each(places, described, [(tuple(place.devices),) for place in places])
    announced = [(place, name) for place in places for name in place.devices]
    free = {(place.id, name): is_free for (place, name), is_free in zip(announced, fleet.free(announced), strict=True)}
    found = []
    for place, told in zip(places, answers, strict=True):
        about: dict[str, Any] = {"name": place.name, "address": place.address}
        if isinstance(told, LatbenchError):
            found.append({**about, "problem": str(told), "devices": [{"name": name} for name in place.devices]})
            continue
        listed = []
        for name, device in told.pop("devices").items():
            busy = not free[place.id, name] or (told["measuring"] and device["present"])
            listed.append({"name": name, "state": "busy" if busy else "free", **device})
        found.append({**about, **told, "devices": listed})
    return found


def _print(address: str, nodes: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    n_devices = sum(bool(node["devices"]) for node in nodes)
    console.print(f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} at {address}, {n_devices} with devices")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("node", "device", "state", "latbench", "is, and how it is measured"):
        table.add_column(column, no_wrap=column in ("device", "state", "latbench"), overflow="fold")
    for node in nodes:
        version = node.get("latbench", "-")
        for device in node["devices"] or [{"name": "-"}]:
            state = device.get("state", "-")
            table.add_row(node["name"], device["name"], state, version, Text(_about(node, device)))
    console.print(table)
    for node in nodes:
        if node.get("nice"):
            console.print(
                f"{node['name']}: Ray runs its processes at nice {node['nice']}, and what is measured there too: start "
                "Ray with RAY_worker_niceness=0 (latbench fleet join does)",
                style="yellow",
            )


def _about(node: dict[str, Any], device: dict[str, Any]) -> str:
    if "problem" in node:
        return str(node["problem"])
    if "is" not in device:
        return f"announces no device ({node['cpu']})"
    if not device["present"]:
        return f"{device['is']}: not in this machine, can only be simulated"
    if device["problem"]:
        return f"{device['is']}: {device['problem']}"
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    return f"{device['is']}, {versions}"


@command.command("join")
@click.argument("address", required=False, metavar="[HOST:PORT]")
@click.option("--head", is_flag=True, help="Start a fleet here instead of joining one.")
@click.option(
    "--device", "names", multiple=True, metavar="NAME", help="Announce this device; default: all that are here."
)
@click.option("--print", "only_print", is_flag=True, help="Print the command instead of running it.")
def join(address: str | None, head: bool, names: tuple[str, ...], only_print: bool) -> None:
    """Let this machine's devices be measured by a fleet: runs `ray start` with what is here.

    HOST:PORT is what `latbench fleet join --head` printed on the first machine. `ray stop` leaves the fleet.
    """
    if (address is None) != head:
        raise UsageError("say which fleet: HOST:PORT of its first machine, or --head to start one here")
    known = devices.profiles()
    here = [selection.profile.name for selection in devices.detect(known=known).matches]
    announced = list(dict.fromkeys([devices.resolve(name, known).name for name in names] or here))
    words, variables = ray_start(address, announced)
    if only_print:
        click.echo(" ".join([*(f"{k}={v}" for k, v in variables.items()), shlex.join(words)]))
        return
    program = Path(sys.executable).with_name(words[0])
    if not program.exists():
        raise EnvironmentUnfitError("a fleet needs Ray. Run: pip install 'latbench[fleet]'")
    run = subprocess.run(
        [str(program), *words[1:]], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        lines = (run.stderr or run.stdout).strip().splitlines()
        raise EnvironmentUnfitError(f"ray start failed: {one_line(lines[-1] if lines else f'exit {run.returncode}')}")
    click.echo(f"announced here: {', '.join(announced)}")
    if head:
        said = run.stdout + run.stderr
        click.echo(_next_steps(said, announced[0]))
        if address := _address(said):
            _await_clients(_clients(address))


def _await_clients(client: str) -> None:
    from latbench.measure.fleet import wait_for

    try:
        wait_for(client, HEAD_LIMIT_S)
    except OSError as error:
        click.echo(f"nobody answers at {client} yet ({error}): other machines cannot reach it", err=True)


def ray_start(address: str | None, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of `ray start`, and the variables that it needs: Ray lowers the priority of its processes else."""
    from latbench.measure.fleet import PREFIX

    where = ["--head", "--include-dashboard=false"] if address is None else [f"--address={address}"]
    resources = json.dumps({f"{PREFIX}{name}": 1 for name in names})
    return ["ray", "start", *where, "--disable-usage-stats", f"--resources={resources}"], {"RAY_worker_niceness": "0"}


def _address(said: str) -> str:
    """From what `ray start --head` printed; empty where it is not there."""
    told = re.search(r"--address='?([^'\s]+:[0-9]+)", said)
    return told[1] if told else ""


def _clients(address: str) -> str:
    return f"ray://{address.rpartition(':')[0]}:{CLIENT_PORT}"


def _next_steps(said: str, device: str) -> str:
    address = _address(said) or "HOST:PORT"
    return (
        f"on another machine:  latbench fleet join {address}\n"
        f"here:                latbench profile --fleet auto --device {device} --space SPACE\n"
        f"from anywhere:       latbench profile --fleet {_clients(address)} --device {device} --space SPACE"
    )
