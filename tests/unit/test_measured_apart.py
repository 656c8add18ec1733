"""Models that were measured on different devices: neither a gate nor a table compares their times or their memory."""

import pytest

from nightpress.client.cli.comparison import comparison_rows
from nightpress.core.compress import report as reports
from nightpress.core.compress.evaluate import gates
from nightpress.core.compress.evaluate.remarks import remarks
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import MeasuredOn, Report, Speedup, Subject, same_device
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.reports import full_report

ON_GPU = MeasuredOn(device="cuda", name="NVIDIA H200", dtype="bfloat16", consumer="transformers 5.23.0")
ON_CPU = MeasuredOn(device="cpu", name="Xeon", dtype="", consumer="onnxruntime 1.32.0")
TAKEN_BY_TURNS = Speedup(value=3.0, low=2.9, high=3.1, told_apart=True, by_turns=True, source_p50_ms=49.5)


def apart(speedup: Speedup | None = None) -> Report:
    """A report whose source was measured on a GPU, and whose first artifact on a processor, perhaps by turns with the source there."""
    report = full_report()
    first, second = report.artifacts
    timings = tuple(timing.model_copy(update={"speedup": speedup}) for timing in first.timings)
    return report.model_copy(
        update={
            "source": report.source.model_copy(update={"measured_on": ON_GPU, "peak_gpu_bytes": 2 * 10**9}),
            "artifacts": (
                first.model_copy(update={"measured_on": ON_CPU, "timings": timings}),
                second.model_copy(update={"measured_on": ON_GPU, "peak_gpu_bytes": 10**9}),
            ),
        }
    )


def decided(source: Subject, artifact: Subject, **bounds: str) -> dict[str, tuple[bool, str]]:
    recipe = parse_recipe({"name": "t", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "gates": bounds})
    return {
        found.gate.split()[0]: (found.passed, found.explanation) for found in gates.decide(recipe, source, (artifact,))
    }


def test_a_report_without_a_place_was_measured_on_the_processor():
    old = full_report()
    assert old.source.measured_on is None
    assert all(same_device(artifact, old.source) for artifact in old.artifacts)
    assert not same_device(apart().artifacts[0], apart().source)


def test_gates_compare_memory_on_one_device_alone():
    report = apart()
    on_cpu, on_gpu = report.artifacts
    passed, why = decided(report.source, on_cpu, memory="<= 100%")["memory"]
    assert not passed
    assert "another device" in why
    passed, why = decided(report.source, on_cpu, memory="<= 1000000000")["memory"]
    assert passed
    assert "of the consumer's process" in why
    passed, why = decided(report.source, on_gpu, memory="<= 50%")["memory"]
    assert passed
    assert "of the GPU" in why


def test_relative_gates_on_speed_need_runs_by_turns():
    for speedup, expected in ((None, False), (TAKEN_BY_TURNS, True)):
        report = apart(speedup)
        passed, why = decided(report.source, report.artifacts[0], latency="<= 50%")["latency"]
        assert passed == expected
        assert ("not compared" in why) == (not expected)


def test_tables_say_where_and_show_no_ratio():
    report = apart()
    markdown, html = reports.render_markdown(report), reports.render_html(report)
    for page in (markdown, html):
        assert "NVIDIA H200, bfloat16, transformers 5.23.0" in page
        assert "Peak memory of the GPU" in page
    rows = {row[0]: row[1:] for row in comparison_rows(report)}
    assert rows["measured on"] == ["NVIDIA H200, bfloat16", "Xeon", "NVIDIA H200, bfloat16"]
    latencies = [cells for label, cells in rows.items() if label.startswith("latency")]
    assert latencies
    assert all("faster" not in cells[1] and "SLOWER" not in cells[1] for cells in latencies)
    assert any("not compared with the source's" in text for text in remarks(report.artifacts[0], report.source))
    assert not any("not compared" in text for text in remarks(apart(TAKEN_BY_TURNS).artifacts[0], report.source))


def test_a_model_that_is_spread_over_gpu_and_host_says_so():
    report = apart()
    moved = report.artifacts[1].model_copy(update={"measured_on": ON_GPU.model_copy(update={"dispatched": True})})
    assert any("no serving speed" in text for text in remarks(moved, report.source))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"device": "cpu"}, "no GPU"),
        ({"exports": ["onnx"]}, "onnx"),
        ({"passes": [{"pass": "dynamic-int8"}], "exports": ["onnx"]}, "CPU only"),
    ],
)
def test_measuring_on_a_gpu_is_refused_where_nothing_could_be(more: dict[str, object], said: str):
    recipe = {"name": "t", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "evaluate_on": "gpu"}
    with pytest.raises(NightpressError) as refused:
        make_plan(parse_recipe(recipe | more))
    assert said in refused.value.message


@pytest.mark.parametrize(
    ("exports", "evaluate_on", "source", "places"),
    [
        (["safetensors", "onnx"], "auto", True, [True, False]),
        (["onnx"], "auto", False, [False]),
        (["safetensors"], "cpu", False, [False]),
        (["gguf", "safetensors"], "gpu", True, [False, True]),
    ],
)
def test_what_is_measured_where(exports: list[str], evaluate_on: str, source: bool, places: list[bool]):
    recipe: Recipe = parse_recipe({"name": "t", "passes": [], "exports": exports, "evaluate_on": evaluate_on})
    assert recipe.measured_on_gpu(None) == source
    assert [recipe.measured_on_gpu(export) for export in recipe.exports] == places
