"""Decides whether an artifact passes the recipe's gates. If a figure has an interval, its unfavourable end is compared with the limit."""

from collections.abc import Iterable, Sequence

from nightpress.core.compress.evaluate.view import FEWEST
from nightpress.core.handoff.report import (
    GateResult,
    GenerationTiming,
    Measurement,
    Slice,
    Speedup,
    Subject,
    Timing,
    same_device,
)
from nightpress.core.recipes.exports import TORCH_FORMATS
from nightpress.core.recipes.gates import Gate
from nightpress.core.recipes.models import Recipe

_PLAIN = "the uncompressed model in the same runtime"


def decide(recipe: Recipe, source: Subject, artifacts: tuple[Subject, ...]) -> tuple[GateResult, ...]:
    """Decide every gate for every artifact. A gate on a figure that was not measured fails, and its explanation says why."""
    subjects = (source, *artifacts)
    return tuple(
        _worst(gate, _results(gate, subjects, artifact)) for artifact in artifacts for gate in recipe.parsed_gates()
    )


def decide_quality(gate: Gate, source: Subject, candidate: Subject) -> GateResult:
    """Decide a gate on quality for one model, as `decide` does."""
    return _worst(gate, _quality(gate, (source, candidate), candidate))


def _results(gate: Gate, subjects: Sequence[Subject], artifact: Subject) -> list[GateResult]:
    """The gate's results for all figures that it limits: one for each data set or each shape."""
    source = subjects[0]
    match gate.metric:
        case "size":
            size = float(artifact.size_bytes)
            return [_compare(gate, artifact, size, size / source.size_bytes, "bytes of the whole folder")]
        case "memory":
            return [_memory(gate, source, artifact)]
        case "latency" | "throughput":
            return _timing(gate, source, artifact)
        case "prefill_tokens_per_s" | "decode_tokens_per_s":
            return _generation(gate, source, artifact)
    return _quality(gate, subjects, artifact)


def _worst(gate: Gate, results: Sequence[GateResult]) -> GateResult:
    """The worst result. A figure that was not measured is worse than any other."""
    worst = max if gate.is_upper else min
    unknown = (result for result in results if result.observed is None)
    return next(unknown, None) or worst(results, key=lambda result: result.observed or 0.0)


def _memory(gate: Gate, source: Subject, artifact: Subject) -> GateResult:
    if gate.relative != "absolute" and not same_device(artifact, source):
        return _unknown(gate, artifact, "the source was measured on another device")
    ours, theirs, what = artifact.peak_memory_bytes, source.peak_memory_bytes, "peak memory of the consumer's process"
    if artifact.peak_gpu_bytes is not None:
        ours, theirs, what = artifact.peak_gpu_bytes, source.peak_gpu_bytes, "peak memory of the GPU"
    if not ours or (not theirs and gate.relative != "absolute"):
        return _unknown(gate, artifact, "its peak memory was not measured")
    ratio = ours / theirs if theirs else None
    return _compare(gate, artifact, float(ours), ratio, what)


def _timing(gate: Gate, source: Subject, artifact: Subject) -> list[GateResult]:
    if not source.timings:
        return [_unknown(gate, artifact, "the recipe's `evaluate` has no `latency`")]
    timed = {(timing.batch, timing.length): timing for timing in artifact.timings}
    results = []
    for shape in ((timing.batch, timing.length) for timing in source.timings):
        ours, what = timed.get(shape), f"at batch {shape[0]} × {shape[1]} tokens"
        if ours is None:
            results.append(_unknown(gate, artifact, f"it was not taken {what}"))
            continue
        results += _speeds(gate, artifact, _figure(gate, ours), (ours.speedup, ours.over_uncompressed), what)
    return results


def _figure(gate: Gate, timed: Timing | GenerationTiming) -> float:
    return float(getattr(timed, "p50_ms" if gate.metric == "latency" else gate.metric))


