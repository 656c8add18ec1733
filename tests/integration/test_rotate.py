"""`rotate` on models of every family that it takes: same answers, untied heads, and less error behind it where there are outliers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.compress.passes.rotate import answers_alike
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import Rotate
from nightpress.core.recipes.plan import make_plan
from tests.block_models import FAMILIES, token_ids
from tests.integration.test_decoder_exports import byte_level_tokenizer, save_llama
from tests.press import lay_out, press


def _save(class_name: str, folder: Path, dtype: torch.dtype = torch.float32, shards: str = "5GB", **more: Any) -> Path:
    """A random model with uneven norms and with biases where the family has them, and a real tokenizer."""
    import transformers

    folder.mkdir()
    size = byte_level_tokenizer(folder)
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**FAMILIES[class_name], "vocab_size": size, **more}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def _rotate(source: Path, work: Path, seed: int = 0, **more: Any) -> tuple[Path, Any]:
    context = PassContext(header=inspect_model(FolderFiles(source)), work_dir=work / "work", seed=seed, **more)
    (work / "work").mkdir(parents=True, exist_ok=True)
    return work / "out", MODEL_PASSES["rotate"](source, work / "out", Rotate(), context)


@torch.no_grad()
def _logits(folder: Path) -> Tensor:
    found: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(token_ids()).logits
    return found


@pytest.mark.parametrize(
    ("class_name", "more"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "hidden_size": 48}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("MistralForCausalLM", {}),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {}),
    ],
)
@pytest.mark.slow
def test_the_rotated_model_answers_the_same(class_name: str, more: dict[str, Any], tmp_path: Path):
    source = _save(class_name, tmp_path / "source", **more)
    out, record = _rotate(source, tmp_path)
    torch.testing.assert_close(_logits(out), _logits(source), rtol=1e-3, atol=1e-4)
    assert record.summary["cosine"] > 0.99999
    tensors = {tensor.name for shard in read_shards(out) for tensor in shard.tensors}
    assert "lm_head.weight" in tensors
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    planned = Rotate().leaves(inspect_model(FolderFiles(source)))
    assert {tensor.name for tensor in planned.tensors} == tensors
    assert planned.size == record.summary["bytes_after"]
    assert {(t.name, t.shape) for t in inspect_model(FolderFiles(out)).tensors} == {
        (t.name, t.shape) for t in planned.tensors
    }


def test_a_model_in_16_bits_and_several_files_answers_nearly_the_same(tmp_path: Path):
    source = _save("LlamaForCausalLM", tmp_path / "source", torch.bfloat16, "20KB")
    assert len(read_shards(source)) > 2
    out, record = _rotate(source, tmp_path)
    assert 0.999 < record.summary["cosine"] <= 1
    assert torch.nn.functional.cosine_similarity(_logits(out).flatten(), _logits(source).flatten(), dim=0) > 0.999


def test_outliers_are_spread_so_that_rounding_loses_less(tmp_path: Path):
    source = _save("LlamaForCausalLM", tmp_path / "source", hidden_size=128, intermediate_size=256)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data[torch.rand_like(parameter) < 1 / 64] *= 20
    model.save_pretrained(source)
    _, record = _rotate(source, tmp_path)
    assert 0 < record.summary["rounding_error_after"] < 0.8 * record.summary["rounding_error_before"]


class _KilledError(Exception):
    pass


@pytest.mark.slow
def test_an_attempt_killed_after_a_file_ends_with_the_same_bytes(tmp_path: Path):
    source = _save("LlamaForCausalLM", tmp_path / "source", shards="20KB")
    whole, record = _rotate(source, tmp_path / "a")

    def kill(_path: str, step: int) -> None:
        if step == 2:
            raise _KilledError

    with pytest.raises(_KilledError):
        _rotate(source, tmp_path / "b", checkpoint=kill)
    steps: list[int] = []
    resumed, again = _rotate(source, tmp_path / "b", checkpoint=lambda _path, step: steps.append(step))
    assert min(steps, default=3) > 2
    assert again.summary == record.summary
    for path in whole.iterdir():
        assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name
    other, _ = _rotate(source, tmp_path / "c", seed=1)
    assert any(path.read_bytes() != (other / path.name).read_bytes() for path in whole.glob("*.safetensors"))


def test_models_that_answer_otherwise_are_told_apart(tmp_path: Path):
    source = _save("LlamaForCausalLM", tmp_path / "source")
    other = _save("LlamaForCausalLM", tmp_path / "other")
    header = inspect_model(FolderFiles(source))
    assert answers_alike(source, other, header) == pytest.approx(1, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    model.model.layers[1].post_attention_layernorm.weight.data += 1
    model.save_pretrained(other)
    assert answers_alike(source, other, header) < 0.99


@pytest.mark.parametrize("class_name", ["Gemma2ForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM"])
def test_families_whose_norms_do_not_allow_it_are_refused_when_planned(class_name: str, tmp_path: Path):
    source = _save(class_name, tmp_path / "source")
    recipe = parse_recipe({"name": "r", "passes": [{"pass": "rotate"}], "exports": ["safetensors"]})
    with pytest.raises(NightpressError, match="can't take a"):
        make_plan(recipe, inspect_model(FolderFiles(source)))


@pytest.mark.slow
def test_it_is_followed_by_a_pass_that_rounds_and_exported(tmp_path: Path):
    source = save_llama(tmp_path / "source", tie_word_embeddings=True, num_hidden_layers=1)
    recipe = {
        "passes": [{"pass": "rotate"}, {"pass": "gptq", "group_size": 32}],
        "exports": ["compressed-tensors", "onnx", "openvino"],
        "calibration": {"samples": 4, "length": 32},
        "evaluate": [],
    }
    manifest, report, _ = press(lay_out(tmp_path / "job", source, recipe))
    assert [artifact.format for artifact in manifest.artifacts] == recipe["exports"]
    assert all(artifact.verification is not None and artifact.verification.passed for artifact in report.artifacts)
    assert [done.name for done in report.passes] == ["rotate", "gptq"]
