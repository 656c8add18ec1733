"""How exact a matrix product has to be."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Losses are only compared: on CUDA three digits are enough, and eight times faster."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
