"""vLLM, in its own environment, runs every scheme that its processor path takes, and refuses broken artifacts.

They run where NIGHTPRESS_VLLM_PYTHON names an environment that `make vllm` made: 3.5 GB, so not in CI.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nightpress.core.compress import environment
from nightpress.core.compress.evaluate import served
from nightpress.core.compress.export import compressed_tensors, vllm
from nightpress.core.compress.grids.packing import pack_bits, unpack_bits
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Metric, Result, parse_frame
from nightpress.core.handoff.report import REPORT_FILE, read_report
from nightpress.core.handoff.spec import OUT_DIR, SOURCE_DIR, SPEC_FILE
from nightpress.worker.process import ChildProcess
from tests.consumers.tries import asked, bound, pressed
from tests.every_family import save_family
from tests.folders import load_tensors
from tests.press import lay_out, press

PYTHON = vllm.interpreter()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="NIGHTPRESS_VLLM_PYTHON is not set: `make vllm` makes its environment"),
    pytest.mark.timeout(1200),
]

_INT = {"pass": "weight-only", "bits": 4, "group_size": 32}
#: Schemes that vLLM 0.32 runs on a processor with AVX-512.
RUN: dict[str, list[dict[str, Any]]] = {
    "int4 group": [_INT],
    "int4 group asymmetric": [_INT | {"symmetric": False}],
    "int8 activations": [{"pass": "smoothquant"}],
    "fp8": [{"pass": "fp8"}],
}
Tensors = dict[str, torch.Tensor]


def tiny(folder: Path) -> Path:
    """A Llama with as many keys as queries, so that the two can be swapped, in heads of 64 that vLLM's attention takes.

    The rows of its down projections are of different sizes, so that it shows when their scales change places.
    """
    save_family("llama", folder, num_attention_heads=2, num_key_value_heads=2, intermediate_size=256, dtype="bfloat16")
    tensors = load_tensors(folder)
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        sizes = torch.linspace(0.25, 2.0, len(tensors[name]), dtype=tensors[name].dtype)
        tensors[name] = tensors[name] * sizes[:, None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(source: Path, work: Path, passes: list[dict[str, Any]]) -> Path:
    compressed_tensors.save(pressed(source, work, passes), work / "artifact")
    return work / "artifact"


@pytest.mark.parametrize("form", RUN)
def test_vllm_answers_as_the_dequantized_weights_do(form: str, tmp_path: Path):
    if form.startswith("int4") and "avx512f" not in environment.cpu_features():
        pytest.skip("vLLM's kernels for int4 need AVX-512")
    source = tiny(tmp_path / "source")
    artifact = written(source, tmp_path / "pressed", RUN[form])
    found, seen = asked(source, artifact, artifact, tmp_path / "scratch")
    verification = served.verify_served(form, found, seen, bound=bound(artifact))
    assert verification.consumer.startswith("vllm ")
    assert "vllm.LLM(" in verification.load_snippet
    assert seen.outputs["vllm.tokens"].shape == (8, 16)


def _changed(artifact: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy with changed tensors, in a single file."""
    shutil.copytree(artifact, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = load_tensors(artifact)
    change(tensors)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def transpose_scales(tensors: Tensors) -> None:
    """The scales of all down projections. A single layer's would hardly show; each is asked by itself in test_broken_layers.py."""
    for name in [name for name in tensors if name.endswith("down_proj.weight_scale")]:
        scale = tensors[name]
        tensors[name] = scale.t().reshape(scale.shape) if scale.shape[1] > 1 else scale.flip(0)


def swap_queries_and_keys(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".q_proj.weight" in name]:
        other = name.replace("q_proj", "k_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def shift_zero_points(tensors: Tensors) -> None:
    """All zero points off by one, as when a version of the format counts them otherwise."""
    for name in [name for name in tensors if name.endswith("weight_zero_point")]:
        rows, _ = tensors[name.replace("zero_point", "shape")].tolist()
        zeros = unpack_bits(tensors[name].t().contiguous(), 4, rows)
        tensors[name] = pack_bits(torch.where(zeros < 7, zeros + 1, zeros - 1), 4).t()


BROKEN: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "int4, scales transposed": ("int4 group", transpose_scales),
    "int4, queries and keys swapped": ("int4 group", swap_queries_and_keys),
    "int4, zero points off by one": ("int4 group asymmetric", shift_zero_points),
    "int8 activations, scales turned": ("int8 activations", transpose_scales),
    "int8 activations, queries and keys swapped": ("int8 activations", swap_queries_and_keys),
    "fp8, queries and keys swapped": ("fp8", swap_queries_and_keys),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_artifact_is_refused(case: str, tmp_path: Path):
    form, change = BROKEN[case]
    if form.startswith("int4") and "avx512f" not in environment.cpu_features():
        pytest.skip("vLLM's kernels for int4 need AVX-512")
    source = tiny(tmp_path / "source")
    meant = written(source, tmp_path / "pressed", RUN[form])
    artifact = _changed(meant, tmp_path / "broken", change)
    found, seen = asked(source, artifact, meant, tmp_path / "scratch")
    with pytest.raises(NightpressError, match="answers otherwise than it should") as refused:
        served.verify_served("it", found, seen, bound=bound(artifact))
    assert refused.value.code == ErrorCode.VERIFICATION_FAILED


def test_a_missing_shard_is_refused_with_what_vllm_said(tmp_path: Path):
    source = tiny(tmp_path / "source")
    artifact = written(source, tmp_path / "pressed", RUN["int8 activations"])
    missing = sorted(artifact.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(NightpressError) as refused:
        asked(source, artifact, artifact, tmp_path / "scratch")
    assert refused.value.code == ErrorCode.VERIFICATION_FAILED
    assert missing.name in refused.value.message + str(refused.value.details["stderr"])


def test_a_form_without_a_kernel_here_is_noted_with_what_vllm_said(tmp_path: Path):
    """vLLM has no kernel for int8 weights with float inputs on any processor. That says nothing about a GPU."""
    recipe = {
        "passes": [{"pass": "weight-only", "bits": 8}],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
    }
    manifest, report, _ = press(lay_out(tmp_path / "job", tiny(tmp_path / "model"), recipe))
    [artifact] = report.artifacts
    assert artifact.serving is None
    [note] = [note for note in artifact.notes if "no kernel for this form on this processor" in note]
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in note
    assert manifest.artifacts[0].consumer.startswith("transformers ")


def test_a_job_verifies_and_times_in_vllm(tmp_path: Path):
    recipe = {
        "target": "gpu-vllm",
        "passes": RUN["int8 activations"],
        "calibration": {"samples": 4, "length": 32},
        "exports": ["compressed-tensors"],
        "evaluate": [
            {"metric": "fidelity", "samples": 4, "length": 16},
            {"metric": "latency", "batch": 1, "length": 16, "repeats": 5},
        ],
    }
    manifest, report, frames = press(lay_out(tmp_path / "job", tiny(tmp_path / "model"), recipe))
    [artifact] = report.artifacts
    serving = artifact.serving
    assert serving is not None
    assert serving.verification is not None
    assert serving.verification.passed
    assert serving.verification.value <= serving.verification.bound
    assert serving.measured_on.consumer.startswith("vllm ")
    assert serving.measured_on.device == "cpu"
    assert serving.measured_on.dtype == "bfloat16"
    assert serving.gap is not None
    assert serving.chosen is not None
    assert serving.peak_memory_bytes is not None
    assert [timing.requests for timing in serving.timings] == [1, 8, 64]
    assert all(timing.speedup is not None for timing in serving.timings)
    assert all(0 < timing.first_p50_ms <= timing.first_p95_ms for timing in serving.timings)
    assert all(0 < timing.slowest <= timing.tokens_per_s <= timing.fastest for timing in serving.timings)
    assert report.source.serving is not None
    assert len(report.source.serving.timings) == 3
    assert manifest.artifacts[0].consumer == serving.measured_on.consumer
    assert {f"compressed-tensors.vllm.tokens_per_s.{n}" for n in (1, 8, 64)} <= {
        frame.name for frame in frames if isinstance(frame, Metric)
    }
    page = (tmp_path / "job" / "out" / "report.html").read_text()
    assert "64 of 64 tokens, 32 written" in page
    assert not (tmp_path / "job" / "work" / "measured").exists()


def test_vllm_runs_inside_a_jobs_walls(tmp_path: Path):
    """In a child: without a network, with a view of its own folder and of the two environments alone."""
    recipe = {
        "name": "walls",
        "passes": [_INT],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
    }
    if "avx512f" not in environment.cpu_features():
        recipe["passes"] = RUN["int8 activations"]
    child = ChildProcess(tmp_path / "jobs", threads=1, network=False, vllm_python=PYTHON)
    try:
        shutil.copytree(tiny(tmp_path / "model"), child.job_dir / SOURCE_DIR, dirs_exist_ok=True)
        spec = {"job_id": "job_1", "attempt": 1, "model_name": "m", "model_digest": "d", "recipe": recipe}
        (child.job_dir / SPEC_FILE).write_text(json.dumps(spec))
        child.begin(patience_s=1000)
        with open(child.frames, "rb", closefd=False) as stream:
            result = [parse_frame(line) for line in stream][-1]
        assert isinstance(result, Result)
        assert result.error is None
        report = read_report((child.job_dir / OUT_DIR / REPORT_FILE).read_bytes())
    finally:
        child.kill()
        child.remove()
    serving = report.artifacts[0].serving
    assert serving is not None
    assert serving.timings == ()
