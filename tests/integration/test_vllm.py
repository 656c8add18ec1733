"""vLLM, in its own environment, runs every scheme that its processor path takes, and refuses broken artifacts.

They run where NIGHTPRESS_VLLM_PYTHON names an environment that `make vllm` made: 3.5 GB, so not in CI.
"""

import json

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress import environment
from nightpress.core.compress.evaluate import served
from nightpress.core.compress.export import compressed_tensors, vllm
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.grids.packing import pack_bits, unpack_bits
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.every_family import save_family
from tests.press import lay_out, press

PYTHON = vllm.interpreter()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="NIGHTPRESS_VLLM_PYTHON is not set: `make vllm` makes its environment"),
    pytest.mark.timeout(1200),
]

_INT = {"pass": "weight-only", "bits": 4, "group_size": 32}
#: Schemes that vLLM 0.32 runs on a processor with AVX-512.
RUN: dict[str, list[dict[str, Any]]] = {
    "int4 group": [_INT],
    "int4 group asymmetric": [_INT | {"symmetric": False}],
    "int8 activations": [{"pass": "smoothquant"}],
    "fp8": [{"pass": "fp8"}],
}
Tensors = dict[str, torch.Tensor]


def tiny(folder: Path) -> Path:
    """A Llama with as many keys as queries, so that the two can be swapped, in heads of 64 that vLLM's attention takes."""
    return save_family(
        "llama", folder, num_attention_heads=2, num_key_value_heads=2, intermediate_size=256, dtype="bfloat16"
    )


def pressed(source: Path, work: Path, passes: list[dict[str, Any]]) -> Path:
    recipe = parse_recipe({"name": "t", "passes": passes, "exports": ["compressed-tensors"], "evaluate": []})
    folder = source
    (work / "work").mkdir(parents=True)
    for index, options in enumerate(recipe.passes):
        context = PassContext(
            header=inspect_model(FolderFiles(folder)),
            work_dir=work / "work",
            index=index,
            calibration=Calibration(samples=4, length=32),
        )
        MODEL_PASSES[options.pass_](folder, work / str(index), options, context)
        folder = work / str(index)
    compressed_tensors.save(folder, work / "artifact")
    return work / "artifact"


def asked(source: Path, artifact: Path, meant: Path, scratch: Path) -> tuple[served.Answers, Observed]:
    """vLLM's answers with an artifact, beside those of the dequantized weights of the folder `meant`."""
    assert PYTHON is not None
    recipe = parse_recipe({"name": "t", "passes": [], "exports": ["safetensors"], "evaluate": []})
    task = vllm.make_task(recipe, inspect_model(FolderFiles(source)), source, threads=1)
    with vllm.start(artifact, task, PYTHON, name="artifact", scratch=scratch / "vllm") as consumer:
        seen = consumer.run()
    reference = vllm.dequantized_answers(meant, task, seen, scratch=scratch)
    return served.answers(seen.outputs, reference.outputs), seen


def bound(artifact: Path) -> float:
    return served.ROUNDED_INPUTS if vllm.rounds_inputs(artifact, "cpu") else served.FLOAT_INPUTS


@pytest.mark.parametrize("form", RUN)
def test_vllm_answers_as_the_dequantized_weights_do(form: str, tmp_path: Path):
    if form.startswith("int4") and "avx512f" not in environment.cpu_features():
        pytest.skip("vLLM's kernels for int4 need AVX-512")
    source = tiny(tmp_path / "source")
    artifact = pressed(source, tmp_path / "pressed", RUN[form])
    found, seen = asked(source, artifact, artifact, tmp_path / "scratch")
    verification = served.verify_served(form, found, seen, bound=bound(artifact))
    assert verification.consumer.startswith("vllm ")
    assert "vllm.LLM(" in verification.load_snippet
    assert seen.wrote
