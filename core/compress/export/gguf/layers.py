"""Compare the weights in a GGUF file with those that were meant, layer by layer.

llama.cpp can't be asked for single layers, as other consumers are (../probes.py), and the outputs of a whole model don't tell one broken layer.
So some rows of each matrix are read back by llama.cpp's own reader of the format, the package `gguf`, and multiplied with the same vectors.
This covers what was written. How llama.cpp multiplies is covered by the whole outputs.

llama.cpp's converter names the tensors by the map of the package `gguf`. It puts the rows of some queries and keys into another order, and
transposes what GPT-2 stores, so these layouts are tried. Fused queries, keys and values, whose rows it regroups, are not compared.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from nightpress.core.compress.export.gguf.families import GgufFamily
from nightpress.core.compress.export.gguf.file import FILE_NAME
from nightpress.core.compress.export.probes import ProbeResult, relative_error
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.runners.measure import probe_rows
from nightpress.core.recipes.gguf_types import GGUF_TYPES
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.llama_converter import by_converter

_KEPT = 2e-2  #: largest relative error of codes that a pass chose: their scales become float16
#: Bits of a type → largest relative error of float weights that the export has rounded to it. Weights with outliers have large errors; with
#: 3 bits and fewer, rounding can't be told from a fault.
_ROUNDED = {8: 0.05, 6: 0.15, 5: 0.3, 4: 0.5}
_REGROUPED = ".query_key_value."
_FLOATS = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}


Place = Callable[[str], str | None]  #: a tensor's name in the model → its name in the file; None: it has none


def compare_layers(pressed: Path, folder: Path, header: ModelHeader) -> ProbeResult:
    """Compare the matrices in the file of `folder` with the weights in `pressed`. The result has the layer nearest to its bound, or beyond it.

    It has no layer if the package `gguf` doesn't know the names of the file's architecture: the converter may be newer.
    """
    weights, reader = PressedWeights(pressed), gguf.GGUFReader(folder / FILE_NAME)
    written = {tensor.name: tensor for tensor in reader.tensors}
    if by_converter(header):
        place, error_of = _converters_names(reader), partial(_converters_error, header)
    else:
        family = GgufFamily(header)
        place, error_of = family.name, partial(_error, family)
    found = ProbeResult(0, "", 0.0, _KEPT)
    layers = 0
    for name in weights:
        tensor = written.get(place(name) or "")
        bound = None if tensor is None else _bound(weights, name, tensor)
        if tensor is None or bound is None:
            continue
        error = error_of(weights, name, tensor)
        layers += 1
        if not error / bound <= found.error / found.bound:  # also true where it is not a number
            found = ProbeResult(0, name.removesuffix(".weight"), error, bound)
    return ProbeResult(layers, found.worst, found.error, found.bound)


def _error(family: GgufFamily, weights: PressedWeights, name: str, tensor: gguf.ReaderTensor) -> float:
    order, rows = family.row_order(name), probe_rows(weights.shape(name)[0])
    meant = family.change(name, weights.rows(name, rows if order is None else order[rows]))
    return relative_error(dequantize(tensor.data[rows], tensor.tensor_type), meant)


def _converters_names(reader: gguf.GGUFReader) -> Place:
    """The names that llama.cpp's converter gives the tensors of a file's architecture."""
    architecture = str(reader.fields["general.architecture"].contents())
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        return lambda _name: None
    names = gguf.get_tensor_name_map(kind, int(reader.fields[f"{architecture}.block_count"].contents()))
    return lambda name: None if _REGROUPED in name else names.get_name(name, try_suffixes=(".weight", ".bias"))


def _converters_error(header: ModelHeader, weights: PressedWeights, name: str, tensor: gguf.ReaderTensor) -> float:
    """The smallest relative error of some rows over the layouts that the converter may have chosen."""
    count, columns = weights.shape(name)
    rows = probe_rows(len(tensor.data))
    ours = dequantize(tensor.data[rows], tensor.tensor_type)
    errors = []
    if ours.shape[1] == columns and len(tensor.data) == count:
        orders = [np.arange(count), *_in_pairs(header, name, count)]
        errors = [relative_error(ours, weights.rows(name, order[rows])) for order in orders]
    if min(errors, default=1.0) > _KEPT and (len(tensor.data), ours.shape[1]) == (columns, count):
        errors.append(relative_error(ours, np.ascontiguousarray(weights.floats(name).T[rows])))
    return min(errors, default=float("inf"))


def _in_pairs(header: ModelHeader, name: str, count: int) -> Iterator[NDArray[np.intp]]:
    """The order of rows of queries and keys where llama.cpp rotates neighbours, as the families of Llama have it."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(
        name.removesuffix(".weight").rpartition(".")[2]
    )
    number = header.config.get(heads or "") or header.config.get("num_attention_heads")
    if heads and number and count % (2 * number) == 0:
        yield np.arange(count).reshape(number, 2, -1).swapaxes(1, 2).reshape(-1)


def _bound(weights: PressedWeights, name: str, tensor: gguf.ReaderTensor) -> float | None:
    """The largest relative error of a matrix; None: it is not compared."""
    if len(weights.shape(name)) != 2:
        return None
    if name in weights.packed or weights.block_type(name) is not None:
        return _KEPT
    kind = tensor.tensor_type.name
    if kind in _FLOATS:
        return _FLOATS[kind]
    type_ = GGUF_TYPES.get(kind.lower())
    return _ROUNDED.get(type_.bits) if type_ is not None else None
