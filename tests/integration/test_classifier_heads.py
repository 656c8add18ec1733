"""Classifiers' outputs (one number, several numbers, labels), and the end of a text in decoders that pad."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.data.tokenized import open_tokenizer
from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import Observed, run_consumer
from nightpress.core.compress.export.verify import verify
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan

RECIPE: dict[str, Any] = {"name": "t", "passes": [{"pass": "weight-only"}], "exports": ["compressed-tensors"]}
TEXTS = [f"{'the ' * (at % 9)}king of {word} sat down" for at, word in enumerate(("spain", "france", "wales") * 8)]


def _header(**config: Any) -> ModelHeader:
    return ModelHeader(
        model_type="bert",
        architecture="BertForSequenceClassification",
        config=config,
        tensors=(),
        has_tokenizer=True,
    )


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({}, "classes"),
        ({"num_labels": 1}, "numbers"),
        ({"id2label": {"0": "LABEL_0"}}, "numbers"),
        ({"id2label": {"0": "LABEL_0"}, "problem_type": "single_label_classification"}, "numbers"),
        ({"num_labels": 3, "problem_type": "regression"}, "numbers"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "labels"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "classes"),
    ],
)
def test_a_head_is_read_as_transformers_reads_it(config: dict[str, Any], head: str) -> None:
    assert _header(**config).head == head


@pytest.mark.parametrize(
    ("config", "metric", "hint"),
    [
        ({"num_labels": 1}, "accuracy", "regression"),
        ({"num_labels": 3, "problem_type": "regression"}, "accuracy", "regression"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "regression", "accuracy"),
        ({"num_labels": 3}, "regression", "accuracy"),
    ],
)
def test_a_metric_for_another_kind_of_head_is_refused(config: dict[str, Any], metric: str, hint: str) -> None:
    evaluate = [{"metric": metric, "data": "reviews"}]
    recipe = parse_recipe({"name": "t", "passes": [], "exports": ["safetensors"], "evaluate": evaluate})
    with pytest.raises(NightpressError, match=f"{metric} is for models that") as caught:
        make_plan(recipe, _header(**config))
    assert f"Use `{hint}` or `fidelity`" in caught.value.hint


def _decoder(bert_tiny: Path, folder: Path, pad: int | None) -> Path:
    """A decoder with a classifier, which reads the last token that isn't padding."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
        initializer_range=0.3,
        pad_token_id=pad,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_tiny / name, folder / name)
    return folder


def _by_hand(folder: Path) -> np.ndarray:
    """The logits of each text, computed one by one and without padding."""
    from transformers import AutoModelForSequenceClassification

    tokenizer, model = open_tokenizer(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return np.stack(
            [model(torch.tensor([tokenizer.encode(text, special=True)])).logits[0].numpy() for text in TEXTS]
        )


@pytest.mark.parametrize("pad", [0, 7, None])
@pytest.mark.slow
def test_a_decoders_classifier_answers_as_it_does_without_padding(
    pad: int | None, bert_tiny: Path, tmp_path: Path
) -> None:
    folder = _decoder(bert_tiny, tmp_path / "model", pad)
    expected = _by_hand(folder)
    rows = [{"text": text, "label": int(row.argmax())} for text, row in zip(TEXTS, expected, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe({**RECIPE, "evaluate": [{"metric": "accuracy", "data": "rows", "samples": len(rows)}]})
    trial = quality.prepare(
        recipe, inspect_model(FolderFiles(folder)), folder, {"rows": tmp_path / "rows.jsonl"}, threads=1
    )
    seen = run_consumer(safetensors.CONSUMER, folder, trial.task, name="source", scratch=tmp_path / "scratch")
    accuracy = quality.measurements(trial, seen, None)[0]
    assert (accuracy.name, accuracy.value) == ("accuracy", 1.0)
    assert np.sort(seen.outputs["quality0.values"], axis=0) == pytest.approx(np.sort(expected, axis=0), abs=1e-4)


def test_a_batch_of_a_model_without_padding_is_refused_when_planned(bert_tiny: Path, tmp_path: Path) -> None:
    header = inspect_model(FolderFiles(_decoder(bert_tiny, tmp_path / "model", None)))
    with pytest.raises(NightpressError, match="padding token") as caught:
        make_plan(parse_recipe({**RECIPE, "evaluate": [{"metric": "latency", "batch": [1, 8]}]}), header)
    assert "pad_token_id" in caught.value.hint
    with pytest.raises(NightpressError, match="pad_token_id"):
        Export(format="onnx").check(header)
    make_plan(parse_recipe({**RECIPE, "evaluate": [{"metric": "latency", "batch": 1}]}), header)


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_one_answer_to_every_text_is_no_verified_artifact(outputs: int, bert_tiny: Path, tmp_path: Path) -> None:
    """The outputs differ little in relation to their size, so a constant output has a large cosine with the source's outputs."""
    recipe = parse_recipe(RECIPE)
    header = inspect_model(FolderFiles(bert_tiny))
    trial = quality.prepare(recipe, header, bert_tiny, {}, threads=1)
    answers = 5 + np.random.default_rng(0).standard_normal((8, outputs)).astype(np.float32)
    constant = np.broadcast_to(answers.mean(axis=0), answers.shape)

    def seen(values: np.ndarray) -> Observed:
        return Observed({"check.values": values}, (), (), None, {"torch": "2"}, "", 0.0, tmp_path)

    def verified(values: np.ndarray) -> bool:
        export = Export(format="compressed-tensors")
        return verify(recipe, export, seen(values), source=seen(answers), traced=None, task=trial.task).passed

    assert verified(answers)
    assert verified(answers + 0.1 * np.random.default_rng(1).standard_normal(answers.shape).astype(np.float32))
    for wrong in (constant, np.ascontiguousarray(answers[::-1])):
        with pytest.raises(NightpressError) as caught:
            verified(wrong)
        assert caught.value.code is ErrorCode.VERIFICATION_FAILED
        assert "in common" in caught.value.message
