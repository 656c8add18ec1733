"""The report's pages: complete, self-contained, and safe against a model's name that contains markup."""

import re
from html.parser import HTMLParser

import pytest
import yaml

from nightpress.core.compress import report as reports
from nightpress.core.compress.report import charts
from nightpress.core.handoff.compare import compare
from nightpress.core.handoff.report import (
    GateResult,
    LayerEffect,
    Measurement,
    PassRecord,
    Report,
    Subject,
    Timing,
    Tried,
    Verification,
    Within,
)
from tests.reports import full_report

EVIL = '<script>alert("x")</script>"><img src=x onerror=alert(1)>'


def searched(name: str) -> Within:
    """A search of three candidates. The data set has this name."""
    tried = tuple(
        Tried(
            what=f"{count} of 42 layers in float",
            size_bytes=size,
            value=value,
            observed=end,
            passed=end >= -0.01,
            unsure=value >= -0.01 > end,
            explanation=f"{end:+.2%} on {name}",
            seconds=4.25,
        )
        for count, size, value, end in (
            (0, 23_650_000, -0.02, -0.031),
            (20, 23_600_000, 0.0, -0.009),
            (10, 23_620_000, -0.004, -0.012),
        )
    )
    return Within(
        gate="accuracy >= -1%",
        data=(name,),
        examples=500,
        candidates=42,
        tried=tried,
        chosen=tried[1].what,
        kept=True,
        beyond=tried[2],
        note=f"note on {name}",
    )


def make_report(name: str = "a-model", *, verdict: str = "accepted", layers: int = 3) -> Report:
    timing = Timing(
        batch=1, length=128, threads=2, repeats=20, p50_ms=10, p95_ms=14, throughput=100, throughput_unit="sequences/s"
    )
    measured = Measurement(
        name="accuracy",
        value=0.84,
        low=0.82,
        high=0.86,
        n=1000,
        better="higher",
        data=name[:20],
        change=-0.01,
        change_low=-0.02,
        change_high=0.0,
    )
    verification = Verification(
        consumer="onnxruntime 1.32.0",
        passed=True,
        measure="cosine",
        value=0.999,
        bound=0.9,
        seconds=3,
        load_snippet=f"import onnxruntime  # {name}",
    )
    effects = tuple(
        LayerEffect(name=f"{name}.{at}", bytes_before=4000, bytes_after=1000, relative_error=0.01 * (at + 1))
        for at in range(layers)
    )
    return Report.model_validate(
        {
            "job_id": "job_1",
            "model": {
                "name": name,
                "digest": "sha256:abc",
                "architecture": name,
                "task": "classification",
                "parameters": 1000,
                "size_bytes": 4000,
                "license": None,
            },
            "recipe": {"name": "int8-encoder", "description": name},
            "environment": {
                "nightpress": "0.1.0",
                "versions": {"onnxruntime": "1.32.0"},
                "cpu": name,
                "cpu_features": ["avx2"],
                "cores": 2,
                "threads": 2,
                "memory_bytes": 8e9,
                "platform": "Linux",
                "seed": 0,
                "attempt": 1,
            },
            "data": [{"ref": name[:20], "sha256": "0" * 64, "license": name}],
            "source": Subject(name="source", format="safetensors", size_bytes=4000, timings=(timing,)),
            "artifacts": [
                Subject(
                    name="onnx",
                    format="onnx",
                    digest="sha256:dig" + (name if name != "a-model" else ""),
                    size_bytes=1000,
                    measurements=(measured,),
                    timings=(timing.model_copy(update={"p50_ms": 5.0, "p95_ms": 6.0, "throughput": 200.0}),),
                    verification=verification,
                    notes=(f"note {name}",),
                )
            ],
            "passes": [
                PassRecord(
                    index=0,
                    name="dynamic-int8",
                    seconds=1,
                    summary={"format": "onnx"},
                    layers=effects,
                    within=searched(name),
                )
            ],
            "gates": [GateResult(gate="size <= 35%", artifact="onnx", observed=0.25, passed=True, explanation=name)],
            "verdict": verdict,
            "phases": {"baseline": 3.0},
            "notes": [name],
        }
    )


