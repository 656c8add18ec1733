"""GPTQ, SparseGPT and Wanda from a model's folder to one that transformers loads, with the built-in prose."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMaskedLM

from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.frames import Checkpoint
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press

_CALIBRATION = Calibration(samples=24, length=48)


def _press(source: Path, work: Path, pass_: dict[str, Any], export: str) -> tuple[Path, Any]:
    recipe = parse_recipe({"name": "r", "passes": [pass_], "exports": [export]})
    header = inspect_model(FolderFiles(source))
    plan = make_plan(recipe, header)
    context = PassContext(header=header, work_dir=work / "work", calibration=_CALIBRATION)
    target = work / "out"
    record = MODEL_PASSES[pass_["pass"]](source, target, recipe.passes[0], context)
    assert plan.estimate is not None
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert written == pytest.approx(plan.estimate.output_bytes[export], rel=0.02)
    assert record.summary["bytes_after"] == pytest.approx(written, rel=0.02)
    assert record.summary["uncalibrated"] == []
    return target, record


def _answers(folder: Path) -> Tensor:
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(1000, 20000, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def _linears(folder: Path) -> dict[str, Tensor]:
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in tensors.items() if ".layer." in name and tensor.dim() == 2}


# torch warns that it will remove a dtype that transformers uses for the scales.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 64},
        {"bits": 4, "group_size": 32, "symmetric": False, "order": "natural", "ranges": "extremes"},
        {"bits": 3, "group_size": 32},
        {"bits": 8, "group_size": None},
    ],
)
@pytest.mark.slow
def test_gptq_loads_in_transformers_and_answers_nearer_than_rounding_does(
    options: dict[str, Any], bert_tiny: Path, tmp_path: Path
):
    ours, record = _press(bert_tiny, tmp_path / "a", {"pass": "gptq", **options}, "compressed-tensors")
    assert len(record.layers) == 12
    source = _answers(bert_tiny)

    def distance(folder: Path) -> float:
        return float((_answers(folder) - source).norm() / source.norm())

    found = distance(ours)
    if options["bits"] == 3:
        assert found < 0.5
        return
    plain = {"pass": "weight-only", **{key: options[key] for key in ("bits", "group_size")}}
    rounded, _ = _press_plain(bert_tiny, tmp_path / "b", plain | {"symmetric": options.get("symmetric", True)})
    assert found < distance(rounded)


def _press_plain(source: Path, work: Path, pass_: dict[str, Any]) -> tuple[Path, Any]:
    recipe = parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]})
    context = PassContext(header=inspect_model(FolderFiles(source)), work_dir=work / "work")
    (work / "work").mkdir(parents=True)
    return work / "out", MODEL_PASSES[pass_["pass"]](source, work / "out", recipe.passes[0], context)


@pytest.mark.parametrize("name", ["sparsegpt", "wanda"])
@pytest.mark.slow
def test_pruning_meets_its_share_or_its_pattern_and_leaves_a_model_that_loads(
    name: str, bert_tiny: Path, tmp_path: Path
):
    half, record = _press(bert_tiny, tmp_path / "half", {"pass": name, "sparsity": 0.5}, "safetensors")
    assert record.summary["sparsity"] == pytest.approx(0.5, abs=0.01)
    pattern, _ = _press(bert_tiny, tmp_path / "pattern", {"pass": name, "pattern": "2:4"}, "safetensors")
    for weight in _linears(pattern).values():
        assert int((weight.view(-1, 4) != 0).sum(1).max()) <= 2
    source = _answers(bert_tiny)
    errors = [float((_answers(folder) - source).norm() / source.norm()) for folder in (half, pattern)]
    assert errors[0] < errors[1] < 1


@pytest.mark.slow
def test_sparse_and_quantized_at_once(bert_tiny: Path, tmp_path: Path):
    pass_ = {"pass": "gptq", "bits": 8, "group_size": 64, "order": "natural", "pattern": "2:4"}
    both, record = _press(bert_tiny, tmp_path, pass_, "compressed-tensors")
    assert record.summary["sparsity"] >= 0.5
    assert json.loads((both / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


@pytest.mark.slow
def test_the_same_job_twice_gives_the_same_bytes(bert_tiny: Path, tmp_path: Path):
    folders = [
        _press(bert_tiny, tmp_path / name, {"pass": "gptq", "group_size": 64}, "compressed-tensors")[0] for name in "ab"
    ]
    for path in folders[0].glob("*.safetensors"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


@pytest.mark.parametrize(
    "pass_",
    [
        {"pass": "gptq", "group_size": 100},
        {"pass": "gptq", "pattern": "2:4"},
        {"pass": "sparsegpt", "pattern": "3:5"},
        {"pass": "sparsegpt", "pattern": "4:2"},
        {"pass": "wanda", "pattern": "2:4", "sparsity": 0.7},
    ],
)
def test_what_cannot_work_is_refused_before_it_runs(pass_: dict[str, Any], bert_tiny: Path):
    header = inspect_model(FolderFiles(bert_tiny))

    def plan() -> Any:
        return make_plan(parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]}), header)

    with pytest.raises(NightpressError):
        plan()


@pytest.mark.slow
def test_a_whole_job_prunes_then_rounds_with_text_that_a_person_brought(bert_tiny: Path, tmp_path: Path):
    text = "\n".join(
        json.dumps({"text": f"The {n} lamps along the quay were lit one after another."}) for n in range(200)
    )
    job = lay_out(
        tmp_path / "job",
        bert_tiny,
        {
            "passes": [{"pass": "sparsegpt", "pattern": "2:4"}, {"pass": "gptq", "group_size": 64}],
            "exports": ["compressed-tensors"],
            "calibration": {"data": "lamps", "samples": 16, "length": 48},
            "evaluate": [{"metric": "auto", "samples": 8, "length": 48}],
        },
        data={"lamps": text},
    )
    _, report, frames = press(job)
    assert [options.name for options in report.passes] == ["sparsegpt", "gptq"]
    assert report.artifacts[0].verification is not None
    assert report.artifacts[0].verification.passed
    vouched = [frame.path for frame in frames if isinstance(frame, Checkpoint) and frame.path.startswith("blocks/")]
    assert len(vouched) == 2 * 2  # two passes, two blocks
