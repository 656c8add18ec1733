"""The precision of matrix products."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Allow TF32 for CUDA products inside the block: three digits are enough to compare losses, and eight times faster."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
