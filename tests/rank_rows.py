"""Functions that several processes run in tests: they compute factors and settle rows together."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from nightpress.core.compress.executors.watch import Inputs
from nightpress.core.compress.passes.stacks import factored, stacks
from nightpress.core.compress.ranks.group import Group
from nightpress.core.compress.solvers import shared_factor
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.obs import Factor, factorize
from nightpress.core.compress.solvers.shared_factor import shared_cholesky


def power_of(columns: int, seed: int) -> torch.Tensor:
    """A Gram matrix [columns, columns] of random inputs, float64."""
    inputs = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return inputs.T @ inputs


def joins_rows(counts: list[int], *, group: Group, tell: Any) -> list[list[list[int]]]:
    """The rows of each count, joined from the parts of all processes: a row holds its number and that of its process."""
    found = []
    for count in counts:
        own = range(count)[group.share(count)]
        part = torch.tensor([[row, group.rank] for row in own], dtype=torch.int16).view(-1, 2)
        found.append(group.join_rows(part, count).tolist())
    return found


def factors_together(sizes: list[int], panel: int, *, group: Group, tell: Any) -> list[tuple[float, bool, bool]]:
    """For each size, a factor's distance from torch's; whether all processes have the same; whether an indefinite matrix is found out."""
    found = []
    for size in sizes:
        matrix = power_of(size, seed=size)
        lower, faulty = shared_cholesky(matrix, group, panel)
        distance = float((lower - torch.linalg.cholesky(matrix)).abs().max() / matrix.diagonal().max().sqrt())
        same = len({tuple(rows) for rows in group.collect(lower.flatten().tolist())}) == 1
        assert not bool(faulty)
        matrix[size // 2, size // 2] = -1.0
        _, faulty = shared_cholesky(matrix, group, panel)
        found.append((distance, same, bool(faulty)))
    return found


def hands_factors_out(
    sizes: list[int], together_from: int, *, group: Group, tell: Any
) -> list[list[tuple[int, float]]]:
    """For each process: the columns of each stack, and its factor's distance from the one that it computes by itself.

    Factors with more columns than `together_from` are computed together.
    """
    rates = shared_factor._Rates(alone=1.0, together=1e30, panel_s=together_from**3 / 3)
    shared_factor._RATES["cpu"], shared_factor._PANEL["cpu"] = rates, together_from
    block, inputs = {}, []
    for at, size in enumerate(sizes):
        gram = Gram(size, "cpu")
        gram.add(torch.randn(2 * size, size, generator=torch.Generator().manual_seed(at)))
        block[str(at)] = torch.zeros(4, size)
        inputs.append(Inputs((str(at),), gram))
    device = torch.device("cpu")
    found = []
    for stack, gram, factor in factored(
        stacks(block, inputs, device, lambda _: None), device, group, damping=0.01, by_power=True
    ):
        found.append((stack.columns, _distance(factor, factorize(gram, by_power=True))))
    return group.collect(found)


def _distance(found: Factor, expected: Factor) -> float:
    assert found.order is not None
    assert expected.order is not None
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.power, expected.power)
    assert torch.equal(found.damping, expected.damping)
    return float((found.upper - expected.upper).norm() / expected.upper.norm())


def errors_of(weight: torch.Tensor, gram: torch.Tensor) -> list[float]:
    """What stands for the errors of a weight's candidates."""
    return [float(weight.double().square().sum()), float(gram.double().sum())]


def lingers(until: Path, errors: Path, *, group: Group, tell: Any) -> None:
    """Says that it has begun, and ends when there is a file. Its standard error goes to `errors`."""
    with errors.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    tell("progress", 0.0, "lingering")
    while not until.exists():
        time.sleep(0.01)
