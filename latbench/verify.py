"""``verify``: measures the network that a search found, on the device that its table speaks of.

Predictions are stated at the table's reference clock, so measurements are restated at it before they are compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latbench import devices, plugins
from latbench.errors import EnvironmentUnfitError, InfeasibleTargetError, MeasurementError, UsageError
from latbench.measure.base import SamplingPlan
from latbench.oracle.base import Constraint
from latbench.oracle.calibrated import CalibratedOracle
from latbench.oracle.factors import FactorOracle
from latbench.oracle.learned import LearnedOracle
from latbench.profiling.bench import BENCH_PLAN, Model, bench, read_model
from latbench.profiling.profile import Target
from latbench.profiling.session import Reporter
from latbench.provenance import Provenance
from latbench.spaces.base import Arch

if TYPE_CHECKING:
    from searchers.results import Found

MAX_ROUNDS = 5  # of selecting again
WITHIN = 0.05  # of a measurement, the error of a prediction that is left as it is


@dataclass(frozen=True)
class Verified:
    """One constraint on a measured network. Latencies in ms at the table's reference clock; counts in their unit."""

    device: str
    unit: str
    target: float
    predicted: float
    measured: float
    low: float  # 95 % interval
    high: float
    as_measured: float  # at the clock that ran
    simulated: bool
    networks: int = 1  # that were measured, and weighed by their shares of images where there are several
    coverage: float = 1.0  # share of images whose network is among them

    @property
    def met(self) -> bool:
        """Whether the measurement keeps the target."""
        return self.measured <= self.target * (1 + 1e-12)

    @property
    def error(self) -> float:
        """Of the prediction, relative to the measurement."""
        return self.predicted / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "met": self.met, "error": self.error}


def verify(
    folder: Path, *, plan: SamplingPlan = BENCH_PLAN, reporter: Reporter | None = None, networks: int = 1
) -> list[Verified]:
    """Measures ``network.onnx`` of a result folder for each constraint, and notes the figures in ``result.json``.

    `networks` above 1: the mean over images where each has a network of its own (instanas), of so many networks, the
    commonest, weighed by their shares of images.

    Raises UsageError where the folder holds no result, its table cannot be measured again, its network is not the one
    that was found or another run is at work in it, EnvironmentUnfitError where this is another machine,
    MeasurementError where the network cannot run.
    """
    from searchers.folders import held
    from searchers.results import note, read_result

    found = read_result(folder)
    with held(folder):
        verified = [_mean(found, constraint, plan, reporter, networks) for constraint in found.problem.constraints]
        note(folder, "verified", [one.to_dict() for one in verified])
    return verified


def until_met(
    folder: Path,
    *,
    plan: SamplingPlan = BENCH_PLAN,
    rounds: int = MAX_ROUNDS,
    within: float = WITHIN,
    reporter: Reporter | None = None,
) -> list[list[Verified]]:
    """``verify``; while a target is missed, or a prediction further than `within` from its measurement, corrects that
    oracle by the measurement and lets the searcher select again from what it trained: a network that misses is too
    slow, one that was predicted too slow leaves some of the budget unused. Oracles are scaled by measured / predicted;
    a learned one is fitted anew with the measured network.

    Gives the rounds, `rounds` at most, the last one kept in the folder. Where none but an earlier one met all targets,
    the nearest of these is selected again, and stands last a second time.

    Raises also UsageError where an oracle cannot be corrected, InfeasibleTargetError where nothing is left.
    """
    from searchers.results import note, read_result

    def settled(one: Verified) -> bool:
        return one.met and abs(one.error) <= within

    done, asked = [verify(folder, plan=plan, reporter=reporter)], [read_result(folder).problem.constraints]
    while not all(map(settled, done[-1])) and len(done) < rounds:
        arch = read_result(folder).result.arch
        constraints = tuple(
            constraint if settled(one) else _corrected(constraint, arch, one)
            for constraint, one in zip(asked[-1], done[-1], strict=True)
        )
        try:
            _select_again(folder, constraints)
        except InfeasibleTargetError as error:
            told = ", ".join(
                f"{one.measured:.4g} {one.unit} measured where {one.predicted:.4g} was predicted"
                for one in done[-1]
                if not settled(one)
            )
            raise InfeasibleTargetError(f"{told}; corrected by that, {error}") from None
        asked.append(constraints)
        done.append(verify(folder, plan=plan, reporter=reporter))
        note(folder, "rounds", [[one.to_dict() for one in verified] for verified in done])
    met = [i for i, verified in enumerate(done) if all(one.met for one in verified)]
    if met and met[-1] != len(done) - 1:
        best = min(met, key=lambda i: max(abs(one.error) for one in done[i]))
        _select_again(folder, asked[best])
        done.append(done[best])
        note(folder, "verified", [one.to_dict() for one in done[best]])
        note(folder, "rounds", [[one.to_dict() for one in verified] for verified in done])
    return done


