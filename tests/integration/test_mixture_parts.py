"""A mixture's block that is settled part by part: the same bytes as in one part, and statistics that are freed on the way."""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, Method, press_blocks
from nightpress.core.compress.executors.blocks.settle import Settler
from nightpress.core.compress.executors.side_by_side import side_by_side
from nightpress.core.compress.passes.calibrated import Quantized, Sparse
from nightpress.core.compress.passes.stacks import stacks
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.recipes.passes import Gptq, SparseGpt
from tests.block_models import context_of, linears_of, save_model, token_ids

#: The second has a shared expert, and a block without experts.
FAMILIES = ("Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM")
_GPTQ = Gptq(group_size=16, overrides={"re:.*down_proj.*": {"bits": 8}})
METHODS = {"gptq": Quantized(_GPTQ, _GPTQ.scheme), "sparsegpt": Sparse(SparseGpt())}


def _press(source: Path, work: Path, method: Method) -> dict[str, bytes]:
    samples = {"input_ids": token_ids()}
    context = context_of(source, work)
    press_blocks(source, work / "out", method, samples, context, chosen=linears_of(source), recipe="parts")
    return {path.name: path.read_bytes() for path in sorted((work / "out").glob("*.safetensors"))}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_parts_end_with_the_bytes_of_a_single_part(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_model(family, tmp_path / "source")
    parts: list[int] = []
    divide = Settler.parts

    def count(self: Settler, tensors: dict[str, Tensor], inputs: list[Inputs], linears: dict[str, nn.Module]) -> object:
        found = divide(self, tensors, inputs, linears)
        parts.append(len(found))
        return found

    monkeypatch.setattr(Settler, "parts", count)
    found = _press(tmp_path / "source", tmp_path / "parts", METHODS[name])
    assert min(parts) > 8
    monkeypatch.setattr(Settler, "parts", lambda _self, _tensors, inputs, _linears: [list(inputs)])
    assert found == _press(tmp_path / "source", tmp_path / "single", METHODS[name])


class _Counts(Quantized):
    """GPTQ that notes, at the start of each call, how many of its statistics are alive, and how many weights each call settles."""

    def __init__(self) -> None:
        super().__init__(_GPTQ, _GPTQ.scheme)
        self._watched: list[weakref.ref[Gram]] = []
        self._settled: list[weakref.ref[Tensor]] = []
        self.alive: list[tuple[int, int]] = []  #: statistics, and weights that earlier calls have returned

    def watch(self, columns: int, device: torch.device) -> Gram:
        statistic = super().watch(columns, device)
        self._watched.append(weakref.ref(statistic))
        return statistic

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        self.alive.append(
            (
                sum(reference() is not None for reference in self._watched),
                sum(reference() is not None for reference in self._settled),
            )
        )
        found = super().settle(block, inputs, device)
        self._settled += [weakref.ref(final.weight) for final in found.values()]
        return found


def test_each_part_frees_its_statistics_and_its_settled_weights(tmp_path: Path):
    save_model("Qwen3MoeForCausalLM", tmp_path / "source", layers=1)
    method = _Counts()
    _press(tmp_path / "source", tmp_path / "work", method)
    # attention: inputs of q, k and v, and of o; router and experts that see all tokens may share theirs
    first = method.alive[0][0]
    assert first >= 6
    assert [statistics for statistics, _ in method.alive] == list(range(first, 0, -1))
    assert {weights for _, weights in method.alive} == {0}


def test_a_gpu_stacks_within_a_part_what_it_stacks_within_a_block():
    """So that results keep their bits. The sizes are those of DeepSeek-V3."""
    shapes = {"gate": (2048, 7168), "up": (2048, 7168), "down": (7168, 2048)}
    block = {
        f"{number}.{name}": torch.empty(shape, device="meta") for number in range(9) for name, shape in shapes.items()
    }
    statistic = Gram(1, "cpu")  # whose size nobody asks for
    inputs = [
        Inputs(tuple(f"{number}.{name}" for name in names), statistic)
        for number in range(9)
        for names in (("gate", "up"), ("down",))
    ]
    gpu = torch.device("cuda")
    whole = list(stacks(block, inputs, gpu, lambda _name: None))
    parts = list(side_by_side(block, inputs, gpu))
    assert [stack for part in parts for stack in stacks(block, part, gpu, lambda _name: None)] == whole
    assert len(parts) == len(whole)
    assert max(len(part) for part in parts) > 1
    assert sorted(id(seen) for part in parts for seen in part) == sorted(map(id, inputs))
