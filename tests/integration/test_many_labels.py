"""Classifiers with independent labels, and regressions, are measured against labels as by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.data.tokenized import open_tokenizer
from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan

NAMES = ("calm", "dry", "odd")
WORDS = ("lamp", "river", "stone", "window", "garden", "letter", "horse", "winter")
TEXTS = [
    f"{at} times the {WORDS[at % 8]} by the {WORDS[(at * 3 + 1) % 8]} and {WORDS[(at * 5 + 2) % 8]}" for at in range(24)
]


def _model(bert_tiny: Path, folder: Path, **config: Any) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(initializer_range=0.3, **shape, **config)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bert_tiny / name).read_bytes())
    return folder


def _trial(folder: Path, rows: list[dict[str, Any]], metric: str, tmp: Path) -> Any:
    file = tmp / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = [{"metric": metric, "data": "rows", "samples": 24, "length": 24}]
    recipe = parse_recipe({"name": "t", "passes": [], "exports": ["safetensors"], "evaluate": evaluate})
    header = inspect_model(FolderFiles(folder))
    make_plan(recipe, header)
    return quality.prepare(recipe, header, folder, {"rows": file}, threads=1)


def _answers(folder: Path, texts: list[str]) -> np.ndarray:
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), open_tokenizer(folder)
    with torch.inference_mode():
        rows = [model(torch.tensor([tokenizer.encode(text, special=True)])).logits[0] for text in texts]
    return torch.stack(rows).numpy()


def _figures(folder: Path, trial: Any, tmp: Path) -> dict[tuple[str, str], Measurement]:
    seen = run_consumer(safetensors.CONSUMER, folder, trial.task, name="source", scratch=tmp / "scratch")
    return {(figure.name, figure.of): figure for figure in quality.measurements(trial, seen, None)}


@pytest.fixture(scope="module")
def many(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: at for at, name in enumerate(NAMES)}}
    folder = tmp_path_factory.mktemp("many") / "model"
    return _model(bert_tiny, folder, problem_type="multi_label_classification", **labels)


def _held(at: int) -> list[int]:
    return [index for index in range(3) if (at >> index) & 1]


@pytest.mark.parametrize("form", ["names", "indices", "flags"])
def test_independent_labels_are_read_in_each_form(many: Path, tmp_path: Path, form: str):
    of = {
        "names": lambda at: [NAMES[index] for index in _held(at)],
        "indices": _held,
        "flags": lambda at: [float(index in _held(at)) for index in range(3)],
    }[form]
    trial = _trial(many, [{"text": text, "label": of(at)} for at, text in enumerate(TEXTS)], "auto", tmp_path)
    sequences = trial.evaluations[0].scorer.examples.sequences
    assert sequences.labels.sum(axis=0).tolist() == [12, 12, 12]
    assert sorted(map(tuple, sequences.labels.tolist())) == sorted(
        tuple(int(index in _held(at)) for index in range(3)) for at in range(24)
    )


def test_independent_labels_are_measured_as_by_hand(many: Path, tmp_path: Path):
    rows = [{"text": text, "label": _held(at), "slice": "ab"[at % 2]} for at, text in enumerate(TEXTS)]
    trial = _trial(many, rows, "accuracy", tmp_path)
    found = _figures(many, trial, tmp_path)
    said = _answers(many, TEXTS) > 0
    held = np.asarray([[index in _held(at) for index in range(3)] for at in range(24)])
    assert found["accuracy", ""].value == pytest.approx((said == held).all(axis=1).mean())
    f1 = [2 * (said & held)[:, at].sum() / (said[:, at].sum() + held[:, at].sum()) for at in range(3)]
    for at, name in enumerate(NAMES):
        assert found["class_f1", name].value == pytest.approx(f1[at])
    assert found["f1", ""].value == pytest.approx(np.mean(f1))
    assert trial.evaluations[0].scorer.slices.count("a") == 12


def test_a_regression_is_measured_as_by_hand(bert_tiny: Path, tmp_path: Path):
    folder = _model(bert_tiny, tmp_path / "model", num_labels=1, problem_type="regression")
    labels = np.random.default_rng(0).normal(size=24).round(3)
    rows = [{"text": text, "label": float(label)} for text, label in zip(TEXTS, labels, strict=True)]
    found = _figures(folder, _trial(folder, rows, "auto", tmp_path), tmp_path)
    answers = _answers(folder, TEXTS)[:, 0]
    assert found["pearson", ""].value == pytest.approx(np.corrcoef(answers, labels)[0, 1], abs=1e-5)
    ranks = [np.argsort(np.argsort(values)) for values in (answers, labels)]
    assert found["spearman", ""].value == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("config", "labels", "metric", "said"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, ["good", "bad"], "regression", "is not one number"),
        ({"num_labels": 1, "problem_type": "regression"}, [1.5, 1.5], "regression", "the same number"),
        ({"num_labels": 2, "problem_type": "regression"}, [[1.5, 2.0], [1.5]], "regression", "is not a list of 2"),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [[0], [7]],
            "accuracy",
            "none of the model's 3",
        ),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused(
    bert_tiny: Path, tmp_path: Path, config: dict[str, Any], labels: list[Any], metric: str, said: str
):
    folder = _model(bert_tiny, tmp_path / "model", **config)
    rows = [{"text": TEXTS[at], "label": label} for at, label in enumerate(labels)]
    with pytest.raises(NightpressError, match=said) as caught:
        _trial(folder, rows, metric, tmp_path)
    assert caught.value.code is ErrorCode.INVALID_DATA
