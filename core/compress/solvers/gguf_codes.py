"""Round a weight onto the grids of GGUF's blocks with the Optimal Brain Surgeon solver.

The ranges are fitted and rounded to their few bits first, so that the grid is fixed; then the codes are chosen column after column, each
column making up for the errors of those before it. A part's minimum shifts its grid. The solver only sees differences between weights and
grid, so weight and grid are both moved by the minimum, and the solver gets a grid of integers with a scale for each part.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nightpress.core.compress.grids.gguf_blocks import BlockCoded, BlockRanges
from nightpress.core.compress.grids.gguf_ranges import fit_ranges, nearest_block_codes, solvable
from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.refine import fit_scales
from nightpress.core.compress.solvers.obs import Factor, Quantize, output_loss, solve
from nightpress.core.compress.solvers.products import fast_products
from nightpress.core.recipes.gguf_types import GgufType

#: A row keeps the solver's codes only if their loss is below this share of the loss of rounding to nearest, as in `solvers.gptq`.
_CLEARLY = 0.99


def solve_blocks(weight: Tensor, gram: Tensor, factor: Factor, kind: GgufType) -> BlockCoded:
    """Round a weight [out, in] float32 onto the grid of a GGUF type.

    gram [in, in] is the Gram matrix that `factor` was made from; the factor's order must be by power. The ranges are fitted with the inputs'
    power as importance. After the codes are chosen, the blocks' units are fitted to them. No row costs the outputs more than rounding to
    nearest. Raises NightpressError(numerical_failure) as `solve` does.
    """
    ranges = fit_ranges(weight, kind, factor.power)
    nearest = BlockCoded(kind, nearest_block_codes(weight, kind, ranges), ranges)
    with fast_products():
        nearest_loss = output_loss(weight, nearest.dequantize(), factor)
    best = BlockCoded(kind, _solved_codes(weight, factor, kind, ranges), ranges)
    with fast_products():
        loss = output_loss(weight, best.dequantize(), factor)
        fitted = replace(best, ranges=_fitted_units(weight, gram, factor, best))
        fitted_loss = output_loss(weight, fitted.dequantize(), factor)
    best = fitted.choose_rows(fitted_loss < loss, best)
    return best.choose_rows(torch.minimum(fitted_loss, loss) <= _CLEARLY * nearest_loss, nearest)


def _solved_codes(weight: Tensor, factor: Factor, kind: GgufType, ranges: BlockRanges) -> Tensor:
    """uint8 [out, in]"""
    minimum = ranges.minimum()
    scale = solvable(ranges.scale()).flatten(1)  # [out, parts of a row]
    zero_point = torch.full_like(scale, 0.0 if minimum is None else -kind.half)
    moved = weight if minimum is None else weight + minimum.flatten(1).repeat_interleave(kind.part, 1)
    grid = Grid(kind.bits, kind.part)
    solved = solve(moved, factor, Quantize(grid, torch.float32, known=(scale, zero_point)))
    assert solved.codes is not None
    return (solved.codes.to(torch.int16) + kind.half).to(torch.uint8)


def _fitted_units(weight: Tensor, gram: Tensor, factor: Factor, coded: BlockCoded) -> BlockRanges:
    """The ranges with the blocks' units, first that of the scales and then that of the minima, fitted to the codes' outputs."""
    kind, ranges = coded.kind, coded.ranges
    shape = ranges.scales.shape
    unit, minimum = ranges.unit.float(), ranges.minimum()
    codes = coded.codes.float().view(*shape, kind.part) - (0 if kind.minimum else kind.half)
    steps = (codes * ranges.scales[..., None]).view_as(weight)
    lowest = torch.zeros_like(weight) if minimum is None else minimum.flatten(1).repeat_interleave(kind.part, 1)
    unit = fit_scales(weight + lowest, gram, steps, unit, torch.float16, damping=factor.damping)
    if minimum is None or ranges.least_unit is None or ranges.minima is None:
        return replace(ranges, unit=unit.half())
    down = ranges.minima[..., None].expand(*shape, kind.part).reshape(weight.shape).float()
    raised = (codes * (unit[..., None] * ranges.scales)[..., None]).view_as(weight)
    least = fit_scales(raised - weight, gram, down, ranges.least_unit.float(), torch.float16, damping=factor.damping)
    return replace(ranges, unit=unit.half(), least_unit=least.half())
