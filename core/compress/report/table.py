"""The comparison of source and artifacts: headlines for each artifact, and the table of all figures."""

from collections.abc import Sequence
from typing import Any

from nightpress.core.compress.report.costs import speed_line
from nightpress.core.compress.report.figures import change, figure, megabytes, metric_name
from nightpress.core.handoff.report import (
    GenerationTiming,
    Measurement,
    Report,
    Speedup,
    Subject,
    Timing,
    decode_speedup,
    same_device,
    speedup,
)

Row = tuple[str, str, list[tuple[str, str]]]  #: (label, the source's figure, [(an artifact's figure, its change)])
_NONE = ("–", "")
_UNKNOWN = "unknown"
_PLAIN = "the uncompressed model in the same runtime"


def headline(report: Report) -> list[tuple[str, str, str]]:
    """For each artifact: (name, a line on size and speed, a line on the first quality figure)."""
    lines = []
    for artifact in report.artifacts:
        parts = [f"{artifact.size_bytes / report.source.size_bytes:.0%} of the size"]
        plain = [timing.over_uncompressed for timing in artifact.timings if timing.over_uncompressed]
        writing = [wrote.decode_over_uncompressed for wrote in artifact.generation if wrote.cached]
        lines_of_speed = (
            speed_line("speed", "{} the speed", _speedups(artifact, report.source)),
            speed_line("speed", f"{{}} the speed of {_PLAIN}", plain, f"that of {_PLAIN}"),
            speed_line("decoding", "decodes {} as fast", _decode_speedups(artifact, report.source)),
            speed_line(
                "decoding",
                f"decodes {{}} as fast as {_PLAIN}",
                [speedup for speedup in writing if speedup],
                f"that of {_PLAIN}",
            ),
        )
        parts += [line for line in lines_of_speed if line]
        first = artifact.measurements[0] if artifact.measurements else None
        lines.append((artifact.name, ", ".join(parts), f"{metric_name(first)} {figure(first)}" if first else ""))
    return lines


def _speedups(artifact: Subject, source: Subject) -> list[Speedup]:
    base, alike = {(timing.batch, timing.length): timing for timing in source.timings}, same_device(artifact, source)
    found = [
        speedup(timing, base[shape], same_device=alike)
        for timing in artifact.timings
        if (shape := (timing.batch, timing.length)) in base
    ]
    return [compared for compared in found if compared is not None]


def _decode_speedups(artifact: Subject, source: Subject) -> list[Speedup]:
    base = {(timing.batch, timing.prompt, timing.tokens): timing for timing in source.generation if timing.cached}
    alike = same_device(artifact, source)
    found = [
        decode_speedup(timing, base[shape], same_device=alike)
        for timing in artifact.generation
        if timing.cached and (shape := (timing.batch, timing.prompt, timing.tokens)) in base
    ]
    return [compared for compared in found if compared is not None]


def rows_of(report: Report) -> list[Row]:
    source, artifacts = report.source, report.artifacts
    rows: list[Row] = [
        (
            "Size on disk",
            megabytes(source.size_bytes),
            [_of(artifact.size_bytes, source.size_bytes, megabytes) for artifact in artifacts],
        )
    ]
    every = {_key(measurement): measurement for subject in (source, *artifacts) for measurement in subject.measurements}
    for key, any_of_them in every.items():
        label = f"{metric_name(any_of_them)} · {any_of_them.data}"
        theirs = _find(source, key)
        cells = []
        for subject in artifacts:
            ours = _find(subject, key)
            cells.append((figure(ours), change(ours)) if ours else ("–", ""))
        rows.append((label, figure(theirs) if theirs else "–", cells))
    if any(subject.measured_on for subject in (source, *artifacts)):
        rows.append(("Measured on", _place(source), [(_place(artifact), "") for artifact in artifacts]))
    alike = [same_device(artifact, source) for artifact in artifacts]
    for at, timing in enumerate(source.timings):
        label = f"Latency, batch {timing.batch} × {timing.length} tokens"
        cells = [_of_time(artifact.timings[at], timing, same) for artifact, same in zip(artifacts, alike, strict=True)]
        rows.append((label, f"{timing.p50_ms:.1f} ms (p95 {timing.p95_ms:.1f})", cells))
        unit = timing.throughput_unit
        throughput = [
            (
                f"{artifact.timings[at].throughput:,.0f} {unit}",
                _times(artifact.timings[at].speedup, artifact.timings[at].throughput / timing.throughput, same),
            )
            for artifact, same in zip(artifacts, alike, strict=True)
        ]
        rows.append(
            (
                f"Throughput, batch {timing.batch} × {timing.length} tokens",
                f"{timing.throughput:,.0f} {unit}",
                throughput,
            )
        )
    rows += _generation_rows(source, artifacts) + _runtime_rows(artifacts)
    process = [artifact.peak_memory_bytes for artifact in artifacts]
    rows += _memory_row("Peak memory of the process", source.peak_memory_bytes, process, shares=all(alike))
    if source.peak_gpu_bytes or any(artifact.peak_gpu_bytes for artifact in artifacts):
        on_gpu = [artifact.peak_gpu_bytes for artifact in artifacts]
        rows += _memory_row("Peak memory of the GPU", source.peak_gpu_bytes, on_gpu)
    return rows


