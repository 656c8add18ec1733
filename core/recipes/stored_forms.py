"""Finds, in a quantized checkpoint's headers, which tensors together store which weight, and the floats that they stand for. No torch here.

Formats: `fp8` of transformers (DeepSeek-V3's blocks, a scale a tensor or a row), `fbgemm_fp8`, `mxfp4` (gpt-oss), compressed-tensors, GPTQ
and AWQ as AutoGPTQ and AutoAWQ pack them, ModelOpt's FP8 and NVFP4, and bitsandbytes. `core/compress/grids/stored_weights.py` decodes them.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.brought import Brought
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.jsonfile import malformed

#: How the tensors of a weight are read; see the decoder of the same name.
Coding = Literal["scaled", "packed", "fp4", "experts", "gptq", "awq", "bnb4", "bnb8"]
#: Reads the bytes of a small tensor.
ReadTensor = Callable[[str], bytes]

_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
#: Leaves that only serve quantized arithmetic, beside a weight of codes: scales of a layer's inputs and outputs.
_OF_LAYERS = re.compile(
    r"(.*_)?(input|output|activation)_(scale|scale_inv|global_scale|zero_point|amax)|scale|weight_(shape|format|g_idx|amax)|g_idx"
)
#: Leaves of attention modules: scales of a quantized cache.
_OF_CACHES = re.compile(r"(q|k|v|kv|prob_output)_(scale|zero_point)")
_SMALL = 4096  #: bytes of a tensor that describes another one


@dataclass(frozen=True)
class StoredWeight:
    """The tensors that store a float weight [out, in], or [experts, out, in]."""

    name: str  #: of the float weight
    shape: tuple[int, ...]
    coding: Coding
    parts: Mapping[str, str]  #: role → tensor, e.g. "codes" → "….qweight"
    bits: int = 8
    block: tuple[int, int] | None = None  #: rows and columns that share a scale, if the config names them
    zero_offset: int = 0  #: added to stored zero points
    details: Mapping[str, Any] = field(default_factory=dict)  #: bitsandbytes' description of the weight


@dataclass(frozen=True)
class FloatView:
    """A checkpoint as the floats that it stands for."""

    tensors: tuple[TensorInfo, ...]  #: float weights and all other tensors, without the parts of codes
    weights: Mapping[str, StoredWeight]  #: by the float weight's name
    brought: Brought | None  #: None: it is stored as floats, and config.json says nothing else


def float_view(config: Mapping[str, Any], tensors: Sequence[TensorInfo], read: ReadTensor) -> FloatView | None:
    """Return a quantized checkpoint as floats; None if its config names no quantization.

    Raises NightpressError: unsupported_format for a format that is not read here, malformed_model if parts of a weight are missing or don't fit.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise malformed("config.json", "`quantization_config` is not an object")
    method = str(
        given.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in given or "load_in_8bit" in given else "")
    )
    found = {tensor.name: tensor for tensor in tensors}
    size = sum(tensor.size for tensor in tensors)
    if not any(map(_may_be_codes, tensors)):
        brought = Brought(method=method[:40], detail=f"{method[:40]} in config.json alone", weights=0, size=size)
        return FloatView(tuple(tensors), {}, brought)
    if method not in _FINDERS:
        raise _unsupported(f"config.json says that the model is quantized as {method[:40]!r}, which is not read here")
    weights = {weight.name: weight for weight in _FINDERS[method](given, found, read)}
    if not weights:
        raise _unsupported(
            f"config.json says that the model is quantized as {method[:40]!r}, and none of its tensors are codes of that form"
        )
    dtype = _float_type(config)
    used = {part for weight in weights.values() for part in weight.parts.values()}
    modules = {name.rpartition(".")[0] for name in weights}
    kept = [tensor for tensor in tensors if tensor.name not in used and not _belongs_to_codes(tensor.name, modules)]
    if odd := [tensor.name for tensor in kept if _may_be_codes(tensor) or tensor.name in weights]:
        raise malformed(
            "config.json",
            f"{odd[0][:200]} seems to hold codes, and the scales that {method} has for them are not there",
        )
    floats = (
        TensorInfo(name=weight.name, dtype=dtype, shape=weight.shape, size=math.prod(weight.shape) * _WIDTHS[dtype])
        for weight in weights.values()
    )
    detail = f"{method}, {', '.join(sorted({_describe(weight, given) for weight in weights.values()})[:3])}"
    brought = Brought(method=method, detail=detail[:200], weights=len(weights), size=size)
    return FloatView((*kept, *floats), weights, brought)


