"""What a table says of itself in words and figures: its conditions, how noisy it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from latbench.provenance import Provenance
from latbench.tables import LatencyTable


def conditions(provenance: Provenance) -> str:
    """Under what the rows were made, in words: back-end and version, threads, batch, resolution, dtype, date."""
    p = provenance
    stated = {**p.environment, **p.settings, **p.options, **p.policy}
    words: dict[str, Callable[[Any], str]] = {
        "threads": lambda n: f"{n} thread" if n == 1 else f"{n} threads",
        "batch": lambda n: f"batch {n}",
        "resolution": lambda n: f"{n} px",
        "dtype": str,
        "context": lambda c: "sandwich and isolated" if c == "both" else str(c),
    }
    parts = [f"{p.backend} {p.versions.get(p.backend, '')}".strip()]
    parts += [word(stated[name]) for name, word in words.items() if stated.get(name) is not None]
    return ", ".join(filter(None, [*parts, (p.finished_at or p.started_at)[:10]]))


def noise(frame: pd.DataFrame) -> NDArray[np.float64]:
    """Half the interval over the magnitude of the latency, of the ok rows that have both; (M,), as fractions."""
    rows = measured_rows(frame)
    half = (rows["ci_high_ms"] - rows["ci_low_ms"]) / 2
    values = (half / rows["ms"].abs().where(rows["ms"] != 0)).dropna()
    return np.asarray(values, np.float64)


def headline(table: LatencyTable) -> str:
    """What was measured, on what."""
    p = table.provenance
    simulated = bool(len(table)) and bool((table.frame["origin"] == "simulated").all())
    return f"{p.space or 'latencies'} on {p.device_name}" + (" (simulated)" if simulated else "")


def measured_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The ok rows, with `ms` at the reference clock where there is one."""
    rows: pd.DataFrame = frame[frame["status"] == "ok"]
    with_ms: pd.DataFrame = rows.assign(
        ms=rows["latency_ref_ms"].astype(float).fillna(rows["latency_ms"].astype(float))
    )
    return with_ms


def amount(value: float, unit: str = "ms") -> str:
    """Three digits and the unit: "4.69 ms", "0.0123 ms", "1.2 M parameters"."""
    if unit == "ms":
        return f"{value:#.3g}".rstrip(".") + " ms" if abs(value) < 1000 else f"{value:.0f} ms"
    return f"{value / 1e6:.3g} M {unit}" if abs(value) >= 1e5 else f"{value:g} {unit}"


def two_digits(value: float) -> str:
    """To two significant digits, without an exponent up to a million: 0.65, 3.2, 600."""
    return f"{float(f'{value:.2g}'):g}"


def method(provenance: Provenance) -> str:
    """How each figure was made, from the policy; empty where none is recorded."""
    p = provenance.policy
    if "rounds" not in p:
        return ""
    block_ms, most = 1e3 * float(p.get("block_s", 0.005)), float(p.get("max_time_s", 1.0))
    words = [
        f"Each row was sampled in blocks of about {block_ms:g} ms, {p['rounds']} in each of {p.get('runs', 1)} worker "
        f"processes, interleaved with the other rows; its latency is {_counted(p)} of the block medians, its interval "
        "comes from the spread between blocks and processes."
    ]
    if p.get("alone_processes"):
        words.append(
            f"Networks and chains of blocks had {p['alone_processes']} processes each: the quietest quarter counts."
        )
    if p.get("criterion") == "ci-median":
        words.append(
            f"Measuring went on until the {100 * float(p.get('confidence', 0.95)):g} % interval was "
            f"±{100 * float(p.get('precision', 0.02)):g} %, or for {most:g} s of inference."
        )
    if p.get("context") in ("sandwich", "both"):
        words.append("Blocks were timed between two thin convolutions, half of whose own time is taken off.")
    if p.get("fold_bn"):
        words.append("Batch norms were folded.")
    if p.get("sweep_bytes"):
        words.append(f"{p['sweep_bytes'] / 2**20:.3g} MiB were read between two runs of a block, as a network would.")
    if provenance.clock_ref_us:
        words.append("Latencies are stated at the session's reference clock.")
    return " ".join(words)


