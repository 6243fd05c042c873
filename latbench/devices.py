"""Device profiles: what a device is called, how it is recognised, what its datasheet promises, and which are here.

Shipped profiles stand in ``devices.toml``; ``~/.config/latbench/devices.toml``, or the file that $LATBENCH_DEVICES
names, adds to them and overrides them key by key.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from latbench import foreign, host, plugins
from latbench.errors import DeviceUnavailableError, EnvironmentUnfitError, MeasurementError, UsageError, shown
from latbench.interpreter import describe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]  # installed on Python 3.10 only

MAX_BYTES = 2**20  # of the user's file: ours has 5 KiB
GENERIC = "cpu"  # the profile that matches every machine


@dataclass(frozen=True)
class DeviceProfile:
    """What is known of a device before it is measured. Figures are the datasheet's; None: not known for sure."""

    name: str
    title: str
    kind: str  # gpu | cpu
    match: tuple[str, ...]  # regular expressions on the GPU's name or the CPU's model, and on the board's name
    aliases: tuple[str, ...] = ()
    arch: str | None = None  # as `uname -m`; None: any
    compute_capability: str | None = None
    newest_tensorrt: str | None = None  # where support has ended: "8.6"
    peak_gflops_fp32: float | None = None
    peak_gflops_fp16: float | None = None
    bandwidth_gbs: float | None = None
    memory_gb: float | None = None
    default_backend: str = "onnxruntime"
    default_dtype: Literal["float32", "float16"] = "float32"
    clocks: str = "float"  # lockable: the driver can hold them still
    worker_python: str | None = None  # the interpreter of its default back-end's worker, where it is not ours


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as nvidia-smi tells it."""

    index: int  # nvidia-smi's: by PCI bus
    name: str
    driver: str
    compute_capability: str | None  # None: the driver is too old to say


@dataclass(frozen=True)
class Selection:
    """A profile, and which device of this machine it stands for."""

    profile: DeviceProfile
    index: int | None  # of the GPU; None: a CPU, or simulated


@dataclass(frozen=True)
class Machine:
    """This host, its GPUs, and the profiles they match: GPUs first, then the CPU's, the generic one last."""

    host: host.Host
    gpus: tuple[Gpu, ...]
    matches: tuple[Selection, ...]

    @property
    def summary(self) -> str:
        """ "AMD EPYC (2 cores, x86_64), no NVIDIA GPU"."""
        gpus = " + ".join(gpu.name for gpu in self.gpus) or "no NVIDIA GPU"
        cores = f"{self.host.cores} core{'s' if self.host.cores > 1 else ''}"
        return f"{self.host.board or self.host.cpu_model} ({cores}, {self.host.arch}), {gpus}"


