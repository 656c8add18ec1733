"""What a class of transformers does that its header doesn't show: `python -m tests.zoo` found it, and plans refuse it in advance.

A table of exceptions: what it doesn't name is tried. Each reason says what transformers or a loader does.
"""

from collections.abc import Mapping

from nightpress.core.recipes.header import ModelHeader

OTHER_STATES = "its cache holds other states than keys and values"
_NOT_FOUND = "no loader finds the scales in its attention"
_NOT_ALONE = "its blocks can't be run by themselves, so that no exchange of factors can be proved"
_NO_FOLD = "no layer before its linear layers can take factors: the block would answer otherwise"
_ONE_GRID = "transformers reads one grid alone for all its layers, and the inputs of a mixture's experts stay in float"
_WHOLE_MASK = "its decoder takes no mask but that of a whole text, and a graph caches a part of it"
_ROUTED = "its decoder asks for what its encoder's routers chose, which no graph of an encoder returns"
_COLOURS = "it reads the numbers of colours, and no images"
_NO_CACHE = "it caches nothing, and computes the whole text again for each token"
_WHOLE_TEXT = "with its cache it still reads the whole text, and a graph with a cache gets only the new tokens"
_COMPLEX = "it turns positions as complex numbers, for which the exporter has no operators"
TEXT_ALONE = "a graph would hold its text part alone, without the {} that it is for"
_BY_NUMBER = "its attention finds the tokens that see the whole text by their number, which a traced graph can't decide"

#: Encoder-decoders: a block of the decoder also reads what the encoder answered. Their decoders alone are other classes.
_CROSS_ATTENTION = (
    "BartForConditionalGeneration",
    "BigBirdPegasusForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "BlenderbotSmallForConditionalGeneration",
    "EncoderDecoderModel",
    "FSMTForConditionalGeneration",
    "LEDForConditionalGeneration",
    "LongT5ForConditionalGeneration",
    "M2M100ForConditionalGeneration",
    "MBartForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "MarianMTModel",
    "MvpForConditionalGeneration",
    "NllbMoeForConditionalGeneration",
    "PLBartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "PegasusXForConditionalGeneration",
    "ProphetNetForConditionalGeneration",
    "SeamlessM4TForTextToText",
    "SeamlessM4Tv2ForTextToText",
    "SwitchTransformersForConditionalGeneration",
    "T5ForConditionalGeneration",
    "T5GemmaForConditionalGeneration",
    "UMT5ForConditionalGeneration",
)

#: Pass, export, or `graph` for all exports of graphs → `model_type` or class → why it can't be had.
_WHY_NOT: Mapping[str, Mapping[str, str]] = {
    "kv-cache": {
        **dict.fromkeys(("falcon_h1", "inkling_text", "minimax"), OTHER_STATES),
        **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), OTHER_STATES),
        **dict.fromkeys(("codegen", "gpt_neo", "gptj"), _NOT_FOUND),  # they call the cache `layer_past`
        "mimo_v2_flash": "its attention has a `v_scale` of its own, which a loader would replace by the cache's",
    },
    "awq": {
        **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "xlm"), _NOT_ALONE),
        **dict.fromkeys(_CROSS_ATTENTION, _NOT_ALONE),
        **dict.fromkeys(("canine", "convnext", "convnextv2", "donut-swin", "flaubert", "focalnet"), _NOT_ALONE),
        **dict.fromkeys(("funnel", "mobilevit", "pvt", "pvt_v2", "segformer", "swin", "swinv2"), _NOT_ALONE),
        **dict.fromkeys(
            ("convbert", "deberta", "fnet", "jetmoe", "mra", "neomme", "swiftformer", "xlnet", "yoso"), _NO_FOLD
        ),
    },
    "smoothquant": {
        "swiftformer": _NOT_ALONE,
        **dict.fromkeys(("Glm4vMoeForConditionalGeneration", "Kimi_K25ForConditionalGeneration"), _ONE_GRID),
        **dict.fromkeys(
            ("Qwen3_5MoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"), _ONE_GRID
        ),
    },
    "openvino": {"fnet": "OpenVINO computes its Fourier transforms otherwise, and the answers differ"},
    "layers": {
        "esm": "its head for contacts has weights for the attention of each block",
        "neomme": "transformers wants a layer that sees the whole text in its config, and that may be the one that goes",
        "openai-gpt": "its blocks return other things than hidden states, and can't be compared",
    },
    "graph": {
        "led": _BY_NUMBER,
        **dict.fromkeys(("fsmt", "prophetnet"), _WHOLE_MASK),
        **dict.fromkeys(("rwkv", "xlnet", "xlstm"), OTHER_STATES),
        "openai-gpt": _NO_CACHE,
        **dict.fromkeys(("deepseek_v2", "llama4_text"), _COMPLEX),
        "evolla": TEXT_ALONE.format("proteins"),
        "fuyu": TEXT_ALONE.format("images"),
        "cpmant": _WHOLE_TEXT,
        "mpt": "it cuts its table of distances to the text's length, which a traced graph can't decide",
        "imagegpt": _COLOURS,
        "pp_lcnet": "its classifier gives its answers no name",
        **dict.fromkeys(("nllb-moe", "switch_transformers"), _ROUTED),
        "t5gemma2": "its decoder reads what is cached and what the encoder answered as one text, which a traced graph can't divide",
        "pegasus_x": "its encoder cuts the text into blocks whose number a traced graph would fix",
    },
}
#: `model_type` → why the model can't be run block by block.
_NOT_BY_BLOCKS: Mapping[str, str] = {
    **dict.fromkeys(
        ("inkling2", "inkling2_text", "inkling_mm_model", "kimi_linear", "minimax_m3_vl", "olmo_hybrid"),
        "transformers joins tensors of its files as it loads them",
    ),
    **dict.fromkeys(
        ("gte", "jina_embeddings_v3", "nomic_bert"), "transformers takes tensors of its files apart as it loads them"
    ),
    "mistral_large4": "transformers turns tensors of its files as it loads them",
    "ibert": "its linear layers are of its own kind, and hold more than weights",
    "imagegpt": _COLOURS,
    "perceiver": "its body takes its input by a name of its own, `inputs`",
    "squeezebert": "its blocks are convolutions, without linear layers",
    "t5gemma2": "layers of its decoder read two things in turn, the text and what the encoder answered",
}


def why_not(name: str, header: ModelHeader) -> str | None:
    """Return why a pass, an export or `graph` can't take this model; None: it is tried."""
    known = _WHY_NOT.get(name, {})
    return known.get(header.model_type) or known.get(header.architecture)


def why_not_by_blocks(header: ModelHeader) -> str | None:
    """Return why this model can't be run block by block; None: it is tried."""
    return _NOT_BY_BLOCKS.get(header.model_type)