def _select_again(folder: Path, constraints: tuple[Constraint, ...]) -> None:
    from searchers.options import from_settings
    from searchers.results import read_result

    found = read_result(folder)
    kind = plugins.load("latbench.searchers", found.result.searcher)
    from_settings(kind, found.settings).search(replace(found.problem, constraints=constraints))


def _corrected(constraint: Constraint, arch: Arch, told: Verified) -> Constraint:
    """The constraint by an oracle that knows of the measurement: every figure measured / predicted times what it was,
    or fitted anew where networks are all that it was fitted to."""
    oracle = constraint.oracle
    if isinstance(oracle, LearnedOracle):
        return replace(constraint, oracle=oracle.seen(arch, told.measured))
    if isinstance(oracle, FactorOracle | CalibratedOracle):
        return replace(constraint, oracle=oracle.scaled(told.measured / told.predicted))
    raise UsageError(f"one measurement cannot correct a {type(oracle).__name__}")


def _mean(
    found: Found, constraint: Constraint, plan: SamplingPlan, reporter: Reporter | None, networks: int
) -> Verified:
    """Over images; of one network, its own."""
    told = found.result.notes.get("policies", ())[:networks]
    if networks == 1 or not told:
        return _verify(found, found.result.arch, constraint, plan, reporter)
    space = found.problem.space
    each = [_verify(found, space.parse_arch(one["arch"]), constraint, plan, reporter) for one in told]
    coverage = sum(one["share"] for one in told)
    weights = [one["share"] / coverage for one in told]
    means = {
        name: sum(weight * getattr(one, name) for weight, one in zip(weights, each, strict=True))
        for name in ("predicted", "measured", "low", "high", "as_measured")
    }
    return replace(each[0], **means, networks=len(each), coverage=coverage)


def _verify(
    found: Found, arch: Arch, constraint: Constraint, plan: SamplingPlan, reporter: Reporter | None
) -> Verified:
    oracle = constraint.oracle
    predicted = oracle.latency(arch)
    if oracle.unit != "ms":
        count = float(getattr(oracle.space.network(arch), {"parameters": "n_params", "MACs": "macs"}[oracle.unit]))
        return Verified("", oracle.unit, constraint.target, predicted, count, count, count, count, False)
    target = target_of(oracle.provenance, plan)
    result = bench(_model(found, arch, constraint, target), target, layers=False, reporter=reporter)
    row = result.row
    if row.status != "ok" or row.latency_ms is None or row.ci_low_ms is None or row.ci_high_ms is None:
        raise MeasurementError(f"{found.result.network}: {row.status} in {row.stage}: {row.error}")
    here, there = result.table.provenance.clock_ref_us, oracle.provenance.clock_ref_us
    scale = there / here if here and there else 1.0
    centre = row.latency_ms if row.latency_ref_ms is None else row.latency_ref_ms  # what the interval is around
    return Verified(
        oracle.provenance.device_name,
        "ms",
        constraint.target,
        predicted,
        centre * scale,
        row.ci_low_ms * scale,
        row.ci_high_ms * scale,
        row.latency_ms,
        target.simulated,
    )


def _model(found: Found, arch: Arch, constraint: Constraint, target: Target) -> Model:
    """The exported file where it is of this network, the back-end reads ONNX and the batch is its own; else the graph
    of that space."""
    from searchers.results import check_network

    space, first = constraint.oracle.space, found.problem.space
    if target.backend_class.artifact == "onnx" and space == first and arch == found.result.arch:
        return read_model(str(check_network(found)))
    return read_model(f"{space.name}:{space.format_arch(arch)}", settings=space.settings())


def target_of(provenance: Provenance, plan: SamplingPlan) -> Target:
    """What a table was measured on, to measure a network in the same way.

    Raises UsageError where the table was not measured by latbench, EnvironmentUnfitError where this is another device.
    """
    if provenance.backend not in plugins.names("latbench.backends"):
        raise UsageError(
            f"the table's figures come from {provenance.backend or 'elsewhere'} and cannot be measured again here; "
            "profile this machine and search with that table"
        )
    simulated = plugins.load("latbench.backends", provenance.backend).clock == "model"
    selection = devices.select(provenance.device, simulated=simulated)
    target = Target(
        provenance.device, provenance.device_name, provenance.backend, dict(provenance.options), plan, "isolated"
    )
    _ = target.backend_class  # says so where it cannot run here
    if not simulated:
        machine = devices.detect()
        here = machine.host.cpu_model if selection.index is None else machine.gpus[selection.index].name
        if here != provenance.device_name:
            raise EnvironmentUnfitError(
                f"the table was measured on {provenance.device_name}, this is {here}: run latbench verify there"
            )
    return target
