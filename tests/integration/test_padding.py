"""Calibration ignores padding: with the same texts, padded to a greater length, every pass has the same statistics and result."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.compress.passes.static_int8 import static_int8
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import StaticInt8
from tests.integration.test_shrink import _model
from tests.integration.test_static_int8 import Bench

_PADDED = 36  #: additional tokens of padding after each text
_CALIBRATION = Calibration(data="mine", samples=60, length=24, packing=False, dtype="float32")
_QUANTIZING = {"gptq", "awq", "smoothquant", "fp8", "kv-cache"}

#: Every pass that uses calibration text, with each of its statistics.
PASSES: dict[str, dict[str, Any]] = {
    "gptq": {"pass": "gptq", "group_size": 16},
    "gptq, 2:4": {"pass": "gptq", "bits": 8, "group_size": None, "pattern": "2:4", "order": "natural"},
    "gptq, bits by measured error": {"pass": "gptq", "group_size": 16, "budget": 7.0},
    "awq": {"pass": "awq", "group_size": 16},
    "smoothquant": {"pass": "smoothquant"},
    "smoothquant, fixed": {"pass": "smoothquant", "alpha": 0.5, "activations": "tensor", "weights": "gptq"},
    "fp8, static": {"pass": "fp8", "activations": "static"},
    "kv-cache": {"pass": "kv-cache"},
    "sparsegpt": {"pass": "sparsegpt", "sparsity": 0.5},
    "wanda": {"pass": "wanda", "sparsity": 0.5},
    "layers": {"pass": "layers"},
    "layers, taylor": {"pass": "layers", "importance": "taylor"},
    "channels": {"pass": "channels", "multiple": 8},
    "channels, global": {"pass": "channels", "multiple": 8, "across": "global"},
    "channels, taylor": {"pass": "channels", "multiple": 8, "importance": "taylor"},
    "heads": {"pass": "heads", "share": 0.5},
    "heads, global": {"pass": "heads", "share": 0.5, "across": "global"},
    "heads, taylor": {"pass": "heads", "share": 0.5, "importance": "taylor"},
}
_ENCODERS = [
    name for name, options in PASSES.items() if options["pass"] not in {"awq", "smoothquant", "kv-cache", "fp8"}
]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts of equal length, so that they need no padding by themselves."""
    letters = np.random.default_rng(0).integers(0, 26, (60, 13))
    rows = [{"text": "".join(chr(97 + at) for at in row)} for row in letters]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pad_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add _PADDED tokens of padding to every text from now on."""
    pad = tokenized.pad

    def longer(sequences: list[list[int]], pad_id: int) -> tokenized.Sequences:
        ids, mask = (
            np.pad(array, ((0, 0), (0, _PADDED)), constant_values=fill)
            for array, fill in zip((pad(sequences, pad_id).ids, pad(sequences, pad_id).mask), (pad_id, 0), strict=True)
        )
        return tokenized.Sequences(ids, mask)

    monkeypatch.setattr(tokenized, "pad", longer)


def _run(source: Path, work: Path, pass_: Mapping[str, Any], texts: Path) -> tuple[dict[str, Tensor], PassRecord]:
    exports = ["compressed-tensors" if pass_["pass"] in _QUANTIZING else "onnx"]
    options = parse_recipe({"name": "r", "passes": [dict(pass_)], "exports": exports}).passes[0]
    header = inspect_model(FolderFiles(source))
    (work / "work").mkdir(parents=True)
    context = PassContext(header, work / "work", calibration=_CALIBRATION, data_files={"mine": texts})
    record = MODEL_PASSES[pass_["pass"]](source, work / "out", options, context)
    found = {name: tensor for path in (work / "out").glob("*.safetensors") for name, tensor in load_file(path).items()}
    return found, record


def _check_alike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Check that two results are equal, except for effects of a different order of sums.

    The order may round a tie in another way, and GPTQ then rounds the rest of the row differently. A different code changes the inputs of
    the later blocks, where more codes then differ, in some matrices more than in others. So only in the first block every single matrix
    must have few different codes; for the others the limit is for all codes together. There scales differ more, too, and one whose group
    has a lowest and a highest weight of nearly one size may change its sign.
    """
    assert ours.keys() == theirs.keys()
    turned: list[Tensor] = []
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            first, second = tensor.double(), theirs[name].double()
            if _block_of(name) and name.endswith("_scale"):
                first, second = first.abs(), second.abs()
            difference = (first - second).norm() / first.norm().clamp(min=1e-12)
            assert difference < (1e-2 if _block_of(name) else 2e-3), name
        else:
            differ = (tensor.view(torch.uint8) != theirs[name].view(torch.uint8)).flatten()
            turned.append(differ)
            assert differ.double().mean() < 0.05 or _block_of(name) > 0, name
    if turned:
        assert torch.cat(turned).double().mean() < 0.05


