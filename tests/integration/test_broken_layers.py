"""A compressed-tensors artifact with a single broken layer is refused, though its whole outputs are within the bound of its bits."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import compressed_tensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.export.probes import ProbeResult, compare, probed_layers
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.grids.packing import pack_bits, unpack_bits
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.registry import MODEL_PASSES
from nightpress.core.compress.runners import measure, transformers_runner
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.folders import load_tensors, tiny_llama
from tests.press import lay_out, press, runner_request

Tensors = dict[str, torch.Tensor]
FORMS: dict[str, dict[str, Any]] = {
    "int4": {"pass": "weight-only", "bits": 4, "group_size": 16},
    "int4 asymmetric": {"pass": "weight-only", "bits": 4, "group_size": 16, "symmetric": False},
    "int3": {"pass": "weight-only", "bits": 3, "group_size": 32},
    "int8": {"pass": "weight-only", "bits": 8},
    "int8 asymmetric": {"pass": "weight-only", "bits": 8, "group_size": 16, "symmetric": False},
    "fp8 weights": {"pass": "weight-only", "format": "fp8"},
    "mxfp4": {"pass": "weight-only", "format": "mxfp4"},
    "nvfp4": {"pass": "weight-only", "format": "nvfp4"},
    "w8a8": {"pass": "smoothquant"},
    "w8a8 static": {"pass": "smoothquant", "activations": "tensor"},
    "fp8": {"pass": "fp8"},
    "fp8, a scale a tensor": {"pass": "fp8", "weights": "tensor"},
    "fp8 blocks": {"pass": "fp8", "weights": "block"},
    "fp8 static": {"pass": "fp8", "activations": "static"},
}
LAYER = "model.layers.1.self_attn"

# torch warns that it will remove a dtype that transformers uses for the scales.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path) -> Path:
    """A Llama of two layers. Its widths are two blocks of 128, so that a block can have the scale of another."""
    folder = tiny_llama(
        tmp_path_factory.mktemp("models") / "llama",
        dtype=torch.float32,
        hidden_size=256,
        intermediate_size=256,
        vocab_size=30522,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    shutil.copy(bert_tiny / "tokenizer.json", folder / "tokenizer.json")
    return folder


def pressed_llama(source: Path, folder: Path, options: dict[str, Any]) -> Path:
    recipe = parse_recipe({"name": "t", "passes": [options], "exports": ["compressed-tensors"]})
    header = inspect_model(FolderFiles(source))
    context = PassContext(header, folder / "work", calibration=Calibration(samples=8, length=32))
    MODEL_PASSES[recipe.passes[0].pass_](source, folder / "pressed", recipe.passes[0], context)
    return folder / "pressed"


def asked(artifact: Path, pressed: Path) -> ProbeResult:
    """Load an artifact as its consumer does, in this process, and ask its layers."""
    with contextlib.chdir(artifact.parent):
        forward = transformers_runner.load(runner_request(artifact))[0]
    forward(np.full((1, 4), 5), np.ones((1, 4), np.int64))  # transformers unpacks the codes in the first pass
    return compare(pressed, measure._run_probes(forward, probed_layers(pressed)), forward.loaded_as["dtype"])


def broken(pressed: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(pressed, target)
    tensors = load_tensors(target)
    for file in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")]:
        file.unlink()
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def misplace_scales(tensors: Tensors) -> None:
    """Transpose a table of scales. A column of them is turned upside down; a single scale goes to another layer."""
    name, other = f"{LAYER}.o_proj.weight_scale", "model.layers.1.mlp.down_proj.weight_scale"
    scale = tensors[name]
    if scale.numel() == 1:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif scale.dim() == 2 and scale.shape[1] > 1:
        tensors[name] = _bytes(scale).t().reshape(scale.shape).contiguous().view(scale.dtype)
    else:
        tensors[name] = _bytes(scale).flip(0).view(scale.dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def swap_queries_and_keys(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(f"{LAYER}.q_proj.")]:
        other = name.replace("q_proj", "k_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def misplace_the_scale_of_inputs(tensors: Tensors) -> None:
    """A scale of inputs that is a hundredth of what it should be cuts off every input."""
    name = f"{LAYER}.o_proj.input_scale"
    tensors[name] = tensors[name] / 100


def shift_zero_points(tensors: Tensors) -> None:
    name = f"{LAYER}.o_proj.weight_zero_point"
    rows, _ = tensors[f"{LAYER}.o_proj.weight_shape"].tolist()
    bits = 32 * len(tensors[name]) // rows
    zeros = unpack_bits(tensors[name].t().contiguous(), bits, rows)
    moved = torch.where(zeros < 2 ** (bits - 1) - 1, zeros + 1, zeros - 1)
    tensors[name] = pack_bits(moved, bits).t()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_one_broken_layer_is_seen(form: str, source: Path, tmp_path: Path):
    pressed = pressed_llama(source, tmp_path, FORMS[form])
    whole = asked(pressed, pressed)
    assert whole.layers == 14  # two blocks of seven
    assert whole.error < whole.bound / 2
    changes = {"scale": (misplace_scales, "_proj"), "swapped": (swap_queries_and_keys, "_proj")}
    if "asymmetric" in form:
        changes["zeros"] = shift_zero_points, "o_proj"
    if "static" in form:
        changes["inputs"] = misplace_the_scale_of_inputs, "o_proj"
    for name, (change, layer) in changes.items():
        found = asked(broken(pressed, tmp_path / name, change), pressed)
        assert found.error > 2.5 * found.bound, name  # also above the bound for 16 bits
        assert found.worst.startswith("model.layers.1"), name
        assert found.worst.endswith(layer), name


@pytest.mark.parametrize("form", ["int4 asymmetric", "int8"])
def test_some_rows_are_those_of_the_whole_weight(form: str, source: Path, tmp_path: Path):
    weights = PressedWeights(pressed_llama(source, tmp_path, FORMS[form]))
    assert weights.integers == weights.coded
    for name in weights.integers:
        rows = measure.probe_rows(weights.shape(name)[0])
        assert (weights.codes(name, rows).dequantize() == weights.floats(name)[rows]).all()
        assert (weights.rows(name, rows) == weights.floats(name)[rows]).all()


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"int8 asymmetric", "int3"}))
@pytest.mark.slow
def test_rows_of_every_form_are_what_its_writer_meant(form: str, source: Path, tmp_path: Path):
    """The reader of rows tells a form by dtypes and shapes; `from_tensors` is told the scheme."""
    folder = pressed_llama(source, tmp_path, FORMS[form])
    options = parse_recipe({"name": "t", "passes": [FORMS[form]], "exports": ["compressed-tensors"]}).passes[0]
    weights, tensors = PressedWeights(folder), load_tensors(folder)
    assert len(weights.coded) == 14
    for name in weights.coded:
        meant = from_tensors(name, options.scheme(name.removesuffix(".weight")), tensors)  # type: ignore[attr-defined]
        rows = measure.probe_rows(weights.shape(name)[0])
        np.testing.assert_allclose(weights.rows(name, rows), meant.numpy()[rows], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_a_job_compares_each_layer_and_a_broken_one_fails_it(source: Path, tmp_path: Path):
    recipe = {
        "passes": [FORMS["int4"]],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
    }
    folder = source
    _, report, _ = press(lay_out(tmp_path / "job", folder, recipe))
    verification = report.artifacts[0].verification
    assert verification is not None
    assert verification.layers == 14
    assert verification.layer_error is not None
    assert verification.layer_error < 1e-5

    pressed = tmp_path / "job" / "out" / "compressed-tensors"
    artifact = broken(pressed, tmp_path / "broken", misplace_scales)
    parsed = parse_recipe({"name": "t", **recipe})
    trial = quality.prepare(parsed, inspect_model(FolderFiles(folder)), folder, {}, threads=1)
    observed, theirs = (
        run_consumer(
            compressed_tensors.CONSUMER, model, trial.task, name=model.name, scratch=tmp_path / "scratch", probes=probes
        )
        for model, probes in ((artifact, probed_layers(pressed)), (folder, {}))
    )
    outputs_alone = verify(parsed, parsed.exports[0], observed, source=theirs, traced=None, task=trial.task)
    assert outputs_alone.passed, "the whole outputs don't tell"
    found = compare(pressed, observed.outputs, observed.loaded_as["dtype"])
    with pytest.raises(NightpressError) as refused:
        verify(parsed, parsed.exports[0], observed, source=theirs, traced=None, task=trial.task, probes=found)
    assert refused.value.code == ErrorCode.VERIFICATION_FAILED
    assert f"{LAYER}.o_proj" in refused.value.message
