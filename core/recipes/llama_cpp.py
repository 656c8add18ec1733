"""Which models llama.cpp computes in the same way as transformers. No torch here.

llama.cpp has a fixed graph for each architecture; only the keys of a GGUF file vary it. A config key that changes what transformers
computes, and that has no GGUF key, must have the value for which the graph was written. Taken from llama.cpp's `src/models/*.cpp`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.llama_converter import CONVERTED, NOT_CONVERTED, by_converter, converter_differences

#: Values of `model_type` for which llama.cpp's graph computes the same as transformers.
DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})
ENCODERS = frozenset({"bert"})
POOLING = frozenset({"mean", "cls", "lasttoken"})  #: pooling modes of embedders

#: ggml's GELU is the tanh approximation. Its difference from the exact function is smaller than float16's rounding error.
_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python")
#: Decoders whose attention has no window in llama.cpp.
_SEES_ALL = frozenset({"mistral", "qwen2", "qwen3"})
_SILUS = ("silu", "swish")
_ROPES = {
    "llama": ("default", "linear", "llama3"),  # frequencies of "llama3" are a tensor, which only the llama graph reads
    "mistral": ("default", "linear", "llama3"),
}
#: model_type → config key → allowed values. None: the key is missing.
_EXPECTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": (None, *_SILUS)},
    "mistral": {"hidden_act": (None, *_SILUS)},
    "qwen2": {"hidden_act": (None, *_SILUS)},
    "qwen3": {"hidden_act": (None, *_SILUS), "attention_bias": (None, False)},
    # For Gemma, transformers computes gelu as the tanh approximation, and ignores hidden_activation.
    "gemma": {
        "hidden_act": (None, "gelu", "gelu_pytorch_tanh"),
        "attention_bias": (None, False),
        "tie_word_embeddings": (None, True),
    },
    "bert": {
        "hidden_act": (None, *_GELUS),
        "position_embedding_type": (None, "absolute"),
        "is_decoder": (None, False),
        "add_cross_attention": (None, False),
    },
}


def why_not_llama_cpp(header: ModelHeader) -> str | None:
    """Return why a GGUF file of this model would not load, or would give other outputs than the model; None: neither."""
    kind = header.model_type
    if header.task == "causal-lm":
        if by_converter(header):
            return next(converter_differences(header), None)
        if kind in NOT_CONVERTED:
            return NOT_CONVERTED[kind]
        if kind not in DECODERS:
            return f"of decoders it takes {', '.join(sorted(DECODERS | CONVERTED.keys()))}, and this is a {kind}"
    elif kind not in ENCODERS or header.task != "embedding":
        return f"llama.cpp runs language models and BERT embedders, and this is a {header.architecture}"
    return next(_differences(kind, header), None)


def _differences(kind: str, header: ModelHeader) -> Iterator[str]:
    config = header.config
    for key, values in _EXPECTED[kind].items():
        if config.get(key) not in values:
            expected = " or ".join(repr(value) for value in values if value is not None)
            yield f"llama.cpp computes a {kind} with `{key}` {expected}, and config.json says {config[key]!r}"
    if kind in ENCODERS:
        if header.pooling not in POOLING:
            yield f"llama.cpp pools by {', '.join(sorted(POOLING))}, and this model by {header.pooling}"
        if config.get("type_vocab_size") == 0:
            yield "llama.cpp's BERT has types of tokens, and config.json says `type_vocab_size` 0"
        return
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turning = rope.get("rope_type") or rope.get("type") or "default"
    if turning not in _ROPES.get(kind, ("default", "linear")):
        yield f"its rotary positions are scaled by {turning!r}"
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        yield f"llama.cpp turns whole heads, and config.json says `partial_rotary_factor` {share}"
    if kind in _SEES_ALL and (window := sliding_window(kind, config)) is not None:
        yield f"llama.cpp's {kind} sees the whole text, and config.json says `sliding_window` {window}, less than its positions"
    width, heads = config.get("head_dim"), config.get("num_attention_heads")
    if kind == "qwen2" and width and heads and width * heads != config.get("hidden_size"):
        yield "llama.cpp's qwen2 has heads that share the hidden size between them"


def sliding_window(kind: str, config: Mapping[str, Any]) -> int | None:
    """Return the sliding window in tokens, if a layer has one that is shorter than the model's positions; else None."""
    window = config.get("sliding_window")
    if kind == "mistral" and "sliding_window" not in config:
        window = 4096  # transformers' default for Mistral
    if not window:
        return None
    if kind.startswith("qwen"):
        kinds = config.get("layer_types")
        last = config.get("max_window_layers", 28) >= config.get("num_hidden_layers", 0)
        if not config.get("use_sliding_window") or (last if kinds is None else "sliding_attention" not in kinds):
            return None
    return int(window) if window < (config.get("max_position_embeddings") or window + 1) else None
