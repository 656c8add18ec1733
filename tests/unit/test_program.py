"""The programs of reports, for every format and task. Tests of whole jobs and of embedders run them; here they are only read."""

import ast
import json
from itertools import product
from pathlib import Path

import pytest

from nightpress.core.compress.export.program import usage_program
from nightpress.core.recipes.header import ModelHeader

_HEADS = {
    "embedding": ("BertModel", {}),
    "one class of several": ("BertForSequenceClassification", {"num_labels": 3}),
    "labels": ("BertForSequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "a number": ("BertForSequenceClassification", {"num_labels": 1}),
    "classes of tokens": ("BertForTokenClassification", {"num_labels": 3}),
    "a word": ("BertForMaskedLM", {}),
    "text": ("LlamaForCausalLM", {}),
    "a translation": ("MarianMTModel", {"vocab_size": 100}),
    "speech": ("WhisperForConditionalGeneration", {"vocab_size": 100}),
    "an image's class": ("ViTForImageClassification", {"num_labels": 3}),
}
_PYTHON = ("safetensors", "compressed-tensors", "onnx", "openvino")


def header(architecture: str, config: dict[str, object], *, pooling: str = "mean") -> ModelHeader:
    return ModelHeader(
        model_type="bert", architecture=architecture, config=config, tensors=(), has_tokenizer=True, pooling=pooling
    )


def check(program: str) -> None:
    """It is Python, prints something, and uses whatever it imports."""
    tree = ast.parse(program)
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used, imported - used
    assert "print" in used


@pytest.mark.parametrize(("format_", "task"), list(product(_PYTHON, _HEADS)))
def test_every_format_and_task_has_a_program(format_: str, task: str, tmp_path: Path) -> None:
    check(usage_program(format_, tmp_path / format_, header(*_HEADS[task])))


@pytest.mark.parametrize("task", ["embedding", "text"])
def test_llama_cpp_has_a_program(task: str, tmp_path: Path) -> None:
    program = usage_program("gguf", tmp_path / "gguf-q8_0", header(*_HEADS[task]))
    check(program)
    assert "gguf-q8_0/model.gguf" in program


@pytest.mark.parametrize("format_", [*_PYTHON, "gguf"])
def test_a_model_with_a_chat_template_is_asked_in_a_chat(format_: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    program = usage_program(format_, tmp_path, header(*_HEADS["text"]))
    check(program)
    assert '"role": "user"' in program


@pytest.mark.parametrize(
    "pooling", ["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean", "mean+cls"]
)
def test_an_embedder_is_pooled_as_its_folder_says(pooling: str, tmp_path: Path) -> None:
    check(usage_program("onnx", tmp_path, header("BertModel", {}, pooling=pooling)))


def test_where_no_program_is_known_none_is_shown(tmp_path: Path) -> None:
    assert usage_program("safetensors", tmp_path, header("WhisperForAudioClassification", {})) == ""


def test_fp4_weights_with_rounded_inputs_are_unpacked_first(tmp_path: Path) -> None:
    """transformers leaves them packed, and its first call would fail in bfloat16."""
    group = {"weights": {"num_bits": 4, "type": "float"}, "input_activations": {"num_bits": 8}}
    for inputs, unpacked in ((group["input_activations"], True), (None, False)):
        config = {"quantization_config": {"config_groups": {"group_0": group | {"input_activations": inputs}}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        program = usage_program("compressed-tensors", tmp_path, header(*_HEADS["text"]))
        check(program)
        assert ("decompress_model" in program) is unpacked
