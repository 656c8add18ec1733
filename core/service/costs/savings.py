"""What an artifact saves where it is used: the price of a million tokens with the source and with the artifact, on the same device.

    price of a million tokens = price of an hour / (tokens a second × 3600) × 10⁶

Speeds are those of the job's report. Only what was measured on one device, at one shape, is compared.
"""

from collections.abc import Iterator
from typing import NamedTuple

from nightpress.core.handoff.report import MeasuredOn, Report, Subject, same_device
from nightpress.core.service.costs.prices import PriceList
from nightpress.core.wire.costs import SavingView

_MILLION = 1e6
_HOUR_S = 3600.0


class _Speed(NamedTuple):
    """Tokens a second at a shape. `what`: served, decode or forward."""

    what: str
    shape: str
    tokens_per_s: float
    on: MeasuredOn | None


def savings_of(report: Report, prices: PriceList, *, cost: float) -> list[SavingView]:
    """What each artifact saves, for each shape at which both it and the source were timed. `cost`: of the job, in the currency.

    Empty if the device has no price, or nothing was timed in tokens.
    """
    return [saving for artifact in report.artifacts for saving in _of_artifact(report.source, artifact, prices, cost)]


def _of_artifact(source: Subject, artifact: Subject, prices: PriceList, cost: float) -> Iterator[SavingView]:
    theirs = {(speed.what, speed.shape): speed for speed in _speeds(source)}
    for ours in _speeds(artifact):
        base = theirs.get((ours.what, ours.shape))
        alike = _alike(ours.on, base.on) if base and ours.what == "served" else same_device(source, artifact)
        if base is None or not alike or not base.tokens_per_s or not ours.tokens_per_s:
            continue
        hour = _price_of(prices, ours.on)
        if not hour:
            continue
        before, after = (hour / (speed.tokens_per_s * _HOUR_S) * _MILLION for speed in (base, ours))
        yield SavingView(
            artifact=artifact.name,
            what=ours.what,
            shape=ours.shape,
            device="cpu" if ours.on is None else ours.on.name,
            price_per_hour=hour,
            source_tokens_per_s=base.tokens_per_s,
            tokens_per_s=ours.tokens_per_s,
            source_per_million=before,
            per_million=after,
            saved_per_million=before - after,
            pays_back_after=cost / (before - after) * _MILLION if before > after else None,
        )


def _speeds(subject: Subject) -> Iterator[_Speed]:
    """The speeds of a model that are known in tokens."""
    serving = subject.serving
    for served in () if serving is None else serving.timings:
        shape = f"{served.requests} requests of {served.prompt} tokens, {served.tokens} written"
        yield _Speed("served", shape, served.tokens_per_s, serving.measured_on if serving else None)
    for written in subject.generation:
        if written.cached:
            shape = f"batch {written.batch}, prompt of {written.prompt} tokens"
            yield _Speed("decode", shape, written.decode_tokens_per_s, subject.measured_on)
    for timing in subject.timings:
        per_text = timing.length if timing.throughput_unit == "sequences/s" else 1
        shape = f"batch {timing.batch} of {timing.length} tokens"
        yield _Speed("forward", shape, timing.throughput * per_text, subject.measured_on)


def _alike(first: MeasuredOn | None, second: MeasuredOn | None) -> bool:
    return first is not None and second is not None and (first.device, first.name) == (second.device, second.name)


def _price_of(prices: PriceList, on: MeasuredOn | None) -> float | None:
    """The price of an hour of the queue that the device belongs to."""
    if on is None or on.device == "cpu":
        return prices.per_hour("cpu", None)
    return prices.per_hour("gpu", on.name)
