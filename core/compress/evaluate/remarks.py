"""Remarks for the reader of a report, e.g. that an artifact is slower than its source. They do not affect the verdict; gates do."""

from collections.abc import Iterator

from nightpress.core.handoff.report import Speedup, Subject

_SLOWER = 1.05  #: an artifact counts as slower only from this ratio of the medians on


def remarks(artifact: Subject, source: Subject) -> tuple[str, ...]:
    """Remarks on figures where the artifact is no better than its source, or where the difference is not significant."""
    return (*_of_size(artifact, source), *_of_latency(artifact), *_of_writing(artifact, source))


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
