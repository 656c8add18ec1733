"""What vLLM's processor path, transformers and llama.cpp make of each scheme that we write, and how fast vLLM serves int4 there and on a GPU.

    NIGHTPRESS_VLLM_PYTHON=… python -m bench.vllm [--forms NAME …] [--isa amx|avx512|avx2] [--no-speed]
    NIGHTPRESS_VLLM_PYTHON=… python -m bench.vllm --device cuda --shape 8b --layers 32

The second form takes speeds alone, on a GPU, of a Llama of that shape with random weights. Else the model is SmolLM2-135M in bf16.
Each consumer reads the same texts, and its log-probabilities are compared with those of the dequantized weights in transformers, in float32: ‖a − b‖ / ‖b − mean b‖. A form without a figure was refused. vLLM has other kernels for processors with AMX, with AVX-512 alone
and with neither; `--isa` lets it choose those of a lesser one than there is. Speeds are of whole rounds of requests; source and artifact
take turns.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.estimates import random_llama
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.environment import give_back_gpu_memory
from nightpress.core.compress.evaluate import quality, served
from nightpress.core.compress.export import compressed_tensors, gguf, safetensors, vllm
from nightpress.core.compress.export.consumer import Consumer, Observed, run_consumer, timed_rounds
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.export.task import Task
from nightpress.core.compress.grids.dequantized import write_dequantized
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.models import smollm_dir

INT4 = {"pass": "weight-only", "bits": 4, "group_size": 64}
INT8 = {"pass": "weight-only", "bits": 8, "group_size": None}
CACHE = {"pass": "kv-cache"}
FORMS: Mapping[str, list[dict[str, Any]]] = {
    "none: the source in bf16": [],
    "int4, groups": [INT4],
    "int4, groups, zero points": [INT4 | {"symmetric": False}],
    "int4, a scale a row": [INT4 | {"group_size": None}],
    "int4, a scale a row, zero points": [INT4 | {"group_size": None, "symmetric": False}],
    "int4, embeddings too": [INT4 | {"embeddings": True}],
    "int4, down projections int8": [INT4 | {"overrides": {"re:.*down_proj": {"bits": 8}}}],
    "int3, groups": [INT4 | {"bits": 3}],
    "int8, a scale a row": [INT8],
    "int8, groups": [INT8 | {"group_size": 64}],
    "int8, groups, zero points": [INT8 | {"group_size": 64, "symmetric": False}],
    "fp8 weights": [{"pass": "weight-only", "format": "fp8"}],
    "mxfp4": [{"pass": "weight-only", "format": "mxfp4"}],
    "nvfp4": [{"pass": "weight-only", "format": "nvfp4"}],
    "int8, inputs too": [{"pass": "smoothquant"}],
    "int8, inputs too, static": [{"pass": "smoothquant", "activations": "tensor"}],
    "fp8, inputs too": [{"pass": "fp8"}],
    "fp8, inputs too, a scale a tensor": [{"pass": "fp8", "weights": "tensor"}],
    "fp8, inputs too, 128 × 128": [{"pass": "fp8", "weights": "block"}],
    "fp8, inputs too, static": [{"pass": "fp8", "activations": "static"}],
    "fp8 cache": [CACHE],
    "int8 cache": [CACHE | {"format": "int8"}],
    "fp8 cache, then int4": [CACHE, INT4],
    "fp8 cache, then int8 with inputs": [CACHE, {"pass": "smoothquant"}],
}
TIMED = "int4, groups"
ISA = {"amx": "", "avx512": "AVX512_CORE_VNNI", "avx2": "AVX2"}  #: as ONEDNN_MAX_CPU_ISA; empty: all that there is
_CALIBRATION = Calibration(samples=4, length=128)


def main() -> int:
    parser = make_parser("vllm", __doc__)
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS), metavar="NAME")
    parser.add_argument("--isa", choices=list(ISA), default="amx", help="what vLLM may use of the processor")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the speeds of --shape, no forms"
    )
    parser.add_argument("--shape", default="8b", help="of bench.blocks_gpu")
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    python = vllm.interpreter()
    if python is None:
        print(f"skipped: {vllm.VARIABLE} is not set", file=sys.stderr)
        return 0
    if options.isa != "amx":
        os.environ["ONEDNN_MAX_CPU_ISA"] = ISA[options.isa]
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        work = Path(folder)
        if options.device == "cuda":
            source = random_llama(work / "model", f"{options.shape} {options.layers}")
            give_back_gpu_memory()  # of the random numbers
            row = f"gpu/{options.shape}, {options.layers} layers"
            figures = list(speeds(source, work, python, options.threads, "cuda", row))
        else:
            figures = list(measure(work, python, options.forms, options.isa, options.threads))
            if not options.no_speed:
                figures += speeds(smollm_dir("bfloat16"), work, python, options.threads, "cpu", "speed")
    return finish("vllm", figures, parser, options, choices=("forms", "isa", "no_speed", "device", "shape", "layers"))


def measure(folder: Path, python: Path, forms: list[str], isa: str, threads: int) -> Iterator[Figure]:
    """How far each consumer's answers are from the dequantized weights', for each form."""
    source = smollm_dir("bfloat16")
    task = make_task(source, threads, timed=False)
    for at, form in enumerate(forms):
        artifact, scratch = make(source, folder / str(at), FORMS[form]), folder / str(at) / "scratch"
        seen = attempt(f"{form} in vLLM", lambda: in_vllm(artifact, task, python, scratch))  # noqa: B023
        if seen is not None:
            meant = vllm.dequantized_answers(artifact, task, seen, scratch=scratch)
            found = served.answers(seen.outputs, meant.outputs)
            yield Figure(f"forms/{form}/{isa}", round(found.error, 4), "relative error")
            yield Figure(f"forms/{form}/{isa}_gap", round(found.gap, 4), "nats")
            yield Figure(f"forms/{form}/{isa}_chosen", round(found.chosen, 3), "of the written tokens")
        if isa == "amx":
            yield from others(form, source, artifact, task, scratch)


def others(form: str, source: Path, artifact: Path, task: Task, scratch: Path) -> Iterator[Figure]:
    """transformers reads the artifact, and llama.cpp its GGUF; each reads the prompts of the task."""
    header = inspect_model(FolderFiles(source))
    whole = np.zeros((len(task.sets[0].sequences.ids), 0), np.int64)
    plain = vllm.scored(task, whole)
    forms = {"transformers": (safetensors.CONSUMER, lambda: artifact)}
    forms["llama_cpp"] = (gguf.CONSUMER, lambda: _as_gguf(form, artifact, scratch / "gguf", header))
    write_dequantized(artifact, scratch / "floats")
    meant = run_consumer(safetensors.CONSUMER, scratch / "floats", plain, name="meant", scratch=scratch / "plain")
    theirs = meant.outputs[f"{vllm.WRITTEN}.nll"]
    for name, (runner, make_folder) in forms.items():
        seen = attempt(
            f"{form} in {name}",
            lambda: run_consumer(runner, make_folder(), plain, name=name, scratch=scratch / "plain"),  # noqa: B023
        )
        if seen is not None:
            error = np.linalg.norm(seen.outputs[f"{vllm.WRITTEN}.nll"] - theirs) / np.linalg.norm(
                theirs - theirs.mean()
            )
            yield Figure(f"forms/{form}/{name}", round(float(error), 4), "relative error")


def _as_gguf(form: str, artifact: Path, folder: Path, header: ModelHeader) -> Path:
    """Raises NightpressError with the plan's reason if a GGUF can't carry the form."""
    make_plan(parse_recipe({"name": "b", "passes": FORMS[form], "exports": ["gguf"]}), header)
    gguf.save(artifact, folder, header, weights="f16", pooling="mean")
    return folder


def speeds(source: Path, folder: Path, python: Path, threads: int, device: Device, row: str) -> Iterator[Figure]:
    """Tokens per second of int4 beside the source in vLLM, by turns, and of both in transformers. row: before the figures' names."""
    task = make_task(source, threads, timed=True)
    models = {"source": source, "int4": make(source, folder / "timed", FORMS[TIMED])}
    with (
        vllm.start(models["source"], task, python, name="source", scratch=folder / "a", device=device) as ours,
        vllm.start(models["int4"], task, python, name="int4", scratch=folder / "b", device=device) as theirs,
    ):
        running: dict[str, Consumer] = {"source": ours, "int4": theirs}
        for consumer in running.values():
            consumer.run()
        for request in task.servings:
            rounds = dict(zip(running, timed_rounds(request, list(running.values()), lambda _share: None), strict=True))
            for name, runs in rounds.items():
                found = served.served_timing(request, runs, rounds["source"], by_turns=True)
                at = f"{row}/{name} in vLLM, {request.requests} at a time"
                ends = round(found.slowest, 1), round(found.fastest, 1)
                yield Figure(f"{at}/tokens_per_s", round(found.tokens_per_s, 1), "tokens/s", ends)
                yield Figure(f"{at}/first", round(found.first_p50_ms, 1), "ms")
                yield Figure(f"{at}/between", round(found.token_p50_ms, 1), "ms")
                prefill = 1000 * request.requests * request.prompt / found.first_p50_ms
                yield Figure(f"{at}/prefill", round(prefill, 1), "tokens/s")
                assert found.speedup is not None
                yield Figure(f"{at}/ratio", round(found.speedup.value, 2), "× the source in vLLM")
    yield from in_transformers(models, folder / "c", threads, device, row)


