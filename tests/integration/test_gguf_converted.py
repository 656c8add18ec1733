"""GGUF files that llama.cpp's own converter writes, for the families that it knows and we don't."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nightpress.core.compress.export import gguf
from nightpress.core.compress.export.gguf import converted
from nightpress.core.compress.model.cosines import whole_cosine
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exports import Export, runs_in_llama_cpp
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.llama_converter import CONVERTED, NOT_CONVERTED
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.folders import load_tensors
from tests.press import lay_out, press
from tests.zoo.llama import save_with_known_tokenizer

_SOME = "arcee"  #: a family of those


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    """llama.cpp and its converter."""
    if not (converted.CONVERTER / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converter is not installed: make llama")
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llama")


def _save(kind: str, folder: Path) -> Path:
    return save_with_known_tokenizer(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], folder)


def _header(**config: Any) -> ModelHeader:
    return ModelHeader(model_type=_SOME, architecture="ArceeForCausalLM", config=config, tensors=(), has_tokenizer=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CONVERTED))
def test_llama_cpp_answers_as_transformers_does(kind: str, llama_cpp: Any, tmp_path: Path):
    folder = _save(kind, tmp_path / "model")
    header = inspect_model(FolderFiles(folder))
    Export(format="gguf").check(header)
    gguf.save(folder, tmp_path / "out", header, weights="f32", pooling="mean")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [gguf.FILE_NAME]
    ids = torch.randint(5, 40000, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    consumer = llama_cpp.Llama(str(tmp_path / "out" / gguf.FILE_NAME), n_ctx=64, logits_all=True, verbose=False)
    consumer.eval(ids)
    found = np.array(consumer.scores[: len(ids)])
    consumer.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert whole_cosine(found[:, : expected.shape[1]], expected) > 0.9999
    compared = gguf.compare_layers(folder, tmp_path / "out", header)
    assert compared.layers >= 4
    assert compared.error < compared.bound, compared


def test_a_matrix_that_the_converter_wrote_otherwise_is_named(llama_cpp: Any, tmp_path: Path):
    """Queries have another order of rows in the file, which is no fault; rows that change places elsewhere are one."""
    folder, out = _save(_SOME, tmp_path / "model"), tmp_path / "out"
    header = inspect_model(FolderFiles(folder))
    gguf.save(folder, out, header, weights="f16", pooling="mean")
    tensors = load_tensors(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = gguf.compare_layers(folder, out, header)
    assert found.error > found.bound
    assert found.worst == name.removesuffix(".weight")


def test_a_job_writes_and_verifies_types_of_floats_and_of_codes(llama_cpp: Any, tmp_path: Path):
    folder = _save(_SOME, tmp_path / "model")
    recipe = {"passes": [], "exports": ["gguf", {"format": "gguf", "type": "q8_0"}], "evaluate": []}
    _, report, _ = press(lay_out(tmp_path / "job", folder, recipe))
    assert [artifact.verification.passed for artifact in report.artifacts if artifact.verification] == [True, True]
    sizes = [artifact.size_bytes for artifact in report.artifacts]
    assert sizes[1] < 0.75 * sizes[0]


def test_what_the_converter_says_is_in_the_error(llama_cpp: Any, tmp_path: Path):
    folder = _save(_SOME, tmp_path / "model")
    header = inspect_model(FolderFiles(folder))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("ArceeFor", "NoSuchFor"))
    with pytest.raises(NightpressError, match="NoSuchForCausalLM is not supported") as caught:
        gguf.save(folder, tmp_path / "out", header, weights="f16", pooling="mean")
    assert caught.value.code == ErrorCode.UNSUPPORTED_ARCHITECTURE


def test_a_worker_without_the_converter_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(converted, "CONVERTER", tmp_path / "none")
    with pytest.raises(NightpressError, match=r"llama\.cpp's converter, and the worker has none") as caught:
        gguf.save(tmp_path, tmp_path / "out", _header(), weights="f16", pooling="mean")
    assert caught.value.code == ErrorCode.UNSUPPORTED_FORMAT
    assert "make llama" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"hidden_act": "relu"}, "`hidden_act`"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
    ids=str,
)
def test_what_the_converter_passes_over_is_refused_when_planned(config: dict[str, Any], why: str):
    Export(format="gguf").check(_header(hidden_act="relu2"))
    with pytest.raises(NightpressError, match=why) as caught:
        Export(format="gguf").check(_header(**config))
    assert caught.value.code == ErrorCode.INVALID_RECIPE


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx` none or False"),
        ("gpt2", {"n_inner": 100, "n_embd": 64}, "four times `n_embd`"),
        ("exaone4", {"sliding_window": 4096}, "`sliding_window` none"),
        ("cohere2", {"layer_types": ["full_attention"] * 4}, "each 4th has a window"),
        *((kind, {}, why) for kind, why in NOT_CONVERTED.items()),
    ],
    ids=str,
)
def test_what_llama_cpps_graph_of_a_family_lacks_is_refused_when_planned(kind: str, config: dict[str, Any], why: str):
    header = _header(**config).model_copy(update={"model_type": kind})
    with pytest.raises(NightpressError, match=re.escape(why)) as caught:
        Export(format="gguf").check(header)
    assert caught.value.code == ErrorCode.INVALID_RECIPE


@pytest.mark.slow
def test_codes_are_refused_when_planned(tmp_path: Path):
    header = inspect_model(FolderFiles(_save(_SOME, tmp_path / "model")))
    recipe = {"name": "r", "passes": [{"pass": "weight-only", "bits": 8}], "exports": ["gguf"], "evaluate": []}
    make_plan(parse_recipe(recipe | {"passes": []}), header)
    with pytest.raises(NightpressError, match=r"written by llama\.cpp's converter, which reads floats") as caught:
        make_plan(parse_recipe(recipe), header)
    assert caught.value.code == ErrorCode.INVALID_RECIPE
    assert not runs_in_llama_cpp(header)  # so no target chooses codes for it
