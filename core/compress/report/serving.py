"""The tables of what vLLM served: each artifact beside the source in vLLM."""

from nightpress.core.compress.report.costs import Table
from nightpress.core.handoff.report import Report, ServedTiming

_NONE = "–"
_HEAD = (
    "requests at a time",
    "source, tokens/s",
    "tokens/s",
    "speed",
    "source, first token",
    "first token",
    "source, between tokens",
    "between tokens",
)


def serving_tables(report: Report) -> dict[str, Table]:
    """Artifact → its table. Only of artifacts that vLLM has run."""
    base = report.source.serving.timings if report.source.serving else ()
    source = {timing.requests: timing for timing in base}
    return {
        artifact.name: Table(
            _HEAD, tuple(_row(timing, source.get(timing.requests)) for timing in artifact.serving.timings)
        )
        for artifact in report.artifacts
        if artifact.serving is not None
    }


def _row(ours: ServedTiming, theirs: ServedTiming | None) -> tuple[str, ...]:
    compared = ours.speedup
    speed = _NONE
    if compared is not None:
        apart = "" if compared.told_apart else ", not told apart"
        speed = f"{compared.value:.2f}× [{compared.low:.2f}, {compared.high:.2f}]{apart}"
    return (
        f"{ours.requests} of {ours.prompt} tokens, {ours.tokens} written",
        _rate(theirs),
        _rate(ours),
        speed,
        *(_NONE if timing is None else _wait(timing.first_p50_ms, timing.first_p95_ms) for timing in (theirs, ours)),
        *(_NONE if timing is None else _wait(timing.token_p50_ms, timing.token_p95_ms) for timing in (theirs, ours)),
    )


def _rate(timing: ServedTiming | None) -> str:
    return _NONE if timing is None else f"{timing.tokens_per_s:,.1f} [{timing.slowest:,.1f}, {timing.fastest:,.1f}]"


def _wait(p50: float, p95: float) -> str:
    return f"{p50:,.1f} ms (p95 {p95:,.1f})"
