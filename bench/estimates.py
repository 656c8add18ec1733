"""The plan's estimates of memory, time and size beside the measured values, for several models and recipes.

    python -m bench.estimates [--only PAIR …] [--threads 2] [--device cuda]

Each pair is a whole job in a worker's child: baseline, passes, exports, verification and a short evaluation. Memory is the value that the
supervisor compares with its limit: the peak of anonymous memory of the child and its descendants. Size is that of the artifact's weights or
graph. Time is CPU seconds divided by threads, so that other work on the machine does not count; wall seconds are given too. Bars: memory
within 20%, size within 2%, time within a factor of 2. A ratio is estimate divided by measurement.

With `--device cuda`, the jobs are language models of known shapes with few layers, with 128 × 512 or 128 × 2048 tokens. Time is then wall
seconds, and the peak of the GPU's memory is compared with its estimate too.
"""

import os
import random
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.processes import cpu_seconds
from bench.record import Figure, finish, make_parser
from nightpress.client.cli.press import write_job
from nightpress.client.folders import read_model_folder
from nightpress.core.handoff.frames import Progress, Result, parse_frame
from nightpress.core.handoff.report import REPORT_FILE, Report
from nightpress.core.handoff.spec import OUT_DIR
from nightpress.core.recipes.costs import GPU_RUNTIME_BYTES
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.placement import Seat
from nightpress.core.recipes.plan import make_plan
from nightpress.worker.process import ChildProcess

MIB = 1024**2
_EVERY_S = 0.05  #: seconds between two readings of memory
#: estimated quantity → (unit, divisor from the raw value to the unit, largest factor between estimate and measurement)
_KINDS = {"memory": ("MiB", MIB, 1.2), "gpu": ("MiB", MIB, 1.2), "size": ("MB", 1e6, 1.02), "seconds": ("s", 1, 2.0)}
_WEIGHTS = {".safetensors", ".onnx", ".data", ".xml", ".bin"}

#: name → (model, pass, export, (calibration samples, length))
PAIRS: dict[str, tuple[str, dict[str, Any], str, tuple[int, int]]] = {
    "bert-tiny-weight-only": ("bert-tiny", {"pass": "weight-only", "bits": 8}, "compressed-tensors", (8, 16)),
    "bert-tiny-dynamic-int8": ("bert-tiny", {"pass": "dynamic-int8"}, "onnx", (8, 16)),
    "bert-tiny-dynamic-int8-openvino": ("bert-tiny", {"pass": "dynamic-int8"}, "openvino", (8, 16)),
    "bert-tiny-static-int8": ("bert-tiny", {"pass": "static-int8"}, "onnx", (16, 32)),
    "minilm-weight-only": ("minilm", {"pass": "weight-only", "bits": 8}, "compressed-tensors", (8, 16)),
    "minilm-gptq": ("minilm", {"pass": "gptq", "group_size": 64}, "compressed-tensors", (32, 128)),
    "minilm-wanda": ("minilm", {"pass": "wanda"}, "safetensors", (64, 256)),
    "minilm-dynamic-int8-onnx": ("minilm", {"pass": "dynamic-int8"}, "onnx", (8, 16)),
    "minilm-dynamic-int8-openvino": ("minilm", {"pass": "dynamic-int8"}, "openvino", (8, 16)),
    "minilm-static-int8-onnx": ("minilm", {"pass": "static-int8"}, "onnx", (32, 128)),
    "minilm-static-int8-openvino": ("minilm", {"pass": "static-int8"}, "openvino", (32, 128)),
    "bert-512-dynamic-int8-onnx": ("bert-512", {"pass": "dynamic-int8"}, "onnx", (8, 16)),
    "bert-512-dynamic-int8-openvino": ("bert-512", {"pass": "dynamic-int8"}, "openvino", (8, 16)),
    "bert-768-dynamic-int8-onnx": ("bert-768", {"pass": "dynamic-int8"}, "onnx", (8, 16)),
    "bert-768-dynamic-int8-openvino": ("bert-768", {"pass": "dynamic-int8"}, "openvino", (8, 16)),
    "smollm-weight-only": (
        "smollm",
        {"pass": "weight-only", "bits": 4, "group_size": 64},
        "compressed-tensors",
        (8, 16),
    ),
    "smollm-gptq": ("smollm", {"pass": "gptq", "group_size": 64}, "compressed-tensors", (32, 512)),
    "smollm-learned": (
        "smollm",
        {"pass": "learned-rounding", "group_size": 64, "steps": 10},
        "compressed-tensors",
        (32, 512),
    ),
    "smollm-sparsegpt": ("smollm", {"pass": "sparsegpt"}, "safetensors", (16, 256)),
    "smollm-onnx": ("smollm", {"pass": "weight-only", "bits": 4, "group_size": 64}, "onnx", (8, 16)),
    "mixture-gptq": ("mixture", {"pass": "gptq", "group_size": 64}, "compressed-tensors", (64, 128)),
    "mixture-awq": ("mixture", {"pass": "awq", "group_size": 64, "symmetric": True}, "compressed-tensors", (64, 128)),
    "mixture-sparsegpt": ("mixture", {"pass": "sparsegpt"}, "safetensors", (64, 128)),
}


