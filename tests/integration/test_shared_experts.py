"""A mixture's experts that live in several processes: against one process, resumed after a kill, and when one of them fails."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightpress.core.compress.context import over_ranks
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.errors import ErrorCode, NightpressError
from tests.block_models import FAMILIES, context_of, save_model, token_ids
from tests.rank_presses import METHODS, MIXTURE, SAME, distance, load, other_codes, padded, run
from tests.rank_tasks import asks_experts, held_by_experts
from tests.service import running

#: Here a weight that is just pruned, or just not, may go the other way. All later layers then see slightly other inputs.
ON_THE_BORDER = {"gptq with unstructured zeros": 100 * SAME}
#: Padded texts: the processes have different numbers of tokens.
TEXTS = padded([24, 3, 24, 17, 9, 24, 1, 24, 20])


# Slow: its processes import the libraries.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tests_can_be_imported", "one_thread")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(MIXTURE, folder, layers=2)
    return folder


_BY_ONE: dict[str, tuple[Any, dict[str, Tensor]]] = {}


def _by_one(
    source: Path, family: str, name: str, work: Path, samples: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """The result of one process and the tensors that it wrote, made once for all numbers of processes."""
    key = f"{source} {name} {sorted((given, tensor.tolist()) for given, tensor in samples.items())}"
    if key not in _BY_ONE:
        result = run(source, family, name, work / "one", None, samples=samples)
        _BY_ONE[key] = result, load(work / "one" / "passes")
    return _BY_ONE[key]


def _same(source: Path, family: str, name: str, work: Path, ranks: Ranks, samples: dict[str, Tensor]) -> Any:
    """Press by one process and by several, and compare. Returns the result of several."""
    expected, alone = _by_one(source, family, name, work, samples)
    found = run(source, family, name, work / "several", ranks, samples=samples)
    several = load(work / "several" / "passes")
    assert distance(several, alone) < ON_THE_BORDER.get(name, SAME)
    assert other_codes(several, alone) < 0.002
    assert found.undersampled == expected.undersampled
    assert set(found.unseen) == set(expected.unseen)
    assert found.bytes_after == expected.bytes_after
    assert found.warnings == expected.warnings
    for weight, effect in expected.effects.items():
        assert found.effects[weight].relative_error == pytest.approx(effect.relative_error, rel=0.01, abs=1e-6)
    return found


#: Each method in two processes. Three methods also in four: there each process exchanges tokens with more than one other.
_SIZES = [*((name, 2) for name in METHODS), *((name, 4) for name in ("gptq", "awq", "smoothquant"))]


@pytest.mark.parametrize(("name", "size"), _SIZES)
def test_several_processes_differ_from_one_by_the_order_of_sums(
    name: str, size: int, model: Path, two: Ranks, four: Ranks, tmp_path: Path
):
    _same(model, MIXTURE, name, tmp_path, {2: two, 4: four}[size], TEXTS)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("MixtralForCausalLM", "awq"),
        ("MixtralForCausalLM", "smoothquant"),
        ("Qwen2MoeForCausalLM", "awq"),
        ("Qwen2MoeForCausalLM", "gptq"),
        ("OlmoeForCausalLM", "awq"),
        ("OlmoeForCausalLM", "smoothquant"),
    ],
)
def test_mixtures_with_shared_experts_dense_blocks_or_unknown_places_do_so_too(
    family: str, name: str, two: Ranks, tmp_path: Path
):
    save_model(family, tmp_path / "model", layers=2)
    _same(tmp_path / "model", family, name, tmp_path, two, TEXTS)


def test_eight_processes_have_an_expert_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, MIXTURE, {**FAMILIES[MIXTURE], "num_experts": 8, "num_hidden_layers": 2})
    save_model(MIXTURE, tmp_path / "model")
    with Ranks(8, tmp_path / "ranks") as eight:
        for name in ("gptq", "awq"):
            _same(tmp_path / "model", MIXTURE, name, tmp_path / name, eight, TEXTS)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_experts_with_few_tokens_see_those_of_all_processes(name: str, model: Path, two: Ranks, tmp_path: Path):
    """So few that some experts get fewer tokens than they have inputs, and others do not."""
    pressed = _same(model, MIXTURE, name, tmp_path, two, padded([24, 6, 18, 1]))
    experts = {weight.split(".experts.")[1][0] for weight in pressed.undersampled}
    assert experts
    assert len(pressed.undersampled) < sum(".experts." in weight for weight in pressed.effects)


def test_a_process_without_a_batch_still_answers_the_others(model: Path, two: Ranks, tmp_path: Path):
    """A batch holds one long text here, and one process has four of them, the other five."""
    _same(model, MIXTURE, "gptq", tmp_path, two, {"input_ids": token_ids(samples=9, length=600)})


@pytest.mark.parametrize("most", [1, 3, 100])
def test_tokens_travel_to_their_experts_and_back(most: int, three: Ranks):
    """Some processes have no tokens, some experts get none, and the numbers of experts and processes don't divide."""
    found = three.run(asks_experts, [[4, 0, 4, 1], [], [1, 4, 3]], most, told=lambda *_: None)
    every = [0.0, 1.0, 2.0, 3.0, 200.0, 201.0, 202.0]
    assert found[0] == [(0, [1.0]), (1, [6.0]), (4, [0.0, 10.0]), (-1, every)]
    assert found[1] == [(-1, every)]
    assert found[2] == [(1, [400.0]), (3, [808.0]), (4, [1005.0]), (-1, every)]
    nothing = three.run(asks_experts, [[], [], []], most, told=lambda *_: None)
    assert nothing == [[(-1, [])]] * 3


