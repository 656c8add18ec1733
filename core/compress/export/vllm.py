"""vLLM as a consumer: its environment, and the examples that it is asked to run. Its pins are not ours, so it has an environment of its own."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import Consumer, Observed, run_consumer
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.export.task import Task, TimedServing, TokenSet
from nightpress.core.compress.grids.dequantized import write_dequantized
from nightpress.core.processor import cpu_features
from nightpress.core.recipes import serving
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Recipe

#: The script that loads an artifact in vLLM's environment; see runners/.
CONSUMER = Path(__file__).parents[1] / "runners" / "vllm_runner.py"
VARIABLE = "NIGHTPRESS_VLLM_PYTHON"  #: the interpreter of that environment
WRITTEN = "vllm"  #: the name of the set whose prompts are read and continued
#: What vLLM says if it has no kernel for a form on this device. It says nothing about other devices.
NO_KERNEL = (
    "Failed to find a kernel",
    "cpu_gemm_wna16",
    "convert_weight_packed_scale_zp",
    "MoE backend",  # none for a mixture's scheme
    "FP8 KV cache on CPU requires",
    "Marlin FP4 not available",
    "expected at most 0 argument(s)",  # an operation that the build for this processor only declares
)
_REPEATS = 5


def interpreter() -> Path | None:
    """The Python of the environment with vLLM; None: there is none, so vLLM is not run."""
    named = os.environ.get(VARIABLE, "")
    return Path(named) if named else None


def variables(scratch: Path, device: Device) -> dict[str, str]:
    """vLLM's own environment variables: one process, no report of its use to anybody, and caches inside the job's folder."""
    caches = {
        name: str((scratch / "vllm" / name.lower()).resolve())
        for name in ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    }
    found = caches | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # texts are continued greedily; its kernels would be compiled first
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONSAFEPATH": "1",  # vLLM starts Python once more to look at a model's class: not from the job's folder
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to single cores, its threads wait for what else runs there
    }
    if device == "cpu":  # without it, small functions are compiled even by `enforce_eager`
        found["TORCH_COMPILE_DISABLE"] = "1"
    return found


def rounds_inputs(folder: Path, device: Device) -> bool:
    """Whether vLLM rounds what enters the layers, or the cache, to 8 bits: as the scheme says, or for int4 by its own choice with AMX."""
    stored = json.loads((folder / "config.json").read_bytes()).get("quantization_config") or {}
    groups = stored.get("config_groups", {}).values()
    with_amx = device == "cpu" and "amx_int8" in cpu_features()
    return stored.get("kv_cache_scheme") is not None or any(
        group["input_activations"] is not None or (with_amx and group["weights"]["num_bits"] == 4) for group in groups
    )


def make_task(recipe: Recipe, header: ModelHeader, model_dir: Path, *, threads: int) -> Task:
    """Texts that vLLM reads and continues, and the numbers of requests that are timed if the recipe times anything."""
    tokenizer = tokenized.open_tokenizer(model_dir)
    # The same text as the verification in transformers has: it must not come from the evaluation's.
    prose = tokenized.read_rows("builtin:prose", None, purpose="calibration")
    prompt, written = serving.lengths(header, serving.CHECK_PROMPT, serving.CHECK_WRITTEN)
    ref = "builtin:prose"
    read = tokenized.text_windows(prose, tokenizer, samples=serving.CHECKED, length=prompt, ref=ref)
    requested, answered = serving.lengths(header, serving.PROMPT, serving.WRITTEN)
    timed = tuple(
        TimedServing(requests, requested, answered, _REPEATS)
        for requests in serving.REQUESTS
        if serving.times_serving(recipe)
    )
    return Task(
        name=header.task,
        model_class=header.kind.loader,
        sets=(TokenSet(WRITTEN, "written", read, new_tokens=written),),
        shapes=(),
        timing_ids=tokenized.text_windows(prose, tokenizer, samples=64, length=requested, ref=ref).ids.ravel(),
        pooling=header.pooling,
        classes=int(header.config.get("vocab_size") or 1),
        threads=threads,
        servings=timed,
        cache_bytes=serving.cache_bytes(header),
    )


def start(
    folder: Path,
    task: Task,
    python: Path,
    *,
    name: str,
    scratch: Path,
    device: Device = "cpu",
    progress: Callable[[float, str], None] = lambda _fraction, _text: None,
) -> Consumer:
    """Start vLLM on a folder. name: of the model in errors, and of its files in `scratch`."""
    return Consumer(
        CONSUMER,
        folder,
        task,
        name=name,
        scratch=scratch,
        device=device,
        progress=progress,
        python=python,
        variables=variables(scratch, device),
    )


def dequantized_answers(
    pressed: Path, task: Task, seen: Observed, *, scratch: Path, device: Device = "cpu"
) -> Observed:
    """What transformers answers with the dequantized weights of the folder `pressed`, on the texts that vLLM has read and written."""
    folder = scratch / "dequantized"
    written = seen.outputs[f"{WRITTEN}.tokens"]
    write_dequantized(pressed, folder)
    try:
        return run_consumer(
            safetensors.CONSUMER,
            folder,
            scored(task, written),
            name="dequantized",
            scratch=scratch / "reference",
            device=device,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scored(task: Task, written: NDArray[Any]) -> Task:
    """The texts of the task with what vLLM wrote, [texts, tokens], to be scored by transformers."""
    ids = np.concatenate([task.sets[0].sequences.ids, written], axis=1)
    targets = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1)
    sequences = tokenized.Sequences(ids, np.ones_like(ids), targets=targets)
    chosen = TokenSet(WRITTEN, "tokens", sequences, compared=np.zeros(ids.shape, np.bool_))
    return replace(task, sets=(chosen,), servings=(), cache_bytes=0)
