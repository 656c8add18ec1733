"""Comparing reports, judging a repeated run, and reading reports of other versions."""

import json
from pathlib import Path

import jsonschema
import pytest

from nightpress.client.cli.comparison import comparison_rows
from nightpress.core.compress import report as reports
from nightpress.core.compress.lineage import read_lineage
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.compare import compare
from nightpress.core.handoff.report import Report, read_report
from nightpress.core.handoff.reproduction import judge
from tests.reports import full_report

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"


def changed(report: Report, **artifact: object) -> Report:
    """The report with its second artifact changed."""
    first, second = report.artifacts
    return report.model_copy(update={"artifacts": (first, second.model_copy(update=artifact))})


def test_what_is_larger_slower_and_worse_is_dominated():
    report = full_report()
    bad = changed(report, size_bytes=91_000_000, timings=report.source.timings)
    found = {point.artifact: point for point in compare([bad]).points}
    assert found["openvino"].dominated_by == "minilm-l6-sentiment · source"
    assert found["onnx"].dominated_by == ""
    assert compare([report]).metric == "accuracy"
    assert compare([report]).shape == (1, 128)


def test_a_smaller_one_that_is_worse_is_not_dominated():
    points = compare([full_report()]).points
    assert not [point.label for point in points if point.dominated_by]


def test_jobs_on_one_source_show_it_once():
    found = compare([full_report(), full_report(recipe="other", job="job_02")])
    assert [point.artifact for point in found.points].count("source") == 1
    assert len(found.points) == 5


def test_nothing_is_beaten_where_no_quality_is_known():
    reports = [full_report(), full_report(job="job_02")]
    found = compare(reports, "perplexity")
    assert found.metric is None
    assert not [point for point in found.points if point.dominated_by]


def test_an_artifact_that_missed_no_gate_of_a_rejected_job_says_so():
    report = full_report(verdict="rejected")
    missed = {gate.artifact for gate in report.gates if not gate.passed}
    verdicts = {point.artifact: point.verdict for point in compare([report]).points}
    assert missed
    for artifact in report.artifacts:
        said = "rejected" if artifact.name in missed else "rejected; its own gates are passed"
        assert verdicts[artifact.name] == said


def test_without_a_common_scale_a_note_says_so():
    report = full_report()
    apart = changed(report, measurements=(), timings=())
    found = compare([apart])
    assert (found.metric, found.shape) == (None, None)
    assert len(found.notes) == 2
    assert "perplexity" in " ".join(compare([report], "perplexity").notes)


def test_the_same_again_is_identical():
    assert judge(full_report(), full_report()).outcome == "identical"


def test_other_bytes_with_the_same_figures_are_equivalent():
    found = judge(full_report(), changed(full_report(), digest="sha256:" + "0" * 64))
    assert found.outcome == "equivalent"
    assert [item.same for item in found.bytes] == [True, False]


@pytest.mark.parametrize(("value", "outcome"), [(0.844, "identical"), (0.8, "different")])
def test_a_figure_may_move_within_its_interval(value: float, outcome: str):
    report = full_report()
    first, *rest = report.artifacts[1].measurements
    found = judge(report, changed(report, measurements=(first.model_copy(update={"value": value}), *rest)))
    assert found.outcome == outcome


def test_a_figure_that_was_not_measured_again_is_different():
    assert judge(full_report(), changed(full_report(), measurements=())).outcome == "different"


def test_versions_that_differ_are_named():
    report = full_report()
    versions = {**report.environment["versions"], "onnxruntime": "1.33.0"}
    other = report.model_copy(update={"environment": report.environment | {"versions": versions, "threads": 4}})
    found = judge(report, other)
    assert found.versions == {"onnxruntime": ("1.32.0", "1.33.0")}
    assert found.environment == {"threads": (2, 4)}


@pytest.mark.slow
def test_a_report_fits_the_published_schema():
    schema = json.loads(SCHEMA.read_text())
    report = json.loads(reports.draw(full_report())["report.json"])
    jsonschema.validate(report, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report | {"verdict": "perhaps"}, schema)