def _block_of(name: str) -> int:
    """The number of a tensor's block; 0 for a tensor outside all blocks."""
    found = re.search(r"\blayers?\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _numbers(value: Any) -> list[float]:
    """The numbers in a record's summary, without counts and shares of zeros."""
    if isinstance(value, Mapping):
        return [
            number for key, inner in value.items() if key not in {"zeros", "sparsity"} for number in _numbers(inner)
        ]
    if isinstance(value, list | tuple):
        return [number for inner in value for number in _numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else []


def _make_padding_loud(folder: Path) -> None:
    """Give the padding token by far the largest keys, so that a statistic that includes padding is clearly different."""
    tensors = load_file(folder / "model.safetensors")
    keys = tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["model.embed_tokens.weight"][1] = 50 * keys[keys.norm(dim=1).argmax()]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _compare(class_name: str, name: str, texts: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _model(class_name, work / "source")
    if class_name != "BertForMaskedLM":
        _make_padding_loud(source)
    plain, plain_record = _run(source, work / "plain", PASSES[name], texts)
    _pad_longer(monkeypatch)
    padded, padded_record = _run(source, work / "padded", PASSES[name], texts)
    _check_alike(plain, padded)
    assert _numbers(padded_record.summary) == pytest.approx(_numbers(plain_record.summary), rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.slow
def test_a_decoders_pass_takes_no_notice_of_padding(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _compare("LlamaForCausalLM", name, texts, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", _ENCODERS)
@pytest.mark.slow
def test_an_encoders_pass_takes_no_notice_of_padding(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _compare("BertForMaskedLM", name, texts, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant", "wanda"])
@pytest.mark.slow
def test_experts_take_no_notice_of_padding(name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _compare("MixtralForCausalLM", name, texts, tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_smoothing_and_the_ranges_of_a_graph_take_no_notice_of_padding(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bench = Bench(tmp_path)
    found = []
    for name in ("plain", "padded"):
        if name == "padded":
            _pad_longer(monkeypatch)
        context = replace(bench.context, work_dir=tmp_path / name, calibration=_CALIBRATION, data_files={"mine": texts})
        static_int8(bench.model, bench.traced, StaticInt8(ranges="mse", min_cosine=None), context)
        (kept,) = (tmp_path / name).rglob("calibration.npz")
        with np.load(kept) as archive:
            found.append({key: archive[key] for key in archive.files})
    plain, padded = found
    assert plain.keys() == padded.keys()
    for key, tensor in plain.items():
        if key.startswith("codes."):
            # A sum in another order may round a tie differently, which changes the rest of the row and the row's error.
            assert (padded[key] != tensor).mean() < 0.05, key
        elif key.startswith("error."):
            assert padded[key].sum() == pytest.approx(tensor.sum(), rel=1e-2), key
        else:
            np.testing.assert_allclose(padded[key], tensor, rtol=2e-3, atol=1e-6, err_msg=key)
