"""Run benchmarks, each in its own process. Each prints its figures and stores them in bench/results (see bench/record.py).

python -m bench --list           list the benchmarks, and how long each usually takes
python -m bench [NAME …]         run the named benchmarks; without a name, all that need no GPU and no arguments
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Bench:
    """A benchmark: what it measures, how long it takes and what it needs."""

    measures: str
    minutes: float  #: usual duration on two idle cores
    needs: Literal["", "a GPU", "two GPUs", "arguments", "an environment with vLLM"] = ""


#: In the order of running: first those that measure milliseconds, while the machine is cool and idle.
BENCHES = {
    "startup": Bench("How long a job, a worker and the API take to start, and the memory of an idle service.", 2),
    "headers": Bench("Reading a model of 1,000 shards and 700 GB from its headers.", 0.5),
    "submit": Bench("Submissions a second over HTTP, beside a bare endpoint with one INSERT.", 2),
    "many_jobs": Bench("Claims, pages and ticks with a million jobs in PostgreSQL, beside ten thousand.", 3),
    "studies": Bench("A study of 2,000 trials that are only rows: steps of the control process, 64 workers.", 15),
    "event_streams": Bench("Five hundred readers of event streams on one API process.", 0.5),
    "attacks": Bench("`GET /v1/me` while the API is attacked in ten ways.", 5),
    "web": Bench("Milliseconds until the web page shows a list, with ten thousand jobs.", 2),
    "recovery": Bench("Seconds until the job of a killed worker runs elsewhere.", 2),
    "storage": Bench("Upload and download of 1 GB, beside boto3.", 3),
    "deliveries": Bench(
        "Deliveries of 1 GB to a bucket, the Hub and a registry, beside their libraries; ticks with 10,000 rows.", 5
    ),
    "stream": Bench("Speed and memory of `weight-only` on a 4 GB model, beside `cp`.", 5),
    "encoder": Bench("all-MiniLM-L6-v2 in dynamic int8, beside fp32.", 4),
    "encoders": Bench("Tables, short vectors and a cut vocabulary of all-MiniLM-L6-v2, beside the model.", 12),
    "static_int8": Bench("all-MiniLM-L6-v2 in static int8, beside ONNX Runtime's own quantizer.", 6),
    "targets": Bench("The target `cpu-encoder`, beside what is made by hand.", 23),
    "targets_llm": Bench("The target `cpu-llm`, beside llama.cpp's own quantizer.", 10),
    "shrink": Bench("all-MiniLM-L6-v2 without a quarter of its channels and heads.", 7),
    "overhead": Bench("The share of a job that verification takes.", 6),
    "source_once": Bench("The share of two jobs on one model that goes to its source.", 8),
    "generation_cache": Bench("Decoding with each kind of key/value cache.", 24),
    "estimates": Bench("What a plan estimates of memory, size and time, beside what is measured.", 25),
    "larger_than_memory": Bench("A model four times as large as the memory that it may use; needs root.", 4),
    "search": Bench("What a study finds, beside the best built-in recipe at the same gate.", 300),
    "blocks_cpu": Bench("CPU time, memory and perplexity of calibrated passes, beside llm-compressor.", 60),
    "ranks_cpu": Bench("Calibrated passes in one process and in two, on the same cores.", 20),
    "quality": Bench(
        "Size and perplexity of every method on a small language model; hours without a GPU.", 15, "a GPU"
    ),
    "gguf": Bench("GGUF files of ours, beside llama.cpp's quantizer with its importance matrix.", 25),
    "offgrid": Bench("Trains the language model that doesn't flatter 4-bit methods.", 3, "a GPU"),
    "low_bits": Bench("Losses at 4 bits and below, beside auto-round, on text that calibrated nothing.", 60, "a GPU"),
    "blocks_gpu": Bench("Seconds and GPU memory of calibrated passes, a layer of known shapes.", 10, "a GPU"),
    "peer_llmcompressor_gpu": Bench("llm-compressor's GPTQ, beside `blocks_gpu`.", 5, "arguments"),
    "vllm": Bench(
        "Every scheme in vLLM, transformers and llama.cpp; int4 served by vLLM.", 60, "an environment with vLLM"
    ),
    "whole_job": Bench(
        "A whole job on a model of 8 billion parameters: the seconds of each phase, and peaks.", 4, "a GPU"
    ),
    "semi_structured": Bench("torch's 2:4 matrix product, beside the dense one.", 1, "a GPU"),
    "structure": Bench("The code itself: arrows against the floors, circles of files, repeated lines.", 0.5),
    "static_search": Bench("The `static-int8` pass alone, on encoders that you have.", 3, "arguments"),
    "train_gpu": Bench(
        "Distillation of a decoder of a billion parameters: steps a second on one GPU and on two.", 2, "a GPU"
    ),
    "two_gpus": Bench("What `blocks_gpu` and `train_gpu` measure on one GPU and on two, in one call.", 6, "two GPUs"),
    "train": Bench("Distilled, pruned and early-exit classifiers: accuracy and latency.", 9, "arguments"),
    "shape_to_speed": Bench(
        "Encoders at several times their speed, beside distillation to fewer layers; trained on a GPU.",
        15,
        "arguments",
    ),
    "within": Bench(
        "Int8 within a gate on accuracy, on a classifier and rows that you have, beside NNCF.", 10, "arguments"
    ),
}


def listing() -> str:
    width = max(map(len, BENCHES))
    lines = [
        f"{name:{width}}  {bench.minutes:4g} min  {bench.measures}" + (f" Needs {bench.needs}." if bench.needs else "")
        for name, bench in BENCHES.items()
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="all that a machine without a GPU can run, if none is named"
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and how long each usually takes")
    options = parser.parse_args()
    if options.list:
        print(listing())
        return 0
    for name in options.names:
        if name not in BENCHES:
            parser.error(f"There is no bench {name!r}. `python -m bench --list` says what there is.")
        if BENCHES[name].needs == "arguments":
            parser.error(f"The bench {name} needs arguments: see `python -m bench.{name} --help`.")
    return run(options.names or [name for name, bench in BENCHES.items() if not bench.needs])


def run(names: list[str]) -> int:
    """Run benchmarks one after another. Returns the number of those that failed or missed a bar."""
    print(f"{len(names)} benches, usually {sum(BENCHES[name].minutes for name in names):g} minutes in all")
    failed = []
    for name in names:
        print(f"\n== {name}: {BENCHES[name].measures} Usually {BENCHES[name].minutes:g} minutes.", flush=True)
        started = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"bench.{name}"]).returncode:
            failed.append(name)
        print(f"== {name} took {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    if failed:
        print(f"\nfailed, or missed a bar: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
