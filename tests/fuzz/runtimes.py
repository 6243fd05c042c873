"""Parsers of what runtimes, drivers and worker processes say."""

from __future__ import annotations

import hashlib
from pathlib import Path
from random import Random

from contract import Parser
from importing import of_file
from mutate import damaged, json_text, text

from latbench import devices, host
from latbench.backends import tensorrt_inspector, tensorrt_versions
from latbench.backends.tensorrt_cache import MAGIC, TimingCache
from latbench.measure.base import Measurement

_ENGINES = (
    {
        "Layers": [{"Name": "conv", "LayerType": "CaskConvolution", "TacticName": "sm80"}, "relu"],
        "Bindings": ["x", "y"],
    },
    {"Layers": [{"Name": "conv", "TacticValue": "0x1"}], "I/O Tensors": [{"Name": "x"}, {"Name": "y"}]},
)
_CACHE = MAGIC + hashlib.sha256(b"entries").hexdigest().encode() + b"\nentries"
_MEASUREMENT = Measurement("k", 0, 0, samples_ms=(1.0, 1.5), conditions={"launch": "graph"}).to_dict()


def _said(case: bytes, _: Path) -> object:
    """What a worker writes into its pipe."""
    return Measurement.parse(case)


def _cpu_files(rng: Random) -> dict[str, str]:
    files = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC\ncore id : 0\nphysical id : 0\nflags : hypervisor\n",
        "proc/meminfo": "MemTotal:       24000000 kB\nMemAvailable:    100 kB\n",
        "proc/loadavg": "0.10 0.20 0.30 1/234 567\n",
        "proc/stat": "cpu  1 2 3 4 5 6 7 8 9 10\n",
        "sys/devices/system/cpu/online": "0-3,5\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/cpu/cpu0/cache/index0/size": "32K\n",
        "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
        "sys/devices/system/cpu/cpu0/cache/index0/type": "Data\n",
        "sys/devices/system/cpu/cpu0/cache/index0/shared_cpu_list": "0-1\n",
    }
    for name in rng.sample(list(files), rng.randrange(4)):
        files[name] = text(rng, [files[name]])
    return files


def _read_host(case: dict[str, str], folder: Path) -> object:
    for name, content in case.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, errors="surrogateescape")
    return host.read(folder)


_SMI = "NVIDIA TITAN Xp, 535.54, 6.1\nNVIDIA TITAN Xp, 535.54, 6.1\n"


def _gpus(case: str, folder: Path) -> object:
    (folder / "out").write_text(case, errors="surrogateescape")
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat {folder / 'out'}\n")
    script.chmod(0o755)
    return devices.nvidia_gpus(str(script))


PARSERS = (
    Parser(
        "engine inspector",
        lambda rng: json_text(rng, rng.choice(_ENGINES)),
        lambda case, _: tensorrt_inspector.parse(case.decode("utf-8", "replace")),
    ),
    Parser("timing cache", lambda rng: damaged(rng, [_CACHE]), of_file("c.timing", TimingCache)),
    Parser(
        "version of TensorRT",
        lambda rng: text(rng, ("8.6.1", "10.13.3.9")),
        lambda case, _: tensorrt_versions.release_of(case),
    ),
    Parser("host", _cpu_files, _read_host, gate=40),
    Parser("nvidia-smi", lambda rng: text(rng, [_SMI]), _gpus, gate=40),
)
