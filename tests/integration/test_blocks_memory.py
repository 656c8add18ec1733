"""Where the blocks executor keeps its activations, and what it does when memory runs out."""

import contextlib
import gc
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import press_blocks
from nightpress.core.compress.memory import return_freed_memory
from nightpress.core.compress.passes.calibrated import Sparse, WeightAndActivation
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes import costs
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import SparseGpt, Wanda
from nightpress.core.recipes.plan import make_plan
from tests.block_models import context_of, linears_of, save_model, token_ids


class _Memory(NamedTuple):
    available: int


@pytest.mark.parametrize("available", [2**40, 2**10])
@pytest.mark.slow
def test_activations_lie_in_memory_or_in_a_file_and_the_result_is_the_same(
    available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    save_model("LlamaForCausalLM", source)

    def press(name: str) -> bytes:
        press_blocks(
            source,
            tmp_path / name / "out",
            Sparse(SparseGpt()),
            {"input_ids": token_ids()},
            context_of(source, tmp_path / name / "work"),
            chosen=linears_of(source),
            recipe="r",
        )
        return b"".join(path.read_bytes() for path in sorted((tmp_path / name / "out").glob("*.safetensors")))

    expected = press("plain")
    mapped: list[int] = []
    from_file = torch.from_file

    def remember(*args: Any, **kwargs: Any) -> Tensor:
        mapped.append(kwargs["size"])
        return from_file(*args, **kwargs)

    monkeypatch.setattr(torch, "from_file", remember)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: _Memory(available))
    assert press("told") == expected
    assert bool(mapped) == (available < 2**20)
    assert not list((tmp_path / "told").rglob("hidden-states.bin"))


@pytest.mark.slow
def test_a_method_that_settles_layer_by_layer_runs_each_text_through_a_block_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    save_model("LlamaForCausalLM", source)
    calls: list[int] = []
    forward = nn.Linear.forward

    def count(self: nn.Linear, inputs: Tensor) -> Tensor:
        calls.append(inputs.shape[0])
        return forward(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", count)

    def linear_runs(work: str) -> int:
        calls.clear()
        method = WeightAndActivation(Wanda())
        context = context_of(source, tmp_path / work)
        samples = {"input_ids": token_ids(samples=1200, length=24)}  # thirty batches, one of which also runs in trials
        press_blocks(source, tmp_path / work / "out", method, samples, context, chosen=linears_of(source), recipe="r")
        return len(calls)

    once = linear_runs("once")
    monkeypatch.setitem(costs.IN_TURN_BYTES, "cpu", 0)
    twice = linear_runs("twice")
    assert once < 0.75 * twice


@pytest.mark.slow
def test_where_a_batch_does_not_fit_smaller_ones_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The allocator really fails: with a large batch, the layers allocate more memory than any machine has."""
    source = tmp_path / "source"
    save_model("LlamaForCausalLM", source)
    forward, refused = nn.Linear.forward, []

    def greedy(limit: int) -> Any:
        def run(self: nn.Linear, inputs: Tensor) -> Tensor:
            if inputs.shape[0] > limit:
                refused.append(inputs.shape[0])
                torch.empty(2**55, dtype=torch.uint8)
            return forward(self, inputs)

        return run

    def press() -> None:
        context = PassContext(header=inspect_or_any(source), work_dir=tmp_path / "work")
        samples = {"input_ids": token_ids(samples=200, length=24)}
        press_blocks(
            source,
            tmp_path / "out",
            WeightAndActivation(Wanda()),
            samples,
            context,
            chosen=linears_of(source),
            recipe="r",
        )

    inspect_or_any = lambda folder: context_of(folder, tmp_path).header  # noqa: E731
    monkeypatch.setattr(nn.Linear, "forward", greedy(30))
    press()
    assert refused == [42]
    monkeypatch.setattr(nn.Linear, "forward", greedy(1))
    with pytest.raises(NightpressError) as caught:
        press()
    assert caught.value.code is ErrorCode.OUT_OF_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_with_too_little_memory_for_a_batch_is_tried_with_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a batch of 16,384 tokens the feed-forward takes about 300 MB, with a quarter of it 75 MB. The GPU may use 200 MiB."""
    source = tmp_path / "source"
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)).save_pretrained(source)
    # Batches that wait inside a block would take as much memory in smaller batches: turn that off.
    monkeypatch.setitem(costs.IN_TURN_BYTES, "cuda", 0)
    messages: list[str] = []
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(200 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        press_blocks(
            source,
            tmp_path / "out",
            Sparse(SparseGpt()),
            {"input_ids": token_ids(samples=64, length=512)},
            context_of(source, tmp_path, device="cuda", progress=lambda _share, text: messages.append(text)),
            chosen=linears_of(source),
            recipe="r",
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("smaller batches" in text for text in messages)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.slow
def test_no_text_waits_inside_a_block_for_good(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No batch still waits inside a block after the last block, or after an error."""
    source = tmp_path / "source"
    save_model("LlamaForCausalLM", source)
    method = Sparse(SparseGpt())

    def fail(*_: object) -> None:
        raise NightpressError(ErrorCode.NUMERICAL_FAILURE, "broken")

    if broken:
        monkeypatch.setattr(method, "settle", fail)
    with pytest.raises(NightpressError) if broken else contextlib.nullcontext():
        press_blocks(
            source,
            tmp_path / "out",
            method,
            {"input_ids": token_ids()},
            context_of(source, tmp_path / "work"),
            chosen=linears_of(source),
            recipe="r",
        )
    gc.collect()
    assert not [
        get_object
        for get_object in gc.get_objects()
        if type(get_object) is greenlet and get_object.gr_frame is not None
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_of_a_run_nothing_stays_on_the_gpu(tmp_path: Path):
    source = tmp_path / "source"
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)).save_pretrained(source)
    held = []
    for name in ("first", "second"):
        press_blocks(
            source,
            tmp_path / name / "out",
            Sparse(SparseGpt()),
            {"input_ids": token_ids(samples=64, length=512)},
            context_of(source, tmp_path / name, device="cuda"),
            chosen=linears_of(source),
            recipe="r",
        )
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    # cuBLAS allocates a workspace at its first product and keeps it.
    assert held[0] == held[1] < 64 * 2**20


def test_the_plan_names_smaller_settings_and_what_they_take(bert_tiny: Path):
    recipe = parse_recipe(
        {
            "name": "r",
            "passes": [{"pass": "gptq", "group_size": 64}],
            "exports": ["compressed-tensors"],
            "calibration": {"samples": 20000, "length": 512},
            "device": "cpu",
        }
    )
    estimate = make_plan(recipe, inspect_model(FolderFiles(bert_tiny))).estimate
    assert estimate is not None
    sizes = [estimate.memory_bytes, *(choice.memory_bytes for choice in estimate.leaner)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    assert "samples: 10000" in estimate.leaner[0].change


def test_freed_memory_goes_back_to_the_kernel():
    held = [torch.ones(64 * 1024) for _ in range(800)]  # 200 MB in pieces that are too small for mappings of their own
    keep = held[::100]
    before = psutil.Process().memory_info().rss
    del held
    return_freed_memory()
    assert psutil.Process().memory_info().rss < before - 100e6
    assert len(keep) == 8
