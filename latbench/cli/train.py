"""``latbench train``: the found network, from scratch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from latbench.cli.training import TrainingBar, speaks


@click.command("train")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--epochs", type=click.IntRange(1), help="Default: the recipe's; warm-up takes at most half.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, over all processes.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Of the recipe: mixup=0, lr=0.2, ...")
@click.option("--plot", type=click.Path(path_type=Path), help="Redraw the history here every epoch: run.svg.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    folder: Path,
    epochs: int | None,
    batch_size: int | None,
    settings: tuple[str, ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Train the network that a search left in DIR from scratch, and put its weights into DIR/network.onnx.

    Cosine rate, label smoothing, mixup. A run that was cut off goes on with the same command.
    """
    from latbench import plugins
    from latbench.cli.target import assignment
    from searchers.results import read_result

    found = read_result(folder)
    plugins.load("latbench.searchers", found.result.searcher)  # says what to install where torch is missing
    from searchers.derive import Recipe, train_found
    from searchers.options import from_settings
    from searchers.world import leave_busy_cores

    recipe = Recipe() if epochs is None else Recipe().lasting(epochs)
    given = asdict(recipe) if batch_size is None else asdict(recipe) | {"batch_size": batch_size}
    recipe = from_settings(Recipe, given | dict(assignment(text) for text in settings))
    if (fewer := leave_busy_cores()) and speaks():
        click.echo(fewer, err=True)
    with TrainingBar(f"train {folder.name}", plot) as bar:
        figures = train_found(found, recipe, reporter=bar)
    if as_json and speaks():
        click.echo(json.dumps(figures))
    elif speaks():
        click.echo(
            f"accuracy {figures['accuracy']:.2%} on {found.problem.data_name}'s test images "
            f"({figures['images']} training images, {recipe.epochs} epochs)\nwritten to {found.result.network}"
        )
