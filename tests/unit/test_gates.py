"""A gate is decided by the worst of the figures that it bounds. A gate on a figure that was not measured is missed."""

from typing import Any

import pytest

from nightpress.core.compress.evaluate import gates
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import GateResult, GenerationTiming, Measurement, Speedup, Subject, Timing
from nightpress.core.recipes.gates import parse_gate
from nightpress.core.recipes.models import parse_recipe


def _figure(name: str, data: str, value: float = 0.8, change: float | None = None, of: str = "") -> Measurement:
    return Measurement(
        name=name,
        value=value,
        n=10,
        better="higher",
        data=data,
        of=of,
        change=change,
        change_low=None if change is None else change - 0.002,
        change_high=None if change is None else change + 0.002,
    )


def _subject(name: str, *measurements: Measurement, **more: Any) -> Subject:
    return Subject(name=name, format=name, size_bytes=10, measurements=measurements, **more)


def _decided(bound: dict[str, str], source: Subject, *artifacts: Subject) -> tuple[GateResult, ...]:
    recipe = parse_recipe({"name": "t", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "gates": bound})
    return gates.decide(recipe, source, artifacts)


@pytest.mark.parametrize("bound", [">= -1%", "<= +1%", "> -1%", "< +1%"])
@pytest.mark.parametrize("unknown_first", [False, True])
def test_a_figure_that_has_no_change_on_one_of_two_data_sets_misses_the_gate(bound: str, unknown_first: bool) -> None:
    figures = [_figure("spearman", "sts-a", change=-0.0005), _figure("spearman", "sts-b")]
    artifact = _subject("onnx", *(reversed(figures) if unknown_first else figures))
    (found,) = _decided({"spearman": bound}, _subject("source"), artifact)
    assert not found.passed
    assert found.observed is None
    assert "sts-b" in found.explanation


def test_a_data_set_on_which_the_source_was_measured_and_the_artifact_was_not_misses_the_gate() -> None:
    source = _subject("source", _figure("spearman", "sts-a"), _figure("spearman", "sts-b"))
    artifact = _subject("onnx", _figure("spearman", "sts-a", change=0.0))
    (found,) = _decided({"spearman": ">= -1%"}, source, artifact)
    assert not found.passed
    assert "sts-b" in found.explanation


def test_of_several_data_sets_the_worst_decides() -> None:
    artifact = _subject(
        "onnx", _figure("cosine", "a", 0.99), _figure("cosine", "b", 0.91), _figure("cosine", "c", 0.95)
    )
    (found,) = _decided({"cosine": ">= 0.93"}, _subject("source"), artifact)
    assert (found.passed, found.observed) == (False, 0.91)
    (found,) = _decided({"cosine": ">= 0.9"}, _subject("source"), artifact)
    assert (found.passed, found.observed) == (True, 0.91)


def _speedup(value: float, low: float, high: float) -> Speedup:
    apart = low > 1 or high < 1
    return Speedup(value=value, low=low, high=high, told_apart=apart, by_turns=True, source_p50_ms=10.0)


def _timing(batch: int, p50: float, speedup: Speedup | None = None) -> Timing:
    rate = {"throughput": 1000 / p50, "throughput_unit": "sequences/s"}
    return Timing(batch=batch, length=8, threads=1, repeats=5, p50_ms=p50, p95_ms=p50, speedup=speedup, **rate)


def _writing(prompt: int, speedup: Speedup | None = None) -> GenerationTiming:
    rates = dict.fromkeys(("prefill_tokens_per_s", "decode_tokens_per_s", "decode_slowest", "decode_fastest"), 9.0)
    waits = dict.fromkeys(("prefill_p50_ms", "prefill_p95_ms", "token_p50_ms", "token_p95_ms"), 1.0)
    shape = {"batch": 1, "prompt": prompt, "tokens": 4, "threads": 1, "repeats": 3}
    return GenerationTiming(**shape, **waits, **rates, decode_speedup=speedup)


def test_a_shape_that_only_the_source_was_timed_at_misses_the_gate() -> None:
    source = _subject("source", timings=(_timing(1, 10.0), _timing(8, 80.0)))
    artifact = _subject("onnx", timings=(_timing(1, 2.0, _speedup(5, 4, 6)),))
    (found,) = _decided({"latency": "<= 100%"}, source, artifact)
    assert not found.passed
    assert "batch 8" in found.explanation