# One finder a method ------------------------------------------------------------------------------------------------


def _find_scaled(
    given: Mapping[str, Any], found: Mapping[str, TensorInfo], _read: ReadTensor
) -> Iterator[StoredWeight]:
    """Codes of 8 bits in the weight's shape, with scales beside them: fp8 of any kind, int8."""
    block = _pair(given.get("weight_block_size")) or next(
        filter(None, map(_pair, _in_groups(given, "block_structure"))), None
    )
    coded = _FP8 | {"I8"}
    for name, tensor in found.items():
        if tensor.dtype not in coded or len(tensor.shape) not in {2, 3}:
            continue
        stem = name.removesuffix("weight")
        scales = (f"{name}_scale_inv", f"{stem}weight_scale", f"{name}_scale", f"{stem}scale", f"{stem}qscale_weight")
        scale = next((found[place] for place in scales if place in found), None)
        if scale is None or scale.name == name:
            continue
        parts = {"codes": name, "scale": scale.name}
        if f"{name}_zero_point" in found:
            parts["zero_point"] = f"{name}_zero_point"
        yield StoredWeight(name, tensor.shape, "scaled", parts, block=block)


def _find_compressed(
    given: Mapping[str, Any], found: Mapping[str, TensorInfo], read: ReadTensor
) -> Iterator[StoredWeight]:
    yield from _find_scaled(given, found, read)
    widths = {int(bits) for bits in _in_groups(given, "num_bits") if isinstance(bits, int) and 1 <= bits <= 8}
    for name, tensor in found.items():
        if not name.endswith("_packed") or len(tensor.shape) != 2:
            continue
        weight = name.removesuffix("_packed")
        scale = _part(found, f"{weight}_scale")
        if tensor.dtype == "U8":
            parts = {"codes": name, "scale": scale.name}
            if f"{weight}_global_scale" in found:
                parts["divisor"] = f"{weight}_global_scale"
            yield StoredWeight(weight, (tensor.shape[0], tensor.shape[1] * 2), "fp4", parts, bits=4)
            continue
        shape = _packed_shape(given, read, _part(found, f"{weight}_shape"), tensor, scale)
        fits = [bits for bits in sorted(widths) if -(-shape[1] * bits // 32) == tensor.shape[1]]
        if tensor.dtype != "I32" or not fits:
            raise malformed(
                "config.json",
                f"{name[:200]} does not have the shape that `quantization_config` and {weight[:200]}_shape say",
            )
        parts = {"codes": name, "scale": scale.name}
        for role, part in (("zero_point", f"{weight}_zero_point"), ("group_index", f"{weight}_g_idx")):
            if part in found:
                parts[role] = part
        yield StoredWeight(weight, shape, "packed", parts, bits=fits[0])


def _find_gptq(given: Mapping[str, Any], found: Mapping[str, TensorInfo], _read: ReadTensor) -> Iterator[StoredWeight]:
    bits = given.get("bits", 4)
    if not isinstance(bits, int) or bits not in {2, 3, 4, 8}:
        raise _unsupported(
            f"config.json says that its weights have {str(bits)[:20]} bits; of GPTQ, 2, 3, 4 and 8 are read"
        )
    if "awq" in str(given.get("packing_format", "")):
        yield from _find_awq(given, found, _read)
        return
    offset = 0 if "v2" in str(given.get("checkpoint_format", "")) else 1
    for name, tensor in found.items():
        if not name.endswith(".qweight") or tensor.dtype != "I32" or len(tensor.shape) != 2:
            continue
        module = name.removesuffix(".qweight")
        parts = {
            role: _part(found, f"{module}.{leaf}").name
            for role, leaf in (("scale", "scales"), ("zero_point", "qzeros"))
        }
        if f"{module}.g_idx" in found:
            parts["group_index"] = f"{module}.g_idx"
        shape = (tensor.shape[1], tensor.shape[0] * 32 // bits)
        yield StoredWeight(f"{module}.weight", shape, "gptq", {"codes": name, **parts}, bits=bits, zero_offset=offset)


def _find_awq(given: Mapping[str, Any], found: Mapping[str, TensorInfo], _read: ReadTensor) -> Iterator[StoredWeight]:
    if given.get("bits", given.get("w_bit", 4)) != 4 or str(given.get("version", "gemm")).lower() != "gemm":
        raise _unsupported("of AWQ, 4 bits in the layout `gemm` are read, and config.json says otherwise")
    for name, tensor in found.items():
        if name.endswith(".qweight") and tensor.dtype == "I32" and len(tensor.shape) == 2:
            module = name.removesuffix(".qweight")
            parts = {"codes": name, "scale": _part(found, f"{module}.scales").name}
            if f"{module}.qzeros" in found:
                parts["zero_point"] = f"{module}.qzeros"
            yield StoredWeight(f"{module}.weight", (tensor.shape[1] * 8, tensor.shape[0]), "awq", parts, bits=4)


def _find_experts(
    given: Mapping[str, Any], found: Mapping[str, TensorInfo], _read: ReadTensor
) -> Iterator[StoredWeight]:
    """gpt-oss: codes [experts, rows, groups, 16] and scales [experts, rows, groups]. The float weight is [experts, inputs, rows]."""
    del given
    for name, tensor in found.items():
        if name.endswith("_blocks") and tensor.dtype == "U8" and len(tensor.shape) == 4:
            weight = name.removesuffix("_blocks")
            experts, rows, groups, size = tensor.shape
            parts = {"codes": name, "scale": _part(found, f"{weight}_scales").name}
            yield StoredWeight(weight, (experts, groups * size * 2, rows), "experts", parts, bits=4)


def _find_modelopt(
    given: Mapping[str, Any], found: Mapping[str, TensorInfo], read: ReadTensor
) -> Iterator[StoredWeight]:
    yield from _find_scaled(given, found, read)
    for name, tensor in found.items():
        if tensor.dtype == "U8" and len(tensor.shape) == 2 and f"{name}_scale_2" in found:
            parts = {"codes": name, "scale": _part(found, f"{name}_scale").name, "factor": f"{name}_scale_2"}
            yield StoredWeight(name, (tensor.shape[0], tensor.shape[1] * 2), "fp4", parts, bits=4)


def _find_bitsandbytes(
    given: Mapping[str, Any], found: Mapping[str, TensorInfo], read: ReadTensor
) -> Iterator[StoredWeight]:
    del given
    for name, tensor in found.items():
        module = name.removesuffix("weight")
        if tensor.dtype == "I8" and f"{module}SCB" in found:
            yield StoredWeight(name, tensor.shape, "bnb8", {"codes": name, "scale": f"{module}SCB"})
            continue
        kind = next((kind for kind in ("nf4", "fp4") if f"{name}.quant_state.bitsandbytes__{kind}" in found), None)
        if tensor.dtype != "U8" or kind is None:
            continue
        state = found[f"{name}.quant_state.bitsandbytes__{kind}"]
        details = _quant_state(read, state)
        parts = {"codes": name, "state": state.name}
        for role in (
            "absmax",
            "quant_map",
            *(("nested_absmax", "nested_quant_map") if "nested_offset" in details else ()),
        ):
            parts[role] = _part(found, f"{name}.{role}").name
        shape = tuple(details["shape"])
        if math.prod(shape) != 2 * math.prod(tensor.shape):
            raise malformed(
                "config.json",
                f"{name[:200]} has {math.prod(tensor.shape)} bytes, too many or too few for its shape {list(shape)}",
            )
        yield StoredWeight(name, shape, "bnb4", parts, bits=4, details=details)


_FINDERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, TensorInfo], ReadTensor], Iterable[StoredWeight]]] = {
    "auto-round": _find_gptq,
    "awq": _find_awq,
    "bitsandbytes": _find_bitsandbytes,
    "compressed-tensors": _find_compressed,
    "fbgemm_fp8": _find_scaled,
    "fp8": _find_scaled,
    "gptq": _find_gptq,
    "modelopt": _find_modelopt,
    "mxfp4": _find_experts,
}


