"""The estimated GPU and host memory of a calibrated pass, compared with measurements.

Measured on one H200 with torch 2.11 in 2026-11: peaks of torch's tensors over two blocks, and whole jobs on the same machine with 16
cores. The stages in core/recipes/block_peak.py come from traces of the 8B, 3B and 1B shapes; the other shapes were only compared.
"""

from typing import Any

import pytest

from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import GPU_RUNTIME_BYTES
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import Awq, Gptq, SmoothQuant, SparseGpt, Wanda
from nightpress.core.recipes.passes.base import OnLinears
from nightpress.core.recipes.placement import Seat
from nightpress.core.recipes.plan import make_plan
from tests.headers import decoder, mixture

MIB = 1024**2
SHAPES = {
    "8b": (4096, 14336, 32, 8),
    "7b": (3584, 18944, 28, 4),
    "3b": (2048, 11008, 16, 2),
    "1b": (2048, 8192, 32, 8),
    "0.5b": (896, 4864, 14, 2),
}
PASSES: dict[str, OnLinears] = {
    "gptq": Gptq(),
    "awq": Awq(),
    "smoothquant": SmoothQuant(alpha=0.5),
    "sparsegpt": SparseGpt(),
    "wanda": Wanda(pattern="2:4"),
}
#: (shape, pass, samples, length) → MiB. The mixtures' were taken before GPTQ settled a mixture part by part. At these numbers of tokens
#: a block needs most while its inputs are watched, which is as before: so the comparison still applies. How high a block peaks while its
#: parts are settled is not measured yet: that needs a larger mixture (`python -m bench.two_gpus --only alone --shapes deepseek-v3`).
PEAKS = {
    ("8b", "gptq", 128, 2048): 7318,
    ("8b", "gptq", 128, 512): 5780,
    ("8b", "awq", 128, 2048): 5653,
    ("8b", "smoothquant", 128, 2048): 5137,
    ("8b", "sparsegpt", 128, 2048): 6241,
    ("8b", "wanda", 128, 2048): 5665,
    ("3b", "gptq", 128, 2048): 3383,
    ("3b", "gptq", 128, 512): 3942,
    ("3b", "awq", 128, 2048): 3043,
    ("3b", "smoothquant", 128, 2048): 2732,
    ("3b", "sparsegpt", 128, 2048): 3251,
    ("3b", "wanda", 128, 2048): 3329,
    ("1b", "gptq", 128, 2048): 2566,
    ("1b", "gptq", 32, 512): 1714,
    ("1b", "awq", 128, 2048): 2531,
    ("1b", "smoothquant", 128, 2048): 2359,
    ("1b", "wanda", 128, 2048): 2825,
    ("7b", "gptq", 128, 512): 7396,
    ("7b", "awq", 128, 512): 4891,
    ("7b", "smoothquant", 128, 512): 4037,
    ("7b", "wanda", 128, 512): 4778,
    ("0.5b", "gptq", 128, 2048): 1179,
    ("0.5b", "awq", 128, 2048): 1179,
    ("0.5b", "smoothquant", 128, 2048): 1099,
    ("0.5b", "wanda", 128, 2048): 1410,
    ("mixture", "gptq", 128, 512): 5868,
    ("mixture", "awq", 128, 512): 5970,
    ("moe", "gptq", 128, 2048): 7557,
    ("moe", "awq", 128, 2048): 7547,
}


def model(shape: str, layers: int = 2) -> ModelHeader:
    if shape == "mixture":
        return mixture(2048, 1024, experts=32, chosen=8, layers=layers, vocabulary=128256)
    if shape == "moe":
        return mixture(2048, 768, experts=64, chosen=8, layers=layers, vocabulary=128256)
    return decoder(*SHAPES[shape], layers, vocabulary=128256)


@pytest.mark.parametrize("case", PEAKS)
def test_the_gpus_peak_is_estimated_within_a_tenth(case: tuple[str, str, int, int]):
    shape, pass_, samples, length = case
    options = PASSES[pass_].model_copy(update={"symmetric": True}) if shape in {"mixture", "moe"} else PASSES[pass_]
    estimated = options.cost(model(shape), Calibration(samples=samples, length=length)).gpu_bytes
    assert estimated / MIB == pytest.approx(PEAKS[case], rel=0.1)


