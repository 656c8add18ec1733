"""A compressed-tensors artifact with a single broken layer is refused, though its whole outputs are within the bound of its bits."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import compressed_tensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.export.probes import ProbeResult, compare, probed_layers
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.grids.packing import pack_bits, unpack_bits
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.registry import MODEL_PASSES
from nightpress.core.compress.runners import measure, transformers_runner
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.every_family import save_family
from tests.press import lay_out, press

Tensors = dict[str, torch.Tensor]
FORMS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 16},
    "int4 asymmetric": {"bits": 4, "group_size": 16, "symmetric": False},
    "int3": {"bits": 3, "group_size": 32},
    "int8": {"bits": 8, "group_size": 16},
    "int8 asymmetric": {"bits": 8, "group_size": 16, "symmetric": False},
}
LAYER = "model.layers.1.self_attn"


def pressed_llama(folder: Path, options: dict[str, Any]) -> Path:
    source = save_family("llama", folder / "source", num_key_value_heads=4)
    recipe = parse_recipe({"name": "t", "passes": [{"pass": "weight-only", **options}], "exports": ["safetensors"]})
    context = PassContext(inspect_model(FolderFiles(source)), folder / "work")
    MODEL_PASSES[recipe.passes[0].pass_](source, folder / "pressed", recipe.passes[0], context)
    return folder / "pressed"


def asked(artifact: Path, pressed: Path) -> ProbeResult:
    """Load an artifact as its consumer does, in this process, and ask its layers."""
    request = {"folder": artifact.name, "task": "causal-lm", "threads": 1, "device": "cpu"}
    with contextlib.chdir(artifact.parent):
        forward = transformers_runner.load(request)[0]
    forward(np.full((1, 4), 5), np.ones((1, 4), np.int64))  # transformers unpacks the codes in the first pass
    return compare(pressed, measure._run_probes(forward, probed_layers(pressed)), forward.loaded_as["dtype"])


def broken(pressed: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(pressed, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def transpose_a_scale(tensors: Tensors) -> None:
    name = f"{LAYER}.o_proj.weight_scale"
    tensors[name] = tensors[name].t().reshape(tensors[name].shape)


def swap_queries_and_keys(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(f"{LAYER}.q_proj.weight_")]:
        other = name.replace("q_proj", "k_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def shift_zero_points(tensors: Tensors) -> None:
    name = f"{LAYER}.o_proj.weight_zero_point"
    rows, _ = tensors[f"{LAYER}.o_proj.weight_shape"].tolist()
    bits = 32 * len(tensors[name]) // rows
    zeros = unpack_bits(tensors[name].t().contiguous(), bits, rows)
    moved = torch.where(zeros < 2 ** (bits - 1) - 1, zeros + 1, zeros - 1)
    tensors[name] = pack_bits(moved, bits).t()


@pytest.mark.parametrize("form", FORMS)
def test_one_broken_layer_is_seen(form: str, tmp_path: Path):
    pressed = pressed_llama(tmp_path, FORMS[form])
    whole = asked(pressed, pressed)
    assert whole.layers == 14  # two blocks of seven
    assert whole.error < 1e-5
    changes = {"scale": (transpose_a_scale, "o_proj"), "swapped": (swap_queries_and_keys, "_proj")}
    if "asymmetric" in form:
        changes["zeros"] = shift_zero_points, "o_proj"
    for name, (change, layer) in changes.items():
        found = asked(broken(pressed, tmp_path / name, change), pressed)
        assert found.error > 0.05, name  # also far above the bound for 16 bits
        assert found.worst.startswith(LAYER), name
        assert found.worst.endswith(layer), name


def test_some_rows_are_those_of_the_whole_weight(tmp_path: Path):
    weights = PressedWeights(pressed_llama(tmp_path, FORMS["int4 asymmetric"]))
    for name in weights.integers:
        rows = measure.probe_rows(weights.shape(name)[0])
        assert (weights.codes(name, rows).dequantize() == weights.floats(name)[rows]).all()


def test_a_job_compares_each_layer_and_a_broken_one_fails_it(tmp_path: Path):
    recipe = {
        "passes": [{"pass": "weight-only", **FORMS["int4"]}],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
    }
    folder = save_family("llama", tmp_path / "model")
    _, report, _ = press(lay_out(tmp_path / "job", folder, recipe))
    verification = report.artifacts[0].verification
    assert verification is not None
    assert verification.layers == 14
    assert verification.layer_error is not None
    assert verification.layer_error < 1e-5

    pressed = tmp_path / "job" / "out" / "compressed-tensors"
    artifact = broken(pressed, tmp_path / "broken", transpose_a_scale)
    parsed = parse_recipe({"name": "t", **recipe})
    trial = quality.prepare(parsed, inspect_model(FolderFiles(folder)), folder, {}, threads=1)
    observed, source = (
        run_consumer(
            compressed_tensors.CONSUMER, model, trial.task, name=model.name, scratch=tmp_path / "scratch", probes=probes
        )
        for model, probes in ((artifact, probed_layers(pressed)), (folder, []))
    )
    outputs_alone = verify(parsed, parsed.exports[0], observed, source=source, traced=None, task=trial.task)
    assert outputs_alone.passed, "the whole outputs don't tell"
    found = compare(pressed, observed.outputs, observed.loaded_as["dtype"])
    with pytest.raises(NightpressError) as refused:
        verify(parsed, parsed.exports[0], observed, source=source, traced=None, task=trial.task, probes=found)
    assert refused.value.code == ErrorCode.VERIFICATION_FAILED
    assert f"{LAYER}.o_proj" in refused.value.message