#: The same for a GPU; the model is a shape of bench.blocks_gpu and a number of layers.
GPU_PAIRS: dict[str, tuple[str, dict[str, Any], str, tuple[int, int]]] = {
    "8b-gptq": ("8b 4", {"pass": "gptq", "group_size": 128}, "compressed-tensors", (128, 2048)),
    "8b-awq": ("8b 4", {"pass": "awq", "group_size": 128}, "compressed-tensors", (128, 2048)),
    "8b-smoothquant": ("8b 4", {"pass": "smoothquant", "alpha": 0.5}, "compressed-tensors", (128, 512)),
    "7b-gptq": ("7b 4", {"pass": "gptq", "group_size": 128}, "compressed-tensors", (128, 512)),
    "3b-gptq": ("3b 12", {"pass": "gptq", "group_size": 128}, "compressed-tensors", (128, 2048)),
    "3b-wanda": ("3b 12", {"pass": "wanda"}, "safetensors", (128, 2048)),
    "0.5b-gptq": ("0.5b 24", {"pass": "gptq", "group_size": 128}, "compressed-tensors", (128, 2048)),
}


def press(name: str, source: Path, root: Path, threads: int, device: str) -> list[Figure]:
    """Run one pair as a whole job. Returns its estimates, its measurements and their ratios."""
    on_gpu = device == "cuda"
    _, pass_, export, (samples, length) = (GPU_PAIRS if on_gpu else PAIRS)[name]
    recipe = parse_recipe(
        {
            "name": "bench",
            "passes": [pass_],
            "exports": [export],
            "calibration": {"samples": samples, "length": length, "data": "words" if on_gpu else "builtin:prose"},
            "evaluate": [{"metric": "fidelity", "samples": 8, "length": 64}],
            "evaluate_on": "cpu",
            "device": "gpu" if on_gpu else "cpu",
        }
    )
    seats = [Seat(recipe.device, 0, threads)]
    estimate = make_plan(recipe, inspect_model(FolderFiles(source)), seats).estimate
    assert estimate is not None
    child = ChildProcess(root, threads=threads, network=True)
    try:
        sets = {"words": words(root / "words.txt", samples * length)} if on_gpu else {}
        write_job(child.job_dir, read_model_folder(source), recipe, sets, device=device, threads=threads)
        measured = watch(child)
        folder = child.job_dir / OUT_DIR / export
        measured["size"] = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in _WEIGHTS)
        if on_gpu:
            report = Report.model_validate_json((child.job_dir / OUT_DIR / REPORT_FILE).read_bytes())
            measured["gpu"] = max(record.peak_gpu_bytes or 0 for record in report.passes)
    finally:
        child.kill()
        child.remove()
    measured["seconds"] = measured["wall_seconds"] if on_gpu else measured["cpu_seconds"] / threads
    estimated = {"memory": estimate.memory_bytes, "seconds": estimate.seconds, "size": estimate.output_bytes[export]}
    if on_gpu:
        estimated["gpu"] = estimate.gpu_bytes - GPU_RUNTIME_BYTES  # torch counts only its tensors, not the CUDA context
    row = f"{'gpu' if on_gpu else 'graphs' if export in {'onnx', 'openvino'} else 'weights'}/{name}"
    figures = [Figure(f"{row}/wall", round(measured["wall_seconds"], 1), "s")]
    for kind, said in estimated.items():
        unit, divisor, factor = _KINDS[kind]
        off = max(said / measured[kind], measured[kind] / said)
        figures += [
            Figure(f"{row}/{kind}_estimated", round(said / divisor, 2), unit),
            Figure(f"{row}/{kind}", round(measured[kind] / divisor, 2), unit),
            Figure(f"{row}/{kind}_ratio", round(said / measured[kind], 2), "estimated / measured"),
            Figure(f"{row}/{kind}_off", round(off, 3), "× off", bar=f"<= {factor:g}"),
        ]
    return figures