def _generation(gate: Gate, source: Subject, artifact: Subject) -> list[GateResult]:
    wanted = [(timing.batch, timing.prompt, timing.tokens) for timing in source.generation if timing.cached]
    if not wanted:
        return [_unknown(gate, artifact, "the recipe's `evaluate` has no `generation-speed`")]
    if not artifact.generation:
        return [_unknown(gate, artifact, "what runs this format here does not decode yet")]
    timed = {(timing.batch, timing.prompt, timing.tokens): timing for timing in artifact.generation if timing.cached}
    results = []
    for shape in wanted:
        ours, what = timed.get(shape), f"at batch {shape[0]} × prompt of {shape[1]}, {shape[2]} tokens written"
        if ours is None:
            results.append(_unknown(gate, artifact, f"it was not taken {what}"))
            continue
        decoding = (ours.decode_speedup, ours.decode_over_uncompressed)
        reading = (ours.prefill_speedup, ours.prefill_over_uncompressed)
        speedups = decoding if gate.metric == "decode_tokens_per_s" else reading
        results += _speeds(gate, artifact, _figure(gate, ours), speedups, what)
    return results


def _speeds(
    gate: Gate, artifact: Subject, value: float, speedups: tuple[Speedup | None, Speedup | None], what: str
) -> list[GateResult]:
    """The results of a gate on a speed: one for each base that it is compared with. A relative gate `best` has two.

    speedups: over the source, and over the uncompressed model in the artifact's runtime. transformers runs the source itself.
    """
    over_source, over_uncompressed = speedups
    bases = [("the source", over_source)]
    if gate.against != "source" and artifact.format not in TORCH_FORMATS:
        plain = (_PLAIN, over_uncompressed)
        bases = [plain] if gate.against == "runtime" else [*bases, plain]
    return [_speed(gate, artifact, value, speedup, base, what) for base, speedup in bases]


def _speed(gate: Gate, artifact: Subject, value: float, speedup: Speedup | None, base: str, what: str) -> GateResult:
    """An absolute gate compares the median. A relative gate compares the unfavourable end of the speedup over the base."""
    if gate.relative == "absolute":
        return _compare(gate, artifact, value, None, f"median {what}")
    if speedup is None:
        return _unknown(gate, artifact, f"it was not compared with {base} {what}")
    inverse = gate.metric == "latency"
    point, *ends = (1 / value if inverse else value for value in (speedup.value, speedup.low, speedup.high))
    upper = gate.is_upper
    end = max(ends) if upper else min(ends)
    said = _end_of(
        upper, "the spread" if not speedup.by_turns else "the 95% interval", _format(gate, _relative(gate, point), base)
    )
    apart = "" if speedup.told_apart else f"; not told apart from {base}"
    return _compare(gate, artifact, value, end, f"{said}, median {what}{apart}", base)


def _quality(gate: Gate, subjects: Sequence[Subject], artifact: Subject) -> list[GateResult]:
    found = {_key(measurement): measurement for measurement in measured(gate, artifact)}
    if not found and gate.slice:
        return [_unknown(gate, artifact, _no_slice(gate, artifact))]
    if not found:
        known = (
            ", ".join(dict.fromkeys(measurement.name for measurement in artifact.measurements)) or "nothing of quality"
        )
        return [_unknown(gate, artifact, f"it was not measured for this model and recipe; measured was {known}")]
    elsewhere = {_key(measurement): measurement for subject in subjects for measurement in measured(gate, subject)}
    if few := [part for part in artifact.slices if _is_too_small(gate, part)]:
        said = ", ".join(f"{part.name} of {part.data} has {part.examples}" for part in few)
        return [_unknown(gate, artifact, f"a slice needs {FEWEST} examples for an interval, and {said}")]
    results = [_one_quality(gate, artifact, measurement) for measurement in found.values()]
    return results + list(
        _lacking(gate, artifact, (measurement for key, measurement in elsewhere.items() if key not in found))
    )


def measured(gate: Gate, subject: Subject) -> list[Measurement]:
    """The gate's figure on each data set; of a gate on slices, on each of these. `of` then names the slice, too."""
    if not gate.slice:
        return [figure for figure in subject.measurements if figure.name == gate.metric]
    return [
        figure.model_copy(update={"of": ", ".join(filter(None, (f"slice {part.name}", figure.of)))})
        for part in subject.slices
        if gate.slice in {"*", part.name}
        for figure in part.measurements
        if figure.name == gate.metric
    ]


