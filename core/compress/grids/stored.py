"""Convert a weight on its grid to the tensors of compressed-tensors, and back as a loader does."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nightpress.core.compress.grids.grid import E2M1, LARGEST_FLOAT, Grid
from nightpress.core.compress.grids.packing import pack_bits, unpack_bits
from nightpress.core.compress.grids.ranges import find_ranges, half_quadratic
from nightpress.core.compress.grids.rounding import dequantize, nearest_codes
from nightpress.core.recipes.schemes import BLOCK, Scheme

_SEARCHED_SCALE = 256.0  #: fp8's largest power of two; 1.5 times it is a number of fp8, too


@dataclass(frozen=True)
class Coded:
    """A weight [out, in] on a grid. Solvers also stack weights along a dimension in front."""

    codes: Tensor  #: [out, in]: int8, or the floats of the grid
    scale: Tensor  #: in the stored dtype: [out, groups], [1] (strategy `tensor`) or [⌈out/128⌉, ⌈in/128⌉] (strategy `block`)
    zero_point: Tensor | None = None  #: int8 [out, groups]
    global_scale: Tensor | None = None  #: float32 [1]; nvfp4's scales are divided by it


def grid_of(scheme: Scheme) -> Grid:
    """The scheme's grid, for solvers whose groups lie within a row."""
    return Grid(scheme.bits, scheme.group_size, scheme.symmetric, scheme.kind)


def round_weight(
    weight: Tensor,
    scheme: Scheme,
    stored: torch.dtype,
    *,
    ranges: str = "extremes",
    importance: Tensor | None = None,
    largest: float | None = None,
) -> Coded:
    """Round a weight [out, in] float32 to nearest.

    stored: the dtype of the scales, unless the format fixes it. ranges: `extremes`, `least-error` (weighted by importance [in]; None: all
    inputs alike) or `half-quadratic`. largest: the largest magnitude of the whole tensor, since `weight` may be some of its rows; the
    strategy `tensor` and nvfp4 need it.
    """
    grid = grid_of(scheme)
    if scheme.strategy == "block":
        return _round_blocks(weight, grid, stored)
    if scheme.strategy == "tensor":
        assert largest is not None
        row = torch.full((1, 1), largest, device=weight.device)
        scale, _ = find_ranges(row, grid, stored)
        wide = scale.expand(len(weight), 1)
        return Coded(nearest_codes(weight, wide, torch.zeros_like(wide), grid), scale.view(1).to(stored))
    held = scale_dtype(scheme, stored)
    if scheme.has_global_scale:
        assert largest is not None
        total = global_scale(largest, ranges, weight.device)
        coded = round_rows(weight * total, grid, held, ranges, importance)
        return Coded(coded.codes, coded.scale, global_scale=total)
    return round_rows(weight, grid, held, ranges, importance)


def scale_dtype(scheme: Scheme, stored: torch.dtype) -> torch.dtype:
    """The dtype of a scheme's scales. stored: that of the float weight."""
    fixed = {"mxfp4-pack-quantized": torch.float8_e8m0fnu, "nvfp4-pack-quantized": torch.float8_e4m3fn}
    return fixed.get(scheme.format, stored)


def global_scale(largest: float, ranges: str, device: torch.device) -> Tensor:
    """nvfp4's global scale, float32 [1], for the largest magnitude of all weights that share it.

    The group of the largest weight gets fp8's largest scale, or 256 where scales are searched: then a scale of 1.5 times its extremes
    still fits. A scale that doesn't fit would become NaN, so the scale is a little less than that: by as much as the rounding of three
    float32 operations can add.
    """
    most = (LARGEST_FLOAT[8] if ranges == "extremes" else _SEARCHED_SCALE) * LARGEST_FLOAT[4] * (1 - 2.0**-22)
    return torch.tensor([most / max(largest, 2.0**-80)], device=device)


def round_rows(weight: Tensor, grid: Grid, stored: torch.dtype, ranges: str, importance: Tensor | None) -> Coded:
    """`round_weight` for a weight [..., out, in] with its scales in a row, in the dtype `stored`, and without a global scale."""
    if ranges == "half-quadratic":
        scale, zero_point = half_quadratic(weight, grid, stored)
    else:
        if ranges == "least-error" and importance is None:
            importance = weight.new_ones((*weight.shape[:-2], weight.shape[-1]))
        scale, zero_point = find_ranges(
            weight, grid, stored, importance=importance if ranges == "least-error" else None
        )
    codes = nearest_codes(weight, scale, zero_point, grid)
    if grid.kind == "int":
        codes = codes.to(torch.int8)
    return Coded(codes, scale.to(stored), None if grid.symmetric else zero_point.to(torch.int8))


