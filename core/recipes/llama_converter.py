"""The decoders whose GGUF files llama.cpp's own converter writes, and why it doesn't write others that it names. No torch here.

For each family in CONVERTED a tiny model with random weights was converted, and llama.cpp answered as transformers does
(tests/integration/test_gguf_converted.py). A config key that llama.cpp's graph doesn't know must have the value that the graph was written for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nightpress.core.recipes.header import ModelHeader


@dataclass(frozen=True)
class Converted:
    """What llama.cpp's graph of a family was written for."""

    activations: tuple[
        str, ...
    ] = ()  #: values of the key for the activation function; none: config.json has no such key
    #: Every so manieth layer sees the whole text, and the others a window. None: the file says what each layer sees.
    period: int | None = None
    keys: Mapping[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  #: config key → allowed values. None: the key is missing.


_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python")

CONVERTED: Mapping[str, Converted] = {
    "arcee": Converted(("relu2",)),
    "bloom": Converted(),
    "cohere": Converted(("silu",)),
    "cohere2": Converted(("silu",), period=4),
    "exaone4": Converted(("silu",), keys={"sliding_window": (None,)}),
    "glm": Converted(("silu",)),
    "glm4": Converted(("silu",)),
    "gpt2": Converted(
        _GELUS,
        keys={
            "scale_attn_weights": (None, True),
            "scale_attn_by_inverse_layer_idx": (None, False),
            "add_cross_attention": (None, False),
        },
    ),
    "gpt_bigcode": Converted(("gelu_pytorch_tanh",)),
    "gpt_neox": Converted(_GELUS, keys={"attention_bias": (None, True)}),
    "granite": Converted(("silu",)),
    "granitemoe": Converted(("silu",)),
    "hunyuan_v1_dense": Converted(("silu",)),
    "mixtral": Converted(("silu",)),
    "olmo": Converted(("silu",)),
    "olmo2": Converted(("silu",)),
}

#: Families that the converter names, and that were tried in the same way without success → what came of it.
NOT_CONVERTED: Mapping[str, str] = {
    "afmoe": "llama.cpp's answers for afmoe differed from those of transformers by 4%",
    "apertus": "llama.cpp's graph has no place for the scaled rotary positions that every Apertus has",
    "bamba": "llama.cpp's answers for bamba differed from those of transformers by 1%",
    "bitnet": "llama.cpp's converter rounds a bitnet's weights to three values",
    "ernie4_5": "for an ernie4_5 llama.cpp's converter reads only tokenizers of SentencePiece",
    "nemotron": "for a nemotron llama.cpp's converter reads only tokenizers of SentencePiece",
}


def by_converter(header: ModelHeader) -> bool:
    """Return whether llama.cpp's own converter writes the GGUF file of this model. It reads floats alone."""
    return header.task == "causal-lm" and header.model_type in CONVERTED


def converter_differences(header: ModelHeader) -> Iterator[str]:
    """Yield what transformers computes for this model, and llama.cpp's graph of its family doesn't."""
    kind, config, family = header.model_type, header.config, CONVERTED[header.model_type]
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        if (given := config.get(key)) is not None and given not in family.activations:
            yield f"llama.cpp computes a {kind} with `{key}` {' or '.join(family.activations)}, and config.json says {given!r}"
    for key, values in family.keys.items():
        if config.get(key) not in values:
            expected = " or ".join("none" if value is None else repr(value) for value in values)
            yield f"llama.cpp computes a {kind} with `{key}` {expected}, and config.json says {config[key]!r}"
    layers = config.get("layer_types")
    if family.period and layers is not None:
        places = [(at + 1) % family.period == 0 for at in range(len(layers))]
        if [layer == "full_attention" for layer in layers] != places:
            yield f"in llama.cpp every layer of a {kind} but each {family.period}th has a window, and config.json names other `layer_types`"
    width = config.get("n_inner")
    if kind == "gpt2" and width and width != 4 * config.get("n_embd", 768):
        yield (
            "llama.cpp's converter writes feed-forward layers of four times `n_embd`, and config.json says `n_inner` "
            + str(width)
        )
    yield from _rotary_differences(config)


def _rotary_differences(config: Mapping[str, Any]) -> Iterator[str]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        turning = part.get("rope_type") or part.get("type") or "default"
        if turning != "default":
            yield f"its rotary positions are scaled by {turning!r}"


def older_keys(header: ModelHeader) -> dict[str, Any]:
    """Return config keys that the converter reads and that transformers 5 drops or renames when it reads config.json."""
    config = header.config
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    match header.model_type:
        case "gpt2":
            return {"n_ctx": config.get("n_positions") or config.get("n_ctx") or 1024}
        case "gpt_neox":
            return {"rotary_pct": 0.25 if share is None else share}
        case "cohere2":
            return {"rotary_pct": 1.0 if share is None else share}
    return {}
