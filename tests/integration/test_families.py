"""Families other than plain encoders and decoders: passes whose output transformers loads, and whole jobs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.usage import run_usage

_WORDS = 30522  # the size of BERT's vocabulary
_SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
_IDS = {"bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0, "vocab_size": _WORDS}
_MIXTURE = {**_SHAPE, **_IDS, "num_key_value_heads": 2, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, **_IDS},
    "T5ForConditionalGeneration": {
        "d_model": 64,
        "d_kv": 16,
        "num_heads": 4,
        "num_layers": 2,
        "d_ff": 128,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 102,
        "vocab_size": _WORDS,
    },
    "ViTForImageClassification": {**_SHAPE, "image_size": 32, "patch_size": 8, "num_labels": 5},
    "AlbertForMaskedLM": {**_SHAPE, **_IDS, "embedding_size": 32},
    "MixtralForCausalLM": {**_MIXTURE, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
}


def _save(name: str, folder: Path, bert_tiny: Path) -> Path:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model_class(model_class.config_class(**MODELS[name])).save_pretrained(folder)
    if not name.startswith("ViT"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bert_tiny / file, folder / file)
    return folder


def _press(source: Path, work: Path, pass_: dict[str, Any], export: str) -> tuple[Path, Any]:
    recipe = parse_recipe({"name": "r", "passes": [pass_], "exports": [export]})
    header = inspect_model(FolderFiles(source))
    plan = make_plan(recipe, header)
    context = PassContext(header=header, work_dir=work / "work", calibration=Calibration(samples=12, length=48))
    record = MODEL_PASSES[pass_["pass"]](source, work / "out", recipe.passes[0], context)
    index = json.loads((work / "out" / "model.safetensors.index.json").read_bytes())
    written = index["metadata"]["total_size"]  # without the headers, which are larger than such small models
    assert plan.estimate is not None
    assert written == pytest.approx(plan.estimate.output_bytes[export], rel=0.02)
    return work / "out", record


def _answers(name: str, folder: Path) -> Tensor:
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    ids = torch.randint(1000, 20000, (4, 24))
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32)} if name.startswith("ViT") else {"input_ids": ids}
    if name.startswith("T5"):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


# torch warns that it will remove a dtype that transformers uses for the scales.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "GPT2LMHeadModel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.slow
def test_codes_of_every_family_are_read_back_by_transformers(
    name: str, symmetric: bool, bert_tiny: Path, tmp_path: Path
):
    source = _save(name, tmp_path / "source", bert_tiny)
    pass_ = {"pass": "gptq", "bits": 8, "group_size": 32, "symmetric": symmetric}
    if not symmetric and ("Moe" in name or "Mixtral" in name):
        with pytest.raises(NightpressError, match="zero points"):
            _press(source, tmp_path, pass_, "compressed-tensors")
        return
    out, record = _press(source, tmp_path, pass_, "compressed-tensors")
    assert record.summary["uncalibrated"] == []
    before, after = _answers(name, source), _answers(name, out)
    assert float((after - before).norm() / before.norm()) < 0.03


@pytest.mark.parametrize("name", ["sparsegpt", "wanda"])
@pytest.mark.slow
def test_gpt2_is_pruned_along_its_inputs_in_the_layout_that_its_loader_reads(
    name: str, bert_tiny: Path, tmp_path: Path
):
    source = _save("GPT2LMHeadModel", tmp_path / "source", bert_tiny)
    out, record = _press(source, tmp_path, {"pass": name, "pattern": "2:4"}, "safetensors")
    model = transformers.GPT2LMHeadModel.from_pretrained(out)
    weight = model.transformer.h[1].mlp.c_fc.weight.detach()  # [in, out]
    assert int((weight.T.reshape(-1, 4) != 0).sum(1).max()) == 2
    assert record.summary["sparsity"] == pytest.approx(0.5, abs=0.01)
    before, after = _answers("GPT2LMHeadModel", source), _answers("GPT2LMHeadModel", out)
    assert 0 < float((after - before).norm() / before.norm()) < 1


@pytest.mark.slow
def test_an_expert_that_the_router_starves_is_calibrated_with_every_token_and_named(bert_tiny: Path, tmp_path: Path):
    source = _save("MixtralForCausalLM", tmp_path / "source", bert_tiny)
    recipe = parse_recipe(
        {"name": "r", "passes": [{"pass": "gptq", "group_size": 32}], "exports": ["compressed-tensors"]}
    )
    context = PassContext(
        header=inspect_model(FolderFiles(source)),
        work_dir=tmp_path / "work",
        calibration=Calibration(samples=3, length=24),
    )
    record = MODEL_PASSES["gptq"](source, tmp_path / "out", recipe.passes[0], context)
    starved = record.summary["starved_experts"]
    assert starved
    assert all(".experts." in name and count < 128 for name, count in starved.items())
    assert record.summary["uncalibrated"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "ViTForImageClassification", "MixtralForCausalLM"])
def test_a_whole_job(name: str, bert_tiny: Path, tmp_path: Path):
    job = lay_out(
        tmp_path / "job",
        _save(name, tmp_path / "source", bert_tiny),
        {
            "passes": [{"pass": "gptq", "bits": 8, "group_size": 32}],
            "exports": ["compressed-tensors"],
            "calibration": {"samples": 8, "length": 32},
            "evaluate": [
                {"metric": "auto", "samples": 4, "length": 24},
                {"metric": "latency", "repeats": 3, "length": 16},
            ],
        },
    )
    _, report, _ = press(job)
    (artifact,) = report.artifacts
    assert artifact.verification is not None
    assert artifact.verification.passed
    found = {measurement.name: measurement.value for measurement in artifact.measurements}
    assert found["top1_agreement"] > 0.5
    if name.startswith("ViT"):
        assert any("synthetic" in note for note in report.notes)
    assert json.loads((tmp_path / "job" / "out" / "report.json").read_bytes())["verdict"]
    if not name.startswith("T5"):  # its class reads no tokenizer of another kind, as this one is
        assert run_usage(artifact, tmp_path / "job" / "out").strip()
