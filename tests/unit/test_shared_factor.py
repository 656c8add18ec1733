"""Who computes the factors of a block's Gram matrices, and how much of the arithmetic each process has."""

import pytest

from nightpress.core.compress.solvers.shared_factor import owners, pays

#: By name: (outputs, inputs) of layers with the same inputs.
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
LLAMA_70B = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]
EXPERTS = [(2816, 2048)] * 96 + [(2048, 1408)] * 96  # `stacks` puts equal shapes side by side
_PANEL = 512


def _balance(groups: list[tuple[int, int]], processes: int) -> float:
    """The operations of one process, shared out ideally, over those on the critical path of several processes.

    A factor takes n³/3, the rows m · n². What all compute together is divided; of a round of factors, the largest counts.
    """
    whole = sum(columns**3 / 3 + rows * columns**2 for rows, columns in groups)
    path = sum(rows * columns**2 for rows, columns in groups) / processes
    turn: list[float] = []
    for (_, columns), owner in zip(groups, owners([columns for _, columns in groups], processes, "cuda"), strict=True):
        if owner == "together":
            path += columns**3 / 3 / processes + columns * _PANEL**2 / 3
            continue
        if owner == "each":
            path += columns**3 / 3
            continue
        if owner == 0:
            path, turn = path + max(turn, default=0.0), []
        turn.append(columns**3 / 3)
    return whole / processes / (path + max(turn, default=0.0))


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("groups", [LLAMA_8B, LLAMA_70B, EXPERTS], ids=["8b", "70b", "experts"])
def test_processes_have_equal_arithmetic(groups: list[tuple[int, int]], processes: int):
    assert _balance(groups, processes) > 0.95


def test_a_single_process_computes_every_factor():
    assert owners([4096, 14336, 28672], 1, "cuda") == ["each", "each", "each"]


def test_large_factors_are_computed_together_and_the_others_by_turns():
    assert owners([4096, 4096, 4096, 14336], 2, "cuda") == [0, 1, "each", "together"]
    assert owners([64, 14336, 64, 64, 64], 3, "cuda") == [0, "together", 1, 2, "each"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_more_processes_and_larger_matrices_pay_sooner(device: str):
    for processes in (2, 4, 8):
        known = [pays(columns, processes, device) for columns in range(128, 32768, 128)]
        assert known == sorted(known)
        assert known[-1]
    assert not pays(1024, 8, device)