def in_transformers(
    models: Mapping[str, Path], scratch: Path, threads: int, device: Device, row: str
) -> Iterator[Figure]:
    """Decoding and prefill of one request in transformers: in float32 on a processor, in the model's own type on a GPU."""
    speed = {"metric": "generation-speed", "prompt": 64, "tokens": 32, "repeats": 3}
    recipe = parse_recipe({"name": "b", "passes": [], "exports": ["safetensors"], "evaluate": [speed]})
    header = inspect_model(FolderFiles(models["source"]))
    task = quality.prepare(recipe, header, models["source"], {}, threads=threads).task
    for name, folder in models.items():
        seen = run_consumer(safetensors.CONSUMER, folder, task, name=name, scratch=scratch, device=device)
        [writing] = seen.writings
        runs = [(64_000 / run[0], 1000 * (len(run) - 1) / sum(run[1:])) for run in writing["milliseconds"]]
        prefill, decode = (statistics.median(values) for values in zip(*runs, strict=True))
        yield Figure(f"{row}/{name} in transformers, 1 at a time/tokens_per_s", round(decode, 1), "tokens/s")
        yield Figure(f"{row}/{name} in transformers, 1 at a time/prefill", round(prefill, 1), "tokens/s")


def make_task(source: Path, threads: int, *, timed: bool) -> Task:
    evaluate = [{"metric": "latency"}] if timed else []
    recipe = parse_recipe({"name": "b", "passes": [], "exports": ["safetensors"], "evaluate": evaluate})
    return vllm.make_task(recipe, inspect_model(FolderFiles(source)), source, threads=threads)


