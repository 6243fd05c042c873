"""``latbench verify``: does the found network keep its budget on the device?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latbench.cli.training import format_amount
from latbench.cli.values import DURATION, PERCENT, format_ms

if TYPE_CHECKING:
    from latbench.verify import Verified


@click.command("verify")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--ci", type=PERCENT, default="1%", show_default=True, help="Half-width of the interval to reach.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Worker processes.")
@click.option("--max-time", type=DURATION, default="20s", show_default=True, help="Of timed inference at most.")
@click.option(
    "--until-met",
    is_flag=True,
    help="While a target is missed, or a prediction further off than --within, correct the oracle by the measurement "
    "and select again from what was trained.",
)
@click.option("--within", type=PERCENT, default="5%", show_default=True, help="Of --until-met, off a measurement.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of --until-met, at most.")
@click.option(
    "--networks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of instanas: the mean over images, of their so many commonest networks.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    folder: Path,
    ci: float,
    runs: int,
    max_time: float,
    until_met: bool,
    within: float,
    rounds: int,
    networks: int,
    as_json: bool,
) -> int:
    """Measure the network that a search left in DIR on its table's device: predicted, measured, target.

    Ends with status 2 where a target is missed.
    """
    from dataclasses import replace

    from latbench import verify
    from latbench.cli.progress import Bar
    from latbench.profiling.bench import BENCH_PLAN

    plan = replace(
        BENCH_PLAN, precision=ci, runs=runs, max_time_s=max_time, min_time_s=min(BENCH_PLAN.min_time_s, max_time)
    )
    with Bar(f"verify {folder.name}") as bar:
        if until_met:
            done = verify.until_met(folder, plan=plan, rounds=rounds, within=within, reporter=bar)
        else:
            done = [verify.verify(folder, plan=plan, reporter=bar, networks=networks)]
    if as_json:
        click.echo(json.dumps({"rounds": [[one.to_dict() for one in verified] for verified in done]}))
    else:
        for number, verified in enumerate(done, 1):
            if len(done) > 1:
                click.echo(f"round {number}")
            for one in verified:
                click.echo(_told(one))
    return 0 if all(one.met for one in done[-1]) else 2


def _told(one: Verified) -> str:
    verdict = "met" if one.met else "MISSED"
    target = f"target {format_amount(one.target, one.unit)}: {verdict}"
    if one.unit != "ms":
        return f"counted {format_amount(one.measured, one.unit)}, {target}"
    word = "simulated" if one.simulated else "measured"
    half = (one.high - one.low) / 2 / one.measured
    clock = "" if one.as_measured == one.measured else f" ({format_ms(one.as_measured)} at the clock that ran)"
    mean = "" if one.networks == 1 else f"mean of {one.networks} networks of {one.coverage:.0%} of images: "
    return (
        f"{mean}predicted {format_ms(one.predicted)}, {word} {format_ms(one.measured, half)}{clock} on {one.device}, "
        f"{target}; the prediction is {one.error:+.1%} off"
    )