def _round_blocks(weight: Tensor, grid: Grid, stored: torch.dtype) -> Coded:
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).transpose(1, 2)  # [R, C, 128, 128]
    flat = blocks.reshape(-1, BLOCK * BLOCK)
    scale, zero_point = find_ranges(flat, grid, stored)
    codes = nearest_codes(flat, scale, zero_point, grid).view(blocks.shape).transpose(1, 2).reshape(padded.shape)
    return Coded(codes[:rows, :columns].contiguous(), scale.view(blocks.shape[:2]).to(stored))


def dequantized(coded: Coded, scheme: Scheme) -> Tensor:
    """The weight [out, in] in float32, as a loader dequantizes it."""
    if scheme.strategy == "block":
        rows, columns = coded.codes.shape
        wide = coded.scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return coded.codes.float() * wide
    if scheme.strategy == "tensor":
        return coded.codes.float() * coded.scale.float()
    scale = coded.scale.float()
    if coded.global_scale is not None:
        scale = scale / coded.global_scale
    return dequantize(coded.codes, scale, coded.zero_point)


def to_tensors(name: str, scheme: Scheme, coded: Coded, *, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors to write for the weight `name`. input_scale [1]: the static scale of the layer's inputs, for nvfp4 the global one."""
    tensors: dict[str, Tensor] = {}
    if scheme.format == "pack-quantized":
        tensors[f"{name}_packed"] = pack_bits(coded.codes, scheme.bits)
        tensors[f"{name}_shape"] = torch.tensor(coded.codes.shape)
        if coded.zero_point is not None:  # packed along the output dimension
            tensors[f"{name}_zero_point"] = pack_bits(coded.zero_point.t(), scheme.bits).t().contiguous()
    elif scheme.bits == 4:
        tensors[f"{name}_packed"] = _pack_e2m1(coded.codes)
    else:
        tensors[name] = coded.codes.to(torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn)
    scale = coded.scale
    tensors[f"{name}_scale"] = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    if coded.global_scale is not None:
        tensors[f"{name}_global_scale"] = coded.global_scale
    if input_scale is not None:
        part = "input_global_scale" if scheme.has_input_global_scale else "input_scale"
        tensors[name.removesuffix("weight") + part] = input_scale
    return tensors


def from_tensors(name: str, scheme: Scheme, written: Mapping[str, Tensor]) -> Tensor:
    """Read and dequantize the weight `name` from the tensors of `to_tensors`: float32 [out, in]."""
    scale = written[f"{name}_scale"]
    if scheme.format == "pack-quantized":
        rows, columns = written[f"{name}_shape"].tolist()
        zero_point = None
        if not scheme.symmetric:
            zero_point = unpack_bits(written[f"{name}_zero_point"].t().contiguous(), scheme.bits, rows).t()
        codes = unpack_bits(written[f"{name}_packed"], scheme.bits, columns)
        return dequantized(Coded(codes, scale, zero_point), scheme)
    if scheme.bits == 8:
        return dequantized(Coded(written[name].float(), scale), scheme)
    codes = unpack_e2m1(written[f"{name}_packed"])
    if not scheme.has_global_scale:
        return dequantized(Coded(codes, scale.view(torch.float8_e8m0fnu)), scheme)
    return dequantized(Coded(codes, scale, global_scale=written[f"{name}_global_scale"]), scheme)


def _pack_e2m1(values: Tensor) -> Tensor:
    """Numbers of e2m1 [rows, columns] → uint8 [rows, columns / 2].

    A number takes four bits: its sign and its index in E2M1. The first of two numbers is in the low bits.
    """
    numbers = torch.tensor(E2M1, dtype=values.dtype, device=values.device)
    places = torch.bucketize(values.abs(), numbers).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
    return places[:, ::2] | (places[:, 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    places = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(len(packed), -1).int()
    numbers = torch.tensor(E2M1, device=packed.device)
    return torch.where(places > 7, -numbers[places & 7], numbers[places & 7])
