"""Graphs without the positions that their answer does not read: the same answers, from a last layer that computes one position."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.graph.unread import without_unread_positions
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.block_models import settings_of

_IDS = np.arange(5, 37).reshape(2, 16)


def _traced(class_name: str, config: str, layers: int, folder: Path) -> Path:
    """Trace a model with random weights. config: the class of block_models whose settings it has."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model_class(model_class.config_class(**settings_of(config, layers))).save_pretrained(folder / "source")
    (folder / "source" / "tokenizer.json").write_text("{}")
    header = inspect_model(FolderFiles(folder / "source"))
    context = PassContext(header=header, work_dir=folder / "work")
    return tracing.trace(folder / "source", header, Sequences(_IDS, np.ones_like(_IDS)), context).path


def _answer(graph: bytes, length: int, *more: str) -> list[Any]:
    model = onnx.load_model_from_string(graph)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in more)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    mask = np.ones((2, length), np.int64)
    mask[1, length // 2 :] = 0
    inputs = {"input_ids": _IDS[:, :length], "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
    found: list[Any] = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    return found


@pytest.mark.parametrize(
    ("class_name", "config", "layers"),
    [
        # What differs between families is in the last layer and the head. The layer before it keeps all positions in each of them.
        ("BertForSequenceClassification", "BertForMaskedLM", 2),
        ("RobertaForSequenceClassification", "RobertaForSequenceClassification", 1),
        ("DistilBertForSequenceClassification", "DistilBertForMaskedLM", 1),
        ("ElectraForSequenceClassification", "ElectraForMaskedLM", 1),
    ],
)
@pytest.mark.slow
def test_a_classifier_answers_the_same_from_one_position_of_its_last_layer(
    class_name: str, config: str, layers: int, tmp_path: Path
):
    graph = _traced(class_name, config, layers, tmp_path)
    model = onnx.load(graph)
    assert without_unread_positions(model)
    onnx.checker.check_model(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul" and "layer" in node.name]
    by_layer = [[node for node in products if f"layer.{at}." in node.name] for at in range(layers)]
    for length in (16, 3):
        (expected,) = _answer(graph.read_bytes(), length)
        tensors = [node.output[0] for found in by_layer for node in found]
        answered, *values = _answer(model.SerializeToString(), length, *tensors)
        assert np.allclose(answered, expected, atol=1e-6)
        lengths = {name: value.shape[-2] for name, value in zip(tensors, values, strict=True)}
        *whole, last = [[lengths[node.output[0]] for node in found] for found in by_layer]
        assert not any(1 in found for found in whole)
        # In the last layer, only keys and values are those of all positions.
        assert last.count(1) == len(last) - 2 > 0


@pytest.mark.parametrize("class_name", ["BertModel", "BertForTokenClassification"])
@pytest.mark.slow
def test_a_model_that_answers_at_every_position_stays_as_it_is(class_name: str, tmp_path: Path):
    model = onnx.load(_traced(class_name, "BertForMaskedLM", 1, tmp_path))
    before = model.SerializeToString()
    assert not without_unread_positions(model)
    assert model.SerializeToString() == before
