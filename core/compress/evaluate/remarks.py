"""Remarks for the reader of a report, e.g. that an artifact is slower than its source. They do not affect the verdict; gates do."""

from collections.abc import Iterator

from nightpress.core.handoff.report import GenerationTiming, Speedup, Subject, Timing, same_device

_SLOWER = 1.05  #: an artifact counts as slower only from this ratio of the medians on


def remarks(artifact: Subject, source: Subject) -> tuple[str, ...]:
    """Remarks on figures where the artifact is no better than its source, or where the difference is not significant."""
    return (
        *_of_size(artifact, source),
        *_of_place(artifact, source),
        *_of_latency(artifact),
        *_of_runtime(artifact),
        *_of_writing(artifact, source),
    )


def _of_place(artifact: Subject, source: Subject) -> Iterator[str]:
    timed: list[Timing | GenerationTiming] = [*artifact.timings, *artifact.generation]
    if timed and not same_device(artifact, source) and not any(_compared(timing) for timing in timed):
        yield "Its speed is not compared with the source's: memory did not hold the source beside it on this device."
    if artifact.measured_on is not None and artifact.measured_on.dispatched:
        yield "The GPU did not hold the model, so parts of it stayed in the host's memory: its speed is no serving speed."


def _compared(timed: Timing | GenerationTiming) -> bool:
    return (timed.speedup if isinstance(timed, Timing) else timed.decode_speedup) is not None


def _of_size(artifact: Subject, source: Subject) -> Iterator[str]:
    if artifact.size_bytes >= source.size_bytes:
        sizes = f"{artifact.size_bytes / 1e6:.1f} MB against {source.size_bytes / 1e6:.1f} MB"
        yield f"Not smaller than the source: {sizes}."


def _of_latency(artifact: Subject) -> Iterator[str]:
    compared = [(timing, timing.speedup) for timing in artifact.timings if timing.speedup is not None]
    if any(not speedup.by_turns for _, speedup in compared):
        yield "Latencies were taken after the source's, not by turns with it: what else ran on the machine then is in their ratio."
    for ours, speedup in compared:
        where = f"at batch {ours.batch} × {ours.length} tokens"
        if not speedup.told_apart:
            yield f"Its speed is not told apart from the source's {where}: {times(speedup)} as fast."
        elif speedup.value * _SLOWER < 1:
            yield f"Slower than the source {where}: {ours.p50_ms:.1f} ms against {speedup.source_p50_ms:.1f} ms."


def _of_runtime(artifact: Subject) -> Iterator[str]:
    found: list[tuple[Speedup | None, str]] = [
        *(
            (timing.over_uncompressed, f"at batch {timing.batch} × {timing.length} tokens")
            for timing in artifact.timings
        ),
        *(
            (wrote.decode_over_uncompressed, f"in decoding at batch {wrote.batch} × prompt of {wrote.prompt} tokens")
            for wrote in artifact.generation
            if wrote.cached
        ),
    ]
    for speedup, where in found:
        if speedup is not None and speedup.told_apart and speedup.value * _SLOWER < 1:
            yield f"Slower than the uncompressed model in the same runtime {where}: {times(speedup)} as fast."


def _of_writing(artifact: Subject, source: Subject) -> Iterator[str]:
    if source.generation and not artifact.generation:
        yield "Writing text was timed on the source only: what runs this format here does not decode yet."
    for wrote in artifact.generation:
        speedup = wrote.decode_speedup
        if not wrote.cached or speedup is None:
            continue
        where = f"at batch {wrote.batch} × prompt of {wrote.prompt} tokens"
        if not speedup.told_apart:
            yield f"Its decoding is not told apart from the source's {where}: {times(speedup)} as fast."
        elif speedup.value * _SLOWER < 1:
            rate = wrote.decode_tokens_per_s
            yield f"Decodes slower than the source {where}: {rate:.1f} tokens/s against {rate / speedup.value:.1f}."


def times(speedup: Speedup) -> str:
    """A speedup with its interval as text, e.g. `1.10× [0.85, 1.42]`."""
    return f"{speedup.value:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]"
