"""Reads how a trial ended from its job: the goal, how far each gate is kept or missed, and why."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import GateResult, Report, Speedup, Subject, read_report, same_device
from nightpress.core.recipes.gates import Gate, parse_gate
from nightpress.core.recipes.search.auto import Goal
from nightpress.core.service.studies.records import Outcome

#: The miss of a gate whose figure was not measured. Above what a measured figure misses by, so that a search turns away from it.
_UNMEASURED = 1.0
_LEAST = 1e-9  #: the miss of a figure that lies on a bound that it must not reach

Interval = tuple[float, float | None, float | None]  #: value, low, high


def outcome_of(
    job_state: str | None,
    error: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    gates: Mapping[str, str],
    goal: Goal,
) -> Outcome:
    """Return how a trial ended. job_state: of its job; None: the job was deleted. report: of a job that has succeeded."""
    if job_state is None:
        return Outcome("failed", "Its job was deleted before its result was read.")
    if job_state == "cancelled":
        return Outcome("cancelled", "Its job was cancelled.")
    if job_state == "failed":
        said = error or {}
        return Outcome("failed", f"{said.get('code', 'internal')}: {said.get('message', 'its job failed')}")
    if report is None:
        return Outcome("failed", "Its job has no report.")
    try:
        read = read_report(report)
    except NightpressError as fault:
        return Outcome("failed", fault.message)
    bounds = {str(gate): gate for gate in (parse_gate(figure, bound) for figure, bound in gates.items())}
    if read.screening is not None:
        figures = _figures(read.screening.gates, bounds)
        return Outcome("screened", read.screening.reason, gates=figures, margin=_margin(figures))
    found = [_of_artifact(read, artifact, bounds, goal) for artifact in read.artifacts]
    return min(found, key=_rank, default=Outcome("failed", "Its job made no artifact."))


def _rank(outcome: Outcome) -> tuple[float, float]:
    missed = max(0.0, outcome.margin or 0.0)
    return (math.inf if outcome.goal is None else missed, math.inf if outcome.goal is None else outcome.goal)


def _of_artifact(report: Report, artifact: Subject, bounds: Mapping[str, Gate], goal: Goal) -> Outcome:
    figures = _figures([result for result in report.gates if result.artifact == artifact.name], bounds)
    margin = _margin(figures)
    measured = _goal(report.source, artifact, goal)
    worst = max(figures, key=lambda figure: float(figure["miss"]), default=None)
    if measured is None:
        lacking = f"{goal}: {artifact.name} has no figure that can be compared with the source's."
        return Outcome("missed", lacking, artifact.name, gates=figures, margin=margin)
    missed = worst is not None and worst["miss"] > 0
    reason = f"{worst['gate']}: {worst['explanation']}" if missed and worst is not None else None
    return Outcome("missed" if missed else "kept", reason, artifact.name, *measured, gates=figures, margin=margin)


def _figures(results: Sequence[GateResult], bounds: Mapping[str, Gate]) -> list[dict[str, Any]]:
    return [
        {
            "gate": result.gate,
            "observed": result.observed,
            "miss": _miss(bounds[result.gate], result),
            "explanation": result.explanation,
        }
        for result in results
        if result.gate in bounds
    ]


def _miss(gate: Gate, result: GateResult) -> float:
    """By how much a gate is missed; at most 0: it is kept. Relative gates in shares of the source, absolute ones in shares of the bound."""
    if result.observed is None:
        return _UNMEASURED
    beyond = result.observed - gate.value
    if gate.operator in {">=", ">"}:
        beyond = -beyond
    if gate.relative == "absolute" and gate.value:
        beyond /= abs(gate.value)
    return min(beyond, 0.0) if result.passed else max(beyond, _LEAST)


def _margin(figures: Sequence[Mapping[str, Any]]) -> float | None:
    return max((float(figure["miss"]) for figure in figures), default=None)


def _goal(source: Subject, artifact: Subject, goal: Goal) -> Interval | None:
    """What is minimized, as a share of the source's; None: it can't be compared."""
    match goal:
        case "size":
            return artifact.size_bytes / source.size_bytes, None, None
        case "memory":
            if not same_device(artifact, source):
                return None
            ours, theirs = (
                subject.peak_gpu_bytes if artifact.peak_gpu_bytes is not None else subject.peak_memory_bytes
                for subject in (artifact, source)
            )
            return (ours / theirs, None, None) if ours and theirs else None
        case "latency":
            return _inverse([timing.speedup for timing in artifact.timings])
        case "decode":
            return _inverse([timing.decode_speedup for timing in artifact.generation if timing.cached])


def _inverse(speedups: Sequence[Speedup | None]) -> Interval | None:
    """The geometric mean over the shapes of the time as a share of the source's. The ends combine those of the shapes."""
    known = [speedup for speedup in speedups if speedup is not None]
    if not known or len(known) < len(speedups) or any(min(s.value, s.low) <= 0 for s in known):
        return None

    def mean(values: Sequence[float]) -> float:
        return math.exp(-sum(map(math.log, values)) / len(values))

    return mean([s.value for s in known]), mean([s.high for s in known]), mean([s.low for s in known])