class Page(HTMLParser):
    """Collects every element and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_shows_what_was_counted_kept_and_saved():
    page, card = reports.render_html(full_report()), reports.render_markdown(full_report())
    for expected in (
        "0.30 → 0.15 (50%)",  # GFLOP of the feed-forward
        "14.3% → 21.1%",  # the quadratic share at 512 tokens
        "held back by",
        "22.60 MB",  # with a bitmap
        "47.20 MB",
        "84% of 32 tokens",
    ):
        assert expected in page
        assert expected in card
    # Lines: attention's share of two models; tokens/s and memory of three subjects, each with a cache and without.
    # Two lines coincide and are drawn once, with both names.
    assert page.count("<polyline") >= 2 * (2 + 2 * 6 - 1)
    assert "source, no cache" in page


def test_losses_and_accuracies_are_drawn_apart_and_so_is_what_stands_over_no_steps():
    report = make_report()
    curves = [
        ("train loss", "step", 0.4),
        ("validation loss", "step", 0.5),
        ("validation accuracy", "step", 88.0),
        ("held-apart accuracy", "blocks run", 77.0),
    ]
    series = [{"name": name, "x": [0, 1], "y": [y, y / 2], "x_label": x} for name, x, y in curves]
    record = PassRecord.model_validate(
        {"index": 0, "name": "early-exit", "seconds": 1, "summary": {}, "series": series}
    )
    page = reports.render_html(report.model_copy(update={"passes": (record,)}))
    section = page[page.index("<h2>Curves</h2>") :]
    section = section[: section.index("</section>")]
    figures = [re.findall(r"</i>([\w -]+):", figure) for figure in section.split("</figure>")[:-1]]
    assert figures == [["train loss", "validation loss"], ["validation accuracy"], ["held-apart accuracy"]]


def test_a_gpu_is_named_with_what_each_pass_took_of_it():
    report = full_report()
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_000_000_000, "torch": "2.11.0", "cuda": "13.0"}
    passes = tuple(options.model_copy(update={"peak_gpu_bytes": 6_540_000_000}) for options in report.passes)
    on_gpu = report.model_copy(update={"environment": report.environment | {"gpu": gpu}, "passes": passes})
    for drawn in (reports.render_html(on_gpu), reports.render_markdown(on_gpu)):
        assert "NVIDIA H100 80GB HBM3" in drawn
        assert drawn.count("up to 6.54 GB") == len(passes)
    assert "GPU memory" not in reports.render_markdown(report)


def test_the_page_carries_the_comparison():
    page = reports.render_html(make_report())
    for expected in ("Accepted", "84.0%", "[82.0%, 86.0%]", "2.00× faster", "25%", "sha256:dig", "import onnxruntime"):
        assert expected in page


def test_a_search_within_a_gate_shows_what_was_tried_what_was_chosen_and_what_is_beyond():
    report = make_report()
    card = reports.render_markdown(report)
    for expected in (
        "How dynamic-int8 kept accuracy",
        "| 0 of 42 layers in float | 23.6 MB | -3.10% on a-model | missed | 4.2 |",
        "| 10 of 42 layers in float | 23.6 MB | -1.20% on a-model | missed by its interval | 4.2 |",
        "Chosen: 20 of 42 layers in float. It keeps the gate.",
        "Measured on 500 examples of a-model",
        "Of 42 possible results, 3 were tried.",
        "On the other side of the gate: 10 of 42 layers in float, -1.20% on a-model.",
        "note on a-model",
    ):
        assert expected in card
    page = reports.render_html(report)
    assert page.count("of 42 layers in float") == 5
    assert "missed by its interval" in page
    (record,) = report.passes
    plain = report.model_copy(update={"passes": (record.model_copy(update={"within": None}),)})
    assert "kept accuracy" not in reports.render_html(plain)


def test_a_pass_that_names_no_format_is_drawn_too():
    report = make_report()
    (record,) = report.passes
    report = report.model_copy(update={"passes": (record.model_copy(update={"summary": {"sparsity": 0.5}}),)})
    assert "<h3>dynamic-int8</h3>" in reports.render_html(report)


def test_the_page_needs_nothing_from_elsewhere():
    page = Page(reports.render_html(make_report()))
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_hostile_names_stay_text():
    text = reports.render_html(make_report(EVIL))
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "&lt;script&gt;" in text


def test_hostile_names_stay_text_in_markdown_too():
    card = reports.render_markdown(make_report(EVIL + "\n# not a heading | not a cell"))
    body = card.split("---\n", 2)[2]
    outside_code = re.sub(r"```.*?```", "", body, flags=re.S)
    assert "<script" not in outside_code
    assert "<img" not in outside_code
    assert "\n# not a heading" not in outside_code


def test_a_snippet_cannot_end_its_code_block():
    bad = make_report("x\n```\n<script>")
    outside = re.sub(r"```.*?```", "", reports.render_markdown(bad).split("---\n", 2)[2], flags=re.S)
    assert "<script" not in outside


def test_the_card_begins_with_metadata_that_hubs_can_read():
    card = reports.render_markdown(make_report("name: [odd"))
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert front["base_model"] == "name: [odd"
    assert front["pipeline_tag"] == "text-classification"
    assert front["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"


@pytest.mark.parametrize("layers", [0, 1, 40, 500])
def test_many_layers_are_cut_to_those_with_the_largest_errors(layers: int):
    report = make_report(layers=layers)
    shown = reports.largest_errors(report.passes[0].layers)
    assert len(shown) == min(layers, 40)
    if layers > 40:
        assert min(layer.relative_error for layer in shown) > report.passes[0].layers[layers - 41].relative_error
    assert "Nightpress report" in reports.render_html(report)


def test_a_rejected_report_says_so_first_and_why():
    report = make_report(verdict="rejected")
    passed = report.gates[0]
    missed = passed.model_copy(update={"gate": "top1_agreement >= 99%", "passed": False})
    page = reports.render_html(report.model_copy(update={"gates": (passed, missed)}))
    assert (
        page.index("Rejected")
        < page.index("1 of 2 gates missed: top1 agreement by onnx.")
        < page.index("Before and after")
    )
    assert page.index("top1_agreement ≥ 99%") < page.index("size ≤ 35%")


def test_what_a_pass_did_alike_in_two_formats_is_drawn_once():
    report = make_report()
    (record,) = report.passes
    again = record.model_copy(update={"summary": {"format": "transformers.js"}})
    other = record.model_copy(update={"summary": {"format": "openvino"}, "layers": record.layers[:2]})
    page = reports.render_html(report.model_copy(update={"passes": (record, other, again)}))
    assert "<h3>dynamic-int8 in onnx and transformers.js</h3>" in page
    assert "<h3>dynamic-int8 in openvino</h3>" in page
    assert page.count("<h3>dynamic-int8") == 2


def test_the_line_to_run_it_again_names_the_data_it_needs():
    assert "nightpress reproduce report.json --model FOLDER --data mine=FILE</pre>" in reports.render_html(
        make_report("mine")
    )


def test_points_that_lie_together_share_a_label_and_what_is_beaten_hides_nothing():
    report = full_report()
    first, second = report.artifacts
    near = second.model_copy(update={"size_bytes": second.size_bytes + 200_000, "name": "near"})
    drawn = charts.pareto(compare([report.model_copy(update={"artifacts": (first, second, near)})]))
    for plot in drawn.split("</svg>")[:2]:
        labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([\d, ]+)</text>', plot)
        assert sorted(number for _, _, text in labels for number in text.split(", ")) == ["1", "2", "3", "4"]
        places = [(float(x), float(y)) for x, y, _ in labels]
        assert all(abs(a[0] - b[0]) >= 12 or abs(a[1] - b[1]) >= 12 for a in places for b in places if a is not b)
        kinds = re.findall(r'<circle class="(\w+)"', plot)
        assert kinds == sorted(kinds, key=lambda kind: kind != "grey")
        assert "grey" in kinds


def test_the_front_is_what_is_best_for_its_size():
    page = reports.render_html(full_report())
    front = page.split('class="front" points="')[1].split('"')[0]
    heights = [float(pair.split(",")[1]) for pair in front.split()]
    assert heights == sorted(heights, reverse=True)  # larger is better; on a page, y grows downwards
