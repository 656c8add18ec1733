"""Matrix products: their precision, and adding them to a matrix or to each matrix of a stack."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Allow TF32 for CUDA products inside the block: three digits are enough to compare losses, and eight times faster."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def add_product(base: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `base` in place. All are [..., rows, columns] with at most one dimension in front."""
    if base.dim() == 3:
        base.baddbmm_(left, right)
    else:
        base.addmm_(left, right)
