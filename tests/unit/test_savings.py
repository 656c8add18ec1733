"""What an artifact saves per million tokens, by hand-made speeds and prices."""

from typing import Any

import pytest

from nightpress.core.handoff.report import GenerationTiming, MeasuredOn, Report, ServedTiming, Serving, Subject
from nightpress.core.service.costs.prices import PriceList
from nightpress.core.service.costs.savings import savings_of
from nightpress.core.settings import Settings
from tests.face import make_report

PRICES = PriceList({"cpu": 0.36, "gpu": 2.0, "gpu:H200": 3.6, "gpu:H200 NVL": 7.2}, "EUR")
H200 = MeasuredOn(device="cuda", name="NVIDIA H200", dtype="bfloat16", consumer="vllm 0.11")


def generation(tokens_per_s: float, **changes: Any) -> GenerationTiming:
    given: dict[str, Any] = {
        "batch": 4,
        "prompt": 128,
        "tokens": 64,
        "threads": 1,
        "repeats": 3,
        "prefill_p50_ms": 1.0,
        "prefill_p95_ms": 1.0,
        "prefill_tokens_per_s": 1.0,
        "token_p50_ms": 1.0,
        "token_p95_ms": 1.0,
        "decode_tokens_per_s": tokens_per_s,
        "decode_slowest": 1.0,
        "decode_fastest": 1.0,
    }
    return GenerationTiming(**(given | changes))


def served(tokens_per_s: float) -> ServedTiming:
    return ServedTiming(
        requests=8,
        prompt=16,
        tokens=32,
        repeats=3,
        tokens_per_s=tokens_per_s,
        slowest=1.0,
        fastest=1.0,
        first_p50_ms=1.0,
        first_p95_ms=1.0,
        token_p50_ms=1.0,
        token_p95_ms=1.0,
    )


def report_of(source: dict[str, Any], artifact: dict[str, Any]) -> Report:
    plain = make_report("job_x", "accepted")
    subjects: list[Subject] = [
        subject.model_copy(update={"timings": (), **figures})
        for subject, figures in ((plain.source, source), (plain.artifacts[0], artifact))
    ]
    return plain.model_copy(update={"source": subjects[0], "artifacts": (subjects[1],)})


def test_the_price_of_a_queue_and_of_the_kind_of_gpu_whose_name_fits_best():
    assert PRICES.per_hour("cpu", None) == 0.36
    assert PRICES.per_hour("gpu", "NVIDIA L4") == PRICES.per_hour("gpu", None) == 2.0
    assert PRICES.per_hour("gpu", "NVIDIA h200") == 3.6
    assert PRICES.per_hour("gpu", "NVIDIA H200 NVL") == 7.2
    assert PriceList({"gpu:L4": 1.0}, "EUR").per_hour("gpu", "NVIDIA H200") is None
    assert PRICES.micros("cpu", None, 10.0) == 1000
    assert PRICES.micros("cpu", None, -10.0) == 0


def test_a_forward_pass_on_the_processor():
    """20 and 40 ms for 128 tokens at 0.36 an hour, which is 0.0001 a second."""
    (saving,) = savings_of(make_report("job_x", "accepted"), PRICES, cost=1.0)
    assert (saving.what, saving.shape) == ("forward", "batch 1 of 128 tokens")
    assert (saving.source_tokens_per_s, saving.tokens_per_s) == pytest.approx((6400.0, 3200.0))
    assert (saving.source_per_million, saving.per_million) == pytest.approx((0.015625, 0.03125))
    assert saving.saved_per_million == pytest.approx(-0.015625)
    assert saving.pays_back_after is None, "it is slower"


def test_decoding_and_serving_on_a_gpu_and_when_the_job_pays_back():
    source = {
        "measured_on": H200,
        "generation": (generation(1000.0), generation(10.0, batch=1)),
        "serving": Serving(measured_on=H200, timings=(served(2000.0),)),
    }
    artifact = {
        "measured_on": H200,
        "generation": (generation(2000.0), generation(7.0, batch=1, cached=False)),
        "serving": Serving(measured_on=H200, timings=(served(8000.0),)),
    }
    first, second = savings_of(report_of(source, artifact), PRICES, cost=0.5)
    assert (first.what, first.device, first.price_per_hour) == ("served", "NVIDIA H200", 3.6)
    assert (first.source_per_million, first.per_million) == pytest.approx((0.5, 0.125))
    assert (second.what, second.shape) == ("decode", "batch 4, prompt of 128 tokens")
    assert (second.source_per_million, second.per_million, second.saved_per_million) == pytest.approx((1.0, 0.5, 0.5))
    assert second.pays_back_after == pytest.approx(1_000_000)


def test_what_was_measured_elsewhere_or_has_no_price_is_not_compared():
    figures = {"generation": (generation(1000.0),)}
    on_gpu = {**figures, "measured_on": H200}
    assert savings_of(report_of(figures, on_gpu), PRICES, cost=1.0) == []
    assert savings_of(report_of(on_gpu, on_gpu), PriceList({"cpu": 1.0}, "EUR"), cost=1.0) == []
    other = H200.model_copy(update={"name": "NVIDIA L4"})
    served_on = [{"serving": Serving(measured_on=on, timings=(served(10.0),))} for on in (H200, other)]
    assert savings_of(report_of(*served_on), PRICES, cost=1.0) == []


@pytest.mark.parametrize("prices", [{"tpu": 1.0}, {"gpu:": 1.0}, {"cpu": -1.0}, {"cpu": float("inf")}])
def test_prices_that_name_no_queue_or_are_no_amount_are_refused(prices: dict[str, float]):
    with pytest.raises(ValueError, match=r"."):
        Settings(_env_file=None, prices=prices)