def test_a_report_of_version_1_is_brought_up_to_date():
    old = full_report().model_dump(mode="json") | {"schema_version": 1}
    del old["data"]
    for subject in (old["source"], *old["artifacts"]):
        del subject["digest"]
        for measurement in subject["measurements"]:
            del measurement["of"]
    found = read_report(json.dumps(old))
    assert found.schema_version == 2
    assert found.data == ()
    assert found.artifacts[0].digest is None
    assert "✓ Accepted" in reports.render_html(found)


def test_a_newer_report_is_read_as_far_as_it_is_known():
    new = full_report().model_dump(mode="json") | {"schema_version": 9, "aura": "violet"}
    assert read_report(new).verdict == "accepted"


@pytest.mark.parametrize(
    "raw", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": "x"}', "\x00", "nonsense"]
)
def test_what_is_no_report_is_refused_kindly(raw: str):
    with pytest.raises(NightpressError) as caught:
        read_report(raw)
    assert caught.value.code == ErrorCode.INVALID_REQUEST
    assert caught.value.hint


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path):
    from huggingface_hub import ModelCard

    file = tmp_path / "README.md"
    file.write_bytes(reports.draw(full_report())["report.md"])
    card = ModelCard.load(file)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "minilm-l6-sentiment"
    assert {eval_result.metric_type for eval_result in card.data.eval_results} >= {"accuracy", "f1"}
    assert all(eval_result.dataset_name for eval_result in card.data.eval_results)


@pytest.mark.parametrize(
    ("passes", "relation"),
    [
        ([], "quantized"),  # GGUF's types quantize without any pass
        (["profile"], "quantized"),
        (["distill"], "finetune"),
        (["magnitude", "recover"], "finetune"),
        (["channels", "dynamic-int8"], "quantized"),
    ],
)
def test_the_card_says_what_the_result_is_to_its_base_in_the_hubs_words(passes: list[str], relation: str):
    report = full_report()
    recipe = report.recipe | {"passes": [{"pass": options} for options in passes]}
    card = reports.render_markdown(report.model_copy(update={"recipe": recipe}))
    assert f"base_model_relation: {relation}\n" in card


def test_lineage_is_carried_over_from_the_card(tmp_path: Path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nbase_model: some/model\ndatasets: [a, b]\nwidget: {}\n---\n# A model\n"
    )
    assert read_lineage(tmp_path) == {"license": "mit", "base_model": "some/model", "datasets": ["a", "b"]}


@pytest.mark.parametrize(
    "card",
    [
        "no front matter",
        "---\nlicense: [\n---\n",
        "---\nlicense: !!python/object/apply:os.system [true]\n---\n",
        "---\na: &a [x, x]\nlicense: [*a, *a]\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: 7\n---\n",
        "---\nlicense: mit",
    ],
)
def test_a_strange_card_says_nothing(tmp_path: Path, card: str):
    (tmp_path / "README.md").write_text(card)
    assert read_lineage(tmp_path) == {}


def test_a_licence_is_known_by_its_text(tmp_path: Path):
    (tmp_path / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    assert read_lineage(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / "LICENSE").write_text("Do as you please.")
    assert read_lineage(tmp_path) == {"license": "other"}


@pytest.mark.parametrize("unknown", ["source", "artifact"])
def test_an_unknown_peak_of_memory_is_no_zero(unknown: str):
    report = full_report()
    blank = {"peak_memory_bytes": None, "generation": ()}
    if unknown == "source":
        report = report.model_copy(update={"source": report.source.model_copy(update=blank)})
    else:
        artifacts = tuple(artifact.model_copy(update=blank) for artifact in report.artifacts)
        report = report.model_copy(update={"artifacts": artifacts})
    for page in (reports.render_markdown(report), reports.render_html(report)):
        assert "Peak memory of the process" in page
        assert "unknown" in page
        assert " 0.0 MB" not in page
        assert ">0.0 MB" not in page
    row = next(comparison_row for comparison_row in comparison_rows(report) if comparison_row[0] == "peak memory")
    assert ("–" in row[1]) is (unknown == "source")
    assert ("–" in row[2]) is (unknown == "artifact")
