"""Write the GGUF file: metadata, vocabulary, then the tensors one by one, so that only one tensor is in memory."""

import math
import os
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from nightpress.core.compress.export.gguf.blocks import codes_type, encode, encode_codes, fitting_type, type_named
from nightpress.core.compress.export.gguf.converted import convert
from nightpress.core.compress.export.gguf.families import GgufFamily
from nightpress.core.compress.export.gguf.metadata import add_metadata
from nightpress.core.compress.export.gguf.vocabulary import add_vocabulary
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors, sync_folder
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.llama_converter import by_converter

CONSUMER = Path(__file__).parents[2] / "runners" / "llamacpp_runner.py"
FILE_NAME = "model.gguf"

Type = gguf.GGMLQuantizationType
_FEWEST_DIMS = 2  #: tensors with fewer dimensions stay in float32: vectors are small, and llama.cpp expects this
#: Type → llama.cpp's name for a file of it, where the two differ
_FILE_TYPES = {
    "f32": "ALL_F32",
    **{kind: f"MOSTLY_{kind.upper()}_M" for kind in ("q3_k", "q4_k", "q5_k")},
    "mxfp4": "MOSTLY_MXFP4_MOE",
}
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
#: Matrices whose rows are looked up. They are not multiplied with anything.
_LOOKED_UP = frozenset({"position_embd.weight", "token_types.weight"})


def save(model_dir: Path, out_dir: Path, header: ModelHeader, *, weights: str, pooling: str) -> None:
    """Write the folder with its one file.

    weights: the type of matrices, e.g. `q8_0`. A matrix that a pass has rounded keeps the pass's codes if a layout can hold them.
    pooling: of an embedder; one of POOLING in core/recipes/llama_cpp.py. Raises NightpressError: unsupported_architecture if llama.cpp has
    no such tensor or tokenizer, numerical_failure if a number is too large for float16. Families that llama.cpp's converter writes: the
    errors of `convert`.
    """
    if by_converter(header):
        convert(model_dir, out_dir / FILE_NAME, header, _file_type(weights), weights=weights)
        return
    family, source = GgufFamily(header), PressedWeights(model_dir)
    names = _names(family, source)
    with disk_errors():
        out_dir.mkdir(parents=True)
        path = out_dir / FILE_NAME
        writer = gguf.GGUFWriter(path, family.architecture)
        try:
            _describe(writer, family, source, model_dir, weights, pooling)
            extra = family.extra_tensors()
            for name, values in extra.items():
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
            for name, tensor in names.items():
                kind = _kind(source, tensor, name, weights)
                shape = source.shape(tensor)
                size = math.prod(shape) * GGML_QUANT_SIZES[kind][1] // GGML_QUANT_SIZES[kind][0]
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in extra.values():
                writer.write_tensor_data(values)
            for name, tensor in names.items():
                writer.write_tensor_data(_encoded(family, source, tensor, _kind(source, tensor, name, weights)))
            writer.flush()
            for stream in writer.fout or ():
                os.fsync(stream.fileno())
        finally:
            writer.close()
        sync_folder(out_dir)


def _names(family: GgufFamily, source: PressedWeights) -> dict[str, str]:
    """Name in the file → name in the model. Raises NightpressError(unsupported_architecture) for a tensor that llama.cpp can't use."""
    names: dict[str, str] = {}
    tied = family.tied and _HEAD in source.names and source.same(_HEAD, _TABLE)
    if _HEAD in source.names and not tied and not family.has_own_head:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"llama.cpp's {family.architecture} multiplies by the table of embeddings, and the model's {_HEAD} holds other numbers.",
            hint="Leave gguf out of `exports`; or remove the head from the files, if the two should be tied.",
        )
    for tensor in source:
        if tensor == _HEAD and tied:  # llama.cpp uses the embedding table as the head, too
            continue
        try:
            name = family.name(tensor)
        except KeyError as error:
            raise NightpressError(
                ErrorCode.UNSUPPORTED_ARCHITECTURE,
                f"llama.cpp's {family.architecture} has no part for the model's tensor {tensor}.",
                hint="Leave gguf out of `exports`.",
            ) from error
        if name is not None:
            names[name] = tensor
    return names


def _describe(
    writer: gguf.GGUFWriter, family: GgufFamily, source: PressedWeights, model_dir: Path, weights: str, pooling: str
) -> None:
    add_metadata(writer, model_dir, family.header)
    family.describe(writer, pooling=pooling)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(_most_used(source) or weights))
    add_vocabulary(writer, model_dir, family.header)


def _most_used(source: PressedWeights) -> str | None:
    """The type of most weights in blocks that a pass has left; None: there are no such blocks."""
    counts: Counter[str] = Counter()
    for name in source:
        if (kind := source.block_type(name)) is not None:
            counts[kind.name] += math.prod(source.shape(name))
    return counts.most_common(1)[0][0] if counts else None


def _file_type(name: str) -> gguf.LlamaFileType:
    """What programs show as the quantization of a file whose matrices have the type of this name."""
    return gguf.LlamaFileType[_FILE_TYPES.get(name, f"MOSTLY_{name.upper()}")]


def _kind(source: PressedWeights, tensor: str, name: str, weights: str) -> Type:
    """The type in which a tensor is stored."""
    shape = source.shape(tensor)
    if (kept := _kept(source, tensor)) is not None:
        return kept
    if len(shape) < _FEWEST_DIMS or name in _LOOKED_UP:
        return Type.F32
    return fitting_type(type_named(weights), shape[-1])


def _kept(source: PressedWeights, tensor: str) -> Type | None:
    """The layout of the codes that a pass chose. None if the tensor has no codes or no layout holds them."""
    if (blocks := source.block_type(tensor)) is not None:
        return type_named(blocks.name)
    if tensor not in source.packed:
        return None
    grid = source.grid(tensor)
    assert grid.group_size is not None
    return codes_type(grid.bits, grid.group_size, symmetric=grid.symmetric)


def _encoded(family: GgufFamily, source: PressedWeights, tensor: str, kind: Type) -> NDArray[np.generic]:
    """A tensor's data as the file stores it."""
    order = family.row_order(tensor)
    if source.block_type(tensor) is not None:
        blocks = source.block_bytes(tensor)
        return blocks if order is None else np.ascontiguousarray(blocks[order])
    if _kept(source, tensor) is not None:
        codes = source.codes(tensor)
        return encode_codes(codes if order is None else codes.take_rows(order))
    values = family.change(tensor, source.floats(tensor))
    if order is not None:
        values = values[order]
    if kind == Type.F32:
        return values
    return _half(values, tensor) if kind == Type.F16 else encode(values, kind)


def _half(values: NDArray[np.float32], tensor: str) -> NDArray[np.float16]:
    if float(np.abs(values).max(initial=0)) > np.finfo(np.float16).max:
        raise NightpressError(
            ErrorCode.NUMERICAL_FAILURE,
            f"{tensor} holds numbers that are too large for float16.",
            hint="Export gguf with the type f32 or q8_0.",
        )
    return values.astype(np.float16)
