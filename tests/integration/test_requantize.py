"""A source that is quantized already goes through the whole pipeline, and its report compares with what was brought."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.compress.executors.open_source import open_source
from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Report
from nightpress.core.handoff.spec import SOURCE_DIR
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import WeightOnly
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.schemes import Scheme
from tests.folders import load_tensors
from tests.press import lay_out, press

_MEASURED = {"evaluate": [{"metric": "fidelity", "samples": 4, "length": 24}]}
_INT4 = {"pass": "weight-only", "bits": 4, "group_size": 32}

# torch warns that it will remove a dtype that transformers uses for the scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def int4(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT-tiny in int4, as compressed-tensors."""
    folder = tmp_path_factory.mktemp("int4")
    context = PassContext(inspect_model(FolderFiles(bert_tiny)), folder / "work")
    MODEL_PASSES["weight-only"](bert_tiny, folder / "int4", WeightOnly.model_validate(_INT4), context)
    return folder / "int4"


def plan(folder: Path, *passes: dict[str, Any]) -> Any:
    recipe = parse_recipe({"name": "test", "passes": passes, "exports": ["compressed-tensors"], **_MEASURED})
    return make_plan(recipe, inspect_model(FolderFiles(folder)))


def test_a_quantized_source_is_refused_with_the_way_to_take_it(int4: Path) -> None:
    with pytest.raises(NightpressError) as error:
        plan(int4, {"pass": "weight-only"})
    assert error.value.code is ErrorCode.INVALID_RECIPE
    assert "compressed-tensors, int4, groups of 32" in error.value.message
    assert "{pass: requantize}" in error.value.hint


def test_a_recipe_may_say_what_it_starts_from(int4: Path, bert_tiny: Path) -> None:
    found = plan(int4, {"pass": "requantize", "from": "compressed-tensors"}, {"pass": "weight-only"})
    assert any("quantized already (compressed-tensors" in warning for warning in found.warnings)
    for folder, said in ((int4, "the model is compressed-tensors"), (bert_tiny, "the model is floats")):
        with pytest.raises(NightpressError, match=said):
            plan(folder, {"pass": "requantize", "from": "gptq"}, {"pass": "weight-only"})
    assert any(
        "does nothing" in warning
        for warning in plan(bert_tiny, {"pass": "requantize"}, {"pass": "weight-only"}).warnings
    )
    with pytest.raises(NightpressError, match="says how the source is read"):
        plan(int4, {"pass": "magnitude"}, {"pass": "requantize"}, {"pass": "weight-only"})


@pytest.mark.slow
def test_what_was_brought_is_the_reports_source(int4: Path, tmp_path: Path) -> None:
    passes = [{"pass": "requantize"}, {"pass": "weight-only"}]
    job = lay_out(tmp_path / "job", int4, {"passes": passes, "exports": ["compressed-tensors"], **_MEASURED})
    _, report, _ = press(job)
    brought = sum(file.stat().st_size for file in (job / SOURCE_DIR).iterdir())
    assert report.source.size_bytes == brought
    assert report.model["size_bytes"] == brought
    assert report.model["parameters"] > 4_000_000
    record, rounded = report.passes
    assert (record.name, record.index, rounded.name, rounded.index) == ("requantize", 0, "weight-only", 1)
    assert record.summary["from"] == "compressed-tensors, int4, groups of 32"
    assert record.summary["weights"] == len(rounded.layers)
    assert any("quantized already" in note for note in report.notes)
    assert max(layer.relative_error for layer in rounded.layers) < 0.03
    assert Report.model_validate_json((job / "out" / "report.json").read_bytes()) == report


def test_the_opened_source_has_the_values_of_its_codes(int4: Path, tmp_path: Path) -> None:
    view = open_source(int4, tmp_path / "opened", lambda _fraction, _what: None).view
    written, codes = load_tensors(tmp_path / "opened"), load_tensors(int4)
    names = [name.removesuffix("_packed") for name in codes if name.endswith("_packed")]
    assert set(names) == view.weights.keys()
    for name in names:
        expected = from_tensors(name, Scheme(4, strategy="group", group_size=32), codes)
        assert (written[name].float() - expected).abs().max() <= expected.abs().max() * 2**-8
    assert "quantization_config" not in json.loads((tmp_path / "opened" / "config.json").read_text())


@pytest.mark.slow
def test_a_config_left_over_does_not_stop_a_job(bert_tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert_tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    job = lay_out(
        tmp_path / "job", folder, {"passes": [{"pass": "weight-only"}], "exports": ["compressed-tensors"], **_MEASURED}
    )
    _, report, _ = press(job)
    assert [record.name for record in report.passes] == ["weight-only"]
    assert any("left over" in note for note in report.notes)
    assert report.source.size_bytes == sum(file.stat().st_size for file in (job / SOURCE_DIR).iterdir())
