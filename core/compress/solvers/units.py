"""Which units of a width go, and how what stays makes up for them: feed-forward channels, or groups of attention heads.

A unit is some neighbouring columns of the one matrix W [out, in] that takes the width in. What the units put out on the calibration text
is known by its second moments C = Σ (x − μ)(x − μ)ᵀ / n where W has a bias, which then makes up for the means, else C = Σ xxᵀ / n.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nightpress.core.compress.solvers.gram import Gram, damped_cholesky


class Moments:
    """Running first and second moments of a layer's inputs."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._gram = Gram(columns, device)
        self._sum = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in [..., columns]."""
        self._gram.add(inputs)
        self.tokens = self._gram.tokens
        self._sum += inputs.reshape(-1, inputs.shape[-1]).sum(0, dtype=torch.float32)

    def is_finite(self) -> bool:
        """Whether all inputs were, and their sums are."""
        return self._gram.is_finite()

    def finish(self, *, centred: bool) -> "Known":
        """Add nothing afterwards."""
        count = max(self.tokens, 1)
        second = self._gram.matrix().div_(count)
        mean = self._sum / count
        if centred:
            second.addr_(mean, mean, alpha=-1)
        return Known(second, mean)


@dataclass(frozen=True)
class Known:
    """What is known of a layer's inputs."""

    second: Tensor  #: [in, in], C
    mean: Tensor  #: [in], μ


def columns_of(units: Tensor, width: int) -> Tensor:
    """The columns of some units [k] of `width` columns each: [k · width]."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)


def output_losses(weight: Tensor, known: Known, width: int) -> Tensor:
    """What the output loses, squared and in the mean over tokens, if one unit alone goes: tr(W_u C_uu W_uᵀ). weight [out, in] → [units]."""
    units = weight.shape[1] // width
    blocks = known.second.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, w, w]
    parts = weight.view(-1, units, width).transpose(0, 1)  # [units, out, w]
    return ((parts @ blocks) * parts).sum((1, 2)).clamp_(min=0)


def weight_norms(parts: Sequence[Tensor], power: int) -> Tensor:
    """The L1 norm, or the squared L2 norm, of all weights of each unit. parts: [units, …] each → [units]"""
    return torch.stack([part.flatten(1).float().abs().pow(power).sum(1) for part in parts]).sum(0)


def smallest(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The units that stay and those that go, each in ascending order: the lowest scores go, of equal ones the last."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:kept].sort().values, order[kept:].sort().values


def shares(scores: Sequence[Tensor], share: float, step: int) -> list[int]:
    """How many units each layer keeps if of all layers' units together a share goes: the cheapest, in steps; every layer keeps one step at least."""
    kept = [len(score) for score in scores]
    gone, wanted = 0, share * sum(kept)
    ascending = [score.double().sort().values.tolist() for score in scores]
    queue: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        # The first step of a ragged layer brings it to a multiple.
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
    """The weight [out, stays] and bias nearest to the former output on the calibration text, by least squares.

    min over Ŵ of ‖W x − Ŵ x_s‖² is Ŵ = W_s + W_g C_gs C_ss⁻¹ (optimal brain surgeon's update for many weights at once, Hassibi & Stork 1993).
    `stays` and `goes` are columns. `damping` times C's mean diagonal is added to C_ss, which only the correction sees.
    Raises NightpressError(numerical_failure) where C_ss stays indefinite with a thousandfold damping.
    """
    inner = known.second[stays][:, stays]
    amount = damping * float(inner.diagonal().mean())
    cross = known.second[stays][:, goes] @ weight[:, goes].T  # [stays, out]
    correction = torch.zeros_like(cross)
    if amount > 0:  # else no unit that stays put out anything: there is nothing to make up with
        lower, _ = damped_cholesky(inner, amount)
        correction = torch.cholesky_solve(cross, lower)
    new = weight[:, stays] + correction.T
    if bias is None:
        return new, None
    return new, bias + weight[:, goes] @ known.mean[goes] - correction.T @ known.mean[stays]