def profiles(user_file: Path | None = None) -> dict[str, DeviceProfile]:
    """Every profile by name, shipped ones first. Raises UsageError, naming file and key, where a file is malformed."""
    shipped = resources.files("latbench").joinpath("devices.toml").read_text(encoding="utf-8")
    tables = _parse(shipped, "latbench/devices.toml")
    known = {name: _profile(name, table, "latbench/devices.toml") for name, table in tables.items()}
    path = user_file or _user_file()
    if path is None:
        return known
    try:
        text = foreign.read_bytes(path, MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    for name, table in _parse(text, str(path)).items():
        profile = _profile(name, {**tables.get(name, {}), **table}, str(path))
        for other in known.values():
            shared = _words(profile) & _words(other) if other.name != name else set()
            if shared:
                raise UsageError(f"{path}: [{name}]: {sorted(shared)[0]!r} is a name of {other.name} already")
        known[name] = profile
    return known


def resolve(name: str, known: Mapping[str, DeviceProfile] | None = None) -> DeviceProfile:
    """The profile of that name, alias or title; case and punctuation do not matter. Raises UsageError."""
    known = profiles() if known is None else known
    words = {word: profile for profile in known.values() for word in _words(profile)}
    if _fold(name) in words:
        return words[_fold(name)]
    close = difflib.get_close_matches(_fold(name), words, n=1)
    hint = f"did you mean {words[close[0]].name}? " if close else ""
    raise UsageError(f"unknown device {shown(name)}: {hint}There are: auto, {', '.join(sorted(known))}")


def nvidia_gpus(command: str = "nvidia-smi") -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the driver lists; none where it is missing, broken or silent for 10 s."""
    for query in ("name,driver_version,compute_cap", "name,driver_version"):  # drivers before 510 lack compute_cap
        try:
            run = subprocess.run(
                [command, f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ()
        if run.returncode == 0:
            rows = [[cell.strip() for cell in line.split(",")] for line in run.stdout.splitlines() if "," in line]
            return tuple(
                Gpu(index, row[0], row[1], row[2] if re.fullmatch(r"[0-9]+\.[0-9]+", row[-1]) and row[2:] else None)
                for index, row in enumerate(rows)
            )
    return ()


def detect(
    root: Path = host.ROOT, known: Mapping[str, DeviceProfile] | None = None, nvidia_smi: str = "nvidia-smi"
) -> Machine:
    """What is here. Raises UsageError where the user's profiles are malformed."""
    known = profiles() if known is None else known
    here, gpus = host.read(root), nvidia_gpus(nvidia_smi)
    able = [profile for profile in known.values() if profile.arch in (None, here.arch)]
    cards = [
        Selection(profile, gpu.index)
        for gpu in gpus
        for profile in able
        if profile.kind == "gpu" and _matches(profile, gpu.name)
    ]
    boards = [  # a Jetson has a GPU although its driver may lack nvidia-smi
        Selection(profile, 0)
        for profile in able
        if profile.kind == "gpu" and not cards and _matches(profile, here.board)
    ]
    cpus = [
        Selection(profile, None)
        for profile in able
        if profile.kind == "cpu" and (_matches(profile, here.cpu_model) or _matches(profile, here.board))
    ]
    return Machine(here, gpus, (*cards, *boards, *cpus, Selection(known[GENERIC], None)))


def backend_problem(name: str) -> str | None:
    """Why a back-end cannot run here, with the command that mends it; None where it can."""
    try:
        plugins.load("latbench.backends", name).available()
    except (EnvironmentUnfitError, UsageError) as error:
        return str(error)
    return None


def worker_problem(name: str, python: str) -> str | None:
    """As ``backend_problem``, in another interpreter; it names that one."""
    try:
        problem = describe(plugins.spec("latbench.backends", name), python)["problem"]
    except MeasurementError as error:
        return str(error)
    return None if problem is None else f"{python}: {problem}"


def select(
    name: str,
    *,
    simulated: bool = False,
    machine: Machine | None = None,
    problem: Callable[[str], str | None] = backend_problem,
) -> Selection:
    """The device that a user's word means on this machine.

    "auto" is the first GPU that is recognised and whose back-end works, else the CPU by its closest profile; "cpu" is
    the CPU; any other name must be in this machine, unless nothing runs on it (`simulated`: the roofline back-end).
    Raises UsageError on an unknown name, DeviceUnavailableError where the device is not here.
    """
    known = profiles()
    if _fold(name) == "auto":
        matches = (machine or detect(known=known)).matches
        if simulated:
            return Selection(matches[0].profile, None)
        return next(s for s in matches if s.index is None or _default_problem(s.profile, problem) is None)
    profile = resolve(name, known)
    if simulated or profile.name == GENERIC:
        return Selection(profile, None)
    machine = machine or detect(known=known)
    for selection in machine.matches:
        if selection.profile.name == profile.name:
            return selection
    raise DeviceUnavailableError(
        f"no {profile.title} here: this machine has {machine.summary}. Three ways on: measure what is here "
        "(--device auto); run the same command on a machine that has one, or send the work there (--fleet ADDRESS); "
        "use published figures (latbench import)"
    )


def _default_problem(profile: DeviceProfile, problem: Callable[[str], str | None]) -> str | None:
    if profile.worker_python is None:
        return problem(profile.default_backend)
    return worker_problem(profile.default_backend, profile.worker_python)


_NUMBERS = {"peak_gflops_fp32", "peak_gflops_fp16", "bandwidth_gbs", "memory_gb"}
_LISTS = {"match", "aliases"}
_CHOICES = {"kind": ("gpu", "cpu"), "clocks": ("float", "lockable"), "default_dtype": ("float32", "float16")}


def _parse(text: str, where: str) -> dict[str, dict[str, Any]]:
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits and deep nesting are no TOMLDecodeError
        raise UsageError(f"{where}: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{where}: {name} = ... stands outside a profile; write [NAME] above it")
    return tables


def _profile(name: str, table: Mapping[str, Any], where: str) -> DeviceProfile:
    """Checked against the fields of DeviceProfile; a GPU's back-end is TensorRT unless it says otherwise."""
    where = f"{where}: [{name}]"
    keys = {field.name: field.default is MISSING for field in fields(DeviceProfile) if field.name != "name"}
    if not _fold(name) or _fold(name) == "auto":
        raise UsageError(f"{where}: a profile cannot have this name")
    for key, value in table.items():
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            raise UsageError(
                f"{where} {key}: unknown key; {'did you mean' if close else 'keys:'} {', '.join(close or keys)}"
            )
        wrong = _complaint(key, value)
        if wrong:
            raise UsageError(f"{where} {key} = {shown(value)}: {wrong}")
    missing = [key for key, required in keys.items() if required and key not in table]
    if missing:
        raise UsageError(f"{where} has no {missing[0]}")
    values: dict[str, Any] = {"default_backend": "tensorrt"} if table["kind"] == "gpu" else {}
    values.update((key, tuple(value) if key in _LISTS else value) for key, value in table.items())
    return DeviceProfile(name=name, **values)


def _complaint(key: str, value: object) -> str | None:
    """What is wrong with a key's value; None where nothing is."""
    if key in _NUMBERS:
        positive = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
        return None if positive else "must be a number above zero"
    if key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return "must be a list of strings"
        return next(filter(None, map(_regex_error, value)), None) if key == "match" else None
    if key in _CHOICES:
        return None if value in _CHOICES[key] else f"must be {' or '.join(_CHOICES[key])}"
    return None if isinstance(value, str) and value else "must be a string"


def _regex_error(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"no regular expression: {error}"
    return None


def _user_file() -> Path | None:
    named = os.environ.get("LATBENCH_DEVICES")
    if named:
        return Path(named)
    # os.path's leaves "~" alone where there is no home; Path's raises
    path = Path(os.path.expanduser("~/.config/latbench/devices.toml"))  # noqa: PTH111
    return path if path.is_file() else None


def _fold(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _words(profile: DeviceProfile) -> set[str]:
    """Folded, everything that names the profile."""
    return {_fold(word) for word in (profile.name, profile.title, *profile.aliases)}


def _matches(profile: DeviceProfile, text: str | None) -> bool:
    return text is not None and any(re.search(pattern, text) for pattern in profile.match)
