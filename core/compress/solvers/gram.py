"""Gram matrices Σ xxᵀ of a linear layer's inputs, summed up batch by batch in float32.

For inputs [tokens, n], tokens · n² multiply-adds; half of the matrix is the mirror of the other half, so only the strips that reach the
diagonal are multiplied: (s + 1) / 2s of the work with s strips. On CUDA 16-bit inputs are multiplied as they are, on the matrix units,
and summed in float32: their products are exact there.
"""

import torch
from torch import Tensor

from nightpress.core.errors import ErrorCode, NightpressError

_STRIPS = {"cuda": 2048, "cpu": 256}  #: columns; narrower ones would no longer fill the device


class Gram:
    """A running Σ xxᵀ."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(
            columns, columns, device=device
        )  #: float32; only the strips up to the diagonal's are filled
        self._strip = _STRIPS[self._sum.device.type]
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in [..., columns], of any float dtype."""
        x = inputs.reshape(-1, inputs.shape[-1])
        columns = x.shape[1]
        self.tokens += len(x)
        on_matrix_units = x.is_cuda and x.dtype in {torch.bfloat16, torch.float16}
        if not on_matrix_units:
            x = x.float()
        for start in range(0, columns, self._strip):
            end = min(start + self._strip, columns)
            into = self._sum[start:end, :end]
            if on_matrix_units:
                into += torch.mm(x[:, start:end].T, x[:, :end], out_dtype=torch.float32)
            else:
                into.addmm_(x[:, start:end].T, x[:, :end])

    def is_finite(self) -> bool:
        """Whether all inputs were, and their sums are."""
        return bool(torch.isfinite(self._sum.diagonal()).all())

    def matrix(self) -> Tensor:
        """Σ xxᵀ [columns, columns], the sum's own memory: add nothing afterwards."""
        columns = len(self._sum)
        for start in range(0, columns, self._strip):
            end = min(start + self._strip, columns)
            self._sum[:start, start:end] = self._sum[start:end, :start].T
        return self._sum


def damped_cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor [n, n] of matrix + damping · 1, and the damping that it took. `matrix` is overwritten.

    Where rounding left the matrix indefinite, up to a thousandfold damping is tried. Raises NightpressError(numerical_failure).
    """
    matrix.diagonal().add_(damping)
    for _ in range(4):
        lower, fault = torch.linalg.cholesky_ex(matrix)
        if not int(fault):
            return lower, damping
        matrix.diagonal().add_(9 * damping)
        damping *= 10
    raise NightpressError(
        ErrorCode.NUMERICAL_FAILURE,
        "The Gram matrix of a layer's inputs is not positive definite.",
        hint="Check that the source model is whole; more calibration text or a larger `damping` helps a layer that saw too little.",
    )