def test_a_prompt_that_only_the_source_was_timed_at_misses_the_gate() -> None:
    source = _subject("source", generation=(_writing(16), _writing(64)))
    artifact = _subject("gguf", generation=(_writing(16, _speedup(1, 1, 1)),))
    (found,) = _decided({"decode_tokens_per_s": ">= 0.1x"}, source, artifact)
    assert not found.passed
    assert "prompt of 64" in found.explanation


@pytest.mark.parametrize(
    ("bound", "observed", "passed"),
    [
        ({"latency": "<= 50%"}, 1 / 1.6, False),
        ({"latency": "<= 65%"}, 1 / 1.6, True),
        ({"latency": ">= 50%"}, 1 / 3.5, False),
        ({"throughput": ">= 2x"}, 1.6, False),
        ({"throughput": ">= 1.5x"}, 1.6, True),
        ({"latency": "<= 4"}, 3.6, True),
    ],
)
def test_a_gate_on_speed_is_decided_on_the_unfavourable_end(
    bound: dict[str, str], observed: float, passed: bool
) -> None:
    artifact = _subject("onnx", timings=(_timing(1, 3.6, _speedup(2.8, 1.6, 3.5)),))
    (found,) = _decided(bound, _subject("source", timings=(_timing(1, 10.0),)), artifact)
    assert found.observed == pytest.approx(observed)
    assert found.passed is passed


def test_a_speed_that_is_not_told_apart_from_the_sources_says_so_in_the_gate() -> None:
    artifact = _subject("onnx", timings=(_timing(1, 3.6, _speedup(2.8, 0.9, 5)),))
    (found,) = _decided({"throughput": ">= 1x"}, _subject("source", timings=(_timing(1, 10.0),)), artifact)
    assert not found.passed
    assert "not told apart" in found.explanation


@pytest.mark.parametrize(("ours", "theirs"), [(None, 5), (5, None), (0, 5), (5, 0)])
def test_an_unknown_peak_of_memory_misses_the_gate(ours: int | None, theirs: int | None) -> None:
    artifact = _subject("onnx", peak_memory_bytes=ours)
    (found,) = _decided({"memory": "<= 200%"}, _subject("source", peak_memory_bytes=theirs), artifact)
    assert not found.passed
    assert found.observed is None


@pytest.mark.parametrize(
    ("bound", "observed"),
    [("<= 0.7x", 0.5), ("<= 0.7x source", 0.5), ("<= 0.7x runtime", 0.8), ("<= 0.7x best", 0.8), ("<= 70% best", 0.8)],
)
def test_a_gate_on_speed_names_what_it_is_compared_with(bound: str, observed: float) -> None:
    timing = _timing(1, 4.0, _speedup(2.5, 2.0, 3.0)).model_copy(update={"over_uncompressed": _speedup(1.5, 1.25, 1.8)})
    artifact = _subject("onnx", timings=(timing,))
    (found,) = _decided({"latency": bound}, _subject("source", timings=(_timing(1, 10.0),)), artifact)
    assert found.observed == pytest.approx(observed)
    assert found.passed is (observed <= 0.7)
    assert ("uncompressed" in found.explanation) is (observed == 0.8)


def test_a_gate_on_the_best_is_missed_where_the_runtimes_own_was_not_timed() -> None:
    artifact = _subject("onnx", timings=(_timing(1, 4.0, _speedup(2.5, 2.0, 3.0)),))
    (found,) = _decided({"latency": "<= 0.7x best"}, _subject("source", timings=(_timing(1, 10.0),)), artifact)
    assert (found.observed, found.passed) == (None, False)


def test_transformers_own_uncompressed_model_is_the_source() -> None:
    artifact = _subject("safetensors", timings=(_timing(1, 4.0, _speedup(2.5, 2.0, 3.0)),))
    for base in ("runtime", "best"):
        bound = {"latency": f"<= 0.7x {base}"}
        (found,) = _decided(bound, _subject("source", timings=(_timing(1, 10.0),)), artifact)
        assert (found.observed, found.passed) == (0.5, True)


@pytest.mark.parametrize(
    "gate", [{"latency": "<= 5 best"}, {"size": "<= 0.5x best"}, {"latency": "<= 0.5xbest"}, {"latency": "<= 0.5x all"}]
)
def test_only_a_relative_gate_on_a_speed_names_it(gate: dict[str, str]) -> None:
    with pytest.raises(NightpressError, match="gate"):
        parse_recipe({"name": "t", "passes": [], "exports": ["onnx"], "gates": gate})


def test_a_gate_is_written_as_it_is_read() -> None:
    for bound in ("<= 0.7x best", ">= 1.5x runtime", "<= 70%"):
        assert str(parse_gate("latency", bound)) == f"latency {bound}"
