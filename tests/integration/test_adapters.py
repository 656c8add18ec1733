"""Adapters of peft are merged into their base as peft merges them, a chunk of rows at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightpress.client.folders import ModelFolder, read_adapter_folder, read_model_folder
from nightpress.core.compress.executors import open_source as opening
from nightpress.core.errors import ErrorCode, NightpressError
from tests.adapters import PLAIN, train
from tests.every_family import save_family
from tests.folders import load_tensors
from tests.press import lay_out, press

# transformers warns of names that peft still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

#: case → (family, options of LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", PLAIN),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 8, "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    ),
    "dora": ("llama", {"target_modules": ["o_proj", "gate_proj"], "r": 4, "use_dora": True}),
    "fan in, fan out": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 4, "fan_in_fan_out": True}),
    "dora, fan in, fan out": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "use_dora": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "r": 4, "bias": "all"}),
    "an encoder": ("bert", {"target_modules": ["query", "value"], "r": 4}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_CHUNK", 5 * 4 * 64)


def merge(base: Path, adapter: Path, target: Path) -> dict[str, Tensor]:
    opening.open_source(base, target, lambda _fraction, _what: None, adapter=adapter)
    return load_tensors(target)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    base = save_family(family, tmp_path / "base")
    expected = train(base, tmp_path / "adapter", options)
    before = load_tensors(base)
    read_adapter_folder(tmp_path / "adapter", read_model_folder(base))
    found = merge(base, tmp_path / "adapter", tmp_path / "opened")
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed
    for name, tensor in expected.items():
        if name in found:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
            assert (name in changed) == (not torch.equal(tensor, before[name])), name
    assert changed <= expected.keys()


def test_an_adapter_of_a_half_precision_base_is_rounded_once(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    expected = train(base, tmp_path / "adapter", CASES["plain"][1])
    halves = {name: tensor.bfloat16() for name, tensor in load_tensors(base).items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    found = merge(base, tmp_path / "adapter", tmp_path / "opened")
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), tensor, rtol=2**-6, atol=2**-7)


def test_an_adapter_with_more_tokens_brings_its_tables_and_its_tokenizer(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    tokens = json.loads((base / "config.json").read_text())["vocab_size"] + 3
    expected = train(base, tmp_path / "adapter", {"target_modules": ["q_proj"], "r": 4}, tokens=tokens)
    tokenizer = (base / "tokenizer.json").read_text()
    (tmp_path / "adapter" / "tokenizer.json").write_text(tokenizer + "\n")
    found = merge(base, tmp_path / "adapter", tmp_path / "opened")
    assert found["model.embed_tokens.weight"].shape[0] == tokens
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "opened" / "config.json").read_text())["vocab_size"] == tokens
    assert (tmp_path / "opened" / "tokenizer.json").read_text() == tokenizer + "\n"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "opened")


def test_an_adapter_goes_onto_codes(tmp_path: Path) -> None:
    """QLoRA: the base is stored as codes, and the adapter changes the floats that they stand for."""
    base = save_family("llama", tmp_path / "base")
    train(base, tmp_path / "adapter", {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8})
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_tensors(base)
    scale = tensors[name].abs().amax(1, keepdim=True) / 448
    codes = (tensors[name] / scale).to(torch.float8_e4m3fn)
    save_file(
        {**tensors, name: codes, f"{name}_scale_inv": scale}, base / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "dtype": "float32", "quantization_config": {"quant_method": "fp8"}})
    )
    found = merge(base, tmp_path / "adapter", tmp_path / "opened")
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    change = (
        parts[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
        @ parts[f"base_model.model.{name.removesuffix('weight')}lora_A.weight"]
    )
    torch.testing.assert_close(found[name], codes.float() * scale + 2 * change)


@pytest.mark.slow
def test_an_adapter_is_pressed_with_its_base(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    train(base, tmp_path / "adapter", CASES["plain"][1])
    both: ModelFolder = read_adapter_folder(tmp_path / "adapter", read_model_folder(base))
    laid = tmp_path / "both"
    for name, path in both.files.items():
        (laid / name).parent.mkdir(parents=True, exist_ok=True)
        (laid / name).write_bytes(path.read_bytes())
    measured = {"evaluate": [{"metric": "fidelity", "samples": 2, "length": 16}]}
    job = lay_out(tmp_path / "job", laid, {"passes": [], "exports": ["safetensors"], **measured})
    _, report, _ = press(job)
    assert report.model["adapter"] == "lora of rank 4 on 4 weights"
    assert report.source.size_bytes == sum(path.stat().st_size for path in both.files.values())
    written, expected = load_tensors(job / "out" / "safetensors"), load_tensors(tmp_path / "merged")
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-6)
    assert not (job / "out" / "safetensors" / "adapter").exists()


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, ErrorCode.UNSUPPORTED_FORMAT, "PREFIX_TUNING"),
        ({"init_lora_weights": "pissa_niter_16"}, ErrorCode.UNSUPPORTED_FORMAT, "changing the base"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ErrorCode.UNSUPPORTED_FORMAT, "fused parameters"),
        ({"use_dora": True}, ErrorCode.MALFORMED_MODEL, "magnitude"),
        ({"lora_alpha": "16"}, ErrorCode.MALFORMED_MODEL, "no number"),
        ({"lora_alpha": float("1e400")}, ErrorCode.MALFORMED_MODEL, "plain JSON|no number"),
        ({"alpha_pattern": {"(": 3}}, ErrorCode.MALFORMED_MODEL, "no pattern"),
        ({"fan_in_fan_out": True}, ErrorCode.MALFORMED_MODEL, "have the shapes"),
        ({"auto_map": {"x": "y.z"}}, ErrorCode.UNSUPPORTED_FORMAT, "auto_map"),
    ],
)
def test_what_can_not_be_merged_exactly_is_refused(
    tmp_path: Path, config: dict[str, Any], code: ErrorCode, said: str
) -> None:
    base = save_family("llama", tmp_path / "base")
    train(base, tmp_path / "adapter", {"target_modules": ["down_proj"], "r": 4})
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(NightpressError, match=said) as error:
        read_adapter_folder(tmp_path / "adapter", read_model_folder(base))
    assert error.value.code is code
    assert error.value.hint


@pytest.mark.slow
def test_an_adapter_of_another_model_does_not_fit(tmp_path: Path) -> None:
    base = read_model_folder(save_family("llama", tmp_path / "base"))
    for family, modules in (("bert", ["query"]), ("qwen2", ["up_proj"])):
        folder = tmp_path / family
        train(
            save_family(family, folder / "base", **({"intermediate_size": 80} if family == "qwen2" else {})),
            folder / "adapter",
            {"target_modules": modules, "r": 2},
        )
        with pytest.raises(NightpressError, match="does not fit this base") as error:
            read_adapter_folder(folder / "adapter", base)
        assert "base_model_name_or_path" in error.value.hint


def test_a_folder_without_an_adapter_is_told(tmp_path: Path) -> None:
    base = read_model_folder(save_family("llama", tmp_path / "base"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NightpressError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        read_adapter_folder(tmp_path / "empty", base)
