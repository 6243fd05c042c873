"""``latbench profile``: a search space on a device into a latency table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli import measuring
from latbench.cli.values import DTYPE, DURATION, PERCENT, format_ms
from latbench.errors import UsageError

if TYPE_CHECKING:
    from latbench.profiling import Outcome, Target
    from latbench.profiling.fleet import FleetOutcome
    from latbench.profiling.fleet_node import FleetNode
    from latbench.spaces.base import Arch, SearchSpace

UNSTEADY = 5.0  # times the precision asked for: what a shared host does in an hour of noise


@click.command()
@measuring.DEVICE
@click.option("--space", "space_name", required=True, help="Search space: mobilenet_v1, nasbench201, ...")
@measuring.BACKEND
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--resolution", type=int, help="Pixels, square; default: the space's.")
@click.option("--dtype", type=DTYPE, help="fp32 or fp16; default: the device's.")
@measuring.RUNTIME
@click.option("--networks", type=click.IntRange(0), default=0, help="Whole networks to measure too (told: additivity).")
@click.option(
    "--sampling",
    type=click.Choice(["uniform", "biased", "d_optimal"]),
    default="uniform",
    show_default=True,
    help="Which networks: random ones; those whose blocks were seen least (AOWS's); those that tell most about all "
    "blocks, which are fewer for the same error of a fit.",
)
@click.option(
    "--context",
    type=click.Choice(["sandwich", "isolated", "both"]),
    default="sandwich",
    show_default=True,
    help="Blocks between thin convolutions, as in a network, or alone.",
)
@click.option(
    "--cache",
    type=click.Choice(["warm", "network", "cold"]),
    default="warm",
    show_default=True,
    help="What lies in the caches when a block runs: itself; what a median network of the space leaves there (five "
    "times slower, sums of blocks are closer where networks exceed the last-level cache); nothing.",
)
@click.option("--fold-bn/--no-fold-bn", default=True, show_default=True, help="Fold batch norms before measuring.")
@click.option("--ci", type=PERCENT, default="2%", show_default=True, help="Half-width of each row's interval to reach.")
@click.option("--runs", type=click.IntRange(1), default=2, show_default=True, help="Worker processes per row.")
@click.option(
    "--rounds", type=click.IntRange(1), default=2, show_default=True, help="Blocks of samples per run; 5: careful."
)
@click.option("--budget", type=DURATION, help="Stop after this long; the same command goes on from there.")
@click.option("--only", metavar="KEY", help="Only the row of this key (a prefix will do).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order, the networks and the weights.")
@click.option("--fleet", "address", metavar="ADDRESS", help="Measure on every node of a fleet that holds the device.")
@click.option("--dry-run", is_flag=True, help="Say how many rows and about how long; measure nothing.")
@measuring.LOCK_CLOCKS
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The table; default: named after what it holds.")
@measuring.JSON
def command(
    device: str,
    space_name: str,
    backend: str | None,
    batch: int,
    resolution: int | None,
    dtype: Any,
    threads: int,
    settings: tuple[str, ...],
    options: tuple[str, ...],
    networks: int,
    sampling: str,
    context: Any,
    cache: str,
    fold_bn: bool,
    ci: float,
    runs: int,
    rounds: int,
    budget: float | None,
    only: str | None,
    seed: int,
    address: str | None,
    dry_run: bool,
    lock_clocks: int | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure every distinct block of a search space on a device into a latency table.

    A killed run is resumed by the same command: nothing that was measured is lost.
    """
    from latbench import plugins
    from latbench.cli.target import assignment, target_of
    from latbench.measure.base import SamplingPlan

    space_class = plugins.load("latbench.spaces", space_name)
    plan = SamplingPlan(precision=ci, runs=runs, rounds=rounds, seed=seed)
    words = {"backend": backend, "dtype": dtype, "threads": threads, "options": options}
    words |= {"clock_mhz": lock_clocks, "context": context, "fold_bn": fold_bn}
    with ExitStack() as stack:
        nodes: list[FleetNode] | None = None
        if address is None:
            target, dtype = target_of(device, plan=plan, **words)
        else:
            from latbench.cli.fleet_nodes import nodes_of
            from latbench.measure.fleet import connect

            nodes, dtype = nodes_of(stack.enter_context(connect(address)), device, words, plan, _say)
            target = nodes[0].target
        space: SearchSpace = space_class.from_settings(
            {
                "batch": batch,
                "dtype": dtype,
                **({"resolution": resolution} if resolution is not None else {}),
                **dict(assignment(text) for text in settings),
            }
        )
        target = _with_cache(target, cache, space)
        archs = networks if sampling == "uniform" else _chosen(space, networks, sampling, seed)
        path = output or Path(_file_name(space, target))
        if dry_run:
            _dry_run(space, target, archs, only, path, as_json)
            return 0
        outcome = _measured(
            space,
            target,
            nodes,
            path,
            networks=archs,
            only=only,
            budget_s=float("inf") if budget is None else budget,
        )
    summary = _summary(outcome)
    click.echo(json.dumps(summary) if as_json else _told(summary))
    return 2 if summary["failed"] else 0


