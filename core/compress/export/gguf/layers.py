"""Compare the weights in a GGUF file with those that were meant, layer by layer.

llama.cpp can't be asked for single layers, as other consumers are (../probes.py), and the outputs of a whole model don't tell one broken layer.
So some rows of each matrix are read back by llama.cpp's own reader of the format, the package `gguf`, and multiplied with the same vectors.
This covers what was written. How llama.cpp multiplies is covered by the whole outputs.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
from gguf.quants import dequantize

from nightpress.core.compress.export.gguf.families import GgufFamily
from nightpress.core.compress.export.gguf.file import FILE_NAME
from nightpress.core.compress.export.probes import ProbeResult, relative_error
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.runners.measure import probe_rows
from nightpress.core.recipes.gguf_types import GGUF_TYPES
from nightpress.core.recipes.header import ModelHeader

_KEPT = 2e-2  #: largest relative error of codes that a pass chose: their scales become float16
#: Bits of a type → largest relative error of float weights that the export has rounded to it. Weights with outliers have large errors; with
#: 3 bits and fewer, rounding can't be told from a fault.
_ROUNDED = {8: 0.05, 6: 0.15, 5: 0.3, 4: 0.5}
_FLOATS = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}


def compare_layers(pressed: Path, folder: Path, header: ModelHeader) -> ProbeResult:
    """Compare the matrices in the file of `folder` with the weights in `pressed`. The result has the layer nearest to its bound, or beyond it."""
    weights, family = PressedWeights(pressed), GgufFamily(header)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE_NAME).tensors}
    found = ProbeResult(0, "", 0.0, _KEPT)
    layers = 0
    for name, bound in _bounds(weights, family, written):
        tensor, order = written[family.name(name) or ""], family.row_order(name)
        rows = probe_rows(weights.shape(name)[0])
        ours = dequantize(tensor.data[rows], tensor.tensor_type)
        meant = family.change(name, weights.rows(name, rows if order is None else order[rows]))
        error = relative_error(ours, meant)
        layers += 1
        if not error / bound <= found.error / found.bound:  # also true where it is not a number
            found = ProbeResult(0, name.removesuffix(".weight"), error, bound)
    return ProbeResult(layers, found.worst, found.error, found.bound)


def _bounds(
    weights: PressedWeights, family: GgufFamily, written: dict[str, gguf.ReaderTensor]
) -> Iterator[tuple[str, float]]:
    """Each matrix that is compared, and its bound."""
    for name in weights:
        place = family.name(name)
        if place not in written or len(weights.shape(name)) != 2:
            continue
        kind = written[place].tensor_type.name
        if name in weights.packed or weights.block_type(name) is not None:
            yield name, _KEPT
        elif kind in _FLOATS:
            yield name, _FLOATS[kind]
        elif (type_ := GGUF_TYPES.get(kind.lower())) is not None and type_.bits in _ROUNDED:
            yield name, _ROUNDED[type_.bits]
