"""Find the smallest weights of any number of tensors exactly, from counts, without keeping or sorting the tensors.

A weight's key is the bit pattern of |w| as float32, an integer that sorts as the magnitude does. The k-th smallest key is found by radix
selection: first from the counts of the keys' upper 15 bits, then from the counts of the lower 16 bits among the keys that share these upper
bits. Of several equal weights, the first ones are pruned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nightpress.core.errors import ErrorCode, NightpressError

UPPER_BINS = 2**15
LOWER_BINS = 2**16
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Threshold:
    """Weights with a key below `key` are pruned, and so are the first `ties` weights with exactly this key."""

    key: int
    ties: int


def magnitude_keys(weight: Tensor) -> Tensor:
    """int32 keys of a float weight. float64 is rounded to float32 first. Raises NightpressError(numerical_failure) on NaN or infinity."""
    keys = weight.float().view(torch.int32) & 0x7FFFFFFF
    if int(keys.max()) >= _INFINITY:
        raise NightpressError(
            ErrorCode.NUMERICAL_FAILURE,
            "A weight holds NaN or infinity.",
            hint="The source model is damaged: export it again.",
        )
    return keys


def count_upper(keys: Tensor) -> Tensor:
    """How many keys have each value of the upper 15 bits: int64 [32768]."""
    return torch.bincount((keys >> 16).view(-1), minlength=UPPER_BINS)


def count_lower(keys: Tensor, upper: int) -> Tensor:
    """How many of the keys with the upper bits `upper` have each value of the lower 16 bits: int64 [65536]."""
    flat = keys.view(-1)
    return torch.bincount(flat[(flat >> 16) == upper] & 0xFFFF, minlength=LOWER_BINS)


def locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the item of this rank (0 is the smallest), and the item's rank within the bin."""
    ends = counts.cumsum(0)
    place = int(torch.searchsorted(ends, rank, right=True))
    return place, rank - (int(ends[place - 1]) if place else 0)


def pattern_mask(keys: Tensor, kept: int, group: int) -> Tensor:
    """True for the weights to prune: all but the `kept` largest of every `group` neighbours in a row. Of equals, the first is pruned.

    keys int32 [rows, columns], where columns is a multiple of `group`. For each weight, the larger weights of its group are counted. This
    takes group·(group−1)/2 comparisons of whole vectors and is faster than sorting short groups.
    """
    columns = keys.reshape(-1, group).t().contiguous()  # [group, G]: each column holds the members of one group
    outranked = torch.zeros(columns.shape, dtype=torch.uint8)  # [group, G]: the number of members that rank above
    for first in range(group):
        for second in range(first + 1, group):
            earlier_wins = columns[first] > columns[second]
            outranked[second] += earlier_wins
            outranked[first] += ~earlier_wins
    return (outranked >= kept).t().reshape(keys.shape)
