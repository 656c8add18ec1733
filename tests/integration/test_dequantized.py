"""A pressed model is written back as a float model with the weights that its codes stand for, whatever their scheme."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nightpress.core.compress.grids.dequantized import StoredWeights, write_dequantized
from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import Quantizing
from tests.every_family import save_family
from tests.folders import load_tensors

_INT4 = {"pass": "weight-only", "bits": 4, "group_size": 32}
FORMS: dict[str, list[dict[str, Any]]] = {
    "int4": [_INT4],
    "int4, zero points": [_INT4 | {"symmetric": False}],
    "int3, a scale a row": [_INT4 | {"bits": 3, "group_size": None}],
    "int4 and int8": [_INT4 | {"overrides": {"re:.*down_proj": {"bits": 8}}}],
    "int4, embeddings": [_INT4 | {"embeddings": True}],
    "fp8 weights": [{"pass": "weight-only", "format": "fp8"}],
    "mxfp4": [{"pass": "weight-only", "format": "mxfp4"}],
    "nvfp4": [{"pass": "weight-only", "format": "nvfp4"}],
    "int8 activations": [{"pass": "smoothquant", "alpha": 0.0}],
    "int8 activations, static": [{"pass": "smoothquant", "alpha": 0.0, "activations": "tensor"}],
    "fp8, a scale a tensor": [{"pass": "fp8", "weights": "tensor"}],
    "fp8, blocks": [{"pass": "fp8", "weights": "block"}],
    "cache, then fp8": [{"pass": "kv-cache"}, {"pass": "fp8"}],
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back(form: str, tmp_path: Path):
    source = save_family("llama", tmp_path / "source", dtype="bfloat16")
    recipe = parse_recipe({"name": "t", "passes": FORMS[form], "exports": ["compressed-tensors"], "evaluate": []})
    folder = source
    for index, options in enumerate(recipe.passes):
        context = PassContext(
            header=inspect_model(FolderFiles(folder)),
            work_dir=tmp_path,
            index=index,
            calibration=Calibration(samples=4, length=32),
        )
        MODEL_PASSES[options.pass_](folder, tmp_path / str(index), options, context)
        folder = tmp_path / str(index)
    last = recipe.passes[-1]
    assert isinstance(last, Quantizing)
    written, floats = load_tensors(folder), load_tensors(source)
    assert StoredWeights(folder).names == sorted(floats)
    write_dequantized(folder, tmp_path / "floats")
    back = load_tensors(tmp_path / "floats")
    assert back.keys() == floats.keys()
    for name, tensor in back.items():
        assert tensor.dtype == floats[name].dtype
        meant = written.get(name)
        if f"{name}_scale" in written:
            meant = from_tensors(name, last.scheme(name.removesuffix(".weight")), written)
        assert meant is not None
        assert torch.equal(tensor, meant.to(tensor.dtype)), name
    config = json.loads((tmp_path / "floats" / "config.json").read_bytes())
    assert "quantization_config" not in config
    assert {file.name for file in (tmp_path / "floats").iterdir()} >= {"tokenizer.json", "model.safetensors"}
