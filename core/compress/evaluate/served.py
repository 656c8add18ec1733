"""Judges what vLLM answered, and summarises how fast it served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.evaluate.speed import speedup
from nightpress.core.compress.export.consumer import Observed, consumer_name
from nightpress.core.compress.export.task import TimedServing
from nightpress.core.compress.export.vllm import WRITTEN
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import ServedTiming, Verification

#: Largest error of the log-probabilities, relative to their spread; see docs/decisions/0114-vllm-is-a-consumer.md for the figures behind.
FLOAT_INPUTS = 0.08  #: weights in float or in codes, inputs in float
ROUNDED_INPUTS = 0.3  #: the kernels round inputs to 8 bits, too
_MEASURE = "relative error of vLLM's log-probabilities, against the dequantized weights in transformers,"


@dataclass(frozen=True)
class Answers:
    """vLLM's log-probabilities of the tokens of some texts, beside those of the dequantized weights."""

    ours: NDArray[np.float64]  #: [texts, tokens − 1], the prompt's tokens and then those that vLLM wrote
    theirs: NDArray[np.float64]  #: the same of the dequantized weights in transformers
    chosen: float  #: share of the tokens that vLLM wrote which the dequantized weights would have chosen

    @property
    def error(self) -> float:
        """‖a − b‖ / ‖b − mean b‖ over all tokens."""
        spread = float(np.linalg.norm(self.theirs - self.theirs.mean()))
        return float(np.linalg.norm(self.ours - self.theirs)) / max(spread, 1e-30)

    @property
    def gap(self) -> float:
        """Mean distance of the log-probabilities, in nats."""
        return float(np.abs(self.ours - self.theirs).mean())


def answers(outputs: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]]) -> Answers:
    """outputs: of vLLM's process. reference: of transformers' process with the dequantized weights, on the same texts."""
    ours = outputs[f"{WRITTEN}.nll"]
    written = outputs[f"{WRITTEN}.tokens"]
    theirs = reference[f"{WRITTEN}.nll"].reshape(ours.shape)
    best = reference[f"{WRITTEN}.top1"].reshape(ours.shape)[:, -written.shape[1] :]
    return Answers(-ours, -theirs, float((best == written).mean()))


def verify_served(name: str, found: Answers, observed: Observed, *, bound: float) -> Verification:
    """Raise NightpressError(verification_failed) if vLLM answers otherwise than the dequantized weights do."""
    if not found.error <= bound:
        raise NightpressError(
            ErrorCode.VERIFICATION_FAILED,
            f"The artifact {name} was loaded by {consumer_name(observed.versions)}, but answers otherwise than it should: {_MEASURE} is {found.error:.4f}, the bound {bound:g}. The log-probabilities are {found.gap:.3f} apart on average, and {found.chosen:.0%} of the tokens that it wrote are those that the dequantized weights choose.",
            hint="Read with what vLLM is to serve it: another version may read the format otherwise. Or use another scheme.",
            artifact=name,
            measure=_MEASURE,
            value=found.error,
            bound=bound,
        )
    return Verification(
        consumer=consumer_name(observed.versions),
        passed=True,
        measure=_MEASURE.rstrip(","),
        value=found.error,
        bound=bound,
        seconds=observed.seconds,
        load_snippet=observed.snippet,
    )


Runs = Sequence[Mapping[str, Any]]  #: as the runner returns them, one for each round


def served_timing(request: TimedServing, ours: Runs, theirs: Runs | None, *, by_turns: bool) -> ServedTiming:
    """Summarise the rounds of one number of requests. theirs: the source's rounds, if it was timed."""
    times = np.array([run["milliseconds"] for run in ours])
    rates = 1000 * request.requests * request.tokens / times
    first = np.concatenate([run["first"] for run in ours])
    between = np.concatenate([np.ravel(run["between"]) for run in ours])
    (first_p50, first_p95), (token_p50, token_p95) = (np.percentile(values, [50, 95]) for values in (first, between))
    base = None if theirs is None else np.array([run["milliseconds"] for run in theirs])
    return ServedTiming(
        requests=request.requests,
        prompt=request.prompt,
        tokens=request.tokens,
        repeats=len(times),
        tokens_per_s=float(np.median(rates)),
        slowest=float(rates.min()),
        fastest=float(rates.max()),
        first_p50_ms=float(first_p50),
        first_p95_ms=float(first_p95),
        token_p50_ms=float(token_p50),
        token_p95_ms=float(token_p95),
        speedup=None if base is None else speedup(times, base, by_turns=by_turns),
    )
