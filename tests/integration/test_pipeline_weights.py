"""Several passes over weights in one recipe, through the whole pipeline to a folder that transformers loads."""

import json
from pathlib import Path

import pytest

from tests.models import bert_tiny_dir
from tests.press import lay_out, press


@pytest.mark.slow
def test_a_pruned_and_rounded_model_is_loaded_and_measured(tmp_path: Path):
    recipe = {
        "passes": [{"pass": "magnitude", "sparsity": 0.25}, {"pass": "weight-only", "bits": 8}],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "auto", "samples": 8, "length": 32}],
        "gates": {"size": "<= 99%"},
    }
    job = lay_out(tmp_path / "job", bert_tiny_dir(), recipe)
    manifest, report, _ = press(job)
    (artifact,) = report.artifacts
    assert artifact.verification is not None
    assert artifact.verification.passed
    assert [options.name for options in report.passes] == ["magnitude", "weight-only"]
    assert manifest.verdict == "accepted"
    config = json.loads((job / "out" / "compressed-tensors" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
