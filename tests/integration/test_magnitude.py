"""Magnitude pruning: exact counts, the smallest first, the same bytes each time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nightpress.core.compress.export import safetensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.passes import Magnitude
from tests.folders import header_of, load_tensors, tiny_llama

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def prune(source: Path, target: Path, threads: int = 2, **options: object) -> PassRecord:
    context = PassContext(header=header_of(source), work_dir=target.parent / "work", threads=threads)
    return MODEL_PASSES["magnitude"](source, target, Magnitude.model_validate(options), context)


def linears(folder: Path) -> list[str]:
    return [tensor.name for tensor in header_of(folder).tensors if is_linear_weight(tensor, Magnitude().ignore)]


def smallest_to_zero(flat: torch.Tensor, count: int) -> torch.Tensor:
    """The reference: one stable sort of all values."""
    pruned = flat.clone()
    pruned[flat.abs().sort(stable=True).indices[:count]] = 0
    return pruned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.9])
def test_each_layer_loses_exactly_its_smallest(tmp_path: Path, dtype: torch.dtype, sparsity: float):
    source = tiny_llama(tmp_path / "source", dtype=dtype, shards=2)
    record = prune(source, tmp_path / "out", sparsity=sparsity)
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    for name in linears(source):
        count = int(sparsity * before[name].numel() + 0.5)
        assert torch.equal(after[name].view(-1), smallest_to_zero(before[name].view(-1), count))
    for name in set(before) - set(linears(source)):
        assert torch.equal(after[name], before[name])
    assert record.summary["zeros"] == sum(int((after[name] == 0).sum()) for name in linears(source))
    for layer in record.layers:
        old, new = before[f"{layer.name}.weight"].double(), after[f"{layer.name}.weight"].double()
        assert layer.relative_error == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-6)
        assert layer.sparsity == pytest.approx(float((new == 0).double().mean()))
        assert layer.bytes_before == layer.bytes_after  # zeros take as many bytes as other numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_globally_the_smallest_of_all_layers_go(tmp_path: Path, dtype: torch.dtype):
    source = tiny_llama(tmp_path / "source", dtype=dtype, shards=3)
    tensors = load_tensors(source)
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(0.1)  # so that the layers' shares of zeros differ
    for path in source.glob("*.safetensors"):
        save_file({name: tensors[name] for name in load_file(path)}, path, metadata={"format": "pt"})
    prune(source, tmp_path / "out", sparsity=0.4, across="global")
    names = linears(source)  # in the order of the files: ties are broken in this order
    after = load_tensors(tmp_path / "out")
    every = torch.cat([tensors[name].view(-1) for name in names])
    expected = smallest_to_zero(every, int(0.4 * every.numel() + 0.5))
    assert torch.equal(torch.cat([after[name].view(-1) for name in names]), expected)


@pytest.mark.slow
def test_ties_go_in_the_order_of_their_places(tmp_path: Path):
    source = tiny_llama(
        tmp_path / "source", dtype=torch.float32, num_hidden_layers=1, hidden_size=1024, intermediate_size=1100
    )
    path = source / "model.safetensors"
    tensors = {
        name: tensor.sign() + (tensor == 0) if tensor.ndim == 2 else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    for across in ("layer", "global"):
        prune(source, tmp_path / across, sparsity=0.3, across=across, threads=3)
    name = "model.layers.0.mlp.up_proj.weight"  # it has several chunks
    gone = load_tensors(tmp_path / "layer")[name].view(-1) == 0
    count = int(0.3 * gone.numel() + 0.5)
    assert gone[:count].all()
    assert not gone[count:].any()
    every = torch.cat([load_tensors(tmp_path / "global")[linear].view(-1) for linear in linears(source)]) == 0
    count = int(0.3 * every.numel() + 0.5)
    assert every[:count].all()
    assert not every[count:].any()


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "4:8", "1:16"])
def test_a_pattern_keeps_its_number_of_the_largest(tmp_path: Path, pattern: str):
    source = tiny_llama(tmp_path / "source", dtype=torch.bfloat16)
    record = prune(source, tmp_path / "out", pattern=pattern)
    kept, group = map(int, pattern.split(":"))
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    for name in linears(source):
        groups = after[name].view(-1, group)
        assert ((groups != 0).sum(1) <= kept).all()
        largest = before[name].abs().view(-1, group).sort(dim=1, descending=True).values[:, :kept]
        assert torch.equal(groups.abs().sort(dim=1, descending=True).values[:, :kept], largest)
    assert record.summary["sparsity"] == pytest.approx(1 - kept / group, abs=0.01)


@pytest.mark.slow
def test_the_same_bytes_each_time_and_the_folder_still_loads(tmp_path: Path):
    source = tiny_llama(tmp_path / "source", shards=2)
    folders = []
    for threads in (1, 3):
        folders.append(tmp_path / str(threads) / "out")
        prune(source, folders[-1], threads=threads, sparsity=0.5)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert first["config.json"] == (source / "config.json").read_bytes()
    safetensors.save(folders[0], tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_the_record_says_that_nothing_became_smaller_and_what_compression_would_save(tmp_path: Path):
    source = tiny_llama(tmp_path / "source", hidden_size=128, intermediate_size=256)
    summary = prune(source, tmp_path / "out", sparsity=0.8).summary
    assert summary["bytes_after"] == summary["bytes_before"]
    storage = summary["storage"]
    kept, weights = summary["weights"] - summary["zeros"], summary["weights"]
    assert storage["dense"] == 2 * weights
    assert storage["bitmap"] == 2 * kept + weights // 8
    assert storage["csr"] > storage["bitmap"]
    assert storage["deflate"] < 0.6 * storage["deflate_before"]
    json.dumps(summary)


def test_progress_never_falls(tmp_path: Path):
    source = tiny_llama(tmp_path / "source")
    seen: list[float] = []
    context = PassContext(
        header=header_of(source), work_dir=tmp_path / "work", progress=lambda fraction, _message: seen.append(fraction)
    )
    MODEL_PASSES["magnitude"](source, tmp_path / "out", Magnitude(across="global"), context)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_infinity_is_refused_with_the_tensor_named(tmp_path: Path):
    source = tiny_llama(tmp_path / "source", dtype=torch.float32)
    tensors = load_tensors(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(NightpressError, match=r"layers\.1\.mlp\.up_proj") as caught:
        prune(source, tmp_path / "out", sparsity=0.5)
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
