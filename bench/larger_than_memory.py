"""GPTQ and weight-only on a checkpoint several times larger than the memory that they may use: peak memory and seconds.

    python -m bench.larger_than_memory [--memory-mib 640] [--times 4]

The model is a narrow Llama with random weights in fp32, with as many blocks as the size needs. Each pass runs in a child that may use
`--memory-mib` in total, including the imports of torch and transformers. A memory cgroup sets the limit: the kernel kills a process that
exceeds it. The peak of the child's resident memory, mapped files included, is compared with the limit too. Only root may make cgroups.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.record import Figure, finish, make_parser

MIB = 1024**2
HIDDEN, INNER, VOCABULARY = 512, 1408, 16384
PASSES = {
    "gptq": {"pass": "gptq", "bits": 4, "group_size": 128},
    "weight-only": {"pass": "weight-only", "bits": 4, "group_size": 128},
}
SAMPLES, LENGTH = 4, 64  #: of calibration: few, because only memory is measured


def write_model(folder: Path, size: int) -> int:
    """Write a checkpoint of at least `size` bytes, with one shard per block. Returns its size in bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from nightpress.core.compress.model.checkpoint import write_index

    matrices = {
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
        "mlp.down_proj": (HIDDEN, INNER),
    }
    per_block = 4 * sum(rows * columns for rows, columns in matrices.values())
    blocks = -(-size // per_block)
    folder.mkdir()
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=8,
        num_hidden_layers=blocks,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(HIDDEN)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    for block in range(blocks):
        prefix = f"model.layers.{block}."
        tensors = {f"{prefix}{name}.weight": random(*shape) for name, shape in matrices.items()}
        tensors |= {f"{prefix}{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        save_file(tensors, folder / f"model-{block:04}.safetensors")
    rest = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": ones}
    save_file(rest, folder / "model-rest.safetensors")
    write_index(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def press(model: Path, work: Path, name: str) -> dict[str, Any]:
    """Run one pass in this process. Returns its seconds, peak memory and output size."""
    import torch

    from nightpress.core.compress.passes import MODEL_PASSES, PassContext, blockwise
    from nightpress.core.recipes.inspect import FolderFiles, inspect_model
    from nightpress.core.recipes.models import parse_recipe

    recipe = parse_recipe({"name": "bench", "passes": [PASSES[name]], "exports": ["compressed-tensors"]})
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    # For random weights, text is no better than random tokens.
    blockwise.calibration_samples = lambda *_: {"input_ids": ids}
    work.mkdir()
    context = PassContext(header=inspect_model(FolderFiles(model)), work_dir=work)
    start = time.perf_counter()
    MODEL_PASSES[name](model, work / "out", recipe.passes[0], context)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
        "written_mib": sum(path.stat().st_size for path in (work / "out").glob("*.safetensors")) / MIB,
    }


@contextlib.contextmanager
def limited(memory: int) -> Iterator[Path]:
    """A cgroup whose processes may use `memory` bytes in total, page cache included. Yields the file to which PIDs are written."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        folder = root / f"nightpress-bench-{os.getpid()}"
        if not root.is_dir():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(memory))
            yield folder / "cgroup.procs"
            return
        finally:
            folder.rmdir()
    raise SystemExit("No memory cgroup can be made here, so nothing would be shown. Run it as root.")


def measure(memory: int, times: float) -> list[Figure]:
    """Run each pass in its own process, which may use `memory` bytes. Raises SystemExit if one fails, e.g. because the kernel killed it."""
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_model(folder / "model", int(times * memory))
        figures += [Figure("checkpoint", round(size / MIB), "MiB"), Figure("limit", round(memory / MIB), "MiB")]
        for name in PASSES:
            with limited(memory) as members:
                # A shell joins the cgroup before it becomes Python, so that imports count too.
                join = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(members)]
                command = [sys.executable, "-m", "bench.larger_than_memory"]
                command += ["--child", str(folder / "model"), str(folder / name), name]
                run = subprocess.run([*join, *command], capture_output=True, text=True)
            if run.returncode:
                said = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
                raise SystemExit(f"{name} failed: {said[-1][:300]}")
            found = json.loads(run.stdout.strip().splitlines()[-1])
            figures += [
                Figure(f"passes/{name}/seconds", round(found["seconds"], 1), "s"),
                Figure(f"passes/{name}/peak", round(found["peak_mib"]), "MiB", bar=f"<= {memory / MIB:g}"),
                Figure(f"passes/{name}/written", round(found["written_mib"]), "MiB"),
            ]
            shutil.rmtree(folder / name)
    return figures


def main() -> int:
    parser = make_parser("larger_than_memory", __doc__)
    parser.add_argument("--memory-mib", type=int, default=640)
    parser.add_argument("--times", type=float, default=4)
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "WORK", "PASS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, work, name = options.child
        print(json.dumps(press(Path(model), Path(work), name)))
        return 0
    figures = measure(options.memory_mib * MIB, options.times)
    return finish("larger_than_memory", figures, parser, options)


if __name__ == "__main__":
    sys.exit(main())