# Parts --------------------------------------------------------------------------------------------------------------


def _part(found: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    if name not in found:
        raise malformed("config.json", f"{name[:200]} is not there, and `quantization_config` needs it")
    return found[name]


def _packed_shape(
    given: Mapping[str, Any], read: ReadTensor, stored: TensorInfo, packed: TensorInfo, scale: TensorInfo
) -> tuple[int, int]:
    """The weight's shape. Read from its tensor only where the number of groups doesn't tell it: a read is a request to a store."""
    sizes = {size for size in _in_groups(given, "group_size") if type(size) is int and size > 0}
    if len(sizes) == 1 and len(scale.shape) == 2 and scale.shape[1] > 1:
        return packed.shape[0], scale.shape[1] * sizes.pop()
    width = stored.size // 2
    raw = read(stored.name) if stored.shape == (2,) and stored.dtype in {"I32", "I64"} else b""
    rows, columns = (
        (int.from_bytes(raw[at : at + width], "little", signed=True) for at in (0, width)) if raw else (0, 0)
    )
    if rows != packed.shape[0] or not 0 < columns <= packed.shape[1] * 32:
        raise malformed("config.json", f"{stored.name[:200]} does not fit {packed.name[:200]}")
    return rows, columns


def _quant_state(read: ReadTensor, state: TensorInfo) -> dict[str, Any]:
    try:
        if state.size > _SMALL:
            raise ValueError("it is too long")
        found = json.loads(read(state.name))
        shape, size = found["shape"], found["blocksize"]
        whole = [*shape, size, *([found["nested_blocksize"]] if "nested_offset" in found else [])]
        if not (len(shape) == 2 and all(type(number) is int and 0 < number < 1 << 31 for number in whole)):
            raise ValueError("its sizes are no sizes")
        return {key: found[key] for key in ("shape", "blocksize", "nested_blocksize", "nested_offset") if key in found}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise malformed("config.json", f"{state.name[:200]} can't be read: {str(error)[:100]}") from error


def _belongs_to_codes(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor only serves quantized arithmetic. modules: those with a weight of codes."""
    module, _, leaf = name.rpartition(".")
    return _OF_CACHES.fullmatch(leaf) is not None or (module in modules and _OF_LAYERS.fullmatch(leaf) is not None)


def _may_be_codes(tensor: TensorInfo) -> bool:
    """Whether a tensor that is no float may be a weight. Buffers of positions and masks have other dtypes or dimensions."""
    if tensor.dtype == "I32":
        return tensor.name.endswith(("qweight", "_packed"))
    return tensor.dtype in _FP8 | {"U8", "I8"} and (len(tensor.shape) in {2, 3} or tensor.name.endswith("_blocks"))


def _in_groups(given: Mapping[str, Any], key: str) -> Iterator[Any]:
    groups = given.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get(key) is not None:
            yield weights[key]


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    return None


def _float_type(config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    for where in (config, inner if isinstance(inner, dict) else {}):
        named = str(where.get("dtype") or where.get("torch_dtype") or "").removeprefix("torch.")
        if named in _DTYPES:
            return _DTYPES[named]
    return "BF16"


def _describe(weight: StoredWeight, given: Mapping[str, Any]) -> str:
    if weight.coding == "scaled":
        return "8 bits" + (f" in blocks of {weight.block[0]} × {weight.block[1]}" if weight.block else "")
    if weight.coding in {"gptq", "awq", "packed"}:
        group = given.get("group_size", next(_in_groups(given, "group_size"), None))
        return f"int{weight.bits}" + (f", groups of {group}" if isinstance(group, int) and group > 0 else "")
    return {"fp4": "fp4", "experts": "fp4, groups of 32", "bnb4": "4 bits", "bnb8": "int8"}[weight.coding]


def _unsupported(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_FORMAT,
        f"{what}.",
        hint=f"Bring the float model it was made from. Read are {', '.join(sorted(_FINDERS))}.",
        file="config.json",
    )
