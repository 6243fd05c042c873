"""A search's folder as a section: what was found, under which budgets, how it came about, and whether it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd

from latbench.errors import UsageError
from latbench.report import charts
from latbench.report.diagram import cells, drawing, stages
from latbench.report.parts import Column, Grid, Picture, Section
from latbench.report.words import amount
from searchers.results import HISTORY, RESULT, Found, read_history, read_result

CHECKPOINT = "search.ckpt"  # written while it trains
_PANELS = {"loss": "loss", "accuracy": "accuracy", "score": "score"}  # prefix of the history's columns -> axis


def search_section(folder: Path, name: str) -> Section:
    """`name` is the anchor. A folder without a result is told as an unfinished search, with the history that is there.

    Raises UsageError where the folder holds neither, or a damaged result.
    """
    if not (folder / RESULT).is_file():
        return _unfinished(folder, name)
    found = read_result(folder)
    verified = json.loads((folder / RESULT).read_text()).get("verified") or []
    result, space = found.result, found.problem.space
    pictures = [*_front_picture(name, found), *_panels(name, result.history, found)]
    missing = []
    if verified:
        pictures[:0] = _verified_pictures(name, verified)
    else:
        missing.append(f"Measured latency of the found network: not measured yet; latbench verify {folder}")
    if not result.history:
        missing.append("History: the search kept none.")
    pictures[:0] = _network_pictures(name, found)
    title = f"{result.searcher}: {space.name} network for {found.problem.data_name}"
    grids = (_choices(name, found), *_history_grid(name, result.history))
    return Section(
        name, "search", title, _lead(found, verified), _facts(found, folder), tuple(missing), tuple(pictures), grids
    )


def _unfinished(folder: Path, name: str) -> Section:
    if not any((folder / name).is_file() for name in (HISTORY, CHECKPOINT)):
        raise UsageError(f"{folder} holds no search (no {RESULT}): give the folder that latbench search -o made")
    history = read_history(folder / HISTORY) if (folder / HISTORY).is_file() else ()
    lead = f"The search has not ended: {len(history)} epochs are in its history."
    missing = [f"The found network: {RESULT} is missing; the same latbench search command goes on where it was."]
    if not history:
        missing.append(f"History: {HISTORY} is missing; it is written after the first epoch.")
    pictures = tuple(_panels(name, history, None))
    grids = tuple(_history_grid(name, history))
    title = f"Unfinished search in {folder.name}"
    return Section(name, "search", title, lead, (("folder", str(folder)),), tuple(missing), pictures, grids)


def _lead(found: Found, verified: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for i, (constraint, predicted) in enumerate(zip(found.problem.constraints, found.result.predicted, strict=True)):
        unit = constraint.oracle.unit
        where = f" on {constraint.oracle.provenance.device_name}" if unit == "ms" else ""
        text = f"predicted {amount(predicted, unit)}{where} for a target of {amount(constraint.target, unit)}"
        if i < len(verified) and unit == "ms":
            one = verified[i]
            word = "simulated" if one["simulated"] else "measured"
            text += f", {word} {amount(one['measured'])}: {'met' if one['met'] else 'missed'}"
        parts.append(text)
    text = f"The network found is {'; '.join(parts)}. Its score is {found.result.score:.4g}"
    accuracy = found.result.notes.get("accuracy")
    text += f", its accuracy in the search {accuracy:.1%}." if isinstance(accuracy, float) else "."
    if found.trained and isinstance(found.trained.get("accuracy"), float):
        text += f" Trained from scratch it reaches {found.trained['accuracy']:.1%}."
    return text


def _facts(found: Found, folder: Path) -> tuple[tuple[str, str], ...]:
    problem, result, space = found.problem, found.result, found.problem.space
    graph = space.network(result.arch)
    oracles = [getattr(c.oracle, "name", f"counting {c.oracle.unit}") for c in problem.constraints]
    lines = [
        ("architecture", space.format_arch(result.arch)),
        ("size", f"{amount(graph.n_params, 'parameters')}, {amount(graph.macs, 'MACs')}"),
        ("space", f"{space.name} ({', '.join(f'{k} {v}' for k, v in space.settings().items())})"),
        ("data", problem.data_name + (f", at most {problem.max_images} images" if problem.max_images else "")),
        ("oracles", ", ".join(oracles)),
        ("settings", ", ".join(f"{k} {v}" for k, v in found.settings.items())),
        ("seed", str(problem.seed)),
        ("folder", str(folder)),
    ]
    return tuple((name, text) for name, text in lines if text)


def _network_pictures(name: str, found: Found) -> list[Picture]:
    """The network stage by stage; for networks of cells the cells too."""
    space, arch = found.problem.space, found.result.arch
    boxes = stages(space, arch)
    caption = (
        "From the input above to the output below: what was chosen at each stage and the shape of what it gives. "
        "Shading is the stage's share of MACs beside the largest."
    )
    n_absent = len(getattr(space, "sites", ())) - len(boxes)
    caption += f" {n_absent} stages that could have been there are left out." if n_absent > 0 else ""
    pictures = [Picture(f"{name}-network", "The network", caption, svg=drawing(boxes))]
    for i, (stage, parts) in enumerate(cells(space, arch)):
        told = f"What {stage} is made of, and every stage that is built like it."
        pictures.append(Picture(f"{name}-cell{i}", f"Inside {stage}", told, svg=drawing(parts)))
    return pictures


def _verified_pictures(name: str, verified: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """One per constraint that is a latency."""
    pictures = []
    for i, one in enumerate(v for v in verified if v["unit"] == "ms"):
        word = "simulated" if one["simulated"] else "measured"
        rows = [
            {"name": "target", "value": one["target"], "low": one["target"], "high": one["target"]},
            {"name": "predicted", "value": one["predicted"], "low": one["predicted"], "high": one["predicted"]},
            {"name": word, "value": one["measured"], "low": one["low"], "high": one["high"]},
        ]
        chart = charts.intervals([{**row, "group": row["name"]} for row in rows], "latency, ms")
        caption = (
            f"On {one['device']}: the prediction is {one['error']:+.2%} off what was {word}; the target is "
            f"{'met' if one['met'] else 'missed'}. The bar is the 95 % interval."
        )
        pictures.append(Picture(f"{name}-verified{i}", "Predicted, measured, target", caption, chart))
    return pictures


def _front_picture(name: str, found: Found) -> list[Picture]:
    """Quality against the first budget over the epochs; empty where the history does not tell both."""
    history, constraint = found.result.history, found.problem.constraints[0]
    names = list(dict.fromkeys(n for row in history for n in row))
    quality = next((n for n in names if n == "score"), next((n for n in names if n.startswith("accuracy")), None))
    if quality is None or "predicted0" not in names:
        return []
    rows = [
        {
            "name": f"epoch {row.get('epoch', i)}",
            "cost": row["predicted0"],
            "quality": row[quality],
            "group": "on the way",
        }
        for i, row in enumerate(history)
        if isinstance(row.get("predicted0"), Real) and isinstance(row.get(quality), Real)
    ]
    final = found.result.score if quality == "score" else found.result.notes.get("accuracy", found.result.score)
    rows.append({"name": "found", "cost": found.result.predicted[0], "quality": final, "group": "found"})
    words = quality.replace("_", " of the ")
    chart = charts.front(rows, f"predicted {constraint.oracle.unit}", words, constraint.target)
    caption = (
        f"What the search held best after each epoch, and what it gave: {words} against the first budget "
        f"({amount(constraint.target, constraint.oracle.unit)})."
    )
    return [Picture(f"{name}-front", "Quality against the budget", caption, chart)]


def _panels(name: str, history: Sequence[Mapping[str, Any]], found: Found | None) -> list[Picture]:
    """The history's losses, accuracies and scores, and what each budget was predicted at."""
    pictures = []
    for prefix, title in _PANELS.items():
        rows = _series(history, prefix)
        if rows:
            chart = charts.history(rows, title)
            told = f"{title.capitalize()} of the search after each epoch."
            pictures.append(Picture(f"{name}-{prefix}", title.capitalize(), told, chart))
    for i, constraint in enumerate(found.problem.constraints if found is not None else ()):
        rows = _series(history, f"predicted{i}")
        if rows:
            unit = constraint.oracle.unit
            chart = charts.history(rows, f"predicted {unit}", (constraint.target, "target"))
            told = f"What the search would have given after each epoch, against {amount(constraint.target, unit)}."
            pictures.append(Picture(f"{name}-predicted{i}", f"Predicted {unit}", told, chart))
    return pictures


def _series(history: Sequence[Mapping[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [
        {"epoch": row.get("epoch", i), "value": value, "series": key.removeprefix(prefix).strip("_") or prefix}
        for i, row in enumerate(history)
        for key, value in row.items()
        if (key == prefix or key.startswith(f"{prefix}_")) and isinstance(value, Real)
    ]


def _choices(name: str, found: Found) -> Grid:
    space = found.problem.space
    rows = [
        {"decision": d.name, "chosen": str(d.options[i]), "options": ", ".join(map(str, d.options))}
        for d, i in zip(space.decisions, found.result.arch, strict=True)
    ]
    columns = (Column("decision", "decision"), Column("chosen", "chosen"), Column("options", "options"))
    return Grid(f"{name}-choices", "What was chosen", "", columns, pd.DataFrame(rows))


def _history_grid(name: str, history: Sequence[Mapping[str, Any]]) -> list[Grid]:
    if not history:
        return []
    frame = pd.DataFrame([dict(row) for row in history])
    columns = tuple(
        Column(str(column), str(column).replace("_", " "), "number" if frame[column].dtype.kind in "if" else "text")
        for column in frame
    )
    return [Grid(f"{name}-history", "History", "One row per epoch.", columns, frame)]