def _chosen(space: SearchSpace, n: int, method: str, seed: int) -> list[Arch]:
    """`n` architectures, in the order to measure them; more of them begin with the same ones."""
    import numpy as np

    from latbench.oracle.sampling import choose
    from latbench.spaces.base import FactoredSpace

    if not isinstance(space, FactoredSpace):
        raise UsageError(f"{space.name} has no blocks to choose networks by: --sampling uniform")
    return [tuple(arch) for arch in choose(space, n, method, np.random.default_rng(seed)).tolist()]


def _with_cache(target: Target, cache: str, space: SearchSpace) -> Target:
    """The target, its plan as ``--cache`` asks."""
    from latbench.measure.base import COLD_SWEEP_BYTES
    from latbench.profiling import median_weight_bytes

    if cache == "warm":
        return target
    sweep_bytes = COLD_SWEEP_BYTES if cache == "cold" else median_weight_bytes(space)
    return replace(target, plan=replace(target.plan, sweep_bytes=sweep_bytes))


def _measured(
    space: SearchSpace, target: Target, nodes: list[FleetNode] | None, path: Path, **asked: Any
) -> Outcome | FleetOutcome:
    """Here, or on the nodes of a fleet."""
    from latbench.cli.progress import Bar
    from latbench.cli.target import clock_held
    from latbench.profiling import profile

    where = target.device if nodes is None else f"{target.device} of {', '.join(node.name for node in nodes)}"
    with Bar(f"profile {space.name} on {where}") as bar:
        if nodes is None:
            with clock_held(target):
                return profile(space, target, path, reporter=bar, **asked)
        from latbench.profiling.fleet import profile_fleet

        for node in nodes:
            node.target = replace(node.target, plan=target.plan)
        return profile_fleet(space, nodes, path, reporter=bar, say=_say, **asked)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _dry_run(
    space: SearchSpace, target: Target, networks: int | Sequence[Arch], only: str | None, path: Path, as_json: bool
) -> None:
    from latbench.profiling import duration_s, wanted

    jobs = wanted(space, target, networks, only)
    kinds = [job.row.kind for job in jobs]
    plain = {
        "rows": len(jobs),
        **{f"{kind}s": kinds.count(kind) for kind in ("block", "stub", "chain", "network")},
        "estimated_s": round(duration_s(jobs, target.plan), 1),
        "output": str(path),
    }
    click.echo(json.dumps(plain) if as_json else _dry(plain, target, space))


def _file_name(space: SearchSpace, target: Target) -> str:
    bits = {"float32": "fp32", "float16": "fp16"}[space.dtype]
    name = f"{target.device}-{target.backend}-{space.name}-r{space.resolution}-b{space.batch}-{bits}"
    threads = target.options.get("threads", 1)
    return f"{name}{f'-t{threads}' if threads != 1 else ''}.parquet"


def _dry(plain: dict[str, Any], target: Target, space: SearchSpace) -> str:
    minutes = plain["estimated_s"] / 60
    took = f"{minutes:.1f} min" if minutes >= 1 else f"{plain['estimated_s']:.0f} s"
    return (
        f"{space.name} on {target.device_name} with {target.backend}: {plain['rows']} rows "
        f"({plain['blocks']} blocks, {plain['stubs']} stubs, {plain['chains']} chains, {plain['networks']} networks), "
        f"about {took}\n"
        f"would write {plain['output']}"
    )


