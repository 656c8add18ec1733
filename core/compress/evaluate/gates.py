"""Whether an artifact is good enough: each gate is decided on the unfavourable end of the interval."""

from core.handoff.report import GateResult, Measurement, Subject
from core.recipes.models import Gate, Recipe


def decide(recipe: Recipe, source: Subject, artifacts: tuple[Subject, ...]) -> tuple[GateResult, ...]:
    """Every gate for every artifact. A gate on something that was not measured is missed, and says so."""
    return tuple(_decide(gate, source, artifact) for artifact in artifacts for gate in recipe.parsed_gates())


def _decide(gate: Gate, source: Subject, artifact: Subject) -> GateResult:
    if gate.metric == "size":
        pair = (float(artifact.size_bytes), float(source.size_bytes))
        return _compare(gate, artifact, pair[0], pair[0] / pair[1], "bytes of the whole folder")
    if gate.metric == "memory":
        if artifact.peak_memory_bytes is None or not source.peak_memory_bytes:
            return _unknown(gate, artifact, "its peak memory was not measured")
        ratio = artifact.peak_memory_bytes / source.peak_memory_bytes
        return _compare(
            gate, artifact, float(artifact.peak_memory_bytes), ratio, "peak memory of the consumer's process"
        )
    if gate.metric in {"latency", "throughput"}:
        return _timing(gate, source, artifact)
    if gate.metric in {"prefill_tokens_per_s", "decode_tokens_per_s"}:
        return _generation(gate, source, artifact)
    return _quality(gate, artifact)


def _timing(gate: Gate, source: Subject, artifact: Subject) -> GateResult:
    pairs = [
        (ours, theirs)
        for ours in artifact.timings
        for theirs in source.timings
        if (ours.batch, ours.length) == (theirs.batch, theirs.length)
    ]
    if not pairs:
        return _unknown(gate, artifact, "the recipe's `evaluate` has no `latency`")
    results = []
    for ours, theirs in pairs:
        value, base = (ours.p50_ms, theirs.p50_ms) if gate.metric == "latency" else (ours.throughput, theirs.throughput)
        what = f"median at batch {ours.batch} × {ours.length} tokens"
        results.append(_compare(gate, artifact, value, value / base, what))
    # The worst shape decides.
    worst = max if gate.operator in {"<=", "<"} else min
    return worst(results, key=lambda one: one.observed)


def _generation(gate: Gate, source: Subject, artifact: Subject) -> GateResult:
    theirs = {(one.batch, one.prompt, one.tokens): one for one in source.generation if one.cached}
    results = []
    for ours in artifact.generation:
        if not ours.cached:
            continue
        base = theirs.get((ours.batch, ours.prompt, ours.tokens))
        if base is not None:
            value = float(getattr(ours, gate.metric))
            what = f"median at batch {ours.batch} × prompt of {ours.prompt}, {ours.tokens} tokens written"
            results.append(_compare(gate, artifact, value, value / float(getattr(base, gate.metric)), what))
    if not results:
        why = (
            "what runs this format here does not decode yet"
            if theirs
            else "the recipe's `evaluate` has no `generation-speed`"
        )
        return _unknown(gate, artifact, why)
    # The worst shape decides.
    worst = max if gate.operator in {"<=", "<"} else min
    return worst(results, key=lambda one: one.observed)


def _quality(gate: Gate, artifact: Subject) -> GateResult:
    found = [one for one in artifact.measurements if one.name == gate.metric]
    if not found:
        known = ", ".join(dict.fromkeys(one.name for one in artifact.measurements)) or "nothing of quality"
        return _unknown(gate, artifact, f"it was not measured for this model and recipe; measured was {known}")
    upper = gate.operator in {"<=", "<"}
    worst = max if upper else min
    return worst((_one_quality(gate, artifact, one) for one in found), key=lambda result: result.observed)


def _one_quality(gate: Gate, artifact: Subject, one: Measurement) -> GateResult:
    upper = gate.operator in {"<=", "<"}
    if gate.relative == "absolute":
        end = one.high if upper else one.low
        value = one.value if end is None else end
        return _compare(gate, artifact, value, None, _ends(one, upper, _shown(gate, one.value), end))
    if one.change is None:
        return _unknown(gate, artifact, "it has no counterpart in the source to compare with; give an absolute bound")
    end = one.change_high if upper else one.change_low
    change = one.change if end is None else end
    point = _shown(gate, _relative(gate, 1 + one.change))
    return _compare(gate, artifact, one.value, 1 + change, _ends(one, upper, point, end))


def _ends(one: Measurement, upper: bool, point: str, end: float | None) -> str:
    if end is None:
        return f"on {one.data}"
    return f"{'upper' if upper else 'lower'} end of the 95% interval around {point}, on {one.data}"


def _compare(gate: Gate, artifact: Subject, value: float, ratio: float | None, what: str) -> GateResult:
    """value: the figure itself; ratio: the figure over the source's."""
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
        explanation=f"{_shown(gate, observed)} ({what})",
    )


def _relative(gate: Gate, ratio: float) -> float:
    return ratio - 1 if gate.relative == "change" else ratio


def _shown(gate: Gate, observed: float) -> str:
    """In the gate's own terms."""
    return {
        "absolute": f"{observed:.5g}",
        "change": f"{100 * observed:+.2f}%",
        "share": f"{100 * observed:.1f}% of the source",
        "times": f"{observed:.2f}x the source",
    }[gate.relative]


def _unknown(gate: Gate, artifact: Subject, why: str) -> GateResult:
    return GateResult(
        gate=str(gate), artifact=artifact.name, observed=0.0, passed=False, explanation=f"{gate.metric}: {why}"
    )
