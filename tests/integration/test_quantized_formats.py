"""Every stored form of a quantized weight: it follows the format's rules, has the planned size, and transformers reads the same values."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.export import compressed_tensors
from nightpress.core.compress.grids.rounded_inputs import round_inputs
from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.compress.runners.transformers_runner import UNPACK
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import Quantizing
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.schemes import Scheme
from tests.folders import load_tensors, tiny_llama
from tests.format_rules import check_folder

_LEARNED = {"pass": "learned-rounding", "steps": 10, "batch": 2}
#: form → (passes, largest relative distance from the source's outputs). The bounds are large: the source's random weights amplify errors.
CASES: dict[str, tuple[list[dict[str, Any]], float]] = {
    "int6": ([{"pass": "weight-only", "bits": 6, "group_size": 64}], 0.4),
    "int3 half-quadratic": ([{"pass": "weight-only", "bits": 3, "group_size": 32, "ranges": "half-quadratic"}], 0.9),
    "int4 asymmetric, embeddings": (
        [{"pass": "weight-only", "bits": 4, "group_size": 32, "symmetric": False, "embeddings": True}],
        0.8,
    ),
    "int4, down projections int8": (
        [
            {
                "pass": "weight-only",
                "bits": 4,
                "group_size": 32,
                "overrides": {"re:.*down_proj": {"bits": 8}},
            }
        ],
        0.8,
    ),
    "fp8 weights": ([{"pass": "weight-only", "format": "fp8"}], 0.4),
    "mxfp4": ([{"pass": "weight-only", "format": "mxfp4", "ranges": "least-error"}], 0.8),
    "nvfp4": ([{"pass": "weight-only", "format": "nvfp4", "ranges": "least-error"}], 0.8),
    "gptq, budget": (
        [{"pass": "gptq", "group_size": 32, "budget": 6.0, "candidates": [3, 4, 8]}],
        0.6,
    ),
    "gptq, embeddings": ([{"pass": "gptq", "bits": 5, "group_size": 64, "symmetric": False, "embeddings": True}], 0.6),
    "learned": ([{**_LEARNED, "bits": 3, "group_size": 32, "symmetric": False}], 1.1),
    "learned, budget": ([{**_LEARNED, "group_size": 32, "budget": 6.0}], 0.6),
    "learned mxfp4": ([{**_LEARNED, "format": "mxfp4"}], 0.8),
    "learned nvfp4": ([{**_LEARNED, "format": "nvfp4"}], 0.8),
    "gptq mxfp4": ([{"pass": "gptq", "format": "mxfp4"}], 0.8),
    "gptq nvfp4": ([{"pass": "gptq", "format": "nvfp4", "order": "natural"}], 0.8),
    "nearest mxfp4, inputs too": ([{"pass": "weight-only", "format": "mxfp4", "activations": "fp4"}], 1.0),
    "gptq mxfp4, fp8 inputs": ([{"pass": "gptq", "format": "mxfp4", "activations": "fp8"}], 0.8),
    "gptq nvfp4, inputs too": ([{"pass": "gptq", "format": "nvfp4", "activations": "fp4"}], 0.8),
    "learned nvfp4, inputs too": (
        [{**_LEARNED, "format": "nvfp4", "activations": "fp4", "start": "better"}],
        0.8,
    ),
    "awq, one layer apart": (
        [
            {
                "pass": "awq",
                "group_size": 32,
                "symmetric": True,
                "overrides": {"re:.*layers.0.*(q|k|v)_proj": {"bits": 8}},
            }
        ],
        0.8,
    ),
    "smoothquant": ([{"pass": "smoothquant"}], 0.4),
    "smoothquant, static, gptq": ([{"pass": "smoothquant", "activations": "tensor", "weights": "gptq"}], 0.4),
    "fp8": ([{"pass": "fp8"}], 0.4),
    "fp8, a scale a tensor": ([{"pass": "fp8", "weights": "tensor"}], 0.4),
    "fp8, blocks": ([{"pass": "fp8", "weights": "block"}], 0.4),
    "fp8, static": ([{"pass": "fp8", "activations": "static"}], 0.4),
    "cache": ([{"pass": "kv-cache"}], 0.4),
    "int8 cache, then int4": ([{"pass": "kv-cache", "format": "int8"}, {"pass": "gptq", "group_size": 32}], 0.8),
    "cache, then smoothquant": ([{"pass": "kv-cache"}, {"pass": "smoothquant"}], 0.4),
}

# torch warns that it will remove a dtype that transformers uses for the scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path) -> Path:
    """A Llama of two layers with a real tokenizer. The group sizes of all grids divide its widths."""
    folder = tiny_llama(
        tmp_path_factory.mktemp("models") / "llama",
        dtype=torch.float32,
        hidden_size=128,
        intermediate_size=256,
        vocab_size=30522,
        tie_word_embeddings=True,
    )
    shutil.copy(bert_tiny / "tokenizer.json", folder / "tokenizer.json")
    return folder


_CALIBRATION = Calibration(samples=8, length=64)


def press(
    source: Path, work: Path, passes: list[dict[str, Any]], *, calibration: Calibration = _CALIBRATION
) -> tuple[Path, list[Any]]:
    """Run a recipe's passes and export the result. Compares the plan's estimated size with the written size."""
    recipe = parse_recipe({"name": "r", "passes": passes, "exports": ["compressed-tensors"]})
    plan = make_plan(recipe, inspect_model(FolderFiles(source)))
    folder, records = source, []
    for index, options in enumerate(recipe.passes):
        context = PassContext(
            header=inspect_model(FolderFiles(folder)),
            work_dir=work / "work",
            index=index,
            calibration=calibration,
        )
        context.work_dir.mkdir(parents=True, exist_ok=True)
        records.append(MODEL_PASSES[options.pass_](folder, work / str(index), options, context))
        folder = work / str(index)
    compressed_tensors.save(folder, work / "out")
    written = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
    assert plan.estimate is not None
    assert written == pytest.approx(plan.estimate.output_bytes["compressed-tensors"], rel=0.02)
    assert records[-1].summary["bytes_after"] == pytest.approx(written, rel=0.02)
    return work / "out", records


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.arange(1000, 1064)[None]).logits
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_a_folder_keeps_the_formats_rules_and_loads_as_what_was_made(case: str, llama: Path, tmp_path: Path):
    passes, bound = CASES[case]
    out, records = press(llama, tmp_path, passes)
    config = check_folder(out, llama)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    model_rounds = any(
        group["input_activations"] and "fp4" in group["format"] for group in config["config_groups"].values()
    )
    if model_rounds:
        exec(UNPACK, {"model": model, "torch": torch})
    source = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    found, expected = answers(model), answers(source)  # the first call unpacks the weights
    assert float((found - expected).norm() / expected.norm()) < bound
    written = load_tensors(out)
    last = parse_recipe({"name": "r", "passes": passes, "exports": ["compressed-tensors"]}).passes[-1]
    if not isinstance(last, Quantizing):
        return
    for layer in records[-1].layers:
        bits = records[-1].summary.get("bits_by_layer", {}).get(layer.name)
        scheme: Scheme = last.scheme(layer.name) if bits is None else last.candidate(bits)  # type: ignore[attr-defined]
        ours = from_tensors(f"{layer.name}.weight", scheme, written)
        theirs = model.get_parameter(f"{layer.name}.weight").float()
        # The loader may dequantize fp4 in bf16.
        torch.testing.assert_close(theirs, ours, rtol=1e-2 if scheme.kind == "float" else 1e-5, atol=1e-6)
        if model_rounds:
            inputs = 3 * torch.randn(16, ours.shape[1], generator=torch.Generator().manual_seed(0))
            rounded = round_inputs(inputs, scheme, written.get(f"{layer.name}.input_global_scale"))
            answered = model.get_submodule(layer.name)(inputs)
            assert float((answered - inputs @ theirs.T).norm() / answered.norm()) > 0.01
            torch.testing.assert_close(answered, rounded @ theirs.T, rtol=1e-3, atol=1e-2 * float(answered.abs().max()))
    if "k_scale" in str(written.keys()):
        assert config["kv_cache_scheme"]["num_bits"] == 8


@pytest.mark.slow
def test_a_budget_is_met_and_spent_where_the_error_is(llama: Path, tmp_path: Path):
    cheap, (low,) = press(llama, tmp_path / "a", [{"pass": "gptq", "group_size": 32, "budget": 5.5}])
    _, (high,) = press(llama, tmp_path / "b", [{"pass": "gptq", "group_size": 32, "budget": 7.5}])
    for record, budget in ((low, 5.5), (high, 7.5)):
        weights = sum(layer.bytes_before for layer in record.layers) / 4
        assert 8 * sum(layer.bytes_after for layer in record.layers) / weights <= budget
        for errors in record.summary["error_by_layer"].values():
            assert errors["8"] < errors["4"]
        bits = record.summary["bits_by_layer"]
        for layer in range(2):
            attention = {bits[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv"}
            assert len(attention) == 1
    counts = [sum(bits == 8 for bits in record.summary["bits_by_layer"].values()) for record in (low, high)]
    assert counts[0] < counts[1]
    # The same budget, given as a size of the whole model, gives the same bytes.
    header = inspect_model(FolderFiles(llama))
    rounded = sum(layer.bytes_before for layer in low.layers)
    size = f"{100 * (header.size - rounded + rounded * 5.5 / 32) / header.size:.9f}%"
    again, _ = press(llama, tmp_path / "c", [{"pass": "gptq", "group_size": 32, "budget": size}])
    for path in cheap.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.slow
def test_a_caches_scales_hold_the_keys_and_values_that_transformers_caches(llama: Path, tmp_path: Path):
    exact = _CALIBRATION.model_copy(update={"dtype": "float32"})
    out, _ = press(llama, tmp_path, [{"pass": "kv-cache", "format": "int8"}], calibration=exact)
    scales = {name: float(load_tensor) for name, load_tensor in load_tensors(out).items() if name.endswith("_scale")}
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    context = PassContext(
        header=inspect_model(FolderFiles(llama)),
        work_dir=tmp_path,
        calibration=_CALIBRATION,
    )
    with torch.no_grad():
        cache = model(**calibration_samples(llama, context), use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        for part, cached in (("k", layer.keys), ("v", layer.values)):
            scale = scales[f"model.layers.{index}.self_attn.{part}_scale"]
            assert scale == pytest.approx(float(cached.abs().max()) / 127.5, rel=1e-4)


@pytest.mark.parametrize(
    "pass_",
    [
        {"pass": "weight-only", "format": "nf4"},
        {"pass": "weight-only", "format": "mxfp4", "group_size": 64},
        {"pass": "weight-only", "format": "fp8", "symmetric": False},
        {"pass": "gptq", "group_size": 32, "symmetric": False, "overrides": {"re:.*": {"bits": 8}}},
        {"pass": "gptq", "group_size": 32, "budget": 4.2},
        {"pass": "gptq", "group_size": 32, "overrides": {"down_proj": {"bits": 8}}},
        {"pass": "gptq", "group_size": 32, "overrides": {"re:.*down_proj": {"bits": 8, "group_size": 96}}},
        {"pass": "fp8", "weights": "block", "activations": "static"},
        {"pass": "weight-only", "format": "nvfp4", "activations": "fp4"},
        {"pass": "gptq", "format": "nvfp4", "sparsity": 0.5},
        {"pass": "gptq", "format": "mxfp4", "budget": 4.5},
        {"pass": "gptq", "format": "nvfp4", "embeddings": True},
    ],
    ids=str,
)
def test_what_no_loader_would_take_is_refused_before_it_runs(pass_: dict[str, Any], llama: Path):
    header = inspect_model(FolderFiles(llama))

    def plan() -> Any:
        return make_plan(parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]}), header)

    with pytest.raises(NightpressError):
        plan()
