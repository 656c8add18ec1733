"""A checkpoint several times larger than the memory it may use goes through GPTQ and weight-only: peak memory and seconds.

    python -m bench.larger_than_memory [--memory-mib 640] [--times 4] [--json]

A narrow Llama of random weights in fp32, with as many blocks as make it so large. Each pass runs in a child that may hold `--memory-mib` in all,
what the imports of torch and transformers took included. The limit is a memory cgroup's: past it the kernel ends the process. The peak of
its resident memory, files it maps included, is held against the limit besides. Needs the right to make cgroups, as root has.
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

MIB = 1024**2
HIDDEN, INNER, VOCABULARY = 512, 1408, 16384
PASSES = {
    "gptq": {"pass": "gptq", "bits": 4, "group_size": 128},
    "weight-only": {"pass": "weight-only", "bits": 4, "group_size": 128},
}
SAMPLES, LENGTH = 4, 64  #: of calibration: few, for the bar is memory


def write_model(folder: Path, size: int) -> int:
    """A checkpoint of at least that many bytes, a shard a block; its size."""
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
    """One pass in this process."""
    import torch

    from nightpress.core.compress.passes import MODEL_PASSES, PassContext, calibrated
    from nightpress.core.recipes.inspect import FolderFiles, inspect_model
    from nightpress.core.recipes.models import parse_recipe

    recipe = parse_recipe({"name": "bench", "passes": [PASSES[name]], "exports": ["compressed-tensors"]})
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    calibrated.calibration_samples = lambda *_: {"input_ids": ids}  # random weights make nothing of text
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
    """A cgroup whose processes hold no more than `memory` bytes together, page cache included; the file that takes their numbers."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-mib", type=int, default=640)
    parser.add_argument("--times", type=float, default=4)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "WORK", "PASS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    memory = given.memory_mib * MIB
    if given.child:
        model, work, name = given.child
        print(json.dumps(press(Path(model), Path(work), name)))
        return 0
    out: dict[str, Any] = {"memory_mib": given.memory_mib}
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        out["checkpoint_mib"] = write_model(folder / "model", int(given.times * memory)) / MIB
        for name in PASSES:
            with limited(memory) as members:
                # It joins before it is Python, so that imports count too.
                join = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(members)]
                command = [sys.executable, "-m", "bench.larger_than_memory"]
                command += ["--child", str(folder / "model"), str(folder / name), name]
                run = subprocess.run([*join, *command], capture_output=True, text=True)
            if run.returncode:
                failed += 1
                out[name] = {"failed": (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1][:300]}
            else:
                out[name] = json.loads(run.stdout.strip().splitlines()[-1])
                out[name]["within"] = out[name]["peak_mib"] <= given.memory_mib
                failed += not out[name]["within"]
            shutil.rmtree(folder / name, ignore_errors=True)
            if not given.json:
                print(name, json.dumps(out[name]), flush=True)
    if given.json:
        print(json.dumps(out))
    return failed


if __name__ == "__main__":
    sys.exit(main())
