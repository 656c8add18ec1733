"""Bounds of what a config may say. No real model comes near them; beyond, a reader would only allocate until it dies."""

from typing import Any

_BOUNDS = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "d_kv", "head_dim"), 1 << 18),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "vocab_size"), 1 << 24),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 4096
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 1 << 14),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "type_vocab_size"), 1 << 30),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_labels"), 1 << 20),
}
#: Names that a part of a model may use for something else: they are sizes where the whole model's config has them.
_AT_THE_TOP = {
    **dict.fromkeys(("dim", "hidden_dim", "word_embed_proj_dim"), 1 << 24),
    "num_experts_per_tok": 1 << 20,
    "num_channels": 1 << 10,
}
_MAY_BE_ZERO = frozenset({"type_vocab_size"})  # DeBERTa has no types of tokens
#: What is no size, and what it is instead.
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("rope_parameters", "rope_scaling", "id2label", "label2id"), (dict, "an object")),
    **dict.fromkeys(("sliding_window", "max_window_layers"), (int, "a whole number")),
    "layer_types": (list, "a list"),
    "rope_type": (str, "a text"),
}


def kind_flaw(key: str, value: Any) -> str | None:
    """Why the key of an object can't hold this, which is of another kind; None: it can. Not for the elements of a list under that key."""
    if value is None or key not in _KINDS or isinstance(value, _KINDS[key][0]):
        return None
    return f"`{key}` is {str(value)[:40]}, not {_KINDS[key][1]}"


def size_flaw(key: str, value: Any, *, at_the_top: bool = False) -> str | None:
    """Why this is no size for the key; None: it is, or the key holds no size. `value` may be a list of sizes or an element of one."""
    bound = _BOUNDS.get(key) or (_AT_THE_TOP.get(key) if at_the_top else None)
    if value is None or bound is None:
        return None
    least = 0 if key in _MAY_BE_ZERO else 1
    for size in value if isinstance(value, list) else [value]:
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= bound:
            return f"`{key}` is {str(size)[:40]}, not a number from {least} to {bound}"
    return None
