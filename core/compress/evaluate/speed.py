"""Summarises timed runs: medians, percentiles, and the speedup of an artifact over its source with an interval."""

from collections.abc import Sequence

import numpy as np

from nightpress.core.compress.evaluate.statistics import Array, spread_of_draws
from nightpress.core.compress.export.consumer import ModelRuns, Observed
from nightpress.core.compress.export.task import Task
from nightpress.core.handoff.report import GenerationTiming, Speedup, Timing


def timings(observed: Observed, task: Task, source: Observed | None = None) -> tuple[Timing, ...]:
    """Medians and 95th percentiles of the timed runs. source: the source's runs, which an artifact is compared with."""
    found = []
    for at, timing in enumerate(observed.timings):
        runs = np.asarray(timing["milliseconds"])
        p50, p95 = np.percentile(runs, [50, 95])
        per_run = timing["batch"] * (timing["length"] if task.name == "causal-lm" else 1)
        found.append(
            Timing(
                batch=timing["batch"],
                length=timing["length"],
                threads=task.threads,
                repeats=len(runs),
                p50_ms=float(p50),
                p95_ms=float(p95),
                throughput=1000 * per_run / float(p50),
                throughput_unit="tokens/s" if task.name == "causal-lm" else "sequences/s",
                speedup=_speedup_of(runs, _theirs(observed, source, "timings", at), observed.beside),
                over_uncompressed=_speedup_of(runs, _uncompressed(observed, "timings", at), observed.uncompressed),
            )
        )
    return tuple(found)


def generation_timings(
    observed: Observed, threads: int, source: Observed | None = None
) -> tuple[GenerationTiming, ...]:
    """Summarise the timed runs of decoding: medians, 95th percentiles, and the slowest and the fastest run."""
    found = []
    for at, writing in enumerate(observed.writings):
        waits = np.asarray(writing["milliseconds"])  # [repeats, tokens], the wait before each token
        prefill, decode = waits[:, 0], waits[:, 1:]
        rates = 1000 * writing["batch"] * decode.shape[1] / decode.sum(axis=1)
        prefill_p50, prefill_p95 = np.percentile(prefill, [50, 95])
        token_p50, token_p95 = np.percentile(decode, [50, 95])
        theirs, plain = _theirs(observed, source, "writings", at), _uncompressed(observed, "writings", at)
        found.append(
            GenerationTiming(
                batch=writing["batch"],
                prompt=writing["prompt"],
                tokens=writing["tokens"],
                cached=writing["cached"],
                alike=writing.get("alike"),
                threads=threads,
                repeats=len(waits),
                prefill_p50_ms=float(prefill_p50),
                prefill_p95_ms=float(prefill_p95),
                prefill_tokens_per_s=1000 * writing["batch"] * writing["prompt"] / float(prefill_p50),
                token_p50_ms=float(token_p50),
                token_p95_ms=float(token_p95),
                decode_tokens_per_s=float(np.median(rates)),
                decode_slowest=float(rates.min()),
                decode_fastest=float(rates.max()),
                peak_memory_bytes=writing["peak_memory_bytes"],
                prefill_speedup=_speedup_of(prefill, None if theirs is None else theirs[:, 0], observed.beside),
                decode_speedup=_speedup_of(
                    decode.mean(axis=1), None if theirs is None else theirs[:, 1:].mean(axis=1), observed.beside
                ),
                prefill_over_uncompressed=_speedup_of(
                    prefill, None if plain is None else plain[:, 0], observed.uncompressed
                ),
                decode_over_uncompressed=_speedup_of(
                    decode.mean(axis=1), None if plain is None else plain[:, 1:].mean(axis=1), observed.uncompressed
                ),
            )
        )
    return tuple(found)


def _theirs(observed: Observed, source: Observed | None, kind: str, at: int) -> Array | None:
    """The source's runs of the same shape in milliseconds: those that took turns with the artifact's, or else the earlier ones."""
    held = observed.beside or source
    return None if held is None else np.asarray(getattr(held, kind)[at]["milliseconds"])


def _uncompressed(observed: Observed, kind: str, at: int) -> Array | None:
    """The runs of the uncompressed model in the artifact's runtime, in milliseconds. None if they did not take turns."""
    held = observed.uncompressed
    return None if held is None else np.asarray(getattr(held, kind)[at]["milliseconds"])


def _speedup_of(ours: Array, theirs: Array | None, beside: ModelRuns | None) -> Speedup | None:
    return None if theirs is None else speedup(ours, theirs, by_turns=beside is not None)


def speedup(ours: Sequence[float] | Array, theirs: Sequence[float] | Array, *, by_turns: bool) -> Speedup:
    """The source's median time divided by the artifact's, with an interval. ours, theirs [rounds]: milliseconds.

    by_turns: both models ran in each round, under the same load. Then the rounds are resampled, and the interval shows the uncertainty of
    both medians. Otherwise the models ran one after the other. Resampling could not show that the machine's load changed in between, so the
    interval compares the 5th percentile of each model with the 95th of the other.
    """
    mine, base = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    value = float(np.median(base) / np.median(mine))
    if by_turns:
        low, high = spread_of_draws(lambda at: np.median(base[at], axis=1) / np.median(mine[at], axis=1), len(mine))
    else:
        (ours_5, ours_95), (theirs_5, theirs_95) = (np.percentile(times, [5, 95]) for times in (mine, base))
        low, high = float(theirs_5 / ours_95), float(theirs_95 / ours_5)
    low, high = min(low, value), max(high, value)
    return Speedup(
        value=value,
        low=low,
        high=high,
        told_apart=low > 1 or high < 1,
        by_turns=by_turns,
        source_p50_ms=float(np.median(base)),
    )
