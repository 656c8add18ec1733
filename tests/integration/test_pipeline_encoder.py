"""An encoder through the whole pipeline with dynamic int8: a complete result, verified by its consumers, and a clear report."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from nightpress.core.handoff.frames import Frame, Metric, Progress
from nightpress.core.handoff.manifest import Manifest, describe_folder
from nightpress.core.handoff.report import Report
from nightpress.core.handoff.spec import SOURCE_DIR, JobSpec
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.plan import make_plan
from tests.models import bert_tiny_dir
from tests.press import graph_bytes, lay_out, press
from tests.usage import run_usage


class Done(NamedTuple):
    folder: Path
    manifest: Manifest
    report: Report
    frames: list[Frame]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    recipe = {
        "passes": [{"pass": "dynamic-int8"}],
        "exports": ["onnx", "openvino"],
        "evaluate": [
            {"metric": "auto", "samples": 16, "length": 48},
            {"metric": "latency", "batch": [1, 4], "length": 32, "repeats": 5},
        ],
        "gates": {"size": "<= 60%", "kl_divergence": "<= 1", "latency": "<= 1000x best"},
    }
    job = lay_out(tmp_path_factory.mktemp("job") / "job", bert_tiny_dir(), recipe)
    return Done(job, *press(job))


@pytest.mark.slow
def test_the_manifest_lists_exactly_the_files_that_are_there(done: Done):
    for artifact in done.manifest.artifacts:
        assert artifact.files == describe_folder(done.folder / "out" / artifact.path)
    assert {artifact.format for artifact in done.manifest.artifacts} == {"onnx", "openvino"}
    named = {file.path for file in done.manifest.report} | {"manifest.json", "onnx", "openvino"}
    assert {path.name for path in (done.folder / "out").iterdir()} == named
    assert Manifest.model_validate_json((done.folder / "out" / "manifest.json").read_bytes()) == done.manifest


@pytest.mark.slow
def test_an_artifact_carries_its_tokenizer_and_config(done: Done):
    for artifact in ("onnx", "openvino"):
        names = {path.name for path in (done.folder / "out" / artifact).iterdir()}
        assert {"config.json", "tokenizer.json"} <= names
        assert not any(name.endswith(".safetensors") for name in names)


@pytest.mark.slow
def test_every_artifact_was_verified_by_its_real_consumer(done: Done):
    consumers = {artifact.name: artifact.verification.consumer.split()[0] for artifact in done.report.artifacts}
    assert consumers == {"onnx": "onnxruntime", "openvino": "openvino"}
    for artifact in done.report.artifacts:
        assert artifact.verification.passed
        assert artifact.verification.bound <= artifact.verification.value <= 1.000001


@pytest.mark.slow
def test_the_artifacts_are_half_the_size_or_less_although_embeddings_are_tied(done: Done):
    for artifact in done.report.artifacts:
        assert artifact.size_bytes < 0.6 * done.report.source.size_bytes
    assert done.report.verdict == "accepted"
    assert len(done.report.gates) == 6


@pytest.mark.parametrize("export", ["onnx", "openvino"])
@pytest.mark.slow
def test_the_plan_says_how_large_a_graph_will_be(done: Done, export: str):
    estimate = make_plan(
        JobSpec.load(done.folder).recipe, inspect_model(FolderFiles(done.folder / SOURCE_DIR))
    ).estimate
    assert estimate is not None
    assert graph_bytes(done.folder / "out" / export) == pytest.approx(estimate.output_bytes[export], rel=0.02)


@pytest.mark.slow
def test_fidelity_has_its_interval_and_the_source_none(done: Done):
    assert [measurement.name for measurement in done.report.source.measurements] == ["masked_accuracy"]
    for artifact in done.report.artifacts:
        found = {measured.name: measured for measured in artifact.measurements}
        assert set(found) == {"masked_accuracy", "top1_agreement", "kl_divergence", "centred_cosine"}
        for measured in found.values():
            assert measured.low <= measured.value <= measured.high
            assert measured.n > 16


@pytest.mark.slow
def test_each_shape_is_timed_for_the_source_and_for_each_artifact(done: Done):
    for subject in (done.report.source, *done.report.artifacts):
        assert [(timing.batch, timing.length, timing.repeats) for timing in subject.timings] == [(1, 32, 5), (4, 32, 5)]
        assert all(0 < timing.p50_ms <= timing.p95_ms for timing in subject.timings)
        assert subject.peak_memory_bytes > 50e6


@pytest.mark.slow
def test_speed_over_the_source_and_over_the_uncompressed_model_are_measured_by_turns(done: Done):
    for artifact in done.report.artifacts:
        for timing in artifact.timings:
            both = timing.speedup, timing.over_uncompressed
            assert all(speedup is not None and speedup.by_turns for speedup in both)
            for speedup in both:
                assert speedup.low <= speedup.value <= speedup.high
                assert speedup.value == pytest.approx(speedup.source_p50_ms / timing.p50_ms)
            assert both[0].source_p50_ms != both[1].source_p50_ms, "two models were timed"
    assert all(timing.over_uncompressed is None for timing in done.report.source.timings)


@pytest.mark.slow
def test_a_gate_on_the_best_is_decided_by_the_faster_of_both(done: Done):
    found = {result.artifact: result for result in done.report.gates if "best" in result.gate}
    assert set(found) == {"onnx", "openvino"}
    for artifact in done.report.artifacts:
        least = min(min(timing.speedup.low, timing.over_uncompressed.low) for timing in artifact.timings)
        assert found[artifact.name].observed == pytest.approx(1 / least)
        assert found[artifact.name].passed
    for name in ("report.html", "report.md"):
        page = (done.folder / "out" / name).read_text()
        assert "uncompressed model in the same runtime" in page


@pytest.mark.slow
def test_every_model_says_where_it_was_measured(done: Done):
    for subject in (done.report.source, *done.report.artifacts):
        place = subject.measured_on
        assert (place.device, place.name, place.dispatched) == ("cpu", done.report.environment["cpu"], False)
        assert place.dtype == ("float32" if subject.format in {"safetensors", "compressed-tensors"} else "")
        assert place.consumer == (subject.verification.consumer if subject.verification else place.consumer)
        assert subject.peak_gpu_bytes is None


@pytest.mark.slow
def test_progress_never_falls_and_ends_at_one(done: Done):
    progress = [frame for frame in done.frames if isinstance(frame, Progress)]
    fractions = [report.fraction for report in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    phases = list(dict.fromkeys(report.phase for report in progress))
    assert phases == ["validating", "baseline", "exporting", "verifying", "evaluating"]
    assert any(isinstance(frame, Metric) and frame.name == "dynamic-int8.relative_error" for frame in done.frames)


@pytest.mark.slow
def test_layers_are_called_as_in_the_model(done: Done):
    for record in done.report.passes:
        names = {layer.name for layer in record.layers}
        assert "bert.encoder.layer.0.attention.self.query" in names
        assert "bert.embeddings.word_embeddings" in names
        assert all(0 < layer.relative_error < 0.05 for layer in record.layers)


@pytest.mark.slow
def test_the_load_snippets_run_as_shown(done: Done):
    for artifact in done.report.artifacts:
        ran = subprocess.run(
            [sys.executable, "-I", "-c", artifact.verification.load_snippet],
            cwd=done.folder / "out",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_the_programs_run_as_shown(done: Done):
    """A masked language model's program prints three words for the mask; both runtimes print the same first one."""
    printed = [run_usage(artifact, done.folder / "out").split() for artifact in done.report.artifacts]
    assert all(len(words) == 3 for words in printed)
    assert len({words[0] for words in printed}) == 1


@pytest.mark.slow
def test_the_report_is_written_for_people_too(done: Done):
    assert "KL divergence" in (done.folder / "out" / "report.html").read_text()
    assert (done.folder / "out" / "report.md").read_text().startswith("---\nbase_model: a model\n")
    assert json.loads((done.folder / "out" / "report.json").read_bytes())["environment"]["versions"]["onnxruntime"]
