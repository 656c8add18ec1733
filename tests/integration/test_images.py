"""Image classifiers: images as the model's own processor makes them, accuracy on a user's labels, and graphs calibrated on images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from nightpress.core.compress import pipeline
from nightpress.core.compress.data.images import read_images
from nightpress.core.handoff.report import Report
from nightpress.core.handoff.spec import DATA_DIR, SOURCE_DIR, JobSpec
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.usage import run_usage


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "source"
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 1}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8, num_labels=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Image.Image]:
    """Pictures of one of three colours, with noise, none of them square."""
    random = np.random.default_rng(0)
    found = []
    for at in range(count):
        values = random.integers(0, 80, (40, 56, 3))
        values[:, :, at % 3] += 150
        found.append(Image.fromarray(values.astype(np.uint8)))
    return found


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def save(rows: list[dict[str, Any]], file: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
        BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    ],
    ids=["ViT", "DINOv2", "ConvNeXt"],
)
def test_images_are_what_the_models_own_processor_makes_of_them(processor: Any, vit: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(vit / name)
    processor.save_pretrained(folder)
    rows = [{"image": {"bytes": png(picture), "path": None}, "label": at % 3} for at, picture in enumerate(pictures(3))]
    file = save(rows, tmp_path / "images.parquet")
    found = read_images("mine", file, folder, inspect_model(FolderFiles(vit)), samples=3, seed=0)
    theirs = processor(images=[pictures(3)[label] for label in found.labels], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found.pixels, theirs, atol=0.02)


@pytest.mark.slow
def test_a_classifier_is_judged_by_the_users_labels_and_calibrated_on_images(vit: Path, tmp_path: Path):
    """The labels are the source's own answers, except for one row of eight: so it is right on seven eighths of them."""
    model = ViTForImageClassification.from_pretrained(vit).eval()
    drawn = pictures(48)
    with torch.inference_mode():
        given = ViTImageProcessorPil.from_pretrained(vit)(images=drawn, return_tensors="pt")
        answers = model(**given).logits.argmax(-1).tolist()
    labels = [(answer + (at % 8 == 0)) % 3 for at, answer in enumerate(answers)]
    rows = [
        {"image": {"bytes": png(picture), "path": None}, "label": label}
        for picture, label in zip(drawn, labels, strict=True)
    ]
    job = tmp_path / "job"
    (job / DATA_DIR).mkdir(parents=True)
    save(rows, job / DATA_DIR / "mine.parquet")
    (job / SOURCE_DIR).symlink_to(vit)
    recipe = {
        "name": "t",
        "passes": [{"pass": "static-int8"}],
        "exports": ["onnx"],
        "calibration": {"data": "mine", "samples": 16},
        "evaluate": [{"metric": "auto", "data": "mine", "samples": 48}],
        "gates": {"accuracy": ">= -30%"},
    }
    spec = JobSpec(
        job_id="job_test",
        attempt=1,
        model_name="a model",
        model_digest="sha256:" + "0" * 64,
        recipe=parse_recipe(recipe),
        data={"mine": "mine.parquet"},
        threads=1,
    )
    spec.save(job)
    manifest = pipeline.run(job, lambda _frame: None)
    report = Report.model_validate_json((job / "out" / "report.json").read_bytes())
    assert [artifact.format for artifact in manifest.artifacts] == ["onnx"]
    (accuracy,) = [figure for figure in report.source.measurements if figure.name == "accuracy"]
    assert accuracy.value == pytest.approx(7 / 8)
    for artifact in report.artifacts:
        found = {figure.name: figure.value for figure in artifact.measurements}
        assert found["accuracy"] > 0.7
        assert found["top1_agreement"] > 0.8
        assert artifact.verification is not None
        assert artifact.verification.value > 0.95
        assert "%" in run_usage(artifact, job / "out")
    assert report.passes[0].summary["attention_scores"] == 1
    assert json.loads((job / "out" / "onnx" / "preprocessor_config.json").read_bytes())["size"]["height"] == 32
