"""From a recipe and a model's header to a plan: the steps, what they cost, and what speaks against them. Nothing runs here."""

import fnmatch
import math
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from core.errors import ErrorCode, NightpressError
from core.recipes.header import DECODERS, ENCODERS, ModelHeader, TensorInfo
from core.recipes.models import Quality, Recipe
from core.recipes.passes import Awq, DynamicInt8, Gptq, Magnitude, SparseGpt, Wanda, WeightOnly

_RUNTIME_BYTES = (
    600 * 1024**2
)  #: a child with torch and one consumer imported, measured: resident memory before any model
_STREAM_BYTES = 300 * 1024**2  #: row chunks and write buffers of the stream executor
_STREAM_RATE = 0.4e9  #: bytes/s read, rounded and written with fsync on two cores
_FORWARD_RATE = 25e9  #: multiply-adds/s of fp32 on two cores
_IMPORT_S = 6.0  #: start of one consumer process


#: Matrices that are looked up, not multiplied.
_NOT_LINEAR = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})
#: Heads over the vocabulary. Most are tied to the embeddings, so they stay as those are, whether or not the file holds a copy.
_OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "vocab_projector", "generator_lm_head", "decoder"})
#: Families whose linear layers are Conv1D, with weights laid out [in, out].
_CONV1D = frozenset({"gpt2"})
#: Families whose blocks are one block run many times: none can be finished before the last run.
_SHARED_BLOCKS = frozenset({"albert"})


_Calibrated = Gptq | Awq | SparseGpt | Wanda
_Pruning = Magnitude | SparseGpt | Wanda
_Rounding = WeightOnly | Gptq | Awq
_OnLinears = _Rounding | _Pruning


class Step(BaseModel):
    model_config = ConfigDict(frozen=True)

    kind: Literal["pass", "export", "evaluate"]
    name: str
    detail: str


class Estimate(BaseModel):
    """Bytes and seconds, from the header alone."""

    model_config = ConfigDict(frozen=True)

    memory_bytes: int
    disk_bytes: int
    seconds: float
    output_bytes: dict[str, int]  #: by export format


class Plan(BaseModel):
    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    queue: Literal["cpu", "gpu"]
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    estimate: Estimate | None  #: None where no model was named


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
    if "embed" in module.lower() or "norm" in leaf or leaf in _NOT_LINEAR or leaf in _OUTPUT_HEADS:
        return False
    return not matches(module, ignore)


def make_plan(recipe: Recipe, header: ModelHeader | None = None) -> Plan:
    """Check that the passes, exports and model go together, and say what it will take.

    Raises NightpressError: invalid_recipe for a combination that can't work, unsupported_architecture for a model no pass or evaluation here knows.
    """
    _check_order(recipe)
    _check_exports(recipe)
    warnings = list(_warnings(recipe))
    estimate = None
    if header is not None:
        _check_model(recipe, header)
        warnings += _model_warnings(recipe, header)
        estimate = _estimate(recipe, header)
    steps = [Step(kind="pass", name=one.pass_, detail=_describe(one)) for one in recipe.passes]
    steps += [
        Step(kind="export", name=name, detail="saved, then loaded by its consumer in a fresh process")
        for name in recipe.exports
    ]
    steps += [
        Step(
            kind="evaluate",
            name=one.metric,
            detail=f"on {one.data}"
            if isinstance(one, Quality)
            else f"batch {list(one.batch)} × {list(one.length)} tokens",
        )
        for one in recipe.evaluate
    ]
    return Plan(
        recipe=recipe,
        queue="gpu" if recipe.device == "gpu" else "cpu",
        steps=tuple(steps),
        warnings=tuple(warnings),
        estimate=estimate,
    )


def _invalid(message: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_RECIPE, message, hint=hint)


def _check_order(recipe: Recipe) -> None:
    for index, one in enumerate(recipe.passes[:-1]):
        if one.last:
            raise _invalid(
                f"passes.{index + 1}: nothing can follow `{one.pass_}`, because its result is no longer a float model.",
                f"Move `{one.pass_}` to the end, or give the two their own recipes.",
            )


def _check_exports(recipe: Recipe) -> None:
    for one in recipe.passes:
        wrong = [name for name in recipe.exports if name not in one.exports]
        if wrong:
            raise _invalid(
                f"exports: {', '.join(wrong)} can't carry the result of `{one.pass_}`.",
                f"Use {' or '.join(sorted(one.exports))} with it.",
            )
        if recipe.device == "gpu" and "cuda" not in one.runs_on:
            raise _invalid(f"`{one.pass_}` runs on a CPU only.", "Leave `device` at `auto`.")
    if "compressed-tensors" in recipe.exports and not any(isinstance(one, _Rounding) for one in recipe.passes):
        raise _invalid(
            "exports: compressed-tensors needs a quantizing pass.",
            "Add `weight-only` or `gptq`, or export `safetensors`.",
        )


