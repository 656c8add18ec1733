"""Which models no graph is made of, for ONNX and OpenVINO. No torch here."""

import re
from collections.abc import Iterator

from nightpress.core.recipes.classes import reads_both_ways
from nightpress.core.recipes.exceptions import OTHER_STATES, TEXT_ALONE, why_not
from nightpress.core.recipes.header import ModelHeader

#: Kinds of rotary positions whose frequencies depend on the text's length.
_TURNED_BY_LENGTH = frozenset({"dynamic", "longrope"})
#: Values in a config's `layer_types` for layers whose cache holds keys and values, and nothing else.
_KEYS_AND_VALUES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
#: The weight of a convolution over the text: the cache of such a layer holds the last inputs.
_CONVOLUTION = re.compile(r"(^|[._])s?conv(_?1d)?\.weight$")


def why_no_graph(header: ModelHeader) -> str | None:
    """Return why no graph of the model is made, although the exporter might trace it; None: it is tried."""
    if (why := why_not("graph", header)) is not None:
        return why
    return next(_differences(header), None)


def _differences(header: ModelHeader) -> Iterator[str]:
    if header.kind.senses == "text":
        for part, beside in (("vision_config", "images"), ("audio_config", "sounds")):
            if part in header.config:
                yield TEXT_ALONE.format(beside)
    if header.is_decoder:
        if _is_encoder(header.model_type) and not header.config.get("is_decoder"):
            yield "it caches nothing and sees the whole text, because its config.json doesn't say `is_decoder: true`"
        if caches_other_states(header):
            yield OTHER_STATES
    if (turning := _rope_type(header)) in _TURNED_BY_LENGTH:
        yield f"rotary positions of kind {turning!r} are computed anew for longer texts, which a traced graph can't decide"
    if header.one_text_a_batch:
        yield "its classifier finds a text's end by the padding token, and its config.json names no `pad_token_id`"


def _is_encoder(model_type: str) -> bool:
    """Return whether models of this type read both ways unless their config says otherwise. BERT for generation is not trained on masked words."""
    return reads_both_ways(model_type) or model_type == "bert-generation"


def caches_other_states(header: ModelHeader) -> bool:
    """Return whether a layer of a decoder caches a state or an index, by its kind or by its convolution."""
    kinds = header.text_config.get("layer_types") or ()
    return not _KEYS_AND_VALUES.issuperset(kinds) or any(_CONVOLUTION.search(tensor.name) for tensor in header.tensors)


def _rope_type(header: ModelHeader) -> str:
    """Return the kind of scaling of the rotary positions, as transformers reads it from the config."""
    rope = header.config.get("rope_parameters") or header.config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")
