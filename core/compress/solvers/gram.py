"""Gram matrices Σ xxᵀ of a linear layer's inputs, summed batch by batch in float32.

For inputs [tokens, n] the whole product takes tokens · n² multiply-adds. The matrix is symmetric, so it is computed in strips of rows that
end at the diagonal: with s strips this is (s + 1) / 2s of the work. On CUDA, 16-bit inputs are multiplied in their own dtype on the matrix
units (tensor cores) and summed in float32. The products of two 16-bit numbers are exact in float32.
"""

import torch
from torch import Tensor

from nightpress.core.errors import ErrorCode, NightpressError

_STRIPS = {"cuda": 2048, "cpu": 256}  #: device → rows of a strip; smaller strips would not keep the device busy


class Gram:
    """A running Σ xxᵀ."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        #: float32 [columns, columns]; `add` fills each strip of rows only up to its end on the diagonal
        self._sum = torch.zeros(columns, columns, device=device)
        self._strip = _STRIPS[self._sum.device.type]
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., columns], of any float dtype."""
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
        """Whether all inputs and their sums are finite."""
        return bool(torch.isfinite(self._sum.diagonal()).all())

    def matrix(self) -> Tensor:
        """Return Σ xxᵀ [columns, columns] in the memory of the running sum. Do not call `add` after this."""
        columns = len(self._sum)
        for start in range(0, columns, self._strip):
            end = min(start + self._strip, columns)
            self._sum[:start, start:end] = self._sum[start:end, :start].T
        return self._sum


def damped_cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the lower Cholesky factor [n, n] of matrix + damping · I, and the damping that was used. Overwrites `matrix`.

    If rounding errors made the matrix indefinite, larger damping is tried, up to a thousandfold. Raises NightpressError(numerical_failure)
    if that is not enough.
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
