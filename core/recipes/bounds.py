"""Upper bounds of the sizes in a config. They are far above any real model. Larger sizes would only make a reader run out of memory."""

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
#: Keys that are sizes only at the top level of the config: inside a nested config they may have another meaning.
_AT_THE_TOP = {
    **dict.fromkeys(("dim", "hidden_dim", "word_embed_proj_dim"), 1 << 24),
    "num_experts_per_tok": 1 << 20,
    "num_channels": 1 << 10,
}
_MAY_BE_ZERO = frozenset({"type_vocab_size"})  # DeBERTa has no token types
#: Key that holds no size → its type, and the type's name for errors.
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("rope_parameters", "rope_scaling", "id2label", "label2id"), (dict, "an object")),
    **dict.fromkeys(("sliding_window", "max_window_layers"), (int, "a whole number")),
    "layer_types": (list, "a list"),
    "rope_type": (str, "a text"),
}


def kind_flaw(key: str, value: Any) -> str | None:
    """Return why the value has the wrong type for the key; None: the type is right. Not for elements of a list under that key."""
    if value is None or key not in _KINDS or isinstance(value, _KINDS[key][0]):
        return None
    return f"`{key}` is {str(value)[:40]}, not {_KINDS[key][1]}"


def size_flaw(key: str, value: Any, *, at_the_top: bool = False) -> str | None:
    """Return why the value is no valid size for the key; None: it is valid, or the key holds no size.

    value: a size, a list of sizes, or an element of such a list. at_the_top: whether the key is at the top level of the config.
    """
    bound = _BOUNDS.get(key) or (_AT_THE_TOP.get(key) if at_the_top else None)
    if value is None or bound is None:
        return None
    least = 0 if key in _MAY_BE_ZERO else 1
    for size in value if isinstance(value, list) else [value]:
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= bound:
            return f"`{key}` is {str(size)[:40]}, not a number from {least} to {bound}"
    return None