def test_each_process_holds_its_experts_alone(model: Path, two: Ranks, four: Ranks, tmp_path: Path):
    held = {}
    for size, ranks in ((1, None), (2, two), (4, four)):
        context = context_of(model, tmp_path / str(size), ranks=ranks)
        held[size] = over_ranks(held_by_experts, model, token_ids(samples=9), samples=9, context=context)
    (whole,) = held[1]
    assert whole == (4 * 2 * 32 * 32 * 4, 4 * 3 * 32 * 32 * 4, 4 * 3 * 32 * 32 * 4)
    for size in (2, 4):
        assert held[size] == [tuple(bytes_ // size for bytes_ in whole)] * size


def test_a_run_whose_process_was_killed_ends_with_the_same_bytes(two: Ranks, tmp_path: Path):
    model = tmp_path / "model"
    save_model(MIXTURE, model)  # with so many blocks that it does not end before it is killed
    run(model, MIXTURE, "awq", tmp_path / "whole", two)
    pids: list[int] = []

    def kill(_path: str, step: int) -> None:
        if step == 1 and not pids:
            pids.extend(two.pids)
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(NightpressError) as caught:
        run(model, MIXTURE, "awq", tmp_path / "killed", two, checkpoint=kill)
    assert caught.value.code is ErrorCode.WORKER_LOST
    assert running(pids) == []
    first = tmp_path / "killed" / "passes" / "model-00002-of-00004.safetensors"
    written = first.stat().st_mtime_ns
    run(model, MIXTURE, "awq", tmp_path / "killed", two)
    assert first.stat().st_mtime_ns == written  # its block was not pressed again
    for path in sorted((tmp_path / "whole" / "passes").iterdir()):
        assert (tmp_path / "killed" / "passes" / path.name).read_bytes() == path.read_bytes()


def test_an_error_in_the_process_of_one_expert_ends_all(model: Path, two: Ranks, tmp_path: Path):
    """Expert 3 lives in the second process, which alone settles its weights, of which one is not finite."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][0, 0] = torch.nan
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    pids: list[int] = []
    with pytest.raises(NightpressError, match=r"experts\.3\.up_proj") as caught:
        run(
            tmp_path / "model",
            MIXTURE,
            "gptq",
            tmp_path / "work",
            two,
            progress=lambda *_: pids.extend(set(two.pids) - set(pids)),
        )
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
    assert len(pids) == 2
    assert running(pids) == []
    assert two.pids == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("name", ["gptq", "awq", "sparsegpt 2:4", "smoothquant"])
def test_two_gpus_agree_with_one(name: str, model: Path, tmp_path: Path):
    run(model, MIXTURE, name, tmp_path / "one", None, samples=TEXTS, device="cuda")
    with Ranks(2, tmp_path / "ranks", device="cuda") as ranks:
        run(model, MIXTURE, name, tmp_path / "several", ranks, samples=TEXTS, device="cuda")
    alone, several = load(tmp_path / "one" / "passes"), load(tmp_path / "several" / "passes")
    assert distance(several, alone) < 1e-3
    assert other_codes(several, alone) < 0.01
