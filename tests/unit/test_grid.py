"""Integer grids and packing, compared with the library that reads our files."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.packing import pack, pack_zero_points
from nightpress.core.compress.grids.ranges import find_ranges
from nightpress.core.compress.grids.rounding import dequantize, nearest_codes, round_to_grid
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.errors import ErrorCode, NightpressError

GRIDS = [Grid(8), Grid(8, 32), Grid(4), Grid(4, 32), Grid(8, symmetric=False), Grid(4, 32, symmetric=False)]


def weight(rows: int = 24, columns: int = 96, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul_(0.05).to(dtype)


def scheme(grid: Grid) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=grid.bits,
            type="int",
            symmetric=grid.symmetric,
            strategy="channel" if grid.group_size is None else "group",
            group_size=grid.group_size,
        ),
    )


@pytest.mark.parametrize("columns", [1, 3, 8, 31, 32, 96, 130])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words_are_those_of_the_library(bits: int, columns: int):
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(columns))
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("rows", [1, 7, 8, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_zero_points_are_those_of_the_library(bits: int, rows: int):
    top = 2 ** (bits - 1)
    zero_point = torch.randint(-top, top, (rows, 3), dtype=torch.int8)
    assert torch.equal(pack_zero_points(zero_point, bits), pack_to_int32(zero_point, bits, packed_dim=0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_library_compresses_our_grid_points_to_our_bytes(grid: Grid):
    """The library's compressor gets our scales and a weight whose values are grid points, and writes the same packed bytes."""
    rounded = round_to_grid(weight(dtype=torch.float32), grid)
    zero_point = rounded.zero_point
    state = {
        "weight": dequantize(rounded.codes, rounded.scale, zero_point),
        "weight_scale": rounded.scale,
        "weight_zero_point": torch.zeros_like(rounded.scale, dtype=torch.int8) if zero_point is None else zero_point,
    }
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme(grid))
    assert torch.equal(theirs["weight_packed"], pack(rounded.codes, grid.bits))
    assert torch.equal(theirs["weight_shape"], torch.tensor(rounded.codes.shape))
    if zero_point is not None:
        assert torch.equal(theirs["weight_zero_point"], pack_zero_points(zero_point, grid.bits))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_library_reads_back_the_weight_we_mean(grid: Grid):
    rounded = round_to_grid(weight(dtype=torch.float32), grid)
    state = {
        "weight_packed": pack(rounded.codes, grid.bits),
        "weight_scale": rounded.scale,
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    if rounded.zero_point is not None:
        state["weight_zero_point"] = pack_zero_points(rounded.zero_point, grid.bits)
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme(grid))["weight"]
    assert torch.equal(theirs, dequantize(rounded.codes, rounded.scale, rounded.zero_point))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_zeros_and_a_row_of_tiny_numbers_have_finite_scales(dtype: torch.dtype):
    source = weight(dtype=dtype)
    source[0] = 0
    source[1] = torch.finfo(dtype).smallest_normal
    rounded = round_to_grid(source, Grid(4))
    assert torch.isfinite(rounded.scale).all()
    assert (rounded.scale != 0).all()
    assert torch.equal(dequantize(rounded.codes, rounded.scale)[0], torch.zeros(source.shape[1], dtype=dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("source", "code", "step"),
    [([-4.0, 1.0], -8, 0.5), ([-4.0, 3.75], -8, 0.5), ([4.0, -1.0], -8, -0.5), ([4.0, -4.0], 7, 4 / 7.5)],
)
def test_the_largest_weight_is_the_lowest_code_whatever_its_sign(
    source: list[float], code: int, step: float, dtype: torch.dtype
):
    rounded = round_to_grid(torch.tensor([source], dtype=dtype), Grid(4))
    assert int(rounded.codes[0, 0]) == code
    assert float(rounded.scale) == pytest.approx(step, rel=float(torch.finfo(dtype).eps))


@pytest.mark.parametrize(("source", "code", "step"), [([-4.0, 1.0], -128, 1 / 32), ([4.0, -1.0], 127, 4 / 127.5)])
def test_with_eight_bits_the_highest_weight_is_half_a_step_above_the_highest_code(
    source: list[float], code: int, step: float
):
    rounded = round_to_grid(torch.tensor([source]), Grid(8))
    assert int(rounded.codes[0, 0]) == code
    assert float(rounded.scale) == pytest.approx(step, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_steps_lose_less_than_those_of_the_largest_magnitude(bits: int):
    source, grid = weight(512, 512, torch.float32), Grid(bits, 64)
    grouped = source.view(512, 8, 64)
    step = grouped.abs().amax(2, keepdim=True) / grid.reach
    usual = (grouped / step).round().clamp(-grid.top, grid.top - 1) * step
    rounded = round_to_grid(source, grid)
    assert rounded.squared_error < (0.95 if bits == 4 else 0.998) * float((usual - grouped).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_sweep_and_the_solvers_have_the_same_grid(dtype: torch.dtype):
    source = weight(dtype=dtype)
    rounded = round_to_grid(source, Grid(4, 32))
    scale, zero_point = find_ranges(source.float(), Grid(4, 32), dtype)
    assert torch.equal(rounded.scale, scale.to(dtype))
    codes = nearest_codes(source.float(), scale, zero_point, Grid(4, 32)).to(torch.int8)
    steps = source.float() / scale.repeat_interleave(32, dim=1)
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-5
    assert torch.equal(rounded.codes[~tie], codes[~tie])
    assert float(tie.float().mean()) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinity_are_refused(bad: float, symmetric: bool, dtype: torch.dtype):
    source = weight(dtype=dtype)
    source[3, 5] = bad
    with pytest.raises(NightpressError) as caught:
        round_to_grid(source, Grid(8, symmetric=symmetric))
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE


def test_a_workspace_used_again_changes_nothing():
    workspace = Workspace()
    for rows in (24, 8, 16):  # a shorter last chunk uses a part of the buffers
        source = weight(rows, seed=rows)
        fresh, again = round_to_grid(source, Grid(4, 32)), round_to_grid(source, Grid(4, 32), workspace)
        assert torch.equal(fresh.codes, again.codes)
        assert torch.equal(pack(fresh.codes, 4), pack(again.codes, 4, workspace))
        assert fresh.squared_error == again.squared_error


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="3 bits"):
        pack(torch.zeros(1, 8, dtype=torch.int8), 3)
