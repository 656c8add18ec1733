"""Does the consumer multiply by the weights that were meant? Each compressed layer is asked, because a whole model's outputs don't tell.

The outputs of a model at 4 bits differ so much from the source's that one layer with transposed scales would not show; at 8 bits, a small
layer would not. So the consumer runs each compressed layer that it has loaded on a few vectors, and some rows of the answers are compared with
the pressed weights, read by our own code. The vectors are made of zeros and ones: a zero point that is off by one changes each row by the
sum of the inputs, and rounding the inputs to 8 bits changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.runners.measure import PROBE, probe_rows, probe_vectors

#: Formats whose runners ask single layers. In graphs, these are the products with packed integer weights.
PROBED_FORMATS = frozenset({"compressed-tensors", "onnx", "openvino", "mlx"})
_BOUND_32 = (
    1e-2  #: largest relative error of a layer's answers in float32; a scale for each token may take 1 as 127/127.5
)
_BOUND_16 = 2e-2  #: in 16 bits


@dataclass(frozen=True)
class ProbeResult:
    layers: int  #: compared; the consumer may not have others as single layers, e.g. experts that it fuses
    worst: str  #: the layer with the largest error; empty if none was compared
    error: float  #: of that layer: ‖y − ŷ‖ / ‖ŷ‖ (Frobenius)
    bound: float


def probed_layers(pressed: Path) -> dict[str, float]:
    """The modules whose weights a pass has replaced by codes, and the factor by which each is asked: its inputs must not be cut off."""
    weights = PressedWeights(pressed)
    return {
        name.removesuffix(".weight"): weights.input_peak(name) or 1.0
        for name in sorted(weights.coded)
        if name.endswith(".weight")
    }


def compare(pressed: Path, outputs: Mapping[str, NDArray[Any]], dtype: str) -> ProbeResult:
    """Compare a consumer's answers with the pressed model's. outputs: as a runner returns them, `probe.LAYER` [vectors, rows] each.

    dtype: that the consumer computed in, e.g. `float32`; empty: the library decides, perhaps for 16 bits.
    """
    weights, worst, error, layers = PressedWeights(pressed), "", 0.0, 0
    for key, ours in outputs.items():
        if not key.startswith(PROBE):
            continue
        layer = key.removeprefix(PROBE)
        rows, columns = weights.shape(f"{layer}.weight")
        off = _off(ours, probe_vectors(columns) @ weights.rows(f"{layer}.weight", probe_rows(rows)).T)
        layers += 1
        if not off <= error:  # also true where it is not a number
            worst, error = layer, off
    return ProbeResult(layers, worst, error, _BOUND_32 if dtype == "float32" else _BOUND_16)


def relative_error(ours: NDArray[np.float32], meant: NDArray[np.float32]) -> float:
    """The relative error of the answers that rows of a weight give, against those of the rows that were meant. [rows, in] each."""
    vectors = probe_vectors(meant.shape[1])
    return _off(vectors @ ours.T, vectors @ meant.T)


def _off(ours: NDArray[Any], meant: NDArray[Any]) -> float:
    return float(np.linalg.norm(ours - meant) / max(float(np.linalg.norm(meant)), 1e-30))