def _warnings(recipe: Recipe) -> Iterable[str]:
    if any(isinstance(one, _Pruning) for one in recipe.passes):
        yield "Unstructured and N:M zeros make a dense model neither smaller nor faster in today's runtimes; the report measures it."
    calibrated = [one.pass_ for one in recipe.passes if one.needs == "calibration"]
    if calibrated and recipe.calibration.data in {one.data for one in recipe.evaluate if isinstance(one, Quality)} - {
        "builtin:prose"
    }:
        yield "The result is measured on the data it was calibrated on: the figures will flatter it."


def _check_model(recipe: Recipe, header: ModelHeader) -> None:
    known = ENCODERS | DECODERS
    if header.model_type not in known or header.task in {"other", "seq2seq"}:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"The model is a {header.architecture or 'model without a named class'} of type {header.model_type!r}, which cannot be evaluated and exported here yet.",
            hint=f"Known types: {', '.join(sorted(known))}.",
            model_type=header.model_type,
        )
    if not header.has_tokenizer:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            "The model has no tokenizer, so nothing can be measured on text.",
            hint="Add tokenizer.json (and tokenizer_config.json) to its folder.",
        )
    takes_linears = [one for one in recipe.passes if isinstance(one, _OnLinears)]
    for one in takes_linears:
        if not any(is_linear_weight(tensor, one.ignore) for tensor in header.tensors):
            raise _invalid(
                f"`{one.pass_}` would change nothing: `ignore` leaves no linear weight of this model.",
                "Narrow `ignore`.",
            )
        _check_layout(one, header)
        if isinstance(one, Awq) and header.model_type not in one.model_types:
            raise _invalid(
                f"`awq` can't take a {header.model_type}: its norms can't make up for scaled inputs.",
                f"Use `gptq`; `awq` takes {', '.join(sorted(one.model_types))}.",
            )
        if header.model_type in _SHARED_BLOCKS and isinstance(one, _Calibrated):
            raise _invalid(
                f"`{one.pass_}` can't take a {header.model_type}: its blocks share their weights.",
                "Use `weight-only` or `magnitude`.",
            )
    if header.is_decoder and any(isinstance(one, DynamicInt8) for one in recipe.passes):
        raise _invalid(
            "`dynamic-int8` takes encoders; a decoder exported so would run without its key/value cache.",
            "Use `weight-only` for this model.",
        )
    wrong = [name for name in recipe.exports if header.is_decoder and name in {"onnx", "openvino"}]
    if wrong:
        raise _invalid(
            f"exports: {', '.join(wrong)} of a decoder is not offered.", "Use compressed-tensors or safetensors."
        )
    if (
        any(isinstance(one, Quality) and one.metric == "perplexity" for one in recipe.evaluate)
        and not header.is_decoder
    ):
        raise _invalid("evaluate: perplexity needs a causal language model.", "Use `auto` or `fidelity`.")
    if (
        any(isinstance(one, Quality) and one.metric == "accuracy" for one in recipe.evaluate)
        and header.task != "classification"
    ):
        raise _invalid("evaluate: accuracy needs a classifier.", "Use `auto` or `fidelity`.")


def _check_layout(one: _OnLinears, header: ModelHeader) -> None:
    """Groups and patterns run along a layer's inputs: they must be the weight's columns, and divide them."""
    divisor, setting = 1, ""
    if isinstance(one, _Rounding) and one.group_size is not None:
        divisor, setting = one.group_size, "group_size"
    elif isinstance(one, Gptq | _Pruning) and one.pattern != "unstructured":
        divisor, setting = int(one.pattern.split(":")[1]), "pattern"
    if header.model_type in _CONV1D and (isinstance(one, _Rounding | _Calibrated) or setting):
        raise _invalid(
            f"`{one.pass_}` can't take a {header.model_type}: its linear layers are Conv1D with weights laid out [in, out], which no loader of the result reads.",
            "Use `magnitude` without a pattern, or another model.",
        )
    widths = {tensor.shape[1]: tensor.name for tensor in header.tensors if is_linear_weight(tensor, one.ignore)}
    ragged = {width: name for width, name in widths.items() if width % divisor}
    if ragged:
        width, name = next(iter(ragged.items()))
        common = math.gcd(*widths)
        fitting = [size for size in (256, 128, 64, 32, 16) if common % size == 0]
        advice = f"Use a group_size of {' or '.join(map(str, fitting))}" if fitting else "Use `group_size: null`"
        raise _invalid(
            f"`{one.pass_}`: {name} has {width} inputs, which {setting} {divisor} does not divide.",
            f"{advice if setting == 'group_size' else 'Use another pattern'}, or name the module in `ignore`.",
        )