def _counted(policy: Mapping[str, Any]) -> str:
    """Of a row's block medians, by ``profiling.profile.Target.policy``; tables of before say nothing of it."""
    return "the mean of the lower half" if policy.get("estimate") == "lower half" else "the median"


def machine(provenance: Provenance) -> str:
    """On what it was measured, from the environment: processor, cores, memory, kernel, what held the clock."""
    e = provenance.environment
    parts = [provenance.device_name]
    if e.get("cpu_model") and e["cpu_model"] != provenance.device_name:
        parts.append(f"in a machine with {e['cpu_model']}")
    if e.get("cpus"):
        parts.append(f"{e['cpus']} cores")
    if e.get("memory_gib"):
        parts.append(f"{e['memory_gib']} GiB")
    if e.get("kernel"):
        parts.append(f"Linux {e['kernel']}")
    if e.get("hypervisor") not in (None, "", "none"):
        parts.append("a virtual machine")
    if e.get("governors"):
        parts.append(f"governor {', '.join(map(str, e['governors']))}")
    if e.get("worker_cpus"):
        parts.append(f"measured on core {', '.join(map(str, e['worker_cpus']))}")
    return ", ".join(parts)


def versions(provenance: Provenance) -> str:
    """ "latbench 0.1.0, onnxruntime 1.31.1, ..." """
    return ", ".join(f"{name} {version}" for name, version in provenance.versions.items())


def kinds(frame: pd.DataFrame) -> str:
    """ "1,612 blocks, 40 networks, 68 stubs" of the rows that succeeded."""
    counts = frame.loc[frame["status"] == "ok", "kind"].value_counts()
    words = [f"{n:,} {kind}{'s' * (n != 1)}" for kind, n in counts.items()]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:]))) or "no row that succeeded"


def failures(frame: pd.DataFrame) -> dict[str, int]:
    """Reason -> number of rows that failed so, the commonest first."""
    failed = frame[frame["status"] != "ok"].astype({"stage": object, "error": object})
    reasons = failed["status"] + failed["stage"].map(lambda s: f" while in {s}" if isinstance(s, str) else "")
    reasons += failed["error"].map(lambda e: f": {' '.join(e.split())}" if isinstance(e, str) else "")
    return {str(reason): int(n) for reason, n in reasons.value_counts().items()}


def citation(table: LatencyTable) -> str:
    """One sentence for a paper: device, versions, batch, precision, resolution, policy, n, interval."""
    p, found = table.provenance, measured_rows(table.frame)
    stated = {**p.environment, **p.settings, **p.options, **p.policy}
    setting = [f"batch {stated['batch']}"] if "batch" in stated else []
    setting += [str(stated["dtype"])] if "dtype" in stated else []
    setting += [f"{stated['resolution']} px"] if "resolution" in stated else []
    if "threads" in stated:
        setting.append(f"{stated['threads']} thread{'s' * (stated['threads'] != 1)}")
    runtime = f"{p.backend} {p.versions.get(p.backend, '')}".strip()
    others = [f"{name} {p.versions[name]}" for name in ("driver", "cuda", "latbench") if name in p.versions]
    shares = noise(table.frame)
    how = ""
    if "rounds" in p.policy:
        n_samples, n_blocks = found["n_samples"].median(), found["n_blocks"].median()
        how = f"; {_counted(p.policy)} of block medians (policy {p.policy_id}"
        how += f", {n_samples:.0f} samples in {n_blocks:.0f} blocks per row at the median)" if len(found) else ")"
    if len(shares):
        confidence = 100 * float(p.policy.get("confidence", 0.95))
        how += f", half-width of the {confidence:g} % interval {np.median(shares):.1%} of the latency at the median"
    origin = sorted(set(found["origin"])) or ["measured"]
    date = (p.finished_at or p.started_at)[:10]
    space = f" of {p.space}" if p.space else ""
    return (
        f"Latencies{space} ({kinds(table.frame)}) were {' and '.join(origin)} on {p.device_name} with {runtime}"
        f"{' (' + ', '.join(others) + ')' if others else ''}{', ' + ', '.join(setting) if setting else ''}"
        f"{', on ' + date if date else ''}{how}."
    )
