"""A job on a GPU measures there what transformers loads, and on the processor what only runs there. Every figure says where."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nightpress.core.compress.export import nursery
from nightpress.core.compress.export.consumer_environment import runner_environment
from nightpress.core.compress.runners import measure, transformers_runner
from nightpress.core.handoff.report import Report
from nightpress.core.handoff.source_outputs import FRESH_FILE, KEPT_FILE
from nightpress.core.handoff.spec import SPEC_FILE, WORK_DIR, JobSpec
from tests.every_family import save_family
from tests.press import lay_out, press, runner_request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

RECIPE: dict[str, Any] = {
    "passes": [{"pass": "weight-only", "bits": 8}],
    "exports": ["compressed-tensors"],
    "evaluate": [
        {"metric": "fidelity", "samples": 8, "length": 16},
        {"metric": "latency", "batch": [1, 4], "length": 16, "repeats": 5},
    ],
}
SPEED = {"metric": "generation-speed", "prompt": 8, "tokens": 8, "repeats": 3}


def on_gpu(job_dir: Path) -> Report:
    spec = json.loads((job_dir / SPEC_FILE).read_bytes())
    (job_dir / SPEC_FILE).write_text(json.dumps(spec | {"device": "cuda"}))
    return press(job_dir)[1]


def test_a_decoder_is_measured_in_its_own_type_on_the_gpu(tmp_path: Path):
    folder = save_family("llama", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    evaluate = [*RECIPE["evaluate"], {"metric": "perplexity", "samples": 8, "length": 16}, SPEED]
    report = on_gpu(lay_out(tmp_path / "job", folder, RECIPE | {"evaluate": evaluate, "gates": {"memory": "<= 10x"}}))
    [artifact] = report.artifacts
    for subject in (report.source, artifact):
        assert subject.measured_on is not None
        assert subject.measured_on.device == "cuda"
        assert subject.measured_on.name == torch.cuda.get_device_name()
        assert subject.measured_on.dtype == "bfloat16"
        assert subject.measured_on.consumer.startswith("transformers ")
        assert not subject.measured_on.dispatched
        assert subject.peak_gpu_bytes is not None
        assert subject.peak_gpu_bytes > 0
        assert len(subject.timings) == 2
        assert subject.generation[0].decode_tokens_per_s > 0
    assert all(timing.speedup is not None and timing.speedup.by_turns for timing in artifact.timings)
    assert "peak memory of the GPU" in report.gates[0].explanation
    assert {"perplexity", "kl_median"} <= {measured.name for measured in artifact.measurements}


def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the requests of all runners that are started from now on."""
    names: list[str] = []
    start = nursery.start

    def told(runner: Path, request: Path, **more: Any) -> nursery.Fork:
        names.append(request.name.removesuffix(".request.json"))
        return start(runner, request, **more)

    monkeypatch.setattr(nursery, "start", told)
    return names


