"""AWQ: divide a layer's strong inputs by factors and multiply the weight's columns by them, so that these columns are rounded more finely.

The published search runs the layer forward for every candidate. The error that it measures, Σ ‖(W − Ŵ)x‖², equals
tr((W − Ŵ) H (W − Ŵ)ᵀ) with the Gram matrix H. So each candidate takes one matrix product, whatever the number of tokens.

Lin et al., AWQ: Activation-aware Weight Quantization (arXiv 2306.00978), section 3.2.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.ranges import find_ranges
from nightpress.core.compress.grids.rounding import nearest_codes
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.products import fast_products
from nightpress.core.recipes.block_peak import stack_size

_EXPONENTS = tuple(step / 20 for step in range(21))
_ROWS = 4096  #: rows of a weight, evenly spaced, that the search uses; more rows don't change which candidate wins


class AwqLayer(NamedTuple):
    """Layers that read the inputs to be scaled: all tokens, or the tokens that a router sends to these layers."""

    weight: Tensor  #: [out, in] float32, the weights of all these layers, stacked along the rows
    gram: Tensor  #: [in, in] float32, Σ xxᵀ of the tokens that the layers were calibrated with
    grid: Grid
    share: float = 1.0  #: share of those tokens that the router sends to the layers, 0 … 1


def search_scales(
    places: Sequence[Sequence[AwqLayer]],
    stored: torch.dtype,
    *,
    share: tuple[int, int] = (1, 1),
    group: Group = ALONE,
    holders: Group = ALONE,
) -> Tensor:
    """Return for each place the factors [places, in] > 0 with the least output error: all 1 if no candidate is better than that.

    places: the layers that read the inputs of each place, all with the same number of inputs. All layers' columns are multiplied by the
    place's factors, and the inputs are divided by them. stored: the dtype of the scales. The loss of each layer is summed over the tokens
    that are routed to it, so that an expert counts as often as it is used.
    share (heads, width): columns are heads · repeats · width. All repeats of a head get the same factors, as grouped-query attention needs.
    group: processes with the same layers, which share out the candidates. holders: processes with different layers of the same places.
    """
    rows = [holders.total(sum(len(layer.weight) for layer in layers)) for layers in places]
    candidates = torch.stack(
        [_candidates(layers, share, count, holders) for layers, count in zip(places, rows, strict=True)], dim=1
    )  # [candidates, places, in]
    losses = torch.zeros(candidates.shape[:2], device=candidates.device)
    for weight, gram, grid, of, weigh in _stacks(places, rows):
        for at in range(len(candidates))[group.share(len(candidates))]:
            factors = candidates[at]
            lost = weight - round_scaled(weight, factors[of, None], grid, stored)
            with fast_products():
                loss = ((lost @ gram).mul_(lost)).sum((1, 2))
            losses[at].index_add_(0, of, loss * weigh)
    group.sum(losses)  # of the candidates of other processes, this one has zeros
    holders.sum(losses)
    best, least = candidates[0], losses[0]  # the first candidate's factors are all 1
    for factors, loss in zip(candidates[1:], losses[1:], strict=True):
        better = loss < least
        best, least = torch.where(better[:, None], factors, best), torch.where(better, loss, least)
    return best


def _candidates(layers: Sequence[AwqLayer], share: tuple[int, int], rows: int, holders: Group) -> Tensor:
    """The factors to try [candidates, in]. rows: of the layers of all processes."""
    power = torch.stack([layer.gram.diagonal() * layer.share for layer in layers]).sum(0)
    magnitude = torch.stack([layer.weight.abs().mean(0) * (len(layer.weight) / rows) for layer in layers]).sum(0)
    holders.sum(power)
    holders.sum(magnitude)
    inputs, weights = _shared(power.sqrt(), share), _shared(magnitude, share)
    inputs, weights = inputs / inputs.mean().clamp(min=1e-12), weights / weights.mean().clamp(min=1e-12)
    found = []
    for exponent in _EXPONENTS:
        for against in (0.0, 1.0) if exponent else (0.0,):
            factors = inputs.clamp(min=1e-4) ** exponent / weights.clamp(min=1e-4) ** (against * (1 - exponent))
            found.append(factors / (factors.max() * factors.min()).sqrt())
    return torch.stack(found)


def _stacks(
    places: Sequence[Sequence[AwqLayer]], all_rows: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Grid, Tensor, Tensor]]:
    """Stack layers of equal shape: weights [n, rows, in], Gram matrices [n, in, in], their grid, their places [n] and their shares [n].

    Of each place at most 4096 rows are looked at; all_rows counts them in all processes. On a CPU each layer is alone. Layers that no token reaches are left out.
    """
    alike: dict[tuple[object, ...], list[tuple[int, AwqLayer]]] = {}
    for place, layers in enumerate(places):
        step = -(-all_rows[place] // _ROWS)
        for layer in layers:
            if layer.share:
                sampled = layer._replace(weight=layer.weight[::step])
                alike.setdefault((sampled.weight.shape, layer.grid), []).append((place, sampled))
    for found in alike.values():
        first = found[0][1]
        rows, columns = first.weight.shape
        most = stack_size(rows, columns, len(found)) if first.weight.is_cuda else 1
        for start in range(0, len(found), most):
            chosen = found[start : start + most]
            yield (
                torch.stack([layer.weight for _, layer in chosen]),
                chosen[0][1].gram[None] if len(chosen) == 1 else torch.stack([layer.gram for _, layer in chosen]),
                first.grid,
                torch.tensor([place for place, _ in chosen], device=first.weight.device),
                torch.tensor([layer.share for _, layer in chosen], device=first.weight.device),
            )


def round_scaled(weight: Tensor, factors: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    """Multiply the columns of a weight [..., out, in] by factors [in], round to nearest, dequantize and divide by the factors again.

    In a stack, factors are [..., 1, in].
    """
    scaled = weight * factors
    scale, zero_point = find_ranges(scaled, grid, stored)
    codes = nearest_codes(scaled, scale, zero_point, grid)
    steps = codes.view(*scale.shape, -1) - zero_point[..., None]
    return (steps * scale[..., None]).view(weight.shape) / factors


def _shared(values: Tensor, share: tuple[int, int]) -> Tensor:
    heads, width = share
    if heads * width in (1, len(values)):
        return values
    grouped = values.view(heads, -1, width)
    return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)
