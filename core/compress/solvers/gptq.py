"""Round a weight to its grid with the Optimal Brain Surgeon solver, and to nearest in the rows where that costs the outputs less.

Frantar et al., GPTQ (arXiv 2210.17323).
"""

import torch
from torch import Tensor

from nightpress.core.compress.grids.refine import fit_scales
from nightpress.core.compress.grids.rounding import dequantize
from nightpress.core.compress.grids.stored import Coded, global_scale, grid_of, round_rows, scale_dtype
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.obs import Factor, Prune, Quantize, Solved, output_loss, solve
from nightpress.core.compress.solvers.products import fast_products
from nightpress.core.recipes.schemes import Scheme

#: A row keeps the solver's codes only if their loss is below this share of the loss of rounding to nearest. The margin is far larger than
#: the error of `fast_products`.
_CLEARLY = 0.99


def round_obs(
    weight: Tensor,
    gram: Tensor,
    factor: Factor,
    scheme: Scheme,
    stored: torch.dtype,
    *,
    ranges: str = "extremes",
    refine: bool = False,
    prune: Prune | None = None,
    largest: float | None = None,
    group: Group = ALONE,
) -> Coded:
    """Round a weight [..., out, in] float32 with the Optimal Brain Surgeon solver.

    gram [..., in, in] is the Gram matrix that `factor` was made from. stored: the dtype of the scales, unless the format fixes it. ranges:
    as in `Quantize`. refine: refit the scales to the chosen codes. largest: nvfp4 needs it, as in `round_weight`. Without `prune`, no row
    costs the outputs more than rounding to nearest. With `prune`, rows are not compared with rounding to nearest, and `refine` has no
    effect. group: as in `solve`. Raises NightpressError(numerical_failure) as `solve` does.
    """
    grid, held = grid_of(scheme), scale_dtype(scheme, stored)
    total = None
    if scheme.has_global_scale:
        assert largest is not None
        total = global_scale(largest, ranges, weight.device)
        weight = weight * total
    importance = factor.power if ranges == "least-error" else None
    nearest = None if prune else round_rows(weight, grid, held, ranges, importance)
    known = None if nearest is None else _ranges_of(nearest)
    solved = solve(weight, factor, Quantize(grid, held, ranges, known), prune, group)
    assert solved.codes is not None
    assert solved.scale is not None
    if nearest is None:
        return Coded(solved.codes, solved.scale, solved.zero_point, total)
    scale, loss = solved.scale, solved.loss
    with fast_products():
        if refine:
            fitted = _fitted(weight, gram, factor, solved, scale, held)
            fitted_loss = output_loss(weight, dequantize(solved.codes, fitted, solved.zero_point), factor)
            scale = torch.where((fitted_loss < loss)[..., None], fitted, scale)
            loss = torch.minimum(fitted_loss, loss)
        nearest_loss = output_loss(weight, dequantize(nearest.codes, nearest.scale, nearest.zero_point), factor)
    worse = (loss > _CLEARLY * nearest_loss)[..., None]
    zero_point = solved.zero_point
    if zero_point is not None and nearest.zero_point is not None:
        zero_point = torch.where(worse, nearest.zero_point, zero_point)
    kept = torch.where(worse, nearest.scale.float(), scale.float()).to(held)  # torch selects few numbers of 8 bits
    return Coded(torch.where(worse, nearest.codes, solved.codes), kept, zero_point, total)


def _ranges_of(coded: Coded) -> tuple[Tensor, Tensor]:
    """Scales and zero points [..., out, groups] in float32."""
    scale = coded.scale.float()
    return scale, torch.zeros_like(scale) if coded.zero_point is None else coded.zero_point.float()


def _fitted(weight: Tensor, gram: Tensor, factor: Factor, solved: Solved, scale: Tensor, stored: torch.dtype) -> Tensor:
    assert solved.codes is not None
    steps = solved.codes.to(weight.dtype)
    if solved.zero_point is not None:
        steps = (steps.view(*scale.shape, -1) - solved.zero_point[..., None]).view_as(weight)
    return fit_scales(weight, gram, steps, scale.to(weight.dtype), stored, damping=factor.damping).to(stored)