@pytest.mark.parametrize("limit", [0, 10**6])
def test_a_source_is_loaded_once_where_memory_has_room(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a limit that holds nothing beside the job, it is loaded again, to be timed alone."""
    names = started(monkeypatch)
    job = lay_out(tmp_path / "job", save_family("llama", tmp_path / "model"), RECIPE)
    JobSpec.load(job).model_copy(update={"memory_limit": limit}).save(job)
    report = on_gpu(job)
    assert names == (
        ["source", "compressed-tensors"] if not limit else ["source", "compressed-tensors", "source-timed"]
    )
    [artifact] = report.artifacts
    assert all(timing.speedup is not None and timing.speedup.by_turns is (not limit) for timing in artifact.timings)
    assert not [fork for made in nursery._nurseries for fork in made._forks if not fork.ended], "none waits any more"


def test_a_kept_source_loads_while_the_passes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_family("llama", tmp_path / "model")
    first, second = (lay_out(tmp_path / name, folder, RECIPE) for name in ("first", "second"))
    JobSpec.load(first).model_copy(update={"keep_source": True}).save(first)
    measured = on_gpu(first)
    (second / WORK_DIR).mkdir()
    shutil.copyfile(first / WORK_DIR / FRESH_FILE, second / WORK_DIR / KEPT_FILE)
    JobSpec.load(second).model_copy(update={"source_measured_by": "job_first"}).save(second)
    names = started(monkeypatch)
    again = on_gpu(second)
    assert names == ["source", "compressed-tensors"], "the source's process is started before the artifact's"
    assert again.source.measurements == measured.source.measurements
    assert again.source.measurements_by == "job_first"
    assert all(timing.speedup is not None and timing.speedup.by_turns for timing in again.artifacts[0].timings)


def test_libraries_are_imported_once_for_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What torch sets among this process's variables when it uses the GPU must not ask for another nursery."""
    begun: list[object] = []
    make = nursery._Nursery

    def told(*given: Any) -> nursery._Nursery:
        begun.append(given)
        return make(*given)

    monkeypatch.setattr(nursery, "_nurseries", [])
    monkeypatch.setattr(nursery, "_Nursery", told)
    recipe = RECIPE | {"passes": [{"pass": "gptq", "bits": 4, "group_size": 16}]}
    on_gpu(lay_out(tmp_path / "job", save_family("llama", tmp_path / "model"), recipe))
    for made in nursery._nurseries:
        made.end()
    assert len(begun) == 1


def test_a_model_that_the_gpu_does_not_hold_is_dispatched(tmp_path: Path):
    """accelerate leaves parts of it in the host's memory. It answers as the whole model does, and its speed is none that serves."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}
    folder = save_family("llama", tmp_path / "model", num_key_value_heads=16, **sizes)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    recipe = RECIPE | {"passes": [], "exports": ["safetensors"]}
    whole = on_gpu(lay_out(tmp_path / "whole", folder, recipe))
    torch.cuda.empty_cache()
    held = torch.empty(torch.cuda.mem_get_info()[0] - weights, dtype=torch.uint8, device="cuda")
    try:
        report = on_gpu(lay_out(tmp_path / "dispatched", folder, recipe))
    finally:
        del held
        torch.cuda.empty_cache()
    for subject in (report.source, *report.artifacts):
        assert subject.measured_on is not None
        assert subject.measured_on.device == "cuda"
        assert subject.measured_on.dispatched
        assert subject.peak_gpu_bytes is not None
        assert subject.peak_gpu_bytes < weights
    for ours, theirs in ((report.source, whole.source), (report.artifacts[0], whole.artifacts[0])):
        assert theirs.measured_on is not None
        assert not theirs.measured_on.dispatched
        found = {measured.name: measured.value for measured in ours.measurements}
        meant = {measured.name: measured.value for measured in theirs.measurements}
        assert found == pytest.approx(meant, rel=1e-3, abs=1e-3)
    [artifact] = report.artifacts
    assert any("serving speed" in note for note in artifact.notes), artifact.notes
    assert "parts in the host’s memory" in (tmp_path / "dispatched" / "out" / "report.md").read_text()


def test_what_runs_on_the_processor_alone_is_measured_there_beside_the_source(tmp_path: Path):
    folder = save_family("bert", tmp_path / "model")
    report = on_gpu(lay_out(tmp_path / "job", folder, RECIPE | {"passes": [], "exports": ["onnx", "safetensors"]}))
    places = {subject.name: subject.measured_on for subject in (report.source, *report.artifacts)}
    assert {name: place and place.device for name, place in places.items()} == {
        "source": "cuda",
        "onnx": "cpu",
        "safetensors": "cuda",
    }
    onnx, floats = report.artifacts
    assert onnx.peak_gpu_bytes is None
    assert all(timing.speedup is not None and timing.speedup.by_turns for timing in (*onnx.timings, *floats.timings))
    assert any("run on the processor" in note for note in report.notes)


def test_processes_on_the_gpu_are_forked(tmp_path: Path):
    """Importing transformers starts no CUDA, which could not be used in a fork."""
    environment = runner_environment("cuda", 1, tmp_path)
    runner = tmp_path / "runner.py"
    runner.write_text("import os, torch; print(os.getppid(), int(torch.ones(1, device='cuda')), flush=True)")
    with tempfile.TemporaryFile() as errors:
        forks = [
            nursery.start(runner, tmp_path / "request", cwd=tmp_path, errors=errors, environment=environment)
            for _ in range(2)
        ]
        said = [fork.stdout.readline().split() for fork in forks]
        assert [fork.wait() for fork in forks] == [0, 0]
        errors.seek(0)
        assert errors.read() == b""
        assert said[0] == said[1] == [said[0][0], b"1"]
        for fork in forks:
            fork.stdin.close()
            fork.stdout.close()


@pytest.mark.parametrize("evaluate_on", ["cpu", "auto"])
def test_the_processor_may_be_asked_for(evaluate_on: str, tmp_path: Path):
    """`auto` comes to the same where nothing that is exported runs on a GPU."""
    exports = {"cpu": ["safetensors"], "auto": ["onnx"]}[evaluate_on]
    recipe = RECIPE | {"passes": [], "exports": exports, "evaluate_on": evaluate_on}
    report = on_gpu(lay_out(tmp_path / "job", save_family("bert", tmp_path / "model"), recipe))
    for subject in (report.source, *report.artifacts):
        assert subject.measured_on is not None
        assert subject.measured_on.device == "cpu"
        assert subject.peak_gpu_bytes is None


def test_what_is_kept_of_the_logits_is_the_same_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In float32, the GPU's figures are the processor's but for the order of sums."""
    save_family("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    here, there = (
        transformers_runner.load(runner_request(tmp_path / "model", device))[0] for device in ("cpu", "cuda")
    )
    random = np.random.default_rng(0)
    ids = random.integers(5, 60, (3, 12))
    mask = np.ones_like(ids)
    targets = np.where(random.random(ids.shape) < 0.5, ids, -1)
    compared = random.random(ids.shape) < 0.3
    ours, theirs = there.scored(ids, mask, targets, compared), measure._score(here, ids, mask, targets, compared)
    assert ours.keys() == theirs.keys()
    for name, kept in theirs.items():
        assert ours[name].shape == kept.shape
        assert ours[name].dtype == kept.dtype
        assert np.abs(ours[name] - kept).max() < 1e-4, name
    assert (there.chosen(ids, mask) == here(ids, mask).argmax(axis=-1)).all()
