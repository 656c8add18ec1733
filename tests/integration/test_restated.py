"""Classes of transformers that count or compare lengths in Python: their graphs answer as they do, whatever the length of the text."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
import transformers
from torch import Tensor

from nightpress.core.compress.export import onnx as to_onnx
from nightpress.core.compress.export import openvino as to_openvino
from nightpress.core.compress.graph.restated import restate
from nightpress.core.compress.graph.tracing import trace
from nightpress.core.compress.passes import PassContext
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import DynamicInt8
from tests.zoo.graphs import examples, graph_distance
from tests.zoo.models import config_for, load, save_tiny

#: Three blocks pool a text twice.
_BLOCKS = {"block_sizes": [1, 2, 1], "block_repeats": [1, 1, 2]}
_WINDOWS = {"attention_window": [4, 16]}
_LENGTHS = (2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31)


def _built(model_type: str, class_name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    config = config_for(model_type, model_class)
    config.update(changes)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too: as zeros they would hide errors
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _texts(length: int) -> dict[str, Tensor]:
    """Two texts of tokens of two types. The second is padded if it's longer than two tokens."""
    ids = torch.randint(5, 50, (2, length), generator=torch.Generator().manual_seed(length))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 2:][-3:] = 0
    types[:, length // 2 :] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _answers(model: Any, length: int) -> bool:
    """Whether Funnel's class answers texts of this length: for some short ones it counts fewer positions than tokens."""
    try:
        with torch.inference_mode():
            model(input_ids=torch.full((1, length), 5))
    except RuntimeError as error:
        if re.search(r"out of bounds|doesn't match the broadcast shape", str(error)):
            return False
        raise
    return True


def _answers_the_same(model: Any, restated: Any, texts: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        expected, found = model(**texts).logits, restated(**texts).logits
    read = texts["attention_mask"].bool() if expected.ndim == 3 else slice(None)  # nobody reads the answer at padding
    torch.testing.assert_close(found[read], expected[read], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling_type": "max", "pool_q_only": False},
        {"truncate_seq": False},
        {"separate_cls": False},
        {"attention_type": "factorized"},
        {"attention_type": "factorized", "pool_q_only": False},
        {"attention_type": "factorized", "separate_cls": False},
    ],
    ids=str,
)
def test_funnel_pools_texts_of_every_length_as_its_class_does(changes: dict[str, Any]) -> None:
    model = _built("funnel", "FunnelForMaskedLM", **_BLOCKS, **changes)
    restated = copy.deepcopy(model)
    restate(restated)
    taken = [length for length in _LENGTHS if _answers(model, length)]
    assert set(taken) >= {8, 9, 16, 17, 31}
    for length in taken:
        _answers_the_same(model, restated, _texts(length))


def test_funnels_classifier_reads_pooled_states() -> None:
    model = _built("funnel", "FunnelForSequenceClassification", **_BLOCKS)
    restated = copy.deepcopy(model)
    restate(restated)
    for length in (5, 6, 7, 8, 9, 16, 17, 31):
        _answers_the_same(model, restated, _texts(length))


@pytest.mark.parametrize("class_name", ["LongformerForMaskedLM", "LongformerForSequenceClassification"])
def test_longformer_reads_windows_at_every_length(class_name: str) -> None:
    model = _built("longformer", class_name, **_WINDOWS)
    restated = copy.deepcopy(model)
    restate(restated)
    for length in (1, *_LENGTHS, 32, 33, 64):
        _answers_the_same(model, restated, _texts(length))


def test_a_classifiers_first_token_that_is_padding_sees_nothing() -> None:
    """transformers lets no padding see the whole text, either."""
    model = _built("longformer", "LongformerForSequenceClassification", **_WINDOWS)
    restated = copy.deepcopy(model)
    restate(restated)
    texts = _texts(20)
    texts["attention_mask"] = torch.ones_like(texts["input_ids"])
    texts["attention_mask"][:, :4] = 0
    _answers_the_same(model, restated, texts)


@pytest.mark.parametrize("use_prompt", [False, True])
def test_mvp_without_its_checks_answers_as_before(use_prompt: bool) -> None:
    model = _built("mvp", "MvpForConditionalGeneration", use_prompt=use_prompt, prompt_length=3, prompt_mid_dim=16)
    restated = copy.deepcopy(model)
    restate(restated)
    texts = _texts(9)
    del texts["token_type_ids"]
    with torch.inference_mode():
        expected, found = (each(**texts, decoder_input_ids=texts["input_ids"][:, :5]) for each in (model, restated))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        written = [each.generate(**texts, max_new_tokens=6, do_sample=False) for each in (model, restated)]
    assert torch.equal(*written)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "class_name", "changes"),
    [
        ("funnel", "FunnelForMaskedLM", {"block_sizes": [1, 1, 1], "block_repeats": [1, 1, 1]}),
        ("longformer", "LongformerForSequenceClassification", _WINDOWS),
    ],
    ids=["funnel", "longformer"],
)
def test_one_graph_reads_texts_of_every_length(
    model_type: str, class_name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = save_tiny(model_type, class_name, tmp_path / "source", **changes)
    header, model = inspect_model(FolderFiles(source)), load(class_name, source)
    traced = trace(source, header, examples(header), PassContext(header=header, work_dir=tmp_path))
    to_onnx.save(source, tmp_path / "onnx", traced, [])
    to_openvino.save(source, tmp_path / "openvino", traced, [])
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    compiled = openvino.Core().compile_model(
        tmp_path / "openvino" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    names = {value.name for value in session.get_inputs()}
    for length in (5, 6, 8, 17, 40):
        texts = {name: value for name, value in _texts(length).items() if name in names}
        feeds = {name: value.numpy() for name, value in texts.items()}
        with torch.inference_mode():
            expected = model(**texts).logits.numpy()
        read = feeds["attention_mask"].astype(bool) if expected.ndim == 3 else slice(None)
        for found in (session.run(None, feeds)[0], compiled(feeds)[0]):
            np.testing.assert_allclose(found[read], expected[read], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_mvp_in_dynamic_int8_writes_token_by_token_what_the_model_says_of_the_whole(
    format_: str, tmp_path: Path
) -> None:
    source = save_tiny("mvp", "MvpForConditionalGeneration", tmp_path / "source", encoder_layers=1, decoder_layers=1)
    header = inspect_model(FolderFiles(source))
    assert graph_distance(format_, header, source, tmp_path / "work", DynamicInt8()) < 0.1