def watch(child: ChildProcess, tell: Callable[[float, Progress], None] | None = None) -> dict[str, Any]:
    """Run a job to its end. Returns the peak of its memory in bytes, CPU seconds and wall seconds.

    tell: gets each frame of progress, with the seconds since the first. The times begin with the first frame of progress, because a worker's child has imported its libraries before. CPU seconds include the
    consumers that the job starts.
    """
    started, before = time.monotonic(), 0.0
    peak, rest, cpu, chatter, importing = 0, b"", 0.0, b"", True
    child.begin(3600)
    while True:
        readable, _, _ = select.select([child.frames, child.chatter], [], [], _EVERY_S)
        if child.chatter in readable:
            chatter = (chatter + os.read(child.chatter, 65536))[-4000:]
        peak = max(peak, child.anonymous_memory())
        cpu = max(cpu, cpu_seconds(child.pid))
        if child.frames not in readable:
            continue
        data = os.read(child.frames, 65536)
        *lines, rest = (rest + data).split(b"\n")
        for frame in map(parse_frame, lines):
            if isinstance(frame, Progress) and importing:
                started, before, importing = time.monotonic(), cpu, False
            if isinstance(frame, Progress) and tell is not None:
                tell(time.monotonic() - started, frame)
            if isinstance(frame, Result):
                if frame.error is not None:
                    raise SystemExit(f"The job failed: {frame.error}")
                wall = time.monotonic() - started
                return {
                    "memory": peak,
                    "cpu_seconds": cpu - before,
                    "wall_seconds": wall,
                }
        if not data:
            raise SystemExit(f"The child ended without a result. It said last:\n{chatter.decode(errors='replace')}")


def random_bert(folder: Path, *, width: int, blocks: int) -> Path:
    """A BERT with a masked-language-model head and random weights: the cost of a job depends only on the shape."""
    from transformers import BertConfig, BertForMaskedLM

    from tests.models import bert_tiny_dir

    config = BertConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    BertForMaskedLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_tiny_dir() / name, folder)
    return folder


def random_mixture(folder: Path) -> Path:
    """Two blocks of 16 experts, in bfloat16, with random weights. An expert's Gram matrices take twice the memory of its weights."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from tests.models import bert_tiny_dir

    config = OlmoeConfig(
        vocab_size=30522,
        hidden_size=512,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=16,
        num_experts_per_tok=8,
        tie_word_embeddings=True,
        bos_token_id=101,
        eos_token_id=102,
        pad_token_id=0,
    )
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_tiny_dir() / name, folder)
    return folder


def words(file: Path, count: int) -> Path:
    """Write a text of at least `count` words, for jobs that need more tokens than the built-in prose has."""
    some = ("night", "press", "the", "of", "river", "light", "a", "stone", "and", "walked")
    chooser = random.Random(0)
    lines = (" ".join(chooser.choices(some, k=20)) + "." for _ in range(count // 20 + 1))
    file.write_text("\n\n".join(lines))
    return file


def random_llama(folder: Path, wanted: str) -> Path:
    """A Llama with random weights. `wanted`: a shape of bench.blocks_gpu and a number of layers, e.g. `8b 4`.

    The tokenizer has fewer tokens than the model's vocabulary.
    """
    from bench.blocks_gpu import SHAPES, write_model
    from tests.models import bert_tiny_dir

    shape, layers = wanted.split()
    if not folder.exists():
        write_model(folder, SHAPES[shape], int(layers))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bert_tiny_dir() / name, folder)
    return folder


def main() -> int:
    parser = make_parser("estimates", __doc__)
    parser.add_argument("--only", nargs="*", choices=sorted(PAIRS | GPU_PAIRS))
    parser.add_argument("--threads", type=int, help="default: 2, beside a GPU 16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    from tests.models import bert_tiny_dir, minilm_dir, smollm_dir

    threads = options.threads or (2 if options.device == "cpu" else 16)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as models:
        folders = {
            "bert-tiny": bert_tiny_dir,
            "minilm": minilm_dir,
            "smollm": smollm_dir,
            "mixture": lambda: random_mixture(Path(models) / "mixture"),
            "bert-512": lambda: random_bert(Path(models) / "bert-512", width=512, blocks=6),
            "bert-768": lambda: random_bert(Path(models) / "bert-768", width=768, blocks=12),
        }
        pairs = GPU_PAIRS if options.device == "cuda" else PAIRS
        for name in options.only or pairs:
            model = pairs[name][0]
            known = folders.get(model)
            source = known() if known else random_llama(Path(models) / model.replace(" ", "-"), model)
            figures += press(name, source, Path(root), threads, options.device)
            print(name, file=sys.stderr, flush=True)
    return finish("estimates", figures, parser, options, choices=("only", "device"))


if __name__ == "__main__":
    sys.exit(main())
