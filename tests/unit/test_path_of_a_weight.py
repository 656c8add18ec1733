"""The call path of a weight through the compression core, from GPTQ's options to the packed tensor."""

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

from nightpress.core.compress.executors.blocks import Inputs
from nightpress.core.compress.passes.calibrated import Quantized
from nightpress.core.recipes.passes import Gptq

_CORE = Path(__file__).parents[2] / "core" / "compress"
_LONGEST = 6


def _stacks() -> set[tuple[tuple[str, str], ...]]:
    """Every call stack, as (package, function) pairs of core.compress, while GPTQ quantizes a weight."""
    options = Gptq(bits=4, group_size=16, refine=True)
    method = Quantized(options, options.scheme)
    statistic = method.watch(64, torch.device("cpu"))
    statistic.add(torch.randn(256, 64))
    weight = {"up.weight": torch.randn(32, 64).half()}
    stack: list[tuple[str, str]] = []
    found: set[tuple[tuple[str, str], ...]] = set()

    def follow(frame: FrameType, event: str, _argument: object) -> None:
        file = Path(frame.f_code.co_filename).resolve()
        if not file.is_relative_to(_CORE):
            return
        if event == "call":
            stack.append((file.relative_to(_CORE).parts[0], frame.f_code.co_name))
            found.add(tuple(stack))
        elif event == "return":
            stack.pop()

    before = sys.getprofile()
    sys.setprofile(follow)
    try:
        method.settle(weight, [Inputs(("up.weight",), statistic)], torch.device("cpu"))
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.slow
def test_a_weight_passes_few_functions_and_enters_no_package_twice():
    stacks = _stacks()
    for last in ("obs_block", "fit_scales", "pack_bits"):
        chains = [stack for stack in stacks if stack[-1][1] == last]
        assert chains, last
        assert max(map(len, chains)) <= _LONGEST, chains
    for stack in stacks:
        packages = [package for package, _ in stack]
        entered = [package for at, package in enumerate(packages) if at == 0 or packages[at - 1] != package]
        assert len(entered) == len(set(entered)), stack
