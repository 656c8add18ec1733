"""Finds the weights of linear layers among a model's tensors, and checks their layout."""

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import CONV1D, ModelHeader, TensorInfo

#: Lookup tables: matrices that are not multiplied.
_NOT_LINEAR = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})
#: Routers, which choose a token's experts. Their few weights have a large effect, and no format carries them rounded.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
#: Heads over the vocabulary: most are tied to the embeddings, so they stay in float like them, even if the file holds a copy. `score` is a
#: decoder's head over classes: its few rows decide every output.
_OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "vocab_projector", "generator_lm_head", "decoder", "score"})
#: What a model sees or hears with, beside the text that it is pressed for. A model that only sees has its blocks elsewhere.
_TOWERS = re.compile(
    r"(^|\.)(vision_tower|visual|vision_encoder|vision_backbone|vision_embedder|audio_tower|audio_encoder|speech_encoder|image_encoder"
    r"|multi_modal_projector|mm_projector|modality_projection|connector|aligner|abstractor|qformer|resampler)\."
    r"|.\.(vision_model|audio_model|image_model|vit)\."
)
#: Names of heads and tables that are linear layers where they stand in a block.
_HEADS_OUTSIDE = frozenset({"w", "head", "output", "output_projection", "fc", "dist_head", "final_layer"})
_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
#: The families' names of the table of token embeddings.
_TOKEN_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "word_embeddings", "wte"})


class Divisor(NamedTuple):
    """A number that must divide the number of inputs of each layer, and the option that requires it."""

    value: int
    setting: str


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a module's or node's name matches a pattern: an equal name, a `*` glob, or `re:` and a full regular expression."""
    return any(
        re.fullmatch(pattern[3:], name) is not None if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def is_linear_weight(tensor: TensorInfo, ignore: Iterable[str]) -> bool:
    """Return whether the tensor is the weight of a linear layer that passes change.

    It is a float matrix called `….weight`, and no embedding, norm, router, output head or ignored module.
    """
    module = tensor.name.removesuffix(".weight")
    if (
        module == tensor.name
        or len(tensor.shape) != 2
        or 0 in tensor.shape
        or tensor.dtype not in {"F64", "F32", "F16", "BF16"}
    ):
        return False
    leaf = module.rsplit(".", 1)[-1].lower()
    if "embed" in module.lower() or leaf.endswith("_emb") or "norm" in leaf or leaf in _NOT_LINEAR | _OUTPUT_HEADS:
        return False
    if _TOWERS.search(module) or is_router(module):
        return False
    if leaf in _HEADS_OUTSIDE and not _IN_A_BLOCK.search(module):
        return False
    return not matches(module, ignore)


def module_of(tensor: TensorInfo) -> str:
    return tensor.name.removesuffix(".weight")


def is_router(module: str) -> bool:
    """Return whether a module chooses a token's experts, or belongs to one that does."""
    return not _ROUTERS.isdisjoint(module.lower().split("."))


def is_expert(name: str) -> bool:
    """Return whether a tensor or module belongs to a mixture's routed expert. A shared expert, which every token passes, does not count."""
    return re.search(r"\.experts\.\d+\.", name) is not None


def is_token_embedding(tensor: TensorInfo) -> bool:
    """Return whether the tensor is the float matrix of token embeddings."""
    return is_table(module_of(tensor)) and len(tensor.shape) == 2 and tensor.dtype in {"F64", "F32", "F16", "BF16"}


def is_table(module: str) -> bool:
    """Return whether a module of this name is the table of token embeddings."""
    return module.rsplit(".", 1)[-1] in _TOKEN_EMBEDDINGS


def invalid(message: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_RECIPE, message, hint=hint)


def check_layout(
    name: str, weights: Sequence[TensorInfo], header: ModelHeader, divisor: Divisor | None, *, turns: bool
) -> None:
    """Check that the divisor divides the number of inputs of each weight: groups and patterns run along a layer's inputs.

    turns: whether the pass transposes weights stored as [in, out]; else such models are refused. Raises NightpressError(invalid_recipe).
    """
    if divisor is None:
        return
    if header.model_type in CONV1D and not turns:
        raise invalid(
            f"`{name}` can't take a {header.model_type} with this {divisor.setting}: its linear layers are Conv1D with weights laid out [in, out].",
            f"Use `{name}` without it, or `sparsegpt` or `wanda`.",
        )
    inputs = 0 if header.model_type in CONV1D else 1
    widths = {tensor.shape[inputs]: tensor.name for tensor in weights}
    ragged = {width: tensor for width, tensor in widths.items() if width % divisor.value}
    if ragged:
        width, tensor = next(iter(ragged.items()))
        common = math.gcd(*widths)
        fitting = [size for size in (256, 128, 64, 32, 16) if common % size == 0]
        advice = f"Use a group_size of {' or '.join(map(str, fitting))}" if fitting else "Use `group_size: null`"
        raise invalid(
            f"`{name}`: {tensor} has {width} inputs, which {divisor.setting} {divisor.value} does not divide.",
            f"{advice if divisor.setting == 'group_size' else 'Use another pattern'}, or name the module in `ignore`.",
        )
