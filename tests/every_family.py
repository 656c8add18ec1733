"""A tiny model of every family that a plan accepts, with any of the heads that change how it is stored."""

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

_WORDS = 96
_IDS = {"vocab_size": _WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, **_IDS}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}
_GPT = {**_IDS, "n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 64}

#: The class and its config, by the family's `model_type`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _WIDE),
    "roberta": ("RobertaForMaskedLM", _WIDE),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 128, "n_heads": 4, "n_layers": 2, "hidden_dim": 256, **_IDS}),
    "mpnet": ("MPNetForMaskedLM", _WIDE),
    "xlm-roberta": ("XLMRobertaForMaskedLM", _WIDE),
    "electra": ("ElectraForMaskedLM", {**_WIDE, "embedding_size": 128}),
    "albert": ("AlbertForMaskedLM", {**_WIDE, "embedding_size": 128}),
    "camembert": ("CamembertForMaskedLM", _WIDE),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {**_WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**_WIDE, "cls_token_id": 3, "sep_token_id": 4, "local_attention": 8},
    ),
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", _GROUPED),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", _GEMMA),
    "phi": ("PhiForCausalLM", _GROUPED),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", _WIDE),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _GPT),
    "opt": ("OPTForCausalLM", {**_WIDE, "ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 64}),
    "falcon": ("FalconForCausalLM", _WIDE),
    "starcoder2": ("Starcoder2ForCausalLM", _GROUPED),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_EXPERTS, "moe_intermediate_size": 128, "head_dim": 16}),
    "olmoe": ("OlmoeForCausalLM", _EXPERTS),
    "t5": (
        "T5ForConditionalGeneration",
        {**_IDS, "d_model": 128, "d_kv": 32, "num_heads": 4, "num_layers": 2, "d_ff": 256, "decoder_start_token_id": 0},
    ),
    "vit": (
        "ViTForImageClassification",
        {key: value for key, value in _WIDE.items() if key not in _IDS} | {"image_size": 32, "patch_size": 8},
    ),
}


def save_family(family: str, folder: Path, *, class_name: str | None = None, **changes: Any) -> Path:
    """Save the family's model with random weights and a tokenizer of single letters.

    Its norms and biases are random too: in a new model they are ones and zeros, so that an error in them would not show.
    """
    usual, config = FAMILIES[family]
    model_class = getattr(transformers, class_name or usual)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and family != "t5":  # T5's initial weights are large already
                parameter.mul_(4)
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    letters = {token: at for at, token in enumerate(["[PAD]", "[BOS]", "</s>", "[UNK]", *string.ascii_letters])}
    tokenizer = Tokenizer(models.WordLevel(letters, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "eos_token": "</s>"}))
    return folder


def family_answers(class_name: str, folder: Path) -> torch.Tensor:
    """The first output of the model that transformers loads from a folder, for three random texts or images."""
    model = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (3, 12), generator=random)
    inputs = (
        {"pixel_values": torch.randn(3, 3, 32, 32, generator=random)} if "ViT" in class_name else {"input_ids": ids}
    )
    if class_name.startswith("T5"):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        out: torch.Tensor = model(**inputs)[0]
    return out
