"""Divides the inputs of a block's layers into those that a method settles side by side."""

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nightpress.core.compress.executors.watch import Inputs
from nightpress.core.recipes.block_peak import stack_size


def side_by_side(
    block: Mapping[str, Tensor],
    inputs: Sequence[Inputs],
    device: torch.device,
    kinds: Mapping[str, Hashable] | None = None,
) -> Iterator[tuple[Inputs, ...]]:
    """Yield groups of weights that have equal shapes, dtypes and kinds, as many as a GPU settles at once. On a CPU each group is alone.

    block: weights [out, in] by name. kinds: what must be equal beside the shape, e.g. the scheme, by weight; None: nothing.
    """
    alike: dict[Hashable, list[Inputs]] = {}
    kinds = kinds or {}
    for group in inputs:
        like = tuple((kinds.get(name), tuple(block[name].shape), block[name].dtype) for name in group.names)
        alike.setdefault(like, []).append(group)
    for groups in alike.values():
        columns = block[groups[0].names[0]].shape[1]
        rows = sum(len(block[name]) for name in groups[0].names)
        most = stack_size(rows, columns, len(groups)) if device.type == "cuda" else 1
        for start in range(0, len(groups), most):
            yield tuple(groups[start : start + most])
