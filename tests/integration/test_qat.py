"""Quantization-aware training: the written model gives the same outputs as the trained one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.tokenized import pad
from nightpress.core.compress.export import onnx as onnx_export
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.model.cosines import whole_cosine
from nightpress.core.compress.passes.qat import on_graph_grid, take_out, train_rounded
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import DynamicInt8
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.training import classifier, rows, run_pass

_TRAIN = {"data": "mine", "length": 16, "batch": 8, "steps": 6, "validation": 0.1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(bert_tiny, tmp_path_factory.mktemp("model") / "classifier", blocks=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def _ids() -> torch.Tensor:
    return torch.randint(1000, 20000, (4, 12), generator=torch.Generator().manual_seed(0))


# torch warns that it will remove a dtype that transformers uses for the scales.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "group_size": 16}, {"activations": "int8"}])
@pytest.mark.slow
def test_the_written_model_answers_as_the_trained_one(options: dict[str, Any], model: Path, data: Path, tmp_path: Path):
    pass_ = {"pass": "qat", **options, "logits": {"alpha": 0.5}, "train": {**_TRAIN, "gradient_checkpointing": True}}
    out, record = run_pass(model, tmp_path, pass_, export="compressed-tensors", data_files={"mine": data})
    assert record.summary["layers"] == 12
    header = inspect_model(FolderFiles(model))
    context = PassContext(header=header, work_dir=tmp_path / "work", data_files={"mine": data})
    recipe = parse_recipe({"name": "x", "passes": [pass_], "exports": ["compressed-tensors"]})
    trained, again, _ = train_rounded(model, recipe.passes[0], context)
    assert again.resumed_from == 6  # it resumes from the last checkpoint, so this is the same training
    written = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = trained(input_ids=_ids()).logits, written(input_ids=_ids()).logits
        take_out(trained, settle=False)
        plain = trained(input_ids=_ids()).logits
    felt = float((plain - expected).abs().max())
    assert felt > 1e-4
    assert float((found - expected).abs().max()) < 0.02 * felt


@pytest.mark.slow
def test_dynamic_int8_finds_the_trained_grid_again(bert_tiny: Path, data: Path, tmp_path: Path):
    model = classifier(bert_tiny, tmp_path / "model", blocks=1)
    pass_ = {"pass": "qat", "leaves": "float", "train": _TRAIN}
    out, _ = run_pass(model, tmp_path, pass_, export="onnx", data_files={"mine": data})
    name = "bert.encoder.layer.0.output.dense.weight"
    weight = load_file(out / "model.safetensors")[name]
    torch.testing.assert_close(on_graph_grid(weight), weight, rtol=1e-6, atol=0)
    header = inspect_model(FolderFiles(out))
    check = pad(_ids().tolist(), 0)
    traced = tracing.trace(out, header, check, PassContext(header=header, work_dir=tmp_path / "work"))
    records = onnx_export.save(out, tmp_path / "onnx", traced, [(0, DynamicInt8())])
    errors = {layer.name: layer.relative_error for layer in records[0].layers}
    assert errors[name.removesuffix(".weight")] < 1e-6
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    feeds = {"input_ids": check.ids, "attention_mask": check.mask, "token_type_ids": np.zeros_like(check.ids)}
    # The graph also rounds activations, with one scale per tensor.
    assert whole_cosine(session.run(None, feeds)[0], traced.check) > 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_a_whole_job_trains_rounded(model: Path, data: Path, tmp_path: Path):
    recipe = {
        "passes": [{"pass": "qat", "bits": 4, "group_size": 32, "train": _TRAIN}],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "accuracy", "data": "mine", "samples": 40, "length": 16}],
    }
    _, report, _ = press(lay_out(tmp_path / "job", model, recipe, {"mine": data.read_text()}))
    assert report.artifacts[0].verification is not None
    assert report.passes[0].series
    assert len(report.passes[0].layers) == 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 4, "activations": "int8"}, "int8 weights"),
        ({"bits": 4, "leaves": "float"}, "dynamic-int8"),
        ({"bits": 4, "group_size": 48}, "does not divide"),
        ({"logits": {"alpha": 0.2}}, "labels"),
        ({"bits": 3}, "bits"),
    ],
)
def test_what_no_runtime_takes_is_refused(options: dict[str, Any], said: str, model: Path):
    recipe = {"name": "x", "passes": [{"pass": "qat", **options}], "exports": ["compressed-tensors"]}
    with pytest.raises(NightpressError, match=said):
        make_plan(parse_recipe(recipe), inspect_model(FolderFiles(model)))