def make(source: Path, work: Path, passes: list[dict[str, Any]]) -> Path:
    """Press the source. Returns the artifact's folder; the source's own if there are no passes."""
    recipe = parse_recipe({"name": "b", "passes": passes, "exports": ["safetensors"], "evaluate": []})
    folder = source
    (work / "work").mkdir(parents=True)
    for index, options in enumerate(recipe.passes):
        header = inspect_model(FolderFiles(folder))
        context = PassContext(header, work / "work", index=index, calibration=_CALIBRATION)
        MODEL_PASSES[options.pass_](folder, work / str(index), options, context)
        folder = work / str(index)
    if not passes:
        return source
    compressed_tensors.save(folder, work / "artifact")
    return work / "artifact"


def in_vllm(artifact: Path, task: Task, python: Path, scratch: Path) -> Observed:
    with vllm.start(artifact, task, python, name="artifact", scratch=scratch / "vllm") as consumer:
        return consumer.run()


def attempt(what: str, run: Any) -> Observed | None:
    """Run, or print why it was refused."""
    try:
        found: Observed = run()
    except NightpressError as error:
        print(json.dumps({what: error.message, "said": str(error.details.get("stderr", ""))[-400:]}), file=sys.stderr)
        return None
    return found


if __name__ == "__main__":
    raise SystemExit(main())
