"""The order in which the units of a layer are removed, channels or heads, and the error after each removal.

A unit is a fixed number of neighbouring columns of the matrix W [out, in] that reads them. Units are removed one at a time, always the unit
whose removal adds the least error once all other columns have been refitted: ZipLM (arXiv 2302.04089), eq. 2 to 4, an Optimal Brain Surgeon
for structures. `compensated` of units.py gives the refitted weights of any set that is left, so none are kept here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nightpress.core.compress.solvers.gram import damped_cholesky

_COMPACTED = 0.9  #: removed columns are cut out of the matrices when so small a share is left


@dataclass(frozen=True)
class Removal:
    """A layer's units in the order of their removal."""

    order: Tensor  #: int64 [units], the first removed first
    #: float64 [units + 1]: the squared error of the output after so many removals, a mean over tokens, as a share of the output's power
    errors: Tensor


def removal(weight: Tensor, second: Tensor, width: int, *, damping: float) -> Removal:
    """Return the order of removal and its errors.

    weight [out, in]; second [in, in], the second moments C of the inputs (see units.py); width: columns of a unit. `damping` times the mean
    diagonal of C is added to its diagonal. Computed in float64. Raises NightpressError(numerical_failure) if C stays indefinite.
    """
    weight, second = weight.double().clone(), second.double()
    units = weight.shape[1] // width
    amount = damping * float(second.diagonal().mean())
    if amount <= 0:  # the layer reads zeros: removing them changes nothing
        return Removal(torch.arange(units), torch.zeros(units + 1, dtype=torch.float64))
    power = float(((weight @ second) * weight).sum())
    lower, _ = damped_cholesky(second.clone(), second.new_tensor(amount))
    inverse = torch.cholesky_inverse(lower)  # [in, in]
    left = torch.arange(units, device=weight.device)  # the unit of each place in the matrices
    gone = torch.zeros(units, dtype=torch.bool, device=weight.device)  # by place
    order, added = [], []
    for step in range(units):
        costs = _costs(weight, inverse, width).masked_fill(gone, torch.inf)
        place = int(costs.argmin())
        order.append(int(left[place]))
        added.append(costs[place].clamp(min=0))
        columns = slice(place * width, (place + 1) * width)
        block = inverse[columns, columns]
        rows = inverse[columns] / block if width == 1 else torch.linalg.solve(block, inverse[columns])
        weight.addmm_(weight[:, columns].clone(), rows, alpha=-1)  # eq. 3; rows is (H⁻¹_SS)⁻¹ H⁻¹_S: [width, in]
        inverse.addmm_(inverse[:, columns].clone(), rows, alpha=-1)  # eq. 4
        gone[place] = True
        if units - step - 1 < _COMPACTED * len(left):
            keep = (~gone).nonzero()[:, 0]
            wide = (keep[:, None] * width + torch.arange(width, device=keep.device)).reshape(-1)
            weight, inverse = weight[:, wide], inverse[wide][:, wide]
            left, gone = left[keep], gone[keep]
    errors = torch.stack(added).cumsum(0).cpu() / max(power, 1e-30)
    return Removal(torch.tensor(order), torch.cat([errors.new_zeros(1), errors]))


def _costs(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """The error that each unit's removal adds, eq. 2: tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ). → [units]; that of a removed unit is not defined."""
    if width == 1:
        norms: Tensor = torch.linalg.vector_norm(weight, dim=0)
        return norms.square() / inverse.diagonal().clamp(min=1e-300)
    units = weight.shape[1] // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, w, w]
    gone = blocks.diagonal(dim1=1, dim2=2).abs().amax(1) < 1e-12 * inverse.abs().max()
    blocks = torch.where(gone[:, None, None], torch.eye(width, dtype=inverse.dtype, device=inverse.device), blocks)
    parts = weight.view(-1, units, width).permute(1, 2, 0)  # [units, w, out]
    solved: Tensor = torch.linalg.solve(blocks, parts)
    return (parts * solved).sum((1, 2))
