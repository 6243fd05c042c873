"""``latbench devices``: what this host is, which profiles match, which back-ends work and why the others do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from latbench import devices, plugins
from latbench.cli.values import format_bytes
from latbench.interpreter import describe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class BackendStatus:
    """A registered back-end on this machine."""

    name: str
    versions: Mapping[str, str]  # empty where it does not work
    problem: str | None  # why it does not work, with the command that mends it


@click.command("devices")
@click.option("--all", "show_all", is_flag=True, help="List every known profile, not only those that match.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(show_all: bool, as_json: bool) -> None:
    """What this host is, which device profiles match, and which back-ends work.

    Profiles of your own go into ~/.config/latbench/devices.toml, or the file that $LATBENCH_DEVICES names.
    """
    known = devices.profiles()
    machine = devices.detect(known=known)
    here = [selection.profile for selection in machine.matches]
    pythons = {profile.default_backend: profile.worker_python for profile in reversed(here) if profile.worker_python}
    backends = [backend_status(name, pythons.get(name)) for name in plugins.names("latbench.backends")]
    if as_json:
        listed = known.values() if show_all else here
        click.echo(json.dumps(_plain(machine, backends, listed), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    _print_host(console, machine)
    auto = devices.select("auto", machine=machine).profile.name
    _print_table(console, _profile_table(list(known.values()) if show_all else here, machine, auto))
    _print_table(console, _backend_table(backends))


def backend_status(name: str, python: str | None = None) -> BackendStatus:
    """Whether a registered back-end works here, in `python` where a device's profile names a worker's interpreter."""
    if python is not None:
        problem = devices.worker_problem(name, python)
        versions = {} if problem else describe(plugins.spec("latbench.backends", name), python)["versions"]
        return BackendStatus(name, versions, problem)
    problem = devices.backend_problem(name)
    versions = {} if problem else plugins.load("latbench.backends", name).versions()
    return BackendStatus(name, versions, problem)


def _plain(machine: devices.Machine, backends: list[BackendStatus], listed: Any) -> dict[str, Any]:
    return {
        "host": asdict(machine.host),
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "matches": [{"profile": s.profile.name, "index": s.index} for s in machine.matches],
        "auto": devices.select("auto", machine=machine).profile.name,
        "profiles": [asdict(profile) for profile in listed],
        "backends": [{**asdict(status), "works": status.problem is None} for status in backends],
    }


def _print_host(console: Console, machine: devices.Machine) -> None:
    from rich.table import Table

    host = machine.host
    grid = Table.grid(padding=(0, 2))
    unlike = f", this process on {len(host.affinity)}" if host.affinity and len(host.affinity) != host.cpus else ""
    facts = {
        "cpu": host.cpu_model,
        "board": host.board,
        "cores": f"{host.cores} ({host.cpus} logical{unlike})",
        "caches": ", ".join(f"L{c.level} {c.kind.lower()} {format_bytes(c.nbytes)}" for c in host.caches),
        "memory": None if host.memory_bytes is None else format_bytes(host.memory_bytes),
        "governor": ", ".join(host.governors),
        "turbo": None if host.turbo is None else "on" if host.turbo else "off",
        "hypervisor": host.hypervisor,
        "load": None if host.load_average is None else f"{host.load_average:.2f}",
        "system": f"{host.system} {host.kernel} ({host.arch})",
        "gpu": "\n".join(f"{gpu.index}: {gpu.name}, driver {gpu.driver}" for gpu in machine.gpus) or "none (NVIDIA)",
    }
    for name, fact in facts.items():
        if fact:
            grid.add_row(name, fact)
    console.print(grid)
    recognised = {selection.index for selection in machine.matches}
    for gpu in machine.gpus:
        if gpu.index not in recognised:
            console.print(
                f"No profile matches {gpu.name}: describe it in ~/.config/latbench/devices.toml", style="yellow"
            )


def _profile_table(listed: list[devices.DeviceProfile], machine: devices.Machine, auto: str) -> Table:
    table = _table("device", "is", "here", "TFLOP/s", "fp16", "GB/s", "GB", "back-end")
    here = {selection.profile.name for selection in machine.matches}
    for profile in listed:
        table.add_row(
            profile.name,
            profile.title,
            "auto" if profile.name == auto else "yes" if profile.name in here else "",
            *(
                "" if figure is None else f"{figure / scale:.4g}"
                for figure, scale in (
                    (profile.peak_gflops_fp32, 1000),
                    (profile.peak_gflops_fp16, 1000),
                    (profile.bandwidth_gbs, 1),
                    (profile.memory_gb, 1),
                )
            ),
            profile.default_backend,
        )
    return table


def _backend_table(backends: list[BackendStatus]) -> Table:
    from rich.text import Text

    table = _table("back-end", "works", "")
    for status in backends:
        versions = ", ".join(f"{name} {version}" for name, version in status.versions.items())
        table.add_row(status.name, "no" if status.problem else "yes", Text(status.problem or versions))
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        figure = column in ("TFLOP/s", "fp16", "GB/s", "GB")
        table.add_column(column, justify="right" if figure else "left", no_wrap=column != columns[-1])
    return table


def _print_table(console: Console, table: Table) -> None:
    console.print()
    console.print(table)
