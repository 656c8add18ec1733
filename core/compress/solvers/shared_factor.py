"""The Cholesky factor of a large matrix, computed by several processes together.

All processes hold the matrix, and end with the whole factor. They go through it in panels of neighbouring columns. Of each panel, a process
computes some of the rows: the product with the finished columns (n³/3 operations in all, shared out), and the triangular solution. Then the
rows are joined. What each process repeats is the factor of a panel's square on the diagonal, n · panel²/3 operations in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nightpress.core.compress.ranks.group import Group

_PANEL = {"cuda": 512, "cpu": 128}  #: kind of device → columns of a panel


@dataclass(frozen=True)
class _Rates:
    alone: float  #: operations per second of a library's factor of a large matrix
    together: float  #: of the products with finished columns, in each process
    panel_s: float  #: seconds of a panel for the square's factor, the two exchanges and the start of kernels


#: An H200, and a core with AVX-512. The panel's time decides; it was estimated and not measured.
_RATES = {"cuda": _Rates(25e12, 45e12, 0.5e-3), "cpu": _Rates(50e9, 50e9, 2e-3)}


def pays(columns: int, processes: int, device: str) -> bool:
    """Whether several processes compute the factor of [columns, columns] together sooner than each would by itself."""
    rates, work = _RATES[device], columns**3 / 3
    together = work / processes / rates.together + columns / _PANEL[device] * rates.panel_s
    return processes > 1 and together < work / rates.alone


#: The process that computes a factor for all; or all compute it together; or each computes it for itself.
Owner = int | Literal["together", "each"]


def owners(columns: Sequence[int], processes: int, device: str) -> list[Owner]:
    """Who computes the factors of Gram matrices with so many columns.

    Large ones are computed together. Of the others, the processes compute as many at a time as there are processes. One that is left over
    is computed by each: the others would only wait for it.
    """
    together = [pays(count, processes, device) for count in columns]
    alone = [at for at, shared in enumerate(together) if not shared]
    found: list[Owner] = ["together"] * len(columns)
    for turn, at in enumerate(alone):
        left_over = turn % processes == 0 and turn + 1 == len(alone)
        found[at] = "each" if left_over or processes == 1 else turn % processes
    return found


def shared_cholesky(matrix: Tensor, group: Group, panel: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the lower factor [n, n] of a matrix [n, n] that all processes hold, and whether it is not positive definite: bool [].

    Every process gets the same bits. A matrix that is not positive definite may come out as NaN. Only the lower triangle of `matrix` is
    read. panel: columns of a panel.
    """
    columns, width = len(matrix), panel or _PANEL[matrix.device.type]
    lower = torch.zeros_like(matrix)
    faulty = torch.zeros((), dtype=torch.int32, device=matrix.device)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        square = matrix[start:end, start:end]
        if start:
            finished = lower[start:end, group.share(start)]
            known = finished @ finished.T
            group.sum(known)
            square = square - known
        square, fault = torch.linalg.cholesky_ex(square)
        lower[start:end, start:end] = square
        faulty |= fault != 0
        own = group.share(columns - end)
        rows = slice(end + own.start, end + own.stop)
        part = matrix[rows, start:end]
        if start:
            part = torch.addmm(part, lower[rows, :start], lower[start:end, :start].T, alpha=-1)
        part = torch.linalg.solve_triangular(square.mT, part, upper=True, left=False)
        lower[end:, start:end] = group.join_rows(part, columns - end)
    group.largest(faulty)  # all processes go on alike
    return lower, faulty != 0
