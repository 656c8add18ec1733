"""Layers exchange factors only if the model's outputs stay the same: every family that folds, in all variants that a config can have."""

import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from nightpress.core.compress.executors.blocks import press_blocks
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.families import FOLDS
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.block_models import Scaled, linears_of, settings_of

#: class → name of a variant → its changes to the family's default config
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "OPTForCausalLM": {
        "plain": {},
        "norms behind": {"do_layer_norm_before": False},
        "as opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "gelu": {"activation_function": "gelu"},
        "no biases": {"enable_bias": False},
        "norms without weights": {"layer_norm_elementwise_affine": False},
    },
    "LlamaForCausalLM": {
        "plain": {},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "wide heads": {"head_dim": 16},
        "every head its own values": {"num_key_value_heads": 4},
        "one head's values for all": {"num_key_value_heads": 1},
        "tied embeddings": {"tie_word_embeddings": True},
    },
    "MistralForCausalLM": {"plain": {}, "wide heads": {"head_dim": 16}},
    "Qwen2ForCausalLM": {"plain": {}},
    "Qwen3ForCausalLM": {"plain": {}, "biases": {"attention_bias": True}},
    "GemmaForCausalLM": {"plain": {}, "biases": {"attention_bias": True}},
    "Gemma2ForCausalLM": {
        "plain": {},
        "caps": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
        "no caps": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    },
    "Gemma3ForCausalLM": {"plain": {}, "caps": {"final_logit_softcapping": 5.0}},
    "PhiForCausalLM": {"plain": {}, "norms on queries and keys": {"qk_layernorm": True}},
    "Phi3ForCausalLM": {"plain": {}, "gelu": {"hidden_act": "gelu"}},
    "GPTNeoXForCausalLM": {
        "plain": {},
        "one after the other": {"use_parallel_residual": False},
        "no biases": {"attention_bias": False},
    },
    "Starcoder2ForCausalLM": {"plain": {}, "no biases": {"use_bias": False}},
    "MixtralForCausalLM": {"plain": {}},
    "Qwen2MoeForCausalLM": {"plain": {}, "no biases": {"qkv_bias": False}},
    "Qwen3MoeForCausalLM": {"plain": {}, "raw shares": {"norm_topk_prob": False}},
    "OlmoeForCausalLM": {"plain": {}, "no bound": {"clip_qkv": None}},
}
_CASES = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
#: In such small models, rounding alone sends tokens to other experts.
_MIXTURES = {"MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"}
#: Both passes exchange factors by the same folds. Families have both as they are, and OPT in all its variants; other variants take turns.
_PRESSED = [
    (family, variant, name)
    for at, (family, variant) in enumerate(case for case in _CASES if case[0] not in _MIXTURES)
    for turn, name in enumerate(("awq", "smoothquant"))
    if variant == "plain" or family == "OPTForCausalLM" or at % 2 == turn
]
#: (class, variant) → the folds that would change the model's outputs
_LEFT_OUT = {
    ("OPTForCausalLM", "norms behind"): ["self_attn_layer_norm", "final_layer_norm"],
    ("OPTForCausalLM", "as opt-350m"): ["self_attn_layer_norm", "final_layer_norm"],
    ("OPTForCausalLM", "gelu"): ["fc1"],
    ("OPTForCausalLM", "norms without weights"): ["self_attn_layer_norm", "final_layer_norm"],
}
_CALIBRATION = Calibration(samples=24, length=32)


