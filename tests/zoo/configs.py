"""Shrinks the default config of any family in transformers to a model of about a hundred thousand weights."""

import re
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WORDS = 128  #: size of the vocabulary

#: A pattern of a key → the key's small value. The first that fits counts. Larger values than the default are never set.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size|vocab_size.*|.*vocabulary.*", WORDS),
    (r"qk_rope_head_dim|rotary_dim|qk_nope_head_dim", 8),
    (r"qk_head_dim|.*head_dim|.*head_size|d_kv|kv_channels|d_head|mamba_d_head|mamba_headdim", 16),
    (r".*(_rank)", 16),
    (r"(num|n|moe_num|num_local|n_routed|moe)_?(routed_|local_)?experts", 4),
    (r"num_experts_per_tok.*|moe_topk|top_k_experts|moe_k|experts_per_tok|num_experts_per_token|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r".*(moe|expert).*(intermediate|ffn|inner|hidden).*size", 64),
    (r".*num_key_value_heads|num_kv_heads|multi_query_group_num|num_query_groups", 2),
    (r".*(heads|n_head|num_head)", 4),
    (
        r".*(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_blocks|_depth|num_encoder_layers)",
        2,
    ),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|n_inner|feed_forward_size|mlp_dim|ffn_size|hidden_dim|dim_ff).*",
        128,
    ),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|embedding_dim|^dim|lru_width|d_inner|word_embed_proj_dim|projection_dim|pooler_output_size|output_dim|out_dim)",
        64,
    ),
    (
        r".*(position_embeddings|n_positions|n_ctx|max_seq_len.*|model_max_length|max_length|positions|context_length)",
        128,
    ),
    (r".*(window|window_size|attention_window|chunk_size|block_size|local_attention)", 16),
    (r"image_size|pretrain_image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"mamba_d_state|state_size|ssm_state_size", 16),
    (r"num_mel_bins", 80),
)
#: What makes a part of a config what it is, by the config's `model_type` and the part's key.
_PARTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("encoder-decoder", "decoder"): {"is_decoder": True, "add_cross_attention": True},
}
#: What the rules don't reach, by `model_type`.
_MAMBA = {"mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128}
_OWN: Mapping[str, Mapping[str, Any]] = {
    **{kind: {"qk_head_dim": 16, "v_head_dim": 16, "head_dim": 8} for kind in ("axk1", "deepseek_v3", "youtu")},
    "bamba": _MAMBA,
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 8},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]},
    "focalnet": {"embed_dim": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "levit": {"hidden_sizes": [32, 64, 96], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1]},
    "mobilevit": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 64]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [64, 64, 64, 64], "depths": [1, 1, 1, 1], "groups_width": 16},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    **{kind: {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]} for kind in ("convnext", "convnextv2")},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "esm": {"vocab_size": WORDS, "pad_token_id": 0, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2},
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 64, "ffn_hidden_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "expand": 2},
    **{
        f"{kind}_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
        for kind in ("glm4v", "glm_ocr", "paddleocr_vl", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl")
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        }
    },
    "perceiver": {
        "d_latents": 64,
        "d_model": 64,
        "num_latents": 16,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "poolformer": {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1]},
    "pvt": {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]},
    "pvt_v2": {
        "hidden_sizes": [8, 16, 40, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 5, 8],
        "image_size": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    **{
        kind: {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 32}
        for kind in ("donut-swin", "swin", "swinv2")
    },
    "reformer": {"is_decoder": True},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(model_type: str) -> Any:
    """Return a small config of this type. Raises whatever the config's class raises if the small values contradict each other."""
    return shrunk(CONFIG_MAPPING[model_type])


def shrunk(config_class: Any, **given: Any) -> Any:
    """Return a config of this class with small values. given: values that are fixed."""
    default = config_class()
    plain = {key: value for key, value in vars(default).items() if not key.startswith("_")}
    wanted: dict[str, Any] = {}
    depths = {value for key, value in plain.items() if re.fullmatch(_SIZES[11][0], key) and isinstance(value, int)}
    lists = {
        key: value
        for key, value in plain.items()
        if isinstance(value, list | tuple) and len(value) in depths and len(value) > 2
    }
    picked = _varied(lists)
    for key, value in plain.items():
        if key in default.sub_configs:
            sub = type(value) if value is not None else default.sub_configs[key]
            if hasattr(sub, "model_type") and hasattr(sub, "from_dict"):
                wanted[key] = shrunk(sub, **_PARTS.get((config_class.model_type, key), {}))
        elif key in lists:
            wanted[key] = [value[at] for at in picked]
        elif (small := _small(key, value)) is not None:
            wanted[key] = small
    if lists:
        for key, value in plain.items():
            if re.fullmatch(_SIZES[11][0], key) and isinstance(value, int) and value == len(next(iter(lists.values()))):
                wanted[key] = len(picked)
    if "num_key_value_heads" in wanted and plain.get("num_key_value_heads") == plain.get("num_attention_heads"):
        wanted["num_key_value_heads"] = wanted.get("num_attention_heads", 4)
    wanted |= _OWN.get(config_class.model_type, {}) | given
    return config_class(**wanted)


def _varied(lists: Mapping[str, Any]) -> list[int]:
    """Return indices of two to four blocks that differ in what the lists say of them."""
    if not lists:
        return []
    columns = list(zip(*(map(str, value) for value in lists.values()), strict=False))
    first = sorted({column: at for at, column in reversed(list(enumerate(columns)))}.values())[:4]
    return first if len(first) > 1 else [0, 1]


def _small(key: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return None
    if key.endswith(("_token_id", "_token_index", "_id")) or key == "image_token_id":
        return _token(key, value)
    if not isinstance(value, int):
        return None
    for pattern, small in _SIZES:
        if re.fullmatch(pattern, key):
            return min(value, small) if value > 0 else None
    return None


def _token(key: str, value: Any) -> Any:
    known = {"pad": 0, "bos": 1, "eos": 2}
    if isinstance(value, list):
        return [2] if value else None
    if not isinstance(value, int) or value < 100:
        return None
    return known.get(key.split("_")[0], 100 + sum(map(ord, key)) % 20)
