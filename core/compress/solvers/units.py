"""Structured pruning: choose the units to remove, feed-forward channels or groups of attention heads, and compensate for them.

A unit is a fixed number of neighbouring columns of the one matrix W [out, in] that reads the pruned activations x. The calibration text
gives the second moments of x. If W has a bias, the bias compensates for the means, and C = Σ (x − μ)(x − μ)ᵀ / n. Otherwise
C = Σ xxᵀ / n.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nightpress.core.compress.ranks.group import Group
from nightpress.core.compress.solvers.gram import Gram, damped_cholesky


class Moments:
    """Running first and second moments of a layer's inputs, in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._gram = Gram(columns, device)
        self._sum = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., columns]."""
        self._gram.add(inputs)
        self.tokens = self._gram.tokens
        self._sum += inputs.reshape(-1, inputs.shape[-1]).sum(0, dtype=torch.float32)

    def combine(self, group: Group) -> None:
        """Add what the other processes have added."""
        self._gram.combine(group)
        self.tokens = self._gram.tokens
        group.sum(self._sum)

    def is_finite(self) -> bool:
        """Whether all inputs and their sums are finite."""
        return self._gram.is_finite()

    def finish(self, *, centred: bool) -> "Known":
        """Return the moments. centred: subtract μμᵀ from the second moments. Do not call `add` after this: the memory is reused."""
        count = max(self.tokens, 1)
        second = self._gram.matrix().div_(count)
        mean = self._sum / count
        if centred:
            second.addr_(mean, mean, alpha=-1)
        return Known(second, mean)


@dataclass(frozen=True)
class Known:
    """The moments of a layer's inputs."""

    second: Tensor  #: [in, in], the C of this module's docstring
    mean: Tensor  #: [in], μ


def columns_of(units: Tensor, width: int) -> Tensor:
    """The column indices [k · width] of units [k], which have `width` columns each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)


def output_losses(weight: Tensor, known: Known, width: int) -> Tensor:
    """The squared error of the output, a mean over tokens, if this unit alone is removed: tr(W_u C_uu W_uᵀ). weight [out, in] → [units]."""
    units = weight.shape[1] // width
    blocks = known.second.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, w, w]
    parts = weight.view(-1, units, width).transpose(0, 1)  # [units, out, w]
    return ((parts @ blocks) * parts).sum((1, 2)).clamp_(min=0)


def weight_norms(parts: Sequence[Tensor], power: int) -> Tensor:
    """The L1 norm (power 1) or the squared L2 norm (power 2) of all weights of each unit. parts: [units, …] each → [units]"""
    return torch.stack([part.flatten(1).float().abs().pow(power).sum(1) for part in parts]).sum(0)


def smallest(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the `kept` units with the highest scores and the other units, each in ascending order. Of equal scores the last is removed."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:kept].sort().values, order[kept:].sort().values


def shares(scores: Sequence[Tensor], share: float, step: int) -> list[int]:
    """Return how many units each layer keeps when `share` of all layers' units is removed. scores: [units] of each layer.

    Units are removed `step` at a time, always the step with the lowest mean score in any layer. Every layer keeps at least one step.
    """
    kept = [len(score) for score in scores]
    gone, wanted = 0, share * sum(kept)
    ascending = [score.double().sort().values.tolist() for score in scores]
    queue: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        # If a layer's number of units is not a multiple of `step`, its first step is smaller and leaves a multiple.
        size = kept[layer] % step or step
        if kept[layer] - size >= step:
            start = len(ascending[layer]) - kept[layer]
            heapq.heappush(queue, (sum(ascending[layer][start : start + size]) / size, layer))

    for layer in range(len(kept)):
        offer(layer)
    while queue and gone + step / 2 <= wanted:
        _, layer = heapq.heappop(queue)
        size = kept[layer] % step or step
        kept[layer] -= size
        gone += size
        offer(layer)
    return kept


def compensated(
    weight: Tensor, bias: Tensor | None, known: Known, stays: Tensor, goes: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Return the weight [out, stays] and bias whose outputs on the calibration text are nearest to the former outputs, by least squares.

    min over Ŵ of ‖W x − Ŵ x_s‖² is Ŵ = W_s + W_g C_gs C_ss⁻¹ (Optimal Brain Surgeon's update for many weights, Hassibi & Stork 1993).
    `stays` and `goes` are indices of columns. `damping` times the mean diagonal of C_ss is added to C_ss; this affects only the correction.
    Raises NightpressError(numerical_failure) if C_ss stays indefinite with a thousandfold damping.
    """
    inner = known.second[stays][:, stays]
    amount = damping * float(inner.diagonal().mean())
    cross = known.second[stays][:, goes] @ weight[:, goes].T  # [stays, out]
    correction = torch.zeros_like(cross)
    if amount > 0:  # otherwise the kept units have zero output and cannot compensate
        lower, _ = damped_cholesky(inner, inner.new_tensor(amount))
        correction = torch.cholesky_solve(cross, lower)
    new = weight[:, stays] + correction.T
    if bias is None:
        return new, None
    return new, bias + weight[:, goes] @ known.mean[goes] - correction.T @ known.mean[stays]
