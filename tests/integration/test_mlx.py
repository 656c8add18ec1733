"""The export for MLX: its codes are those of the pressed model, and mlx-lm answers as the pressed model does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import mlx as export
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.export.probes import compare, probed_layers
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.mlx import mlx_group, why_not_mlx
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.folders import load_tensors
from tests.integration.test_decoder_exports import save_llama
from tests.press import lay_out, press
from tests.usage import run_usage
from tests.zoo.__main__ import classes_of
from tests.zoo.cells import as_floats, logits_in_mlx, mlx_distance, pressed
from tests.zoo.models import answers, inputs_of, load, save_tiny

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install '.[mlx]'")


def recipe(*, exports: str = "compressed-tensors", **options: Any) -> Recipe:
    chosen = {"pass": "weight-only", "ranges": "extremes", **options}
    return parse_recipe({"name": "t", "passes": [chosen], "exports": [exports], "evaluate": []})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model", intermediate_size=128)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        *(({"bits": bits, "group_size": 32}, 32) for bits in (2, 3, 4, 5, 6, 8)),
        *(({"bits": bits, "group_size": 64, "symmetric": False}, 64) for bits in (2, 3, 4, 5, 6, 8)),
        ({"bits": 8, "group_size": None}, 64),  # the narrowest layer has 64 inputs
    ],
)
def test_mlx_reads_the_numbers_that_were_pressed(options: dict[str, Any], size: int, llama: Path, tmp_path: Path):
    out, changed = pressed(recipe(**options), llama, tmp_path / "p")
    export.save(out, tmp_path / "mlx")
    written, meant = mx.load(str(tmp_path / "mlx" / "model.safetensors")), PressedWeights(out)
    assert len(changed) == 14
    for name in changed:
        module = name.removesuffix(".weight")
        codes, scales, biases = (written[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        group = codes.shape[1] * 32 // options["bits"] // scales.shape[1]
        assert group == (size if options["group_size"] else mlx_group(meant.shape(name)[1], None))
        read = np.array(mx.dequantize(codes, scales, biases, group, options["bits"]))
        np.testing.assert_allclose(read, meant.floats(name), rtol=0, atol=2e-6 * np.abs(read).max())
    for name in set(meant.names) - set(changed):
        np.testing.assert_array_equal(np.array(written[name]), meant.floats(name))


def test_biases_in_16_bits_are_as_near_as_their_type(tmp_path: Path):
    """A bias is up to 2^bits scales, and bfloat16 has 8 bits."""
    source = save_llama(tmp_path / "source", intermediate_size=128, dtype="bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in load_tensors(source).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out, changed = pressed(recipe(bits=4, group_size=64, symmetric=False), source, tmp_path / "p")
    export.save(out, tmp_path / "mlx")
    written, meant = mx.load(str(tmp_path / "mlx" / "model.safetensors")), PressedWeights(out)
    for name in changed:
        module = name.removesuffix(".weight")
        parts = [written[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        assert {str(part.dtype) for part in parts[1:]} == {"mlx.core.bfloat16"}
        read = np.array(
            mx.dequantize(*(part.astype(mx.float32) if part.dtype != mx.uint32 else part for part in parts), 64, 4)
        )
        step = meant.codes(name).scale.max()
        assert np.abs(read - meant.floats(name)).max() <= 16 * step / 2**8


def test_layers_with_other_bits_and_rounded_embeddings_are_told_in_the_config(llama: Path, tmp_path: Path):
    mixed = recipe(bits=4, group_size=32, overrides={"re:.*down_proj": {"bits": 8, "group_size": 64}})
    out, _ = pressed(mixed, llama, tmp_path / "p")
    export.save(out, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_bytes())
    assert "quantization_config" not in config
    down = {f"model.layers.{at}.mlp.down_proj": {"group_size": 64, "bits": 8} for at in (0, 1)}
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine", **down}
    model = load("LlamaForCausalLM", as_floats(llama, out, tmp_path / "floats", mixed))
    ours, theirs = logits_in_mlx(tmp_path / "mlx", inputs_of(model)["input_ids"]), answers(model)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_a_model_is_divided_into_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "_SHARD_BYTES", 60_000)
    out, _ = pressed(recipe(bits=4, group_size=32), llama, tmp_path / "p")
    export.save(out, tmp_path / "mlx")
    files = sorted(path.name for path in (tmp_path / "mlx").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "mlx" / "model.safetensors.index.json").read_bytes())["weight_map"]
    monkeypatch.setattr(export, "_SHARD_BYTES", 1 << 40)
    export.save(out, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index.keys() == whole.keys()
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "mlx" / file)[name], whole[name])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma", "glm4", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"])
def test_a_family_answers_in_mlx_as_in_transformers(model_type: str, tmp_path: Path):
    """All others are tried by `python -m tests.zoo "causal language models" --cells mlx`."""
    class_name = classes_of("causal language models")[model_type]
    source = save_tiny(model_type, class_name, tmp_path / "source")
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert why_not_mlx(inspect_model(FolderFiles(source))) is None
    assert mlx_distance(class_name, source, tmp_path / "work", recipe(bits=4, group_size=None)) < 1e-3


def test_what_mlx_has_no_layout_for_is_refused_when_planned(llama: Path):
    header = inspect_model(FolderFiles(llama))
    for options, why in (
        ({"bits": 7, "group_size": 32}, "packs 2, 3, 4, 5, 6, 8 bits, not 7"),
        ({"bits": 4, "group_size": 16}, "groups have 32, 64 or 128 inputs, not 16"),
        ({"bits": 4, "group_size": 32, "overrides": {"re:.*q_proj": {"bits": 7, "group_size": 32}}}, "not 7"),
    ):
        with pytest.raises(NightpressError) as refused:
            make_plan(recipe(exports="mlx", **options), header)
        assert (refused.value.code, why in refused.value.message) == (ErrorCode.INVALID_RECIPE, True), refused.value
    make_plan(recipe(exports="mlx", bits=8, group_size=None), header)
    window = {"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 128}
    mistral = header.model_copy(update={"model_type": "mistral", "config": header.config | window})
    assert "`sliding_window` 64" in (why_not_mlx(mistral) or "")
    other = header.model_copy(update={"model_type": "falcon"})
    assert "for a falcon" in (why_not_mlx(other) or "")


@pytest.mark.slow
def test_a_job_runs_the_artifact_in_mlx_and_finds_a_broken_layer(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = {
        "passes": [{"pass": "gptq", "bits": 4, "group_size": 64, "symmetric": False}],
        "exports": ["mlx"],
        "calibration": {"data": "builtin:prose", "samples": 4, "length": 32},
        "evaluate": [
            {"metric": "perplexity", "samples": 4, "length": 32},
            {"metric": "generation-speed", "batch": 1, "prompt": 8, "tokens": 4},
        ],
    }
    job = lay_out(tmp_path / "job", llama, wanted)
    _, report, _ = press(job)
    [artifact] = report.artifacts
    assert artifact.verification is not None
    assert artifact.verification.layers == 14
    assert artifact.verification.layer_error is not None
    assert artifact.verification.layer_error < 1e-5
    assert artifact.generation[0].decode_over_uncompressed is not None
    assert artifact.generation[0].prefill_over_uncompressed is not None
    assert "mlx-lm" in artifact.verification.consumer
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert run_usage(artifact, job / "out").strip()

    made = job / "out" / "mlx"
    tensors = load_file(made / "model.safetensors")
    broken = "model.layers.1.self_attn.o_proj"
    tensors[f"{broken}.scales"] = tensors[f"{broken}.scales"].flip(0)
    save_file(tensors, made / "model.safetensors", {"format": "mlx"})
    parsed = parse_recipe({"name": "t", **wanted})
    trial = quality.prepare(parsed, inspect_model(FolderFiles(llama)), llama, {}, threads=1)
    monkeypatch.setattr(export, "_SHARD_BYTES", 1 << 40)
    out, _ = pressed(
        parse_recipe({"name": "t", **wanted, "exports": ["compressed-tensors"]}), llama, tmp_path / "again"
    )
    observed = run_consumer(
        export.CONSUMER, made, trial.task, name="source", scratch=tmp_path / "scratch", probes=probed_layers(out)
    )
    assert compare(out, observed.outputs, observed.loaded_as["dtype"]).worst == broken