def _save(family: str, says: dict[str, Any], folder: Path) -> Path:
    """Save a small model with outliers in its layers' inputs, so that a wrong factor changes the outputs."""
    model_class = getattr(transformers, family)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**settings_of(family, layers=2), **says})).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
        # Not the norms of queries and keys: with sharp attention, rounding errors would dominate the result.
        if "norm" in name and "self_attn." not in name and name.endswith("weight"):
            parameter.data[::5] *= 6
    model.save_pretrained(folder)
    letters = {token: at for at, token in enumerate(["[UNK]", "[PAD]", "</s>", *string.ascii_letters])}
    tokenizer = Tokenizer(models.WordLevel(letters, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _press(source: Path, work: Path, pass_: dict[str, Any]) -> tuple[Path, PassRecord]:
    options = parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]}).passes[0]
    header = inspect_model(FolderFiles(source))
    (work / "work").mkdir(parents=True)
    context = PassContext(header=header, work_dir=work / "work", calibration=_CALIBRATION)
    return work / "out", MODEL_PASSES[pass_["pass"]](source, work / "out", options, context)


def _answers(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # only this implementation multiplies float64
    ids = torch.randint(3, 55, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def _cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))


def test_every_family_that_folds_is_walked():
    assert {getattr(transformers, name).config_class.model_type for name in VARIANTS} == set(FOLDS)


@pytest.mark.parametrize(("family", "variant"), _CASES)
def test_a_model_whose_layers_exchanged_factors_answers_as_before_in_every_shape(
    family: str, variant: str, tmp_path: Path
):
    """Nothing is rounded, so the outputs agree to the last digits of a float."""
    source = _save(family, VARIANTS[family][variant], tmp_path / "source")
    header = inspect_model(FolderFiles(source))
    method, context = Scaled(header), PassContext(header=header, work_dir=tmp_path / "work", calibration=_CALIBRATION)
    samples = {"input_ids": torch.randint(3, 55, (8, 24), generator=torch.Generator().manual_seed(2))}
    chosen = linears_of(source)
    pressed = press_blocks(source, tmp_path / "out", method, samples, context, chosen=chosen, recipe="scaled")
    copy_companions(source, tmp_path / "out")
    ours, theirs = _answers(tmp_path / "out"), _answers(source)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    left_out = _LEFT_OUT.get((family, variant), [])
    assert [text.split()[0] for text in pressed.warnings] == left_out
    assert method.scaled, "factors were exchanged somewhere"


# torch warns that it will remove a dtype that transformers uses for the scales.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("family", "variant", "name"), _PRESSED)
@pytest.mark.slow
def test_a_pressed_model_answers_as_its_source_in_every_shape(family: str, variant: str, name: str, tmp_path: Path):
    source = _save(family, VARIANTS[family][variant], tmp_path / "source")
    pass_ = {"pass": "awq", "bits": 8, "group_size": 16} if name == "awq" else {"pass": "smoothquant"}
    out, record = _press(source, tmp_path, pass_)
    assert _cosine(_answers(out), _answers(source)) > 0.998
    before, after = (
        {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
        for folder in (source, out)
    )
    changed = [
        key for key in before if key in after and before[key].dim() == 1 and not torch.equal(before[key], after[key])
    ]
    left_out = _LEFT_OUT.get((family, variant), [])
    assert [text.split()[1] for text in record.warnings] == left_out
    assert not any(name in key for key in changed for name in left_out)


@pytest.mark.slow
def test_a_model_in_which_nothing_folds_is_refused_by_awq_and_smoothed_nowhere(tmp_path: Path):
    says = {"do_layer_norm_before": False, "activation_function": "gelu"}
    source = _save("OPTForCausalLM", says, tmp_path / "source")
    rest = {"ignore": ["lm_head", "re:.*embed.*", "re:.*out_proj"]}
    with pytest.raises(NightpressError, match="fc1 can't take factors") as caught:
        _press(source, tmp_path / "awq", {"pass": "awq", "bits": 8, "group_size": 16, **rest})
    assert caught.value.code is ErrorCode.UNSUPPORTED_ARCHITECTURE
    assert "gptq" in str(caught.value.hint)
    _, record = _press(source, tmp_path / "smooth", {"pass": "smoothquant", **rest})
    assert len(record.warnings) == 3
    assert all("(2 blocks)" in text for text in record.warnings)
