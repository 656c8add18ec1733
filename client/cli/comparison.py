"""A report as a table: a column for the source model and for each artifact, with changes and intervals."""

from collections.abc import Sequence

from nightpress.client.cli import output
from nightpress.core.handoff.report import (
    GenerationTiming,
    Measurement,
    Report,
    Subject,
    Timing,
    decode_speedup,
    read_report,
    same_device,
    speedup,
)
from nightpress.core.handoff.slices import figure_of, figures_shown


def print_report(raw: dict[str, object]) -> None:
    """Print a report: sizes, quality with intervals, latency, throughput, memory, gates, verdict and notes."""
    report = read_report(raw)  # accepts more fields of a newer server and fewer of an old job
    subjects = (report.source, *report.artifacts)
    recipe, model = report.recipe.get("name", "?"), report.model.get("name", "?")
    output.say(f"{model} pressed with {recipe}", "bold")
    rows = comparison_rows(report)
    headers = ["", *("source" if subject is report.source else subject.format for subject in subjects)]
    output.print_table(headers, rows, right=range(1, len(headers)))
    for artifact in report.artifacts:
        print_slices(artifact)
    for gate in report.gates:
        mark, style = ("met   ", "green") if gate.passed else ("MISSED", "red")
        output.say(
            f"gate {mark} {gate.artifact}: {gate.gate} (observed {_figure(gate.observed)}) {gate.explanation}", style
        )
    for record in report.passes:
        if record.within is not None:
            for sentence in record.within.told():
                output.say(f"{record.name} within {record.within.gate}: {sentence}")
    for subject in report.artifacts:
        for note in subject.notes:
            output.say(f"note {subject.format}: {note}", "yellow")
    for note in report.notes:
        output.say(f"note {note}", "yellow")
    output.say(f"verdict: {report.verdict}", "green" if report.verdict == "accepted" else "red")


def print_slices(artifact: Subject) -> None:
    """Print the figures of each slice of the data, the farthest from the source first. Nothing if the data has no slices."""
    if not artifact.slices:
        return
    names = figures_shown(artifact.slices)
    output.say(f"{artifact.format} by slice, the worst first", "bold")
    rows = [
        [part.name, part.data, f"{part.examples:,}", *(_quality(figure_of(part, name)) for name in names)]
        for part in artifact.slices
    ]
    headers = ["slice", "data", "examples", *names]
    output.print_table(headers, rows, right=range(2, len(headers)))


def comparison_rows(report: Report) -> list[list[str]]:
    """The rows of the table: a figure each, with a cell for the source model and then for each artifact."""
    source, artifacts = report.source, report.artifacts
    alike = [same_device(artifact, source) for artifact in artifacts]
    rows = [["size", output.size_text(source.size_bytes), *(_size(artifact, source) for artifact in artifacts)]]
    for key in _measured((source, *artifacts)):
        cells = [_quality(_find(subject, key)) for subject in (source, *artifacts)]
        name, data, of = key
        rows.append([f"{name}{f' of {of}' if of else ''} ({data})", *cells])
    for batch, length in _shapes((source, *artifacts)):
        before = _timing(source, batch, length)
        label = f"{batch} × {length} tokens"
        after = [_timing(artifact, batch, length) for artifact in artifacts]
        rows.append(
            [
                f"latency, {label}",
                _latency(before, None, same=True),
                *(_latency(timing, before, same=same) for timing, same in zip(after, alike, strict=True)),
            ]
        )
        rows.append([f"throughput, {label}", *(_throughput(timing) for timing in (before, *after))])
    for at, base in enumerate(source.generation):
        label = f"{base.batch} × prompt of {base.prompt}, {base.tokens} written{'' if base.cached else ', no cache'}"
        found = [subject.generation[at] if subject.generation else None for subject in (source, *artifacts)]
        rows.append(
            [
                f"prefill, {label}",
                *(f"{timing.prefill_tokens_per_s:,.0f} tokens/s" if timing else "–" for timing in found),
            ]
        )
        decoding = zip(found, (True, *alike), strict=True)
        rows.append(
            [f"decode, {label}", *(_decode(timing, base, same=same) if timing else "–" for timing, same in decoding)]
        )
    rows.append(["peak memory", *(_memory(subject.peak_memory_bytes) for subject in (source, *artifacts))])
    rows.append(["peak GPU memory", *(_memory(subject.peak_gpu_bytes) for subject in (source, *artifacts))])
    rows.append(["measured on", *(_place(subject) for subject in (source, *artifacts))])
    rows.append(["verified by", "", *(_verified(artifact) for artifact in artifacts)])
    return [row for row in rows if any(cell not in ("", "–") for cell in row[1:])]


def _size(subject: Subject, source: Subject) -> str:
    share = f" ({subject.size_bytes / source.size_bytes:.0%})" if source.size_bytes else ""
    return output.size_text(subject.size_bytes) + share


_Key = tuple[str, str, str]


def _key(measurement: Measurement) -> _Key:
    return measurement.name, measurement.data, measurement.of


def _measured(subjects: Sequence[Subject]) -> list[_Key]:
    return list(dict.fromkeys(_key(measurement) for subject in subjects for measurement in subject.measurements))


def _find(subject: Subject, key: _Key) -> Measurement | None:
    return next((measurement for measurement in subject.measurements if _key(measurement) == key), None)


def _quality(found: Measurement | None) -> str:
    if found is None:
        return "–"
    text = _figure(found.value) + (f" {found.unit}" if found.unit else "")
    if found.low is not None and found.high is not None:
        text += f" [{_figure(found.low)}, {_figure(found.high)}]"
    return text + (f" {found.change:+.1%}" if found.change is not None else "")


def _shapes(subjects: Sequence[Subject]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((timing.batch, timing.length) for subject in subjects for timing in subject.timings))


def _timing(subject: Subject, batch: int, length: int) -> Timing | None:
    return next((timing for timing in subject.timings if (timing.batch, timing.length) == (batch, length)), None)


def _latency(found: Timing | None, before: Timing | None, *, same: bool) -> str:
    if found is None:
        return "–"
    text = f"{found.p50_ms:.1f} ms"
    if before is None or not found.p50_ms:
        return text
    compared = speedup(found, before, same_device=same)
    if compared is None:
        return text
    if not compared.told_apart:
        return f"{text} (not told apart: {compared.low:.1f}× to {compared.high:.1f}×)"
    factor = compared.value
    return f"{text} ({factor:.1f}× faster)" if factor >= 1 else f"{text} ({1 / factor:.1f}× SLOWER)"


def _throughput(found: Timing | None) -> str:
    return "–" if found is None else f"{found.throughput:,.1f} {found.throughput_unit}"


def _decode(found: GenerationTiming, before: GenerationTiming, *, same: bool) -> str:
    text = f"{found.decode_tokens_per_s:,.1f} tokens/s (p95 {found.token_p95_ms:.1f} ms)"
    compared = None if found is before else decode_speedup(found, before, same_device=same)
    if compared is None:
        return text
    return f"{text} {compared.value:.2f}×{'' if compared.told_apart else ' (not told apart)'}"


def _memory(peak: int | None) -> str:
    return output.size_text(peak) if peak else "–"


def _place(subject: Subject) -> str:
    place = subject.measured_on
    return "–" if place is None else ", ".join(part for part in (place.name, place.dtype) if part)


def _verified(subject: Subject) -> str:
    seen = subject.verification
    return "–" if seen is None else f"{seen.consumer}{'' if seen.passed else ': FAILED'}"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"
