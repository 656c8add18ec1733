"""The blocks executor on a GPU: marginal seconds a layer and peak memory on a model of Llama-3-8B's shape, cut to a few layers.

    python -m bench.blocks_gpu [--layers 4 10] [--samples 128] [--length 2048] [--only NAME …] [--json]

Everything counts: reading the weights, both forward passes, Gram matrices, solving, packing, writing and fsync (to the folder that
NIGHTPRESS_BENCH_DISK names, if it is set). The floor beside it is
what no calibrated method goes without: two forward passes of a layer and the Gram matrices of its four distinct inputs.
Random weights and token ids: the work doesn't depend on their values.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from core.compress.checkpoint import read_shards
from core.compress.context import PassContext
from core.compress.executors.blocks import Method, press_blocks
from core.compress.passes.activations import RoundedInputs
from core.compress.passes.calibrated import ActivationAware, Quantized, Sparse, WeightAndActivation
from core.compress.solvers.gram import Gram
from core.recipes.header import ModelHeader
from core.recipes.linears import is_linear_weight
from core.recipes.passes import Awq, Gptq, SmoothQuant, SparseGpt, Wanda

HIDDEN, INNER, HEADS, KEY_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
KEYS = HIDDEN // HEADS * KEY_HEADS
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
HEADER = ModelHeader(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config={"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "hidden_size": HIDDEN},
    tensors=(),
    has_tokenizer=False,
)


def methods() -> dict[str, Method]:
    """What is timed, by name."""
    plain = Gptq(order="natural", ranges="extremes", refine=False)
    by_power = Gptq(ranges="extremes", refine=False)
    joint = Gptq(order="natural", ranges="extremes", pattern="2:4")
    awq, default = Awq(ranges="extremes"), Gptq()
    return {
        "gptq-w4a16": Quantized(plain, plain.scheme),
        "gptq-w4a16-activation-order": Quantized(by_power, by_power.scheme),
        "gptq-w4a16-default": Quantized(default, default.scheme),
        "awq-w4a16": ActivationAware(awq, awq.scheme, HEADER),
        "smoothquant": RoundedInputs(SmoothQuant(alpha=0.5), HEADER),
        "smoothquant-search": RoundedInputs(SmoothQuant(), HEADER),
        "smoothquant-static-gptq": RoundedInputs(SmoothQuant(activations="tensor", weights="gptq"), HEADER),
        "sparsegpt-2:4": Sparse(SparseGpt(pattern="2:4")),
        "sparsegpt-50%": Sparse(SparseGpt()),
        "wanda-2:4": WeightAndActivation(Wanda(pattern="2:4")),
        "gptq-w4a16-and-2:4": Quantized(joint, joint.scheme),
    }


def write_model(folder: Path, layers: int) -> None:
    """A checkpoint with a shard a layer, beside the shards of `folder`'s siblings where they exist already."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * 0.02).bfloat16()

    rest = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN)}
    ones = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    save_file(rest | {"model.norm.weight": ones}, folder / "model-rest.safetensors")
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in MATRICES.items()}
        tensors |= {f"model.layers.{layer}.{name}_layernorm.weight": ones for name in ("input", "post_attention")}
        save_file({name: one.clone() for name, one in tensors.items()}, folder / f"model-{layer:03}.safetensors")


def floor(samples: int, length: int) -> dict[str, float]:
    """Seconds a layer that no calibrated method goes without."""
    from transformers import LlamaModel

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        num_hidden_layers=1,
        vocab_size=256,
        rope_theta=500000.0,
    )
    config.use_cache = False
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaModel(config).eval()
    torch.set_default_dtype(torch.float32)
    hidden = torch.randn(8, length, HIDDEN, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(8 * length, INNER, device="cuda", dtype=torch.bfloat16)
    narrow_gram, wide_gram = Gram(HIDDEN, "cuda"), Gram(INNER, "cuda")
    position = torch.arange(length, device="cuda")[None]
    embeddings = model.rotary_emb(hidden, position)

    def forward() -> None:
        with torch.no_grad():
            model.layers[0](hidden, position_embeddings=embeddings, position_ids=position)

    batches = samples / 8
    forward_s = _median(forward) * batches
    gram_s = (3 * _median(lambda: narrow_gram.add(hidden)) + _median(lambda: wide_gram.add(wide))) * batches
    return {"two_forwards_s": 2 * forward_s, "gram_s": gram_s, "floor_s": 2 * forward_s + gram_s}


def _median(run: Any) -> float:
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def press(method: Method, model: Path, scratch: Path, ids: torch.Tensor) -> dict[str, float]:
    """Seconds and GiB of one whole run."""
    shutil.rmtree(scratch, ignore_errors=True)
    infos = [one.info for shard in read_shards(model) for one in shard.tensors]
    chosen = frozenset(info.name for info in infos if is_linear_weight(info, Wanda().ignore))
    header = ModelHeader(
        model_type="llama", architecture="LlamaForCausalLM", config={}, tensors=(), has_tokenizer=False
    )
    context = PassContext(header=header, work_dir=scratch / "work", device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    press_blocks(model, scratch / "out", method, {"input_ids": ids}, context, chosen=chosen, recipe="bench")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 10))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", nargs="*", choices=sorted(methods()))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device", file=sys.stderr)
        return 0
    few, many = given.layers
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": given.samples * given.length,
    }
    with tempfile.TemporaryDirectory(dir=os.environ.get("NIGHTPRESS_BENCH_DISK")) as scratch:
        folder = Path(scratch)
        for layers in (few, many):
            write_model(folder / f"model-{layers}", layers)
        ids = torch.randint(0, VOCABULARY, (given.samples, given.length), generator=torch.Generator().manual_seed(1))
        out["floor"] = floor(given.samples, given.length)
        if not given.json:
            print(json.dumps(out), flush=True)
        for name in given.only or methods():
            press(methods()[name], folder / f"model-{few}", folder / "run", ids[:8])  # compiles the kernels
            runs = {
                layers: press(methods()[name], folder / f"model-{layers}", folder / "run", ids)
                for layers in (few, many)
            }
            out[name] = {
                "s_per_layer": (runs[many]["seconds"] - runs[few]["seconds"]) / (many - few),
                "seconds": {layers: run["seconds"] for layers, run in runs.items()},
                "peak_gib": max(run["peak_gib"] for run in runs.values()),
            }
            if not given.json:
                print(name, json.dumps(out[name]), flush=True)
    if given.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