def _model_warnings(recipe: Recipe, header: ModelHeader) -> Iterable[str]:
    for one in recipe.passes:
        if isinstance(one, _OnLinears):
            touched = sum(tensor.size for tensor in header.tensors if is_linear_weight(tensor, one.ignore))
            if touched < header.size / 4:
                yield f"`{one.pass_}` touches only {100 * touched / header.size:.0f}% of the model's bytes; the rest is embeddings and norms."


def _describe(one: _OnLinears | DynamicInt8) -> str:
    if isinstance(one, _Rounding):
        zeros = f", {one.sparsity:.0%} zeros" if isinstance(one, Gptq) and one.sparsity is not None else ""
        return f"int{one.bits}, " + (f"groups of {one.group_size}" if one.group_size else "a scale a row") + zeros
    if isinstance(one, Magnitude):
        return f"{one.sparsity:.0%} zeros, {one.pattern}, by {one.across}"
    if isinstance(one, _Pruning):
        return f"{one.sparsity:.0%} zeros, {one.pattern}"
    return "int8 weights and activations"


def weight_only_bytes(tensor: TensorInfo, one: _Rounding) -> int:
    """Bytes of one linear weight in compressed-tensors `pack-quantized`: int32 words of codes, scales in the tensor's dtype, and its shape."""
    rows, columns = tensor.shape
    groups = 1 if one.group_size is None else -(-columns // one.group_size)
    width = tensor.size // (rows * columns)
    zero_points = 0 if one.symmetric else 4 * (-(-rows * one.bits // 32) * groups)
    return rows * -(-columns * one.bits // 32) * 4 + rows * groups * width + zero_points + 16


def _output_bytes(recipe: Recipe, header: ModelHeader, export: str) -> int:
    total = 0
    for tensor in header.tensors:
        size = tensor.size
        for one in recipe.passes:
            if isinstance(one, _Rounding) and is_linear_weight(tensor, one.ignore):
                size = weight_only_bytes(tensor, one)
            elif isinstance(one, DynamicInt8) and len(tensor.shape) == 2:
                size = tensor.shape[0] * tensor.shape[1] + 4 * tensor.shape[0]
        if export in {"onnx", "openvino"} and size == tensor.size and tensor.dtype in {"F16", "BF16"}:
            size = tensor.size * 2  # graphs are exported in fp32
        total += size
    return total


def _estimate(recipe: Recipe, header: ModelHeader) -> Estimate:
    outputs = {export: _output_bytes(recipe, header, export) for export in recipe.exports}
    fp32 = 4 * header.parameters
    # The evaluations load the source in fp32; a graph export holds the traced model and its serialised copy.
    graph = any(name in {"onnx", "openvino"} for name in recipe.exports)
    memory = _RUNTIME_BYTES + _STREAM_BYTES + fp32 * (3 if graph else 1)
    tokens = sum(
        one.samples * one.length
        if isinstance(one, Quality)
        else sum(b * n for b in one.batch for n in one.length) * (one.repeats + 3)
        for one in recipe.evaluate
    )
    calibrated = sum(isinstance(one, _Calibrated) for one in recipe.passes)
    if calibrated:
        memory = max(memory, _RUNTIME_BYTES + _blocks_bytes(recipe, header))
    runs = 1 + len(recipe.exports)
    seconds = (
        _IMPORT_S * runs
        + len(recipe.passes) * header.size / _STREAM_RATE
        + runs * tokens * header.parameters / _FORWARD_RATE
        # Two forward passes of all blocks; the Gram matrices cost about as much as one.
        + calibrated * 3 * recipe.calibration.samples * recipe.calibration.length * header.parameters / _FORWARD_RATE
    )
    return Estimate(
        memory_bytes=memory,
        disk_bytes=header.size + 2 * sum(outputs.values()),
        seconds=round(seconds, 1),
        output_bytes=outputs,
    )


def _blocks_bytes(recipe: Recipe, header: ModelHeader) -> int:
    """What the blocks executor holds: the embeddings, or two blocks with one layer's Gram matrix and its factor, beside the activations."""
    blocks: dict[str, int] = {}
    outside = widest = 0
    for tensor in header.tensors:
        found = re.match(r".*?\.\d+\.", tensor.name)
        size = 4 * math.prod(tensor.shape)
        if found is None:
            outside = max(outside, size)
            continue
        blocks[found[0]] = blocks.get(found[0], 0) + size
        if len(tensor.shape) == 2:
            widest = max(widest, tensor.shape[1])
    width = int(header.config.get("hidden_size") or header.config.get("dim") or widest)
    activations = 4 * recipe.calibration.samples * recipe.calibration.length * width
    return activations + max(outside, 2 * max(blocks.values(), default=0) + 4 * 4 * widest**2)
