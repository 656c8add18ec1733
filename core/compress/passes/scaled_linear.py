"""A linear layer of fixed codes whose scales learn."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nightpress.core.compress.grids.grid import LARGEST_FLOAT
from nightpress.core.compress.grids.packing import unpack_bits
from nightpress.core.compress.grids.rounded_inputs import round_inputs
from nightpress.core.compress.grids.stored import unpack_e2m1
from nightpress.core.recipes.schemes import Scheme


class ScaledLinear(nn.Module):
    """A linear layer with the weight scale · (code − zero point). The scale is its own, times 1 + `change`, in its stored dtype.

    The relative change learns: scales differ by orders of magnitude, and then one learning rate fits all. Gradients pass through the
    rounding of the scale. Powers of two have no change.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, parts: Mapping[str, Tensor]) -> None:
        """linear: only its bias is used. parts: the stored tensors of its weight: `packed`, `scale`, …, or `codes` if not packed."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme, self.bias = scheme, linear.bias
        scale = parts["scale"]
        powers = scheme.format == "mxfp4-pack-quantized"
        self.steps = _fixed(_steps(scheme, parts, self.out_features, self.in_features))
        self.scale = _fixed(scale.view(torch.float8_e8m0fnu) if powers else scale)
        self.total = _fixed(parts["global_scale"]) if "global_scale" in parts else None
        self.inputs_total = _fixed(parts["input_global_scale"]) if "input_global_scale" in parts else None
        self.change = None if powers else nn.Parameter(torch.zeros(scale.shape))

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in float32, as a loader dequantizes it."""
        scale = self.scale.float()
        if self.change is not None:
            wanted = scale * (1 + self.change)
            scale = wanted + (self._held(wanted.detach()).float() - wanted).detach()
        if self.total is not None:
            scale = scale / self.total
        grouped = self.steps.float().view(self.out_features, scale.shape[-1] if scale.dim() == 2 else 1, -1)
        return (grouped * scale.reshape(-1, grouped.shape[1], 1)).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.activations is not None:
            x = round_inputs(x, self.scheme, self.inputs_total)
        return nn.functional.linear(x, self.weight, self.bias)

    def stored_scale(self) -> Tensor:
        """The scale in its stored dtype."""
        if self.change is None:
            return self.scale.detach()
        return self._held(self.scale.float() * (1 + self.change.detach()))

    def _held(self, wanted: Tensor) -> Tensor:
        """The nearest numbers of the scale's dtype. A scale that would become zero or change its sign stays as it was."""
        if self.scale.dtype == torch.float8_e4m3fn:
            wanted = wanted.clamp(max=LARGEST_FLOAT[8])
        held = wanted.to(self.scale.dtype).float()
        return torch.where(held * self.scale.float() > 0, held, self.scale.float()).to(self.scale.dtype)


def _fixed(tensor: Tensor) -> nn.Parameter:
    """A parameter that does not learn: it moves with the module to a device, and is in no checkpoint."""
    return nn.Parameter(tensor, requires_grad=False)


def _steps(scheme: Scheme, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    """Codes less zero points, [out, in]: int16, or bfloat16 for floats, which holds them exactly."""
    if scheme.kind == "float":
        return (unpack_e2m1(parts["packed"]) if "packed" in parts else parts["codes"].float()).to(torch.bfloat16)
    codes = unpack_bits(parts["packed"], scheme.bits, columns).short()
    if scheme.symmetric:
        return codes
    zeros = unpack_bits(parts["zero_point"].t().contiguous(), scheme.bits, rows).t().short()  # [out, groups]
    return (codes.view(rows, zeros.shape[1], -1) - zeros[..., None]).view(rows, columns)