def _summary(outcome: Outcome | FleetOutcome) -> dict[str, Any]:
    frame = outcome.table.frame
    ok = frame[frame["status"] == "ok"]
    half = ((ok["ci_high_ms"] - ok["ci_low_ms"]) / 2 / ok["gross_ref_ms"].fillna(ok["gross_ms"])).dropna()
    bad = frame[frame["status"] != "ok"]
    additivity = outcome.table.notes.get("additivity")
    isolated = outcome.table.notes.get("additivity_isolated")
    return {
        "table": str(outcome.path),
        "rows": len(frame),
        "wanted": outcome.n_wanted,
        "missing": outcome.n_missing,
        "failed": len(bad),
        "failures": bad["error"].str.slice(0, 200).value_counts().to_dict(),
        "seconds": round(outcome.seconds, 1),
        "interval_median": float(half.median()) if len(half) else None,
        "interval_p95": float(half.quantile(0.95)) if len(half) else None,
        "precision": outcome.table.provenance.policy["precision"],
        "additivity": _without_series(additivity),
        **({"additivity_isolated": _without_series(isolated)} if isolated else {}),
        "canary": outcome.table.notes.get("canary"),
        **_fleet(outcome),
    }


def _fleet(outcome: Outcome | FleetOutcome) -> dict[str, Any]:
    """What a fleet's nodes did; nothing where there was none."""
    nodes, apart = getattr(outcome, "nodes", None), getattr(outcome, "apart", ())
    if nodes is None:
        return {}
    tables = [
        {"table": one.path and str(one.path), "nodes": list(one.nodes), "rows": one.rows, "why": one.why}
        for one in apart
    ]
    return {"nodes": nodes, "apart": tables}


def _without_series(figures: dict[str, Any] | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    plain = {k: _without_series(v) if isinstance(v, dict) else v for k, v in figures.items()}
    return {k: v for k, v in plain.items() if not isinstance(v, list)}


def _told(summary: dict[str, Any]) -> str:
    lines = [f"{summary['rows']} rows in {summary['table']} ({summary['seconds']:.0f} s)"]
    if summary["interval_median"] is not None:
        lines.append(
            f"95 % intervals: half-width {summary['interval_median']:.2%} of the latency (median), "
            f"{summary['interval_p95']:.2%} (95th percentile)"
        )
        if summary["interval_median"] > UNSTEADY * summary["precision"]:
            lines.append(
                f"the machine did not hold still: half of the rows are known to no better than that, and "
                f"{summary['precision']:.0%} was wanted. Why: latbench doctor; measure again in a quieter hour"
            )
    canary = summary["canary"] or {}
    if "spread" in canary:
        lines.append(
            f"reference block: spread {canary['spread']:.2%} over {canary['n']:.0f} visits, worst {canary['worst']:.2%}"
        )
    for name, node in summary.get("nodes", {}).items():
        lines.append(f"  {name}: {node['rows']} rows{_steady(node['canary'])}{', then lost' if 'lost' in node else ''}")
    lines += [
        f"{', '.join(one['nodes'])}: {one['why']}; kept apart: "
        + (f"{one['rows']} rows in {one['table']}" if one["table"] else "measured nothing")
        for one in summary.get("apart", ())
    ]
    for name in ("additivity", "additivity_isolated"):
        figures = summary.get(name)
        if figures:
            context = figures.get("context", "isolated")
            lines += _sums(f"sums of blocks ({context})", figures)
            if "beyond_cache" in figures:
                lines += _sums("with what chains of blocks pay beyond the cache", figures["beyond_cache"])
    for reason, count in summary["failures"].items():
        lines.append(f"{count} failed: {reason}")
    if summary["missing"]:
        lines.append(
            f"{summary['missing']} of {summary['wanted']} rows not measured yet: run the same command to go on"
        )
    return "\n".join(lines)


def _steady(canary: dict[str, float]) -> str:
    return (
        f", reference block {format_ms(canary['median_ms'])}, spread {canary['spread']:.2%}"
        if "spread" in canary
        else ""
    )


def _sums(what: str, figures: dict[str, Any]) -> list[str]:
    rank = "" if figures["spearman"] is None else f", Spearman {figures['spearman']:.4f}"
    lines = [
        f"{what} against {figures['n']} measured networks, nothing fitted to them: "
        f"MAPE {figures['mape']:.2%}, bias {figures['bias']:+.2%}{rank}"
    ]
    if "more_params" in figures:
        fewer, more = figures["fewer_params"], figures["more_params"]
        lines.append(
            f"  the half with fewer parameters: MAPE {fewer['mape']:.2%}, bias {fewer['bias']:+.2%}; "
            f"with more: {more['mape']:.2%}, {more['bias']:+.2%}"
        )
    return lines
