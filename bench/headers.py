"""Reading a model of 1,000 shards and 700 GB from its headers, and finding its structure: the time, and the memory of the process.

    python -m bench.headers [--shards 1000] [--runs 5]

The folder has the tensors of a DeepSeek-V3: 61 layers with 256 experts each, in fp8 with a scale for 128 × 128. The shards are sparse files:
real headers and an index, and no bytes on the disk behind them. A fresh process reads the folder as the API does, without torch. Another one
builds the model on torch's meta device, as a worker does, and finds its blocks and the files' name of each weight. The time without the imports
is the processor's, of one thread, so that other work on the machine doesn't count.
"""

import json
import shutil
import statistics
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.processes import run_python
from bench.record import Figure, finish, make_parser

_LAYERS, _DENSE, _EXPERTS, _WIDTH, _INNER = 61, 3, 256, 7168, 2048
_WIDTHS = {"F8_E4M3": 1, "F32": 4, "BF16": 2}
_CODE = """
import resource, sys, time
from pathlib import Path
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started, worked = peak(), time.perf_counter(), time.process_time()
header = inspect_model(FolderFiles(Path(sys.argv[1])))
taken, worked = time.perf_counter() - started, time.process_time() - worked
assert not {"torch", "numpy", "transformers"} & sys.modules.keys()
print(taken, peak() - before, peak(), len(header.tensors), header.brought.size if header.brought else header.size, worked)
"""

_STRUCTURE = """
import sys, time
from pathlib import Path
import torch
from nightpress.core.compress.model.on_meta import build, lacking
from nightpress.core.compress.model.rows import possible_rows
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
import transformers.models.deepseek_v3.modeling_deepseek_v3
torch.set_num_threads(1)
folder = Path(sys.argv[1])
names = [tensor.name for tensor in inspect_model(FolderFiles(folder)).tensors]
started = time.process_time()
built = build(folder, names, torch.bfloat16)
rows = possible_rows(built.model)
taken = time.process_time() - started
assert lacking(built) is None
print(taken, len(built.names), *(len(blocks) for _, blocks in rows))
"""

Tensor = tuple[str, str, tuple[int, ...]]  #: name, dtype, shape


def tensors(layers: int = _LAYERS, dense: int = _DENSE, vocabulary: int = 129280) -> Iterator[Tensor]:
    """The tensors of a DeepSeek-V3 with so many layers, of which the first `dense` have no experts."""
    yield "model.embed_tokens.weight", "BF16", (vocabulary, _WIDTH)
    yield "lm_head.weight", "BF16", (vocabulary, _WIDTH)
    yield "model.norm.weight", "BF16", (_WIDTH,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        norms = {"input_layernorm": _WIDTH, "post_attention_layernorm": _WIDTH}
        norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
        for name, width in norms.items():
            yield f"{prefix}.{name}.weight", "BF16", (width,)
        for name, rows, columns in (
            ("q_a_proj", 1536, _WIDTH),
            ("q_b_proj", 24576, 1536),
            ("kv_a_proj_with_mqa", 576, _WIDTH),
            ("kv_b_proj", 32768, 512),
            ("o_proj", _WIDTH, 16384),
        ):
            yield from _fp8(f"{prefix}.self_attn.{name}", rows, columns)
        if layer < dense:
            yield from _feed_forward(f"{prefix}.mlp", 18432)
            continue
        yield f"{prefix}.mlp.gate.weight", "BF16", (_EXPERTS, _WIDTH)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (_EXPERTS,)
        yield from _feed_forward(f"{prefix}.mlp.shared_experts", _INNER)
        for expert in range(_EXPERTS):
            yield from _feed_forward(f"{prefix}.mlp.experts.{expert}", _INNER)


def _feed_forward(module: str, inner: int) -> Iterator[Tensor]:
    for name, rows, columns in (("gate_proj", inner, _WIDTH), ("up_proj", inner, _WIDTH), ("down_proj", _WIDTH, inner)):
        yield from _fp8(f"{module}.{name}", rows, columns)


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
        found = [[float(word) for word in run_python("-c", _CODE, str(folder)).split()] for _ in range(runs)]
        structure, weights, blocks = (float(word) for word in run_python("-c", _STRUCTURE, str(folder)).split())
    finally:
        shutil.rmtree(folder)
    seconds, more, whole = ([run[column] for run in found] for column in range(3))
    return [
        Figure("inspect/seconds", round(statistics.median(seconds), 2), "s", (round(min(seconds), 2), round(max(seconds), 2)), "< 3"),
        Figure("inspect/processor", round(statistics.median(run[5] for run in found), 2), "s of the processor"),
        Figure("inspect/memory", round(max(whole)), "MB, the whole process", bar="< 200"),
        Figure("inspect/memory more than before", round(max(more)), "MB"),
        Figure("inspect/tensors", found[0][3]),
        Figure("inspect/size", round(found[0][4] / 1e9), "GB"),
        Figure("structure/seconds", round(structure, 1), "s of the processor", bar="< 20"),
        Figure("structure/blocks", blocks),
        Figure("structure/weights", weights),
    ]  # fmt: skip


def main() -> int:
    parser = make_parser("headers", __doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    return finish("headers", measure(options.shards, options.runs), parser, options)


if __name__ == "__main__":
    sys.exit(main())
