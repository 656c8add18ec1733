"""Activations that are not finite: every method raises the same error, which names the layer, and none skips the layer silently."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.compress.passes.static_int8 import static_int8
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import StaticInt8
from tests.integration.test_padding import PASSES
from tests.integration.test_shrink import _model
from tests.integration.test_static_int8 import Bench

_CALIBRATION = Calibration(samples=4, length=16, dtype="float32")


def _overflowing(folder: Path) -> Path:
    """A model with finite weights whose second block overflows: its outputs are infinite, and the third block's are NaN."""
    _model("LlamaForCausalLM", folder)
    tensors = load_file(folder / "model.safetensors")
    for part, by in (("gate", 1e13), ("up", 1e13), ("down", 1e16)):
        tensors[f"model.layers.1.mlp.{part}_proj.weight"] *= by
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_stops_and_names_the_layer(name: str, tmp_path: Path):
    source = _overflowing(tmp_path / "source")
    pass_: dict[str, Any] = PASSES[name]
    options = parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]}).passes[0]
    header = inspect_model(FolderFiles(source))
    (tmp_path / "work").mkdir()
    context = PassContext(header, tmp_path / "work", calibration=_CALIBRATION)
    with pytest.raises(NightpressError) as caught:
        MODEL_PASSES[pass_["pass"]](source, tmp_path / "out", options, context)
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
    assert "model.layers." in str(caught.value)
    assert caught.value.details["layers"]
    assert "calibration" in str(caught.value.hint)


@pytest.mark.slow
def test_a_graph_stops_and_names_the_product(tmp_path: Path):
    bench = Bench(tmp_path)
    graph = tmp_path / "overflows" / "model.onnx"
    graph.parent.mkdir()
    model = onnx.load(bench.traced.path)
    tensors = {initializer.name: initializer for initializer in model.graph.initializer}
    product = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in tensors][3]
    weight = onnx.numpy_helper.to_array(tensors[product.input[1]])
    tensors[product.input[1]].CopyFrom(onnx.numpy_helper.from_array(np.full_like(weight, 3e38), product.input[1]))
    onnx.save(model, graph)
    with pytest.raises(NightpressError) as caught:
        static_int8(bench.model, replace(bench.traced, path=graph), StaticInt8(), bench.context)
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
    assert caught.value.details["layers"]
