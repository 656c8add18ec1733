"""A layer's inputs as a runtime rounds them before the product: the schemes NVFP4, MXFP4 and MXFP4XFP8 of compressed-tensors."""

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import LARGEST_FLOAT
from nightpress.core.compress.grids.rounding import nearest_floats
from nightpress.core.recipes.schemes import BLOCK, Scheme

_EXPONENT = 0x7F800000  #: the bits of a float32's exponent
_QUARTER = 1 << 21  #: a quarter of a float32's mantissa: from 1.75 times a power of two, the next power counts
_SMALLEST = 2.0**-9  #: fp8's smallest number, in place of a scale that became zero


def input_global_scale(peak: Tensor) -> Tensor:
    """nvfp4's global scale of a layer's inputs, float32 [1]. peak []: their largest magnitude in calibration."""
    return (LARGEST_FLOAT[8] * LARGEST_FLOAT[4] / peak.float().clamp(min=2.0**-80)).view(1)


def round_inputs(x: Tensor, scheme: Scheme, total: Tensor | None = None) -> Tensor:
    """Round inputs [..., in] of any float dtype. Gradients pass through as if nothing was rounded.

    scheme: of fp4 weights with rounded activations. total [1]: nvfp4's global scale of the inputs.
    """
    assert scheme.is_fp4
    assert scheme.activations is not None
    bits = scheme.activations.bits
    size = scheme.group_size if bits == 4 else BLOCK
    grouped = x.detach().float().view(*x.shape[:-1], -1, size or 1)
    scale = _scale(grouped.abs().amax(-1, keepdim=True), bits, total)
    rounded = (nearest_floats(grouped / scale, bits) * scale).flatten(-2)
    return x + (rounded.to(x.dtype) - x).detach()


def _scale(peak: Tensor, bits: int, total: Tensor | None) -> Tensor:
    """The scales of groups, by their largest magnitudes."""
    if bits == 8:
        return (peak / LARGEST_FLOAT[8]).clamp(min=2.0**-100)
    if total is None:  # the group's largest number comes to lie between 3.5 and 7
        power = ((peak.contiguous().view(torch.int32) + _QUARTER) & _EXPONENT).view(torch.float32)
        return (power / 4).clamp(min=2.0**-100)
    held = (total * peak / LARGEST_FLOAT[4]).clamp(max=LARGEST_FLOAT[8]).to(torch.float8_e4m3fn).float()
    return torch.where(held > 0, held, _SMALLEST) / total
