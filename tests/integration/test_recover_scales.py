"""`recover-scales`: less of the source's answers is lost, the codes stay as they are, and a killed training ends with the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.compress.passes.recover_scales import load_rounded, put_in
from nightpress.core.compress.runners.transformers_runner import UNPACK
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import RecoverScales
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.schemes import Activations
from tests.folders import load_tensors
from tests.press import lay_out, press
from tests.training import language_model, rows

# torch warns that it will remove a dtype that transformers uses for the scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

_TRAIN = {"data": "mine", "length": 16, "batch": 8, "steps": 8, "validation": 0.2, "learning_rate": 0.01}
_ROUNDINGS: dict[str, dict[str, Any]] = {
    "int": {"bits": 3, "group_size": 16},
    "zero points": {"bits": 3, "group_size": 16, "symmetric": False},
    "nvfp4": {"format": "nvfp4", "ranges": "extremes"},
    "mxfp4": {"format": "mxfp4", "activations": "fp4"},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def model(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(bert_tiny, tmp_path_factory.mktemp("model") / "lm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def _round(model: Path, work: Path, options: dict[str, Any]) -> Path:
    (parsed,) = parse_recipe(
        {"name": "r", "passes": [{"pass": "weight-only", **options}], "exports": ["compressed-tensors"]}
    ).passes
    context = PassContext(header=inspect_model(FolderFiles(model)), work_dir=work / "work")
    context.work_dir.mkdir(parents=True)
    MODEL_PASSES["weight-only"](model, work / "rounded", parsed, context)
    return work / "rounded"


def _recover(model: Path, data: Path, work: Path, rounded: Path, name: str, **options: Any) -> tuple[Path, PassRecord]:
    extra = {key: options.pop(key) for key in ("checkpoint", "work_dir") if key in options}
    passes = [{"pass": "weight-only"}, {"pass": "recover-scales", "train": _TRAIN, **options}]
    parsed = parse_recipe({"name": "r", "passes": passes, "exports": ["compressed-tensors"]}).passes[1]
    context = PassContext(
        **{"work_dir": work / "work", **extra},
        header=inspect_model(FolderFiles(model)),
        origin=model,
        index=1,
        data_files={"mine": data},
    )
    return work / name, MODEL_PASSES["recover-scales"](rounded, work / name, parsed, context)


def _answers(model: Any) -> Tensor:
    ids = torch.randint(1000, 20000, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("kind", _ROUNDINGS)
@pytest.mark.slow
def test_it_recovers_a_part_of_the_loss_and_leaves_the_codes(kind: str, model: Path, data: Path, tmp_path: Path):
    rounded = _round(model, tmp_path, _ROUNDINGS[kind])
    out, record = _recover(model, data, tmp_path, rounded, "out")
    assert record.summary["loss_after"] < record.summary["loss_before"]
    assert record.summary["recovered"] == pytest.approx(
        1 - record.summary["loss_after"] / record.summary["loss_before"]
    )
    assert record.summary["scaled_layers"] == 28
    before, after = load_tensors(rounded), load_tensors(out)
    assert before.keys() == after.keys()
    learned = set()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        if not torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)):
            learned.add(name.rsplit(".", 1)[-1] if "proj" in name else "norm")
    assert learned == ({"norm"} if kind == "mxfp4" else {"norm", "weight_scale"})
    # What a loader reads is what was trained, to the rounding of the norms.
    trained = load_rounded(out, PassContext(header=inspect_model(FolderFiles(model)), work_dir=tmp_path / "again"))
    layers = put_in(trained, out)
    if kind == "mxfp4":  # inputs near the middle of two numbers may be rounded to either
        assert all(layer.scheme.activations == Activations(bits=4) for layer in layers.values())
        return
    read = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    found, expected = _answers(read), _answers(trained)
    # transformers dequantizes fp4 in bfloat16.
    assert float((found - expected).norm() / expected.norm()) < (1e-2 if kind == "nvfp4" else 1e-5)


class _KilledError(Exception):
    pass


@pytest.mark.slow
def test_an_attempt_killed_while_it_trains_ends_with_the_same_bytes(model: Path, data: Path, tmp_path: Path):
    rounded = _round(model, tmp_path, _ROUNDINGS["int"])
    train = {**_TRAIN, "checkpoint_every": 4}
    whole, _ = _recover(model, data, tmp_path, rounded, "whole", train=train)

    def kill(path: str, step: int) -> None:
        if path.endswith("checkpoint.safetensors") and step == 4:
            raise _KilledError

    again = tmp_path / "again"
    with pytest.raises(_KilledError):
        _recover(model, data, tmp_path, rounded, "killed", train=train, work_dir=again, checkpoint=kill)
    resumed, record = _recover(model, data, tmp_path, rounded, "killed", train=train, work_dir=again)
    assert record.summary["resumed_from"] == 4
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (resumed / path.name).read_bytes()


@pytest.mark.slow
def test_a_training_that_makes_it_worse_is_not_taken(model: Path, data: Path, tmp_path: Path):
    rounded = _round(model, tmp_path, _ROUNDINGS["int"])
    wild = {**_TRAIN, "steps": 2, "learning_rate": 1.0}
    out, record = _recover(model, data, tmp_path, rounded, "out", train=wild)
    assert record.summary["recovered"] == 0
    for name, tensor in load_tensors(rounded).items():
        assert torch.equal(tensor, load_tensors(out)[name]), name


@pytest.mark.slow
def test_a_job_ships_an_adapter_that_peft_loads_over_the_artifact(model: Path, data: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    recipe = {
        "passes": [
            {"pass": "gptq", "format": "nvfp4", "activations": "fp4"},
            {"pass": "recover-scales", "rank": 4, "alpha": 4, "train": {**_TRAIN, "learning_rate": 2e-3}},
        ],
        "calibration": {"samples": 4, "length": 32},
        "exports": ["compressed-tensors"],
        "evaluate": [],
    }
    manifest, report, _ = press(lay_out(tmp_path / "job", model, recipe, {"mine": data.read_text()}))
    assert [artifact.format for artifact in manifest.artifacts] == ["compressed-tensors"]
    record = report.passes[1]
    (artifact,) = report.artifacts
    assert artifact.verification is not None
    assert artifact.verification.passed
    assert artifact.verification.layers == 28
    assert 0 < record.summary["recovered"] < 1
    assert record.summary["adapter_recovered"] > 0
    folder = tmp_path / "job" / "out" / "compressed-tensors"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"]) == (4, 4.0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exec(UNPACK, {"model": base, "torch": torch})
    plain = _answers(base)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert not torch.allclose(_answers(adapted), plain)
    written = load_tensors(folder / "adapter")
    assert len(written) == 2 * 28
    for name, tensor in peft.get_peft_model_state_dict(adapted).items():
        assert torch.equal(tensor, written[name])


def test_its_training_has_defaults_of_its_own():
    passes = [{"pass": "gptq"}, {"pass": "recover-scales", "train": {"data": "mine"}}]
    options = parse_recipe({"name": "r", "passes": passes, "exports": ["compressed-tensors"]}).passes[1]
    assert isinstance(options, RecoverScales)
    assert (options.train.learning_rate, options.train.epochs, options.train.batch) == (1e-3, 4, 8)
    assert options.train.model_copy(update={"data": "builtin:prose"}) == RecoverScales().train


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([{"pass": "recover-scales"}], "behind"),
        ([{"pass": "smoothquant"}, {"pass": "recover-scales"}], "behind"),
        ([{"pass": "gptq", "group_size": 16}, {"pass": "recover-scales"}, {"pass": "recover-scales"}], "behind"),
        ([{"pass": "gptq", "group_size": 16}, {"pass": "wanda"}], "nothing can follow"),
    ],
)
def test_it_stands_right_behind_a_rounding_pass(passes: list[dict[str, Any]], says: str, model: Path):
    recipe = parse_recipe({"name": "r", "passes": passes, "exports": ["compressed-tensors"]})
    with pytest.raises(NightpressError) as caught:
        make_plan(recipe, inspect_model(FolderFiles(model)))
    assert says in f"{caught.value.message} {caught.value.hint}"
