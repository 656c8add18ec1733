"""How transformers loads a folder with quantized weights: as codes, dequantized to floats while it loads, or not at all. No torch here."""

from collections.abc import Collection, Iterable, Mapping

from nightpress.core.recipes.classes import is_taken_apart
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import is_expert, is_table, module_of
from nightpress.core.recipes.schemes import Scheme

#: Families whose modules have other names in transformers than in their files, or whose code reads weights that packed modules lack.
_OTHER_NAMES = frozenset({"axk2", "deepseek_v4", "hy_v3", "laguna", "nemotron_h", "t5", "vit"})
#: Families whose `_init_weights` reads the weight of every linear module before the files are read. A packed module has none.
_READ_BEFORE_LOADING = frozenset({"falcon", "gpt_bigcode", "modernbert", "modernvbert"})
#: Families that transformers can't load with a quantization_config, although it loads them in float: `model_type` → why.
#: Of some, classes.py also names layers that are taken apart. A recipe could ignore those, and the rest still would not load: tried with
#: `hrm_text` and transformers 5.23.
_NEVER = {
    **dict.fromkeys(
        ("llama4", "llama4_text"),
        "in a quantized model transformers looks for each expert's own weights, and the files hold those of all experts together",
    ),
    **dict.fromkeys(
        ("bailing_hybrid", "kimi_linear", "olmo_hybrid"),
        "transformers merges its convolutions while it loads it, and in a quantized model finds none of them",
    ),
    "ibert": "its linear layers are of its own kind, which read no codes but their own",
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers", "hrm_text", "inkling_mm_model"),
        "transformers splits its merged layers while it loads it, and can't split packed ones",
    ),
}
_WORD = 32  #: bits of the integers that codes are packed into


def become_floats(model_type: str, schemes: Mapping[str, Scheme]) -> bool:
    """Return whether the config must tell transformers to dequantize the codes while it loads them. schemes: module → scheme.

    With packed weights, transformers prepares modules without packed zero points (compressed-tensors up to 0.20), and then refuses the
    files. It can't load packed embeddings, and it unpacks fp4 to bfloat16 for every model's dtype. Dequantizing avoids all of these, and
    the faults of the families above. It works with a single scheme only. vLLM does not read the key. But a dequantized model does not round
    its inputs. So fp4 with rounded inputs stays in codes; who loads them in another dtype than bfloat16 unpacks them first.
    """
    packed = any(scheme.format == "pack-quantized" for scheme in schemes.values())
    return (
        model_type in _OTHER_NAMES
        or (packed and model_type in _READ_BEFORE_LOADING)
        or any(scheme.is_fp4 and scheme.activations is None for scheme in schemes.values())
        or any(not scheme.symmetric for scheme in schemes.values())
        or any(is_table(name) for name in schemes)
    )


def why_unreadable(header: ModelHeader, schemes: Mapping[TensorInfo, Collection[Scheme]]) -> tuple[str, str] | None:
    """Return (why transformers could not load the result, what to do); None: it can load it.

    schemes: each weight that a pass takes → the schemes that the pass may choose from.
    """
    if (never := _NEVER.get(header.model_type)) is not None:
        return never, "Use `wanda` or `sparsegpt`, whose result stays in float."
    if (apart := next((name for name in _names(schemes) if is_taken_apart(header.model_type, name)), None)) is not None:
        return (
            f"transformers divides, joins or turns {apart} while it loads it, and can't do so with codes",
            "Name the layer in `ignore`, or round the graph by `dynamic-int8` or `static-int8`.",
        )
    every = {scheme for some in schemes.values() for scheme in some}
    of_modules = {module_of(tensor): scheme for tensor, some in schemes.items() for scheme in some}
    if any(scheme.is_fp4 and scheme.activations is not None for scheme in every) and (
        header.has_experts or become_floats(header.model_type, of_modules)
    ):
        return (
            f"transformers dequantizes the fp4 weights of a {header.model_type} while it loads them, and then rounds no inputs",
            "Leave `activations` at `none`.",
        )
    if header.has_experts and (refused := _experts(header, schemes, every)) is not None:
        return refused
    if len(every) > 1 and become_floats(header.model_type, of_modules):
        return f"transformers reads one grid alone of a {header.model_type}", "Leave out `overrides` and `budget`."
    for tensor, some in schemes.items():
        for scheme in some:
            if not scheme.symmetric and tensor.shape[0] * scheme.bits <= _WORD:
                return (
                    f"transformers can't read the zero points of {tensor.name}, which has only {tensor.shape[0]} outputs",
                    "Set `symmetric` to true, or name the module in `ignore`.",
                )
    return None


def _names(schemes: Mapping[TensorInfo, object]) -> list[str]:
    return sorted(tensor.name for tensor in schemes)


def _experts(
    header: ModelHeader, schemes: Mapping[TensorInfo, Collection[Scheme]], every: Iterable[Scheme]
) -> tuple[str, str] | None:
    """As `why_unreadable`, for a mixture's experts: transformers merges them while it loads them, by one scheme for all."""
    taken = {scheme for tensor, some in schemes.items() if is_expert(tensor.name) for scheme in some}
    if any(not name.symmetric for name in taken):
        return (
            "transformers passes over the zero points of a mixture's experts",
            "Set `symmetric` to true for this model.",
        )
    if len(taken) > 1:
        return (
            "transformers reads one grid alone for all experts of a mixture",
            "Let all experts have the same bits and groups: `overrides` may name other layers, and leave out `budget`.",
        )
    if any(name.format == "nvfp4-pack-quantized" for name in taken):
        return (
            "transformers passes over what nvfp4's scales are divided by in a mixture's experts",
            "Use `mxfp4` or integers for this model.",
        )
    if any(name.strategy == "block" for name in taken):
        return (
            "transformers multiplies a mixture's experts by a scale a row, and can't by one for 128 × 128",
            "Leave `weights` at `channel` for this model.",
        )
    names = {tensor.name for tensor in schemes}
    left = [
        tensor.name
        for tensor in header.tensors
        if is_expert(tensor.name) and tensor.name.endswith(".weight") and tensor.name not in names
    ]
    if left and (taken or any(scheme.format != "float-quantized" for scheme in every)):
        return (
            f"transformers takes all of a mixture's experts for codes, and {left[0]} stays in float",
            "Let the pass take all experts: change `ignore`.",
        )
    return None
