"""What tables, models and search results say of themselves: in JSON values, and one fact a line for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latbench.cli.model import validation_in_words

if TYPE_CHECKING:
    from latbench.oracle.store import StoredModel
    from latbench.tables import LatencyTable

Facts = list[tuple[str, str]]


def table_summary(table: LatencyTable) -> dict[str, Any]:
    """Conditions, counts, noise, failures by reason, warnings, notes of a table, in JSON values."""
    import numpy as np

    from latbench.report import words

    kinds = ["kind", "context", "status", "origin"]
    figures = ("latency_ms", "latency_ref_ms", "ci_low_ms", "ci_high_ms")
    frame, provenance = table.frame_of(*kinds, *figures, "stage", "error", "warnings"), table.provenance
    noise = words.noise(frame)
    warnings = frame["warnings"].explode().dropna()
    counts = frame.groupby(kinds).size().reset_index(name="n").sort_values("n", ascending=False, kind="stable")
    return {
        "provenance": provenance.to_dict(),
        "env_id": provenance.env_id,
        "policy_id": provenance.policy_id,
        "conditions": words.conditions(provenance),
        "n_rows": len(table),
        "counts": [dict(zip([*kinds, "n"], line, strict=True)) for line in counts.to_numpy(object).tolist()],
        "noise": {"median": float(np.median(noise)), "p95": float(np.quantile(noise, 0.95))} if len(noise) else None,
        "failures": words.failures(frame),
        "warnings": {str(name): int(n) for name, n in warnings.value_counts().items()},
        "notes": dict(table.notes),
    }


def table_facts(summary: Mapping[str, Any]) -> Facts:
    """``table_summary`` in words."""
    p, notes = summary["provenance"], summary["notes"]
    facts = [
        ("device", f"{p['device']}: {p['device_name']}"),
        ("space", p["space"]),
        ("conditions", summary["conditions"]),
        ("ids", f"environment {summary['env_id']}, policy {summary['policy_id']}"),
    ]
    for i, c in enumerate(summary["counts"]):
        what = f"{c['kind']}s" + (" in a sandwich" if c["context"] == "sandwich" else "")
        ended = "" if c["status"] == "ok" else f", {c['status']}"
        facts.append(("" if i else "rows", f"{c['n']} {what}, {c['origin']}{ended}"))
    if summary["noise"]:
        words = "median {median:.2%}, 95th percentile {p95:.2%} (half the interval)"
        facts.append(("noise", words.format(**summary["noise"])))
    for i, (reason, n) in enumerate(list(summary["failures"].items())[:8]):
        facts.append(("" if i else "failed", f"{n} x {reason}"))
    return [
        *facts,
        ("warnings", ", ".join(f"{n} x {name}" for name, n in summary["warnings"].items())),
        ("sums", _additivity(notes.get("additivity") or {})),
        ("mixed", "; ".join(notes.get("mixed", ()))),
        ("command", p["command"]),
    ]


def _additivity(figures: Mapping[str, Any]) -> str:
    """Sums of blocks against measured networks, in words."""
    parts = [f"{len(figures['measured_ms'])} networks"] if "measured_ms" in figures else []
    forms = {"mape": "mean error {:.2%}", "bias": "bias {:+.2%}", "spearman": "Spearman {:.4f}"}
    parts += [form.format(figures[name]) for name, form in forms.items() if figures.get(name) is not None]
    if "beyond_cache" in figures:
        parts.append(f"{figures['beyond_cache']['mape']:.2%} with weights beyond the cache")
    return ", ".join(parts) + " (sum of blocks against the network measured)" if parts else ""


def model_summary(stored: StoredModel) -> dict[str, Any]:
    """A model's kind, the conditions of its table, its notes with its validation, in JSON values."""
    from latbench.report import words

    provenance = stored.oracle.provenance
    return {
        "oracle": stored.oracle.name,
        "unit": stored.oracle.unit,
        "provenance": provenance.to_dict(),
        "env_id": provenance.env_id,
        "policy_id": provenance.policy_id,
        "conditions": words.conditions(provenance),
        "notes": dict(stored.notes),
    }


def model_facts(stored: StoredModel) -> Facts:
    """``model_summary`` in words."""
    summary, notes = model_summary(stored), stored.notes
    p = summary["provenance"]
    counts = [f"{notes[key]} {key[2:]}" for key in ("n_blocks", "n_networks") if key in notes]
    return [
        ("model", stored.oracle.name + "".join(f", {k}={v}" for k, v in notes.get("options", {}).items())),
        ("device", f"{p['device']}: {p['device_name']}"),
        ("space", p["space"]),
        ("conditions", summary["conditions"]),
        ("ids", f"environment {summary['env_id']}, policy {summary['policy_id']}"),
        ("fitted to", " and ".join(counts) + (f" of {notes['table']['path']}" if "table" in notes else "")),
        *(("source", source["path"]) for source in notes.get("sources", ())),
        ("fitted", notes.get("fitted_at", "")),
        *validation_in_words(notes),
        ("command", notes.get("command", "")),
    ]


def result_facts(folder: Path) -> Facts:
    """What a search found, in words. Raises UsageError where the folder holds no result."""
    from latbench.cli.training import format_amount
    from latbench.cli.values import format_count
    from searchers.results import read_result

    found = read_result(folder)
    problem, result = found.problem, found.result
    graph = problem.space.network(result.arch)
    facts = [
        ("search", f"{result.searcher} on {problem.data_name}, seed {problem.seed}"),
        ("space", problem.space.name),
        ("found", problem.space.format_arch(result.arch)),
        ("size", f"{format_count(graph.n_params)} parameters, {format_count(graph.macs)} MACs"),
    ]
    for constraint, predicted in zip(problem.constraints, result.predicted, strict=True):
        unit, device = constraint.oracle.unit, constraint.oracle.provenance.device_name
        where = f" on {device}" if unit == "ms" else ""
        text = f"{format_amount(predicted, unit)}{where}, target {format_amount(constraint.target, unit)}"
        facts.append(("predicted", text))
    return [
        *facts,
        ("score", f"{result.score:.4g}"),
        ("history", f"{len(result.history)} epochs"),
        ("settings", ", ".join(f"{name} {value}" for name, value in found.settings.items())),
        ("next", f"latbench verify {folder}; latbench report {folder} -o report.html"),
    ]
