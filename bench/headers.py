"""Reading a model of 1,000 shards and 700 GB from its headers: the time, and the memory of the process that reads it.

    python -m bench.headers [--shards 1000] [--runs 5]

The folder has the tensors of a DeepSeek-V3: 61 layers with 256 experts each, in fp8 with a scale for 128 × 128. The shards are sparse files:
real headers and an index, and no bytes on the disk behind them. A fresh process reads the folder as the API does, without torch.
"""

import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.record import Figure, finish, make_parser

_LAYERS, _EXPERTS, _WIDTH, _INNER = 61, 256, 7168, 2048
_WIDTHS = {"F8_E4M3": 1, "F32": 4, "BF16": 2}
_CODE = """
import resource, sys, time
from pathlib import Path
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started = peak(), time.perf_counter()
header = inspect_model(FolderFiles(Path(sys.argv[1])))
taken = time.perf_counter() - started
assert not {"torch", "numpy", "transformers"} & sys.modules.keys()
print(taken, peak() - before, peak(), len(header.tensors), header.brought.size if header.brought else header.size)
"""

Tensor = tuple[str, str, tuple[int, ...]]  #: name, dtype, shape


def tensors() -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", "BF16", (129280, _WIDTH)
    yield "lm_head.weight", "BF16", (129280, _WIDTH)
    yield "model.norm.weight", "BF16", (_WIDTH,)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", "BF16", (_WIDTH,)
        for name, rows, columns in (("q_b_proj", 24576, 1536), ("o_proj", _WIDTH, 16384)):
            yield from _fp8(f"{prefix}.self_attn.{name}", rows, columns)
        for expert in range(_EXPERTS):
            for name, rows, columns in (
                ("gate_proj", _INNER, _WIDTH),
                ("up_proj", _INNER, _WIDTH),
                ("down_proj", _WIDTH, _INNER),
            ):
                yield from _fp8(f"{prefix}.mlp.experts.{expert}.{name}", rows, columns)


def _fp8(module: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "F8_E4M3", (rows, columns)
    yield f"{module}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def write_model(folder: Path, shards: int) -> None:
    """Write config, tokenizer, index and sparse shards."""
    every = list(tensors())
    each = -(-len(every) // shards)
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, at = {}, 0
        for tensor, dtype, shape in every[number * each : (number + 1) * each]:
            size = _WIDTHS[dtype]
            for length in shape:
                size *= length
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
            weight_map[tensor] = name
        if not header:
            continue
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (folder / "tokenizer.json").write_text("{}")


def measure(shards: int, runs: int) -> list[Figure]:
    folder = Path(tempfile.mkdtemp(prefix="np-headers-"))
    try:
        write_model(folder, shards)
        command = [sys.executable, "-c", _CODE, str(folder)]
        found = []
        for _ in range(runs):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append([float(word) for word in done.stdout.split()])
    finally:
        shutil.rmtree(folder)
    seconds, more, whole = ([run[column] for run in found] for column in range(3))
    return [
        Figure("inspect/seconds", round(statistics.median(seconds), 2), "s", (round(min(seconds), 2), round(max(seconds), 2)), "< 3"),
        Figure("inspect/memory", round(max(whole)), "MB, the whole process", bar="< 200"),
        Figure("inspect/memory more than before", round(max(more)), "MB"),
        Figure("inspect/tensors", found[0][3]),
        Figure("inspect/size", round(found[0][4] / 1e9), "GB"),
    ]  # fmt: skip


def main() -> int:
    parser = make_parser("headers", __doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    return finish("headers", measure(options.shards, options.runs), parser, options)


if __name__ == "__main__":
    sys.exit(main())
