"""``latbench search``: the best network of a space under budgets."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.training import COUNT, TrainingBar, constraints_of, format_amount, speaks
from latbench.cli.values import LATENCY, PERCENT
from latbench.errors import UsageError

if TYPE_CHECKING:
    from searchers.base import Problem, SearchResult


@click.command("search")
@click.argument("searcher")
@click.option(
    "--table",
    "tables",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Latency table, or fitted model; again for another device.",
)
@click.option("--target", "targets", type=LATENCY, multiple=True, required=True, help="Budget of each table: 4ms.")
@click.option("--max-params", type=COUNT, help="Budget of parameters too: 1.5M.")
@click.option("--max-macs", type=COUNT, help="Budget of multiply-accumulates too: 300M.")
@click.option("--confidence", type=PERCENT, help="With which a measurement keeps the target; default: the prediction.")
@click.option(
    "--missing",
    type=click.Choice(["error", "interpolate"]),
    default="error",
    show_default=True,
    help="Where a table lacks a block: refuse, or take the widths on both sides of it.",
)
@click.option("--data", required=True, help="digits, folder:DIR, parquet:FILE, cifar10:DIR (cifar100, mnist, ...).")
@click.option("--max-images", type=click.IntRange(1), help="Train on a balanced sample of so many images.")
@click.option("--epochs", type=click.IntRange(1), help="Default: the searcher's.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, over all processes.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another option of the searcher.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--fleet", metavar="ADDRESS", help="Judge candidates on every node of this fleet: ray://HOST:10001, or auto."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Redraw the history here every epoch: run.svg.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of checkpoints and results."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    searcher: str,
    tables: tuple[Path, ...],
    targets: tuple[float, ...],
    max_params: float | None,
    max_macs: float | None,
    confidence: float | None,
    missing: str,
    data: str,
    max_images: int | None,
    epochs: int | None,
    batch_size: int | None,
    settings: tuple[str, ...],
    seed: int,
    fleet: str | None,
    plot: Path | None,
    output: Path,
    as_json: bool,
) -> None:
    """Search a network of the table's space under a latency budget: aows, tfnas, relativenas, instanas, irlas, random.

    A search that was cut off goes on with the same command. Several GPUs: torchrun --nproc-per-node N $(which latbench)
    search ...
    """
    from latbench import plugins
    from latbench.cli.target import assignment

    kind = plugins.load("latbench.searchers", searcher)
    from searchers.base import Problem
    from searchers.folders import held
    from searchers.options import from_settings
    from searchers.world import leave_busy_cores

    given = {"epochs": epochs, "batch_size": batch_size}
    chosen = from_settings(
        kind, {k: v for k, v in given.items() if v is not None} | dict(assignment(text) for text in settings)
    )
    counts = {"n_params": max_params, "macs": max_macs}
    constraints = constraints_of(tables, targets, counts, missing=missing, confidence=confidence)
    problem = Problem(constraints, data, output, seed, max_images=max_images)
    if fleet is not None and getattr(chosen, "evaluator", "supernet") == "supernet":
        raise UsageError(
            f"{searcher} trains one supernet, which a fleet cannot share: start it with torchrun"
            + (", or choose --set evaluator=train" if hasattr(chosen, "evaluator") else "")
        )
    with ExitStack() as stack:
        if speaks():
            stack.enter_context(held(output))
        if fleet is not None:
            from searchers.candidates import candidate_fleet

            problem = replace(problem, fleet=stack.enter_context(candidate_fleet(fleet, _say)))
        if (fewer := leave_busy_cores()) and speaks():
            _say(fewer)
        bar = stack.enter_context(TrainingBar(f"search {searcher}", plot))
        result = chosen.search(problem, reporter=bar)
    if speaks():
        click.echo(json.dumps(_plain(problem, result)) if as_json else _told(problem, result))


def _say(line: str) -> None:
    click.echo(line, err=True)


def _plain(problem: Problem, result: SearchResult) -> dict[str, Any]:
    return {
        "searcher": result.searcher,
        "arch": list(result.arch),
        "predicted": list(result.predicted),
        "target": list(result.target),
        "unit": [constraint.oracle.unit for constraint in problem.constraints],
        "score": result.score,
        "network": str(result.network),
        "notes": dict(result.notes),
    }


def _told(problem: Problem, result: SearchResult) -> str:
    space = problem.space
    lines = [f"found {space.name}:{space.format_arch(result.arch)}", f"  {space.describe(result.arch)}"]
    for constraint, predicted in zip(problem.constraints, result.predicted, strict=True):
        oracle = constraint.oracle
        where = f" on {oracle.provenance.device_name}" if oracle.provenance.device_name else ""
        lines.append(
            f"  predicted {format_amount(predicted, oracle.unit)}{where}, target "
            f"{format_amount(constraint.target, oracle.unit)} ({predicted / constraint.target:.1%} of it)"
        )
    if "accuracy" in result.notes:
        lines.append(f"  accuracy {result.notes['accuracy']:.2%} on held-out images, with the weights of the search")
    if "warning" in result.notes:
        lines.append(f"  warning: {result.notes['warning']}")
    lines += [f"  score {result.score:.4g}", f"written to {problem.out}; next: latbench verify {problem.out}"]
    return "\n".join(lines)
