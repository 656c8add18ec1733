"""AWQ and SmoothQuant on mixtures of experts: closer to the source than rounding, and read by transformers as written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import Quantizing
from nightpress.core.recipes.plan import make_plan
from tests.folders import load_tensors
from tests.format_rules import check_folder

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30522,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
_PARTS = {"num_experts": 4, "moe_intermediate_size": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": {**_PARTS, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    "Qwen3MoeForCausalLM": {**_PARTS, "head_dim": 16},
    "OlmoeForCausalLM": {"num_experts": 4},
}

# torch warns that it will remove a dtype that transformers uses for the scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with random weights. Some channels of the norms' outputs and of the experts' products have far larger values."""
    folder = tmp_path_factory.mktemp("mixture")
    model_class = getattr(transformers, request.param)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**_SHAPE, **MIXTURES[request.param]))
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[::16] *= 40
        elif name.endswith("experts.gate_up_proj"):
            parameter.data[:, 64::16] *= 40  # rows of up_proj
    model.save_pretrained(folder)
    shutil.copy(bert_tiny / "tokenizer.json", folder)
    return folder


def _press(source: Path, work: Path, pass_: dict[str, Any]) -> tuple[Path, Any]:
    recipe = parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]})
    plan = make_plan(recipe, inspect_model(FolderFiles(source)))
    (work / "work").mkdir(parents=True)
    context = PassContext(
        header=inspect_model(FolderFiles(source)),
        work_dir=work / "work",
        calibration=Calibration(samples=16, length=64),
    )
    record = MODEL_PASSES[pass_["pass"]](source, work / "out", recipe.passes[0], context)
    written = sum(load_tensor.nbytes for load_tensor in load_tensors(work / "out").values())
    assert plan.estimate is not None
    assert written == pytest.approx(plan.estimate.output_bytes["compressed-tensors"], rel=0.02)
    return work / "out", record


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _answers(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.randint(1000, 20000, (64, 32), generator=torch.Generator().manual_seed(1))).logits
    return logits


def _distance(answers: Tensor, expected: Tensor) -> float:
    """The median over tokens of the relative error: a token that rounding sends to another expert has a large error that means nothing."""
    return float(((answers - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def _expert_weights(model: Any) -> dict[tuple[int, str], Tensor]:
    """(layer, matrix) → the weights of all experts [experts, out, in], as transformers loaded them."""
    return {
        (layer, part): getattr(block.mlp.experts, part).detach()
        for layer, block in enumerate(model.model.layers)
        if hasattr(block.mlp, "experts")
        for part in ("gate_up_proj", "down_proj")
    }


def _check_loaded(source: Path, out: Path, pass_: dict[str, Any], record: Any) -> Any:
    """Check the folder by the format's rules, and every loaded matrix against its dequantized codes. Returns the loaded model."""
    check_folder(out, source)
    options = parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]}).passes[0]
    assert isinstance(options, Quantizing)
    model, written = _load(out), load_tensors(out)
    _answers(model)  # the first call unpacks the weights of layers that are modules
    theirs = _expert_weights(model)
    assert record.summary["uncalibrated"] == []
    for layer in record.layers:
        ours = from_tensors(f"{layer.name}.weight", options.scheme(layer.name), written)
        parts = layer.name.split(".")
        if "experts" in parts:
            at, leaf = int(parts[2]), parts[-1]
            fused = theirs[at, "down_proj" if leaf in {"down_proj", "w2"} else "gate_up_proj"][int(parts[-2])]
            found = fused if leaf in {"down_proj", "w2"} else fused.chunk(2)[leaf in {"up_proj", "w3"}]
        else:
            found = model.get_parameter(f"{layer.name}.weight").float()
        torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-6)
    return model


@pytest.mark.parametrize(
    ("pass_", "plain", "share"),
    [
        ({"pass": "awq", "group_size": 32, "symmetric": True}, {"pass": "weight-only", "bits": 4, "group_size": 32}, 0.9),
        ({"pass": "smoothquant"}, {"pass": "smoothquant", "alpha": 0}, 0.7),
    ],
    ids=["awq", "smoothquant"],
)  # fmt: skip
@pytest.mark.slow
def test_scaled_experts_answer_nearer_than_rounded_ones_and_load_as_they_were_written(
    pass_: dict[str, Any], plain: dict[str, Any], share: float, mixture: Path, tmp_path: Path
):
    expected = _answers(_load(mixture))
    out, record = _press(mixture, tmp_path / "scaled", pass_)
    before, after = load_tensors(mixture), load_tensors(out)
    routers = [name for name in before if name.endswith((".gate.weight", "shared_expert_gate.weight"))]
    assert routers
    for name in routers:  # routers take the factors of the norms before them, and stay in float
        assert after[name].dtype == before[name].dtype
        assert not torch.equal(after[name], before[name])
    model = _check_loaded(mixture, out, pass_, record)
    rounded, _ = _press(mixture, tmp_path / "rounded", plain)
    assert _distance(_answers(model), expected) < share * _distance(_answers(_load(rounded)), expected)


@pytest.mark.parametrize(
    ("pass_", "reason"),
    [
        ({"pass": "awq", "group_size": 32}, "zero points"),
        ({"pass": "gptq", "group_size": 32, "overrides": {"re:.*experts.*(w2|down_proj)": {"bits": 8}}}, "one grid alone"),
        ({"pass": "awq", "group_size": 32, "symmetric": True, "budget": 5.0}, "one grid alone"),
        ({"pass": "weight-only", "format": "nvfp4"}, "nvfp4"),
    ],
    ids=["zero points", "overrides", "budget", "nvfp4"],
)  # fmt: skip
def test_what_transformers_would_misread_of_experts_is_refused_before_it_runs(
    pass_: dict[str, Any], reason: str, mixture: Path
):
    recipe = parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]})
    with pytest.raises(NightpressError, match=reason):
        make_plan(recipe, inspect_model(FolderFiles(mixture)))
