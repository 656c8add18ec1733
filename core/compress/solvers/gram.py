"""Gram matrices Σ xxᵀ of a linear layer's inputs, summed batch by batch in float32.

For inputs [tokens, n] the whole product takes tokens · n² multiply-adds. The matrix is symmetric, so it is computed in strips of rows that
end at the diagonal: with s strips this is (s + 1) / 2s of the work. On CUDA, 16-bit inputs are multiplied in their own dtype on the matrix
units (tensor cores) and summed in float32. The products of two 16-bit numbers are exact in float32.
"""

import torch
from torch import Tensor

from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.shared_factor import pays, shared_cholesky
from nightpress.core.errors import ErrorCode, NightpressError

_CHOLESKY_BLOCK = 128
_STRIPS = {"cuda": 2048, "cpu": 256}  #: device → rows of a strip; smaller strips would not keep the device busy


class Gram:
    """A running Σ xxᵀ."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        #: float32 [columns, columns]; `add` fills each strip of rows only up to its end on the diagonal
        self._sum = torch.zeros(columns, columns, device=device)
        self._strip = _STRIPS[self._sum.device.type]
        self.tokens = 0

    @property
    def columns(self) -> int:
        return len(self._sum)

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
                torch.addmm(into, x[:, start:end].T, x[:, :end], out_dtype=torch.float32, out=into)
            else:
                into.addmm_(x[:, start:end].T, x[:, :end])

    def combine(self, group: Group) -> None:
        """Add what the other processes have added."""
        if group.size == 1:
            return
        self.tokens = group.total(self.tokens)
        columns = len(self._sum)
        for start in range(0, columns, self._strip):
            end = min(start + self._strip, columns)
            group.sum(self._sum[start:end, :end])

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


class GramAndPeak(Gram):
    """A running Σ xxᵀ, and the largest magnitude of all inputs."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        super().__init__(columns, device)
        self.peak = torch.zeros((), device=device)

    def add(self, inputs: Tensor) -> None:
        super().add(inputs)
        if inputs.numel():
            torch.maximum(self.peak, inputs.abs().amax().float(), out=self.peak)

    def combine(self, group: Group) -> None:
        super().combine(group)
        group.largest(self.peak)


def damped_cholesky(matrix: Tensor, damping: Tensor, group: Group = ALONE) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factors [..., n, n] of matrix + damping · I, and the damping [...] that was used. Overwrites `matrix`.

    If rounding errors made a matrix indefinite, larger damping is tried for it, up to a thousandfold. group: processes that hold the same
    matrix, and factor it together if that pays. Raises NightpressError(numerical_failure) if no damping is enough.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(damping[..., None])
    for _ in range(4):
        lower, faulty = cholesky(matrix, group)
        if not bool(faulty.any()):
            return lower, damping
        diagonal.add_(torch.where(faulty, 9 * damping, torch.zeros_like(damping))[..., None])
        damping = torch.where(faulty, 10 * damping, damping)
    raise NightpressError(
        ErrorCode.NUMERICAL_FAILURE,
        "The Gram matrix of a layer's inputs is not positive definite.",
        hint="Check that the source model is whole; more calibration text or a larger `damping` helps a layer that saw too little.",
    )


def cholesky(matrix: Tensor, group: Group = ALONE) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factors of matrices [..., n, n], and which of them are not positive definite: bool [...]."""
    if matrix.dim() == 2 and pays(len(matrix), group.size, matrix.device.type):
        return shared_cholesky(matrix, group)
    if matrix.dim() == 3 and matrix.is_cuda:
        return cholesky_of_stack(matrix)
    lower, fault = torch.linalg.cholesky_ex(matrix)
    return lower, fault != 0


def cholesky_of_stack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`cholesky` for a stack [count, n, n], on any device. A matrix that is not positive definite may come out as NaN.

    On CUDA, torch factors a stack column by column, or one matrix after the other. This code factors the same block of columns of all
    matrices at once, so that nearly all of the n³/3 multiply-adds of each matrix are in batched products.
    """
    rest = matrix.clone()
    faulty = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for start in range(0, matrix.shape[-1], _CHOLESKY_BLOCK):
        end = start + _CHOLESKY_BLOCK
        block, fault = torch.linalg.cholesky_ex(rest[:, start:end, start:end])
        faulty |= fault != 0
        rest[:, start:end, start:end] = block
        if end < matrix.shape[-1]:
            below = torch.linalg.solve_triangular(block.mT, rest[:, end:, start:end], upper=True, left=False)
            rest[:, end:, start:end] = below
            rest[:, end:, end:].baddbmm_(below, below.mT, alpha=-1)
    return rest.tril_(), faulty