#: Whole jobs: shape, pass, export, layers, samples, length; measured MiB of host memory, measured seconds.
JOBS = {
    "3b-gptq": ("3b", {"pass": "gptq"}, "compressed-tensors", 12, 2048, 8517, 48.1),
    "8b-gptq": ("8b", {"pass": "gptq"}, "compressed-tensors", 4, 2048, 10993, 45.9),
    "8b-smoothquant": ("8b", {"pass": "smoothquant", "alpha": 0.5}, "compressed-tensors", 4, 512, 10764, 42.5),
    "3b-wanda": ("3b", {"pass": "wanda"}, "safetensors", 12, 2048, 8193, 43.7),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_memory_beside_a_gpu_and_the_time_are_estimated(name: str):
    shape, pass_, export, layers, length, memory, seconds = JOBS[name]
    recipe: dict[str, Any] = {
        "name": "r",
        "passes": [pass_],
        "exports": [export],
        "calibration": {"samples": 128, "length": length},
        "evaluate": [{"metric": "fidelity", "samples": 8, "length": 64}],
        "evaluate_on": "cpu",  # as it was measured
        "device": "gpu",
    }
    estimate = make_plan(parse_recipe(recipe), model(shape, layers), [Seat("gpu", 0, 16)]).estimate
    assert estimate is not None
    assert estimate.memory_bytes / MIB == pytest.approx(memory, rel=0.2)
    assert seconds / 2 < estimate.seconds < 2 * seconds
    assert estimate.gpu_bytes > GPU_RUNTIME_BYTES


@pytest.mark.parametrize(("evaluate_on", "seconds", "memory"), [("cpu", 505, 48.9e9), ("auto", 101.9, 4.62e9)])
def test_a_whole_8b_job_is_estimated_for_the_cores_of_its_worker(evaluate_on: str, seconds: float, memory: float):
    """Measured on one GPU with 16 cores, by the models' figures taken on the processor and on the GPU (bench.whole_job)."""
    recipe = get_recipe("int4-lm").model_copy(update={"device": "gpu", "evaluate_on": evaluate_on})
    estimate = make_plan(recipe, model("8b", 32), [Seat("gpu", 0, 16)]).estimate
    assert estimate is not None
    assert seconds / 2 < estimate.seconds < 2 * seconds
    assert estimate.memory_bytes == pytest.approx(memory, rel=0.2)


@pytest.mark.parametrize("pass_", ["gptq", "awq", "wanda"])
def test_each_of_several_gpus_holds_a_part_of_a_mixtures_experts(pass_: str):
    """What is in place of an expert's weight and Gram matrix on one GPU is on another, but the first keeps the results until they are written."""
    few = Calibration(samples=64, length=128)  # so few tokens that experts take nearly all memory
    cost = PASSES[pass_].cost(model("moe"), few)
    alone, *shared = (cost.each_gpu(gpus) for gpus in (1, 2, 4, 8))
    assert alone == cost.gpu_bytes
    assert alone > shared[0] > shared[1] > shared[2]
    least = PASSES[pass_].cost(model("moe"), Calibration(samples=1, length=128))
    assert cost.each_gpu(128) == least.gpu_bytes <= alone, "fewer experts than GPUs: each holds all"
    dense = PASSES[pass_].cost(model("8b"), few)
    assert dense.each_gpu(4) == dense.gpu_bytes
    assert cost.then(dense).each_gpu(4) == max(cost.each_gpu(4), dense.gpu_bytes)


@pytest.mark.parametrize("pass_", ["gptq", "sparsegpt"])
def test_a_mixture_as_large_as_deepseek_v3_fits_a_gpu_and_a_host(pass_: str):
    """Not measured: what is estimated must leave 15% of a GPU of 139 GiB, and stay under 64 GiB of the host."""
    header = mixture(7168, 2048, experts=256, chosen=8, layers=3, vocabulary=32000)
    cost = PASSES[pass_].cost(header, Calibration(samples=128, length=2048))
    assert 1.15 * cost.gpu_bytes < 139 * 1024**3
    assert cost.host_bytes is not None
    assert cost.host_bytes < 64 * 1024**3
