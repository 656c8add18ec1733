"""Which tensors of a model are the weights of linear layers, and what their layout allows."""

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import CONV1D, ModelHeader, TensorInfo

#: Matrices that are looked up, not multiplied.
_NOT_LINEAR = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})
#: They choose experts; a router's few weights decide everything, and no format carries them rounded.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
#: Heads over the vocabulary, most of which are tied to the embeddings, so that they stay as those are, whether or not the file holds a copy;
#: and a decoder's head over classes, a few rows that decide every answer.
_OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "vocab_projector", "generator_lm_head", "decoder", "score"})
#: What families call the table of token embeddings.
_TOKEN_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "word_embeddings", "wte"})


class Divisor(NamedTuple):
    """What the inputs of each layer must be divisible by, and the setting that says so."""

    value: int
    setting: str


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module or node name is meant by one of the patterns: equal, a `*` glob, or `re:` and a full match."""
    return any(
        re.fullmatch(pattern[3:], name) is not None if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def is_linear_weight(tensor: TensorInfo, ignore: Iterable[str]) -> bool:
    """Whether a pass over linear layers takes this tensor: a matrix called `….weight` that is no embedding, norm or ignored module."""
    module = tensor.name.removesuffix(".weight")
    if (
        module == tensor.name
        or len(tensor.shape) != 2
        or 0 in tensor.shape
        or tensor.dtype not in {"F64", "F32", "F16", "BF16"}
    ):
        return False
    leaf = module.rsplit(".", 1)[-1].lower()
    if "embed" in module.lower() or "norm" in leaf or leaf in _NOT_LINEAR | _ROUTERS | _OUTPUT_HEADS:
        return False
    return not matches(module, ignore)


def module_of(tensor: TensorInfo) -> str:
    return tensor.name.removesuffix(".weight")


def is_expert(name: str) -> bool:
    """Whether a tensor or module belongs to one of a mixture's experts; one that every token goes through is none."""
    return re.search(r"\.experts\.\d+\.", name) is not None


def is_token_embedding(tensor: TensorInfo) -> bool:
    """Whether it is the matrix that tokens are looked up in."""
    return is_table(module_of(tensor)) and len(tensor.shape) == 2 and tensor.dtype in {"F64", "F32", "F16", "BF16"}


def is_table(module: str) -> bool:
    """Whether a module of this name looks tokens up."""
    return module.rsplit(".", 1)[-1] in _TOKEN_EMBEDDINGS


def invalid(message: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_RECIPE, message, hint=hint)


def check_layout(
    name: str, weights: Sequence[TensorInfo], header: ModelHeader, divisor: Divisor | None, *, turns: bool
) -> None:
    """Groups and patterns run along a layer's inputs, which must divide.

    Inputs must be the weight's columns, but for a pass that turns the others. Raises NightpressError(invalid_recipe).
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