def _place(subject: Subject) -> str:
    """E.g. `NVIDIA H200, bfloat16, transformers 5.1.0`."""
    if subject.measured_on is None:
        return _UNKNOWN
    place = subject.measured_on
    moved = "parts in the host’s memory" if place.dispatched else ""
    return ", ".join(part for part in (place.name, place.dtype, place.consumer, moved) if part)


def _memory_row(label: str, theirs: int | None, ours: Sequence[int | None], *, shares: bool = True) -> list[Row]:
    """A row of memory peaks in bytes. None is unknown, as is 0 in reports of earlier versions. No row if nothing is known.

    shares: whether to show each as a share of the source's.
    """
    base = theirs or 0 if shares else 0
    cells = [_of(figure, base, megabytes) if figure else (_UNKNOWN, "") for figure in ours]
    return [(label, megabytes(theirs) if theirs else _UNKNOWN, cells)] if theirs or any(ours) else []


def _generation_rows(source: Subject, artifacts: tuple[Subject, ...]) -> list[Row]:
    rows: list[Row] = []
    for at, base in enumerate(source.generation):
        shape = (
            f"batch {base.batch} × prompt of {base.prompt}, {base.tokens} written{'' if base.cached else ', no cache'}"
        )
        # A consumer that can't decode leaves its cells empty.
        ours = [artifact.generation[at] if artifact.generation else None for artifact in artifacts]
        alike = [same_device(artifact, source) for artifact in artifacts]
        for stage, shown, gained in (("Prefill", _prefill, _prefill_gain), ("Decode", _decode, _decode_gain)):
            cells = [
                (shown(figure), gained(figure, base, same)) if figure else _NONE
                for figure, same in zip(ours, alike, strict=True)
            ]
            rows.append((f"{stage}, {shape}", shown(base), cells))
        peaks = [figure.peak_memory_bytes if figure else None for figure in ours]
        rows += _memory_row(f"Peak memory, {shape}", base.peak_memory_bytes, peaks)
    return rows


def _runtime_rows(artifacts: Sequence[Subject]) -> list[Row]:
    """Speeds over the uncompressed model in each artifact's own runtime. No rows if none was measured."""
    found: dict[str, dict[str, Speedup]] = {}
    for artifact in artifacts:
        for timing in artifact.timings:
            if timing.over_uncompressed:
                label = f"batch {timing.batch} × {timing.length} tokens"
                found.setdefault(label, {})[artifact.name] = timing.over_uncompressed
        for wrote in artifact.generation:
            if wrote.cached and wrote.decode_over_uncompressed:
                label = f"decode, batch {wrote.batch} × prompt of {wrote.prompt}"
                found.setdefault(label, {})[artifact.name] = wrote.decode_over_uncompressed
    return [
        (
            f"Against the uncompressed model in the same runtime, {label}",
            _NONE[0],
            [
                (f"{of[artifact.name].source_p50_ms:.1f} ms uncompressed", _times(of[artifact.name], 1, True))
                if artifact.name in of
                else _NONE
                for artifact in artifacts
            ],
        )
        for label, of in found.items()
    ]


def _prefill(timing: GenerationTiming) -> str:
    return f"{timing.prefill_tokens_per_s:,.0f} tokens/s (first token after {timing.prefill_p50_ms:.1f} ms, p95 {timing.prefill_p95_ms:.1f})"


def _decode(timing: GenerationTiming) -> str:
    return (
        f"{timing.decode_tokens_per_s:,.1f} tokens/s [{timing.decode_slowest:,.1f} to {timing.decode_fastest:,.1f}] "
        f"({timing.token_p50_ms:.1f} ms a token, p95 {timing.token_p95_ms:.1f})"
    )


def _prefill_gain(timing: GenerationTiming, base: GenerationTiming, same: bool) -> str:
    return _times(timing.prefill_speedup, timing.prefill_tokens_per_s / base.prefill_tokens_per_s, same)


def _decode_gain(timing: GenerationTiming, base: GenerationTiming, same: bool) -> str:
    return _times(timing.decode_speedup, timing.decode_tokens_per_s / base.decode_tokens_per_s, same)


def _key(measurement: Measurement) -> tuple[str, str, str]:
    return measurement.name, measurement.data, measurement.of


def _find(subject: Subject, key: tuple[str, str, str]) -> Measurement | None:
    return next((measurement for measurement in subject.measurements if _key(measurement) == key), None)


def _of(value: int, base: int, show: Any) -> tuple[str, str]:
    return show(value), f"{value / base:.0%}" if base else ""


def _of_time(ours: Timing, theirs: Timing, same: bool) -> tuple[str, str]:
    shown, compared = f"{ours.p50_ms:.1f} ms (p95 {ours.p95_ms:.1f})", speedup(ours, theirs, same_device=same)
    if compared is None:
        return shown, ""
    if not compared.told_apart:
        return shown, "not told apart"
    faster = compared.value
    return shown, f"{faster:.2f}× faster" if faster >= 1 else f"{1 / faster:.2f}× slower"


def _times(speedup: Speedup | None, ratio: float, same_device: bool) -> str:
    """A speedup as text. ratio: of the medians, shown for a report of an earlier version, which has no speedup."""
    if speedup is None:
        return f"{ratio:.2f}×" if same_device else ""
    apart = "" if speedup.told_apart else ", not told apart"
    return f"{speedup.value:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]{apart}"
