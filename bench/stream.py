"""The speed of `weight-only` on a large model, beside `cp` of the same files, and its memory.

    python -m bench.stream [--size-gb 4] [--repeats 3] [--folder DIR]

It makes a Llama-like bf16 model in a temporary folder; in total this needs three times the model's size on disk. Then `cp` and
`weight-only` with 8 and 4 bits run in turns. *Cold*: the page cache is emptied before each run, and both sides end with fsync. *Warm*:
the files are in the page cache; the pass ends with fsync, and `cp` does not. Speeds are bytes of the source per second; ratios are
medians of ratios of neighbouring runs. Bars: 0.8 of the speed of `cp` cold, 0.35 warm; less than 400 MB of anonymous memory.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.processes import run_python
from bench.record import Figure, finish, make_parser

HIDDEN, FEED_FORWARD, VOCABULARY, SHARD_BYTES = 2048, 5632, 32000, 10**9
BARS = {"cold": 0.8, "warm": 0.35}


def make_model(folder: Path, size: int) -> None:
    """Write a model of about `size` bytes. All layers use the same random values, because the speed does not depend on them."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    square, wide = HIDDEN * HIDDEN, HIDDEN * FEED_FORWARD
    layer_bytes = 2 * (4 * square + 3 * wide)
    layers = max(1, round((size - 2 * 2 * VOCABULARY * HIDDEN) / layer_bytes))
    noise = torch.randn(wide).mul_(0.02).bfloat16()

    def weight(rows: int, columns: int, shift: int) -> Any:
        return noise.roll(shift)[: rows * columns].view(rows, columns).clone()

    blocks: list[dict[str, Any]] = [
        {"model.embed_tokens.weight": noise.repeat(6)[: VOCABULARY * HIDDEN].view(VOCABULARY, HIDDEN)}
    ]
    for index in range(layers):
        at = f"model.layers.{index}"
        blocks.append(
            {f"{at}.self_attn.{name}_proj.weight": weight(HIDDEN, HIDDEN, index) for name in "qkvo"}
            | {f"{at}.mlp.{name}_proj.weight": weight(FEED_FORWARD, HIDDEN, index) for name in ("gate", "up")}
            | {f"{at}.mlp.down_proj.weight": weight(HIDDEN, FEED_FORWARD, index)}
            | {f"{at}.{name}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for name in ("input", "post_attention")}
        )
    blocks.append(
        {
            "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
            "lm_head.weight": blocks[0]["model.embed_tokens.weight"].clone(),
        }
    )
    folder.mkdir(parents=True)
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    total = number = 0
    for last, block in [(block is blocks[-1], block) for block in blocks]:
        shard |= block
        if last or sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            number += 1
            name = f"model-{number:05}.safetensors"
            save_file(shard, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
            total += sum(tensor.nbytes for tensor in shard.values())
            shard = {}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": layers,
                "hidden_size": HIDDEN,
            }
        )
    )


def empty_page_cache(folder: Path) -> None:
    """Empty the whole page cache if this process may; otherwise only the pages of the model's files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        for path in folder.iterdir():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def fill_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(8 * 1024**2):
                pass


def copy(source: Path, target: Path, *, sync: bool) -> float:
    target.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *sorted(map(str, source.iterdir())), str(target)], check=True)
    if sync:
        subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    return time.perf_counter() - start


def press(source: Path, target: Path, bits: int, threads: int) -> dict[str, float]:
    """Run the pass in a new process, so that its memory can be measured. The time includes the pass, but not the imports."""
    arguments = ("-m", "bench.stream", "--child", str(source), str(target), str(bits), str(threads))
    result: dict[str, float] = json.loads(run_python(*arguments, env=os.environ | {"OMP_NUM_THREADS": str(threads)}))
    return result


def child(source: Path, target: Path, bits: int, threads: int) -> None:
    import threading

    from nightpress.core.compress.model.checkpoint import read_shards
    from nightpress.core.compress.passes import MODEL_PASSES, PassContext
    from nightpress.core.recipes.header import ModelHeader
    from nightpress.core.recipes.passes import WeightOnly

    header = ModelHeader(
        model_type="llama",
        architecture="LlamaForCausalLM",
        config={},
        tensors=tuple(tensor.info for shard in read_shards(source) for tensor in shard.tensors),
        has_tokenizer=True,
    )
    peak, stop = anonymous_bytes(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work = target.with_name(target.name + "-work")
    start, used = time.perf_counter(), time.process_time()
    record = MODEL_PASSES["weight-only"](
        source,
        target,
        WeightOnly.model_validate({"bits": bits}),
        PassContext(header=header, work_dir=work, threads=threads),
    )
    seconds, used = time.perf_counter() - start, time.process_time() - used
    stop.set()
    watcher.join()
    shutil.rmtree(work)
    error = record.summary["relative_error"]
    print(json.dumps({"seconds": seconds, "cpu_s": used, "memory": peak, "imported": before, "relative_error": error}))


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel doesn't say RssAnon")


def measure(folder: Path, size_gb: float, repeats: int, threads: int) -> list[Figure]:
    source, target = folder / "model", folder / "out"
    make_model(source, round(size_gb * 1e9))
    size = sum(path.stat().st_size for path in source.iterdir())
    figures = [Figure("model", round(size / 1e9, 2), "GB")]
    for state in ("cold", "warm"):
        runs: dict[int, list[dict[str, float]]] = {8: [], 4: []}
        prepare = empty_page_cache if state == "cold" else fill_page_cache
        for _ in range(repeats):
            os.sync()
            prepare(source)
            reference = copy(source, target, sync=state == "cold")
            shutil.rmtree(target)
            for bits, seen in runs.items():
                os.sync()
                prepare(source)
                seen.append({**press(source, target, bits, threads), "cp_s": reference})
                shutil.rmtree(target)
        for bits, seen in runs.items():

            def median(key: str, seen: list[dict[str, float]] = seen) -> float:
                return statistics.median(run[key] for run in seen)

            row, ratio = f"cases/{state}, int{bits}", statistics.median(run["cp_s"] / run["seconds"] for run in seen)
            peak = max(run["memory"] for run in seen)
            figures += [
                Figure(f"{row}/speed", round(size / 1e9 / median("seconds"), 3), "GB of source/s"),
                Figure(f"{row}/cp", round(size / 1e9 / median("cp_s"), 3), "GB/s"),
                Figure(f"{row}/ratio", round(ratio, 3), "×", bar=f">= {BARS[state]}"),
                Figure(f"{row}/cpu", round(median("cpu_s"), 2), "CPU seconds"),
                Figure(f"{row}/memory", round(peak / 1e6), "MB, anonymous", bar="< 400"),
                Figure(f"{row}/imports", round(max(run["imported"] for run in seen) / 1e6), "MB of these"),
                Figure(f"{row}/error", seen[0]["relative_error"]),
            ]
    return figures


def main() -> int:
    parser = make_parser("stream", __doc__)
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to put the model; a file system on a disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="nightpress-bench-") as folder:
        figures = measure(Path(folder), options.size_gb, options.repeats, options.threads)
    return finish("stream", figures, parser, options, choices=("folder",))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        sys.exit(main())
