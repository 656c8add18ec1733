"""Properties of rounding that hold for every weight on every grid, and of selecting the smallest weights."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.packing import pack
from nightpress.core.compress.grids.rounding import dequantize, round_to_grid
from nightpress.core.compress.solvers.threshold import (
    count_lower,
    count_upper,
    locate,
    magnitude_keys,
    pattern_mask,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def weights(draw: st.DrawFn, columns_of: int = 1) -> torch.Tensor:
    rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    seed, exponent = draw(st.integers(0, 2**31)), draw(st.integers(-12, 3))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, groups * columns_of, generator=generator) * 2.0**exponent
    if draw(st.booleans()):  # so that many magnitudes are equal
        values = (values * 4 / 2.0**exponent).round() * 2.0**exponent / 4
    if draw(st.booleans()):
        values[draw(st.integers(0, rows - 1))] = 0
    return values.to(draw(DTYPES))


@given(weights(columns_of=32), st.sampled_from([4, 8]), st.sampled_from([None, 16, 32]), st.booleans())
@settings(max_examples=150)
@pytest.mark.slow
def test_every_weight_lies_within_half_a_step(source: torch.Tensor, bits: int, group_size: int | None, symmetric: bool):
    rounded = round_to_grid(source, Grid(bits, group_size, symmetric))
    back = dequantize(rounded.codes, rounded.scale, rounded.zero_point).double()
    steps = rounded.scale.double().repeat_interleave(source.shape[1] // rounded.scale.shape[1], dim=1)
    # Half a step, plus the rounding of the step's reciprocal.
    assert float(((back - source.double()).abs() / steps).max()) <= 0.5 + 5e-5
    error = float((back - source.double()).square().sum())
    assert rounded.squared_error == pytest.approx(error, rel=1e-3, abs=1e-9 * float(steps.square().sum()))
    assert rounded.squared_norm == pytest.approx(float(source.double().square().sum()), rel=1e-4)


@given(weights(columns_of=32), st.sampled_from([4, 8]))
@settings(max_examples=50)
def test_rounding_what_lies_on_the_grid_changes_nothing(source: torch.Tensor, bits: int):
    first = round_to_grid(source.float(), Grid(bits))
    again = torch.round(dequantize(first.codes, first.scale) / first.scale)
    assert torch.equal(again.to(torch.int8), first.codes)


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 2**31))
@settings(max_examples=100)
def test_packing_is_the_librarys(rows: int, columns: int, bits: int, seed: int):
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))


@given(weights(), st.data())
@settings(max_examples=150)
@pytest.mark.slow
def test_radix_selection_finds_the_key_of_any_rank(source: torch.Tensor, data: st.DataObject):
    keys = magnitude_keys(source)
    rank = data.draw(st.integers(0, keys.numel() - 1))
    upper, within = locate(count_upper(keys), rank)
    lower, ties = locate(count_lower(keys, upper), within)
    ordered = keys.view(-1).sort().values
    assert upper << 16 | lower == int(ordered[rank])
    assert ties == rank - int((ordered < ordered[rank]).sum())


@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (5, 7)]), st.data())
@settings(max_examples=100)
def test_a_pattern_keeps_the_largest_of_each_group(pattern: tuple[int, int], data: st.DataObject):
    kept, group = pattern
    source = data.draw(weights(columns_of=group))
    keys = magnitude_keys(source)
    gone = pattern_mask(keys, kept, group)
    groups, flags = keys.view(-1, group), gone.view(-1, group)
    assert (flags.sum(1) == group - kept).all()
    smallest_kept = groups.masked_fill(flags, 2**31 - 1).amin(1)
    largest_gone = groups.masked_fill(~flags, -1).amax(1)
    assert (largest_gone <= smallest_kept).all()
    order = groups.sort(dim=1, stable=True).indices[:, : group - kept]  # among equal magnitudes, the first is removed
    assert torch.equal(flags, torch.zeros_like(flags).scatter_(1, order, True))
