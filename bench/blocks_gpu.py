"""The blocks executor on a GPU: marginal seconds per layer and peak memory, beside the plan's estimate, on a model with few layers.

    python -m bench.blocks_gpu [--shape 8b|70b|7b|3b|1b|0.5b|moe|moe-wide] [--layers 2 6] [--samples 128] [--length 2048] [--only NAME …]
    python -m bench.blocks_gpu --hidden 2048 --inner 768 --heads 32 --kv-heads 4 --experts 64 --top-k 8
    python -m bench.blocks_gpu --gpus 2
    python -m bench.blocks_gpu --only learned-rounding --layers 1 3 --peer PYTHON

The second form takes any shape: a Llama, or with --experts a Qwen3 mixture, where --inner is the width of an expert. With --gpus, a process
on each GPU has a part of the samples, and of a mixture's experts; the peak is that of the GPU that needs most. The floor is that of one GPU,
divided by their number: what processes send to each other counts as avoidable. PYTHON is that of an environment with auto-round
(bench/peer-autoround-requirements.txt): it presses the same models after `learned-rounding`, with the same tokens and as many steps.

Each method runs in its own process, because earlier methods would affect its peak. Everything counts: reading the weights, both forward
passes, Gram matrices, solving, packing, writing and fsync (to the folder in NIGHTPRESS_BENCH_DISK, if it is set). The floor is the work
that every calibrated method needs: two forward passes of a layer (a mixture's by transformers' own fused experts) and the Gram matrices of
its distinct inputs. Weights and token ids are random, because the work does not depend on their values.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from bench.peers import auto_round
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import Method, press_blocks
from nightpress.core.compress.model.checkpoint import read_shards, write_index
from nightpress.core.compress.passes.activations import RoundedInputs
from nightpress.core.compress.passes.calibrated import ActivationAware, Quantized, Sparse, WeightAndActivation
from nightpress.core.compress.passes.learned_rounding import Learned
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.passes import Awq, Fp8, Gptq, LearnedRounding, SmoothQuant, SparseGpt, Wanda
from nightpress.core.recipes.passes.base import OnLinears

VOCABULARY = 128256
OWN_SHAPE = ("hidden", "inner", "heads", "kv_heads", "experts", "top_k")


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    key_heads: int
    experts: int = 0  #: 0: a dense model
    chosen: int = 0  #: experts that each token goes to

    @property
    def head(self) -> int:
        return 128 if self.experts else self.hidden // self.heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        queries, keys = self.head * self.heads, self.head * self.key_heads
        prefixes = [f"mlp.experts.{expert}" for expert in range(self.experts)] or ["mlp"]
        feed_forward = {
            f"{prefix}.{name}": size
            for prefix in prefixes
            for name, size in (
                ("gate_proj", (self.inner, self.hidden)),
                ("up_proj", (self.inner, self.hidden)),
                ("down_proj", (self.hidden, self.inner)),
            )
        }
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            **feed_forward,
            **({"mlp.gate": (self.experts, self.hidden)} if self.experts else {}),
        }

    @property
    def norms(self) -> dict[str, int]:
        around = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), self.hidden)
        return around | (dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.head) if self.experts else {})

    def config(self, **more: Any) -> PretrainedConfig:
        common = {
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "rope_theta": 500000.0,
            **more,
        }
        if not self.experts:
            return LlamaConfig(intermediate_size=self.inner, architectures=["LlamaForCausalLM"], **common)
        return Qwen3MoeConfig(
            moe_intermediate_size=self.inner,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
            head_dim=self.head,
            norm_topk_prob=True,
            architectures=["Qwen3MoeForCausalLM"],
            **common,
        )


#: The shapes of Llama-3-8B and -70B, Qwen2.5-7B and -3B, Llama-3.2-1B, Qwen2.5-0.5B, and two mixtures of 64 experts.
SHAPES = {
    "8b": Shape(4096, 14336, 32, 8),
    "70b": Shape(8192, 28672, 64, 8),
    "7b": Shape(3584, 18944, 28, 4),
    "3b": Shape(2048, 11008, 16, 2),
    "1b": Shape(2048, 8192, 32, 8),
    "0.5b": Shape(896, 4864, 14, 2),
    "moe": Shape(2048, 768, 32, 4, experts=64, chosen=8),
    "moe-wide": Shape(2048, 1408, 32, 4, experts=64, chosen=8),
}


OPTIONS: dict[str, OnLinears] = {
    "gptq-w4a16": Gptq(order="natural", ranges="extremes", refine=False),
    "gptq-w4a16-activation-order": Gptq(ranges="extremes", refine=False),
    "gptq-w4a16-default": Gptq(),
    "awq-w4a16": Awq(ranges="extremes"),
    "awq-w4a16-default": Awq(),
    "smoothquant": SmoothQuant(alpha=0.5),
    "smoothquant-search": SmoothQuant(),
    "smoothquant-static-gptq": SmoothQuant(activations="tensor", weights="gptq"),
    "fp8-static": Fp8(activations="static"),
    "sparsegpt-2:4": SparseGpt(pattern="2:4"),
    "sparsegpt-50%": SparseGpt(),
    "wanda-2:4": Wanda(pattern="2:4"),
    "learned-rounding": LearnedRounding(),
    "gptq-w4a16-and-2:4": Gptq(order="natural", ranges="extremes", pattern="2:4"),
}


def method_of(options: OnLinears, header: ModelHeader) -> Method:
    match options:
        case Gptq():
            return Quantized(options, options.scheme)
        case Awq():
            return ActivationAware(options, options.scheme, header)
        case LearnedRounding():
            return Learned(options, options.scheme, largest=None, seed=0)
        case SmoothQuant() | Fp8():
            return RoundedInputs(options, header)
        case SparseGpt():
            return Sparse(options)
        case Wanda():
            return WeightAndActivation(options)
    raise TypeError(options)


def write_model(folder: Path, shape: Shape, layers: int, vocabulary: int = VOCABULARY) -> None:
    """Write a checkpoint with one shard per layer, and random weights in bfloat16.

    Embeddings are large, and layers that write into the residual stream are small, as in GPT-2: else rounding errors would grow with each
    layer, and a model of 32 layers would not answer alike at 4 bits.
    """
    folder.mkdir(parents=True)
    config = shape.config(
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, device="cuda") * 0.02).bfloat16()

    rest = {
        "model.embed_tokens.weight": random(vocabulary, shape.hidden) * 50,
        "lm_head.weight": random(vocabulary, shape.hidden),
    }
    ones = torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)
    rest["model.norm.weight"] = ones
    save_file(rest, folder / "model-rest.safetensors")
    for layer in range(layers):
        tensors = {
            f"model.layers.{layer}.{name}.weight": random(*size)
            * ((2 * layers) ** -0.5 if name.endswith(("o_proj", "down_proj")) else 1)
            for name, size in shape.matrices.items()
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": ones[:size] for name, size in shape.norms.items()}
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / f"model-{layer:03}.safetensors")
    write_index(folder)


def floor(shape: Shape, samples: int, length: int) -> dict[str, float]:
    """Seconds per layer that every calibrated method needs."""
    from transformers import AutoModel

    config = shape.config(num_hidden_layers=1, vocab_size=256)
    config.use_cache = False
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModel.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():  # a mixture's are empty
        torch.nn.init.normal_(parameter, std=0.02)
    hidden = torch.randn(8, length, shape.hidden, device="cuda", dtype=torch.bfloat16)
    routed = 8 * length * shape.chosen // shape.experts if shape.experts else 8 * length  # tokens of an expert
    inputs = [(3, 8 * length, shape.hidden), (1, routed, shape.inner)]
    if shape.experts:
        queries = shape.head * shape.heads
        inputs = [(1, 8 * length, shape.hidden), (1, 8 * length, queries)]
        inputs += [(shape.experts, routed, columns) for columns in (shape.hidden, shape.inner)]
    position = torch.arange(length, device="cuda")[None]
    embeddings = model.rotary_emb(hidden, position)

    def forward() -> None:
        with torch.no_grad():
            model.layers[0](hidden, position_embeddings=embeddings, position_ids=position)

    batches = samples / 8
    forward_s = _median(forward) * batches
    gram_s = sum(count * _gram_seconds(tokens, columns) for count, tokens, columns in inputs) * batches
    return {"two forward passes": 2 * forward_s, "Gram matrices": gram_s, "both": 2 * forward_s + gram_s}


def _gram_seconds(tokens: int, columns: int) -> float:
    """Seconds to add so many tokens to a Gram matrix."""
    gram, inputs = Gram(columns, "cuda"), torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    return _median(lambda: gram.add(inputs))


def _median(run: Any) -> float:
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def press(
    options: OnLinears,
    model: Path,
    scratch: Path,
    ids: torch.Tensor,
    ranks: Ranks | None = None,
    progress: Callable[[float, str], None] = lambda _fraction, _message: None,
) -> dict[str, float]:
    """Run a method once. Returns its seconds and its peak of GPU memory in GiB. ranks: processes that share out the samples."""
    shutil.rmtree(scratch, ignore_errors=True)
    infos = [tensor.info for shard in read_shards(model) for tensor in shard.tensors]
    chosen = frozenset(info.name for info in infos if is_linear_weight(info, options.ignore))
    header = inspect_model(FolderFiles(model))
    method = method_of(options, header)
    context = PassContext(header=header, work_dir=scratch / "work", device="cuda", ranks=ranks, progress=progress)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if ranks is not None:
        ranks.peak_gpu_bytes = 0
    torch.cuda.synchronize()
    start = time.perf_counter()
    step = options.batch if isinstance(options, LearnedRounding) else None
    press_blocks(model, scratch / "out", method, {"input_ids": ids}, context, chosen=chosen, recipe="bench", step=step)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if ranks is None else ranks.peak_gpu_bytes
    return {"seconds": seconds, "peak_gib": peak / 2**30}


def in_turn(names: Sequence[str], options: argparse.Namespace) -> int:
    """Run each method by its own command, with the given options. Returns the highest exit status."""
    arguments = [
        "--layers",
        *map(str, options.layers),
        "--samples",
        str(options.samples),
        "--length",
        str(options.length),
    ]
    arguments += ["--shape", options.shape, "--gpus", str(options.gpus)]
    arguments += ["--peer", options.peer] if options.peer else []
    for name in OWN_SHAPE:
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command = [sys.executable, "-m", "bench.blocks_gpu", *arguments, "--only"]
    return max(subprocess.run([*command, name]).returncode for name in names)


def measure(name: str, options: argparse.Namespace, folder: Path) -> list[Figure]:
    """Measure one method on a model with few layers and on a model with more. The difference gives the cost per layer."""
    few, many = options.layers
    title, shape = chosen_shape(options)
    calibration = Calibration(samples=options.samples, length=options.length)
    for layers in (few, many):
        write_model(folder / f"model-{layers}", shape, layers)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (options.samples, options.length), generator=generator)
    least = floor(shape, options.samples, options.length)
    if options.gpus > 1:
        title += f" on {options.gpus} GPUs"
        least = {what: seconds / options.gpus for what, seconds in least.items()}
    torch.cuda.empty_cache()
    threads = torch.get_num_threads()
    with Ranks(options.gpus, folder / "ranks", device="cuda", threads=threads) as processes:
        ranks = processes if options.gpus > 1 else None
        press(OPTIONS[name], folder / f"model-{few}", folder / "run", ids[:8], ranks)  # compiles the kernels
        runs = {
            layers: press(OPTIONS[name], folder / f"model-{layers}", folder / "run", ids, ranks)
            for layers in (few, many)
        }
    cost = OPTIONS[name].cost(inspect_model(FolderFiles(folder / f"model-{many}")), calibration)
    estimated = cost.each_gpu(options.gpus) / 2**30
    peak = max(run["peak_gib"] for run in runs.values())
    row = f"{title}/{name}"
    seconds = (runs[many]["seconds"] - runs[few]["seconds"]) / (many - few)
    chosen, beside = OPTIONS[name], list[Figure]()
    if options.peer and isinstance(chosen, LearnedRounding):
        beside = _auto_round(options, chosen, ids, folder, f"{title}/auto-round", seconds)
    return [
        *(Figure(f"{title} floor/{what}/seconds", round(taken, 3), "s a layer") for what, taken in least.items()),
        Figure(f"{row}/seconds", round(seconds, 3), "s a layer"),
        Figure(f"{row}/peak", round(peak, 2), "GiB of the GPU"),
        Figure(f"{row}/estimated", round(estimated, 2), "GiB of the GPU"),
        Figure(f"{row}/estimated_over_peak", round(estimated / peak, 2)),
        *beside,
    ]


def _auto_round(
    options: argparse.Namespace, chosen: LearnedRounding, ids: torch.Tensor, folder: Path, row: str, ours: float
) -> list[Figure]:
    """What auto-round takes for the same models and tokens, and how much faster we are. ours: our seconds a layer."""
    tokens = folder / "calibration.npy"
    np.save(tokens, ids.numpy())
    settings = {"scheme": "W4A16", "iters": chosen.steps, "batch_size": chosen.batch, "group_size": chosen.group_size}
    auto_round(options.peer, folder / f"model-{options.layers[0]}", settings, tokens, None)  # compiles its kernels
    few, many = (
        auto_round(options.peer, folder / f"model-{layers}", settings, tokens, None) for layers in options.layers
    )
    seconds = (many["seconds"] - few["seconds"]) / (options.layers[1] - options.layers[0])
    return [
        Figure(f"{row}/seconds", round(seconds, 3), "s a layer"),
        Figure(f"{row}/peak", round(max(few["peak"], many["peak"]) / 2**30, 2), "GiB of the GPU"),
        Figure(f"{row}/ratio", round(seconds / ours, 2), "times our seconds", bar=">= 1.5"),
    ]


def chosen_shape(options: argparse.Namespace) -> tuple[str, Shape]:
    """The title and the shape that the options name."""
    if not options.hidden:
        return options.shape, SHAPES[options.shape]
    shape = Shape(options.hidden, options.inner, options.heads, options.kv_heads, options.experts, options.top_k)
    mixture = f", {shape.experts} experts, {shape.chosen} a token" if shape.experts else ""
    return f"{shape.hidden} x {shape.inner}{mixture}", shape


def main() -> int:
    parser = make_parser("blocks_gpu", __doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 6])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gpus", type=int, default=1, help="processes, each on a GPU of its own")
    parser.add_argument("--only", nargs="*", choices=sorted(OPTIONS))
    parser.add_argument("--peer", help="the Python of auto-round's environment")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    for name in OWN_SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device", file=sys.stderr)
        return 0
    names = options.only or list(OPTIONS)
    if len(names) > 1:
        return in_turn(names, options)
    with tempfile.TemporaryDirectory(dir=os.environ.get("NIGHTPRESS_BENCH_DISK")) as scratch:
        figures = measure(names[0], options, Path(scratch))
    return finish("blocks_gpu", figures, parser, options, choices=("only", "shape", "peer"))


if __name__ == "__main__":
    sys.exit(main())
