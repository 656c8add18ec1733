"""An artifact is also timed beside the uncompressed model in its own runtime."""

from pathlib import Path
from typing import Any, get_args

import pytest

from nightpress.core.handoff.spec import JobSpec
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes.base import ExportFormat
from nightpress.core.recipes.plan import make_plan, timed_uncompressed
from tests.press import lay_out, press

RECIPE: dict[str, Any] = {
    "name": "int8",
    "passes": [{"pass": "dynamic-int8"}],
    "exports": ["onnx", "openvino"],
    "evaluate": [
        {"metric": "fidelity", "samples": 4, "length": 16},
        {"metric": "latency", "length": 32, "repeats": 4},
    ],
    "gates": {"latency": "<= 1000x best"},
}


def names(model: Path, **changes: Any) -> list[str]:
    recipe = parse_recipe(RECIPE | changes)
    return [export.name for export in timed_uncompressed(recipe, inspect_model(FolderFiles(model)))]


def test_each_runtime_of_a_compressed_artifact_has_its_own_reference(bert_tiny: Path):
    assert names(bert_tiny) == ["onnx", "openvino"]
    assert names(bert_tiny, exports=["onnx"]) == ["onnx"]
    half = [{"pass": "magnitude"}]
    assert names(bert_tiny, passes=half, exports=["safetensors", "openvino"]) == ["openvino"]
    assert names(bert_tiny, passes=[], exports=[{"format": "onnx", "type": "fp16"}]) == ["onnx"]
    for runtime in set(get_args(ExportFormat)) - {"safetensors", "compressed-tensors"}:
        assert Export(format=runtime).uncompressed is not None, runtime


@pytest.mark.parametrize(
    "changes",
    [
        {"passes": [], "exports": ["onnx"]},
        {"passes": [{"pass": "magnitude"}], "exports": ["safetensors"]},
        {"evaluate": [{"metric": "fidelity"}], "gates": {}},
    ],
    ids=["the artifact is the uncompressed model", "transformers runs the source", "nothing is timed"],
)
def test_a_recipe_without_such_an_artifact_pays_nothing(changes: dict[str, Any], bert_tiny: Path):
    assert names(bert_tiny, **changes) == []


def test_the_plan_counts_its_time_and_bounds_its_memory(bert_tiny: Path, minilm: Path):
    for model in (bert_tiny, minilm):
        header = inspect_model(FolderFiles(model))
        with_it, without = (
            make_plan(parse_recipe({**RECIPE, "passes": passes, "exports": ["onnx"]}), header).estimate
            for passes in ([{"pass": "magnitude"}], [])
        )
        assert with_it is not None
        assert without is not None
        assert with_it.seconds > without.seconds + 4
        assert with_it.memory_bytes < without.memory_bytes + 3 * header.size + 2**30


@pytest.mark.slow
def test_where_memory_does_not_hold_it_the_gate_says_so(tmp_path: Path, bert_tiny: Path):
    recipe = {**RECIPE, "exports": ["onnx"], "gates": {"latency": "<= 1000x runtime"}}
    lay_out(tmp_path / "job", bert_tiny, recipe)
    JobSpec.load(tmp_path / "job").model_copy(update={"memory_limit": 10**6}).save(tmp_path / "job")
    _, tight, _ = press(tmp_path / "job")
    (timing,), (gate,) = tight.artifacts[0].timings, tight.gates
    assert timing.over_uncompressed is None
    assert (gate.observed, gate.passed) == (None, False)
    assert "uncompressed model in the same runtime" in gate.explanation