def _is_too_small(gate: Gate, part: Slice) -> bool:
    """Whether the gate is on this slice, whose examples are too few. An evaluation that doesn't give the gate's figure has no say."""
    named = gate.slice in {"*", part.name}
    gives = not part.measurements or any(figure.name == gate.metric for figure in part.measurements)
    return named and gives and part.examples < FEWEST


def _no_slice(gate: Gate, artifact: Subject) -> str:
    names = ", ".join(dict.fromkeys(part.name for part in artifact.slices))
    if not names:
        return "no data set of this recipe has rows with a `slice`"
    if gate.slice != "*" and gate.slice not in {part.name for part in artifact.slices}:
        return f"no data set of this recipe has a slice {gate.slice!r}; there are: {names}"
    return f"it was not measured on this slice for this model and recipe; the slices are {names}"


def _lacking(gate: Gate, artifact: Subject, missing: Iterable[Measurement]) -> Iterable[GateResult]:
    for measurement in missing:
        yield _unknown(gate, artifact, f"it was not measured on {_place(measurement)}, where it was for others")


def _key(measurement: Measurement) -> tuple[str, str, str]:
    return measurement.name, measurement.data, measurement.of


def _place(measurement: Measurement) -> str:
    return f"{measurement.data}, {measurement.of}" if measurement.of else measurement.data


def _one_quality(gate: Gate, artifact: Subject, measurement: Measurement) -> GateResult:
    upper = gate.is_upper
    if gate.slice and measurement.low is None:
        return _unknown(gate, artifact, f"too few examples of {_place(measurement)} have it for an interval")
    if gate.relative == "absolute":
        end = measurement.high if upper else measurement.low
        value = measurement.value if end is None else end
        return _compare(gate, artifact, value, None, _ends(measurement, upper, _format(gate, measurement.value), end))
    if measurement.change is None:
        why = f"on {_place(measurement)} it has nothing in the source to compare with; give an absolute bound"
        return _unknown(gate, artifact, why)
    end = measurement.change_high if upper else measurement.change_low
    change = measurement.change if end is None else end
    point = _format(gate, _relative(gate, 1 + measurement.change))
    return _compare(gate, artifact, measurement.value, 1 + change, _ends(measurement, upper, point, end))


def _ends(measurement: Measurement, upper: bool, point: str, end: float | None) -> str:
    where = f"on {_place(measurement)}"
    return where if end is None else f"{_end_of(upper, 'the 95% interval', point)}, {where}"


def _end_of(upper: bool, interval: str, point: str) -> str:
    return f"{'upper' if upper else 'lower'} end of {interval} around {point}"


def _compare(
    gate: Gate, artifact: Subject, value: float, ratio: float | None, what: str, base: str = "the source"
) -> GateResult:
    """Compare with the gate's limit. value: the figure; ratio: the figure divided by the base's, needed by relative gates."""
    if gate.relative == "absolute":
        observed = value
    else:
        assert ratio is not None
        observed = _relative(gate, ratio)
    passed = {
        "<=": observed <= gate.value,
        ">=": observed >= gate.value,
        "<": observed < gate.value,
        ">": observed > gate.value,
    }[gate.operator]
    return GateResult(
        gate=str(gate),
        artifact=artifact.name,
        observed=observed,
        passed=passed,
        explanation=f"{_format(gate, observed, base)} ({what})",
    )


def _relative(gate: Gate, ratio: float) -> float:
    return ratio - 1 if gate.relative == "change" else ratio


def _format(gate: Gate, observed: float, base: str = "the source") -> str:
    """The figure as text, in the unit of the gate."""
    return {
        "absolute": f"{observed:.5g}",
        "change": f"{100 * observed:+.2f}%",
        "share": f"{100 * observed:.1f}% of {base}",
        "times": f"{observed:.2f}x {base}",
    }[gate.relative]


def _unknown(gate: Gate, artifact: Subject, why: str) -> GateResult:
    return GateResult(
        gate=str(gate), artifact=artifact.name, observed=None, passed=False, explanation=f"{gate.metric}: {why}"
    )
