"""SmolLM2-135M decoding with each kind of key/value cache, beside none: tokens/s, memory, and what it answers.

    python -m bench.generation_cache [--threads 2] [--prompts 64 256 1024] [--tokens 32] [--only sliding …] [--json]

Each kind is a job of its own: the pipeline presses the model, and transformers, in a fresh process, decodes with the folder it left and,
for four tokens in three runs, without any cache. Memory is that of what the cache keeps; the peak is the whole process's, weights included.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import machine_of
from nightpress.core.compress import pipeline
from nightpress.core.handoff.report import Report, read_report
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.recipes.models import parse_recipe
from tests.models import smollm_dir

KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"prefix_bytes": 256_000_000},
    "static": {"mode": "static", "length": 1152},
    "sliding": {"mode": "sliding", "window": 252},
    "quantized-8": {"mode": "quantized", "bits": 8},
    "quantized-4": {"mode": "quantized", "bits": 4},
    "quantized-2": {"mode": "quantized", "bits": 2},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.generation_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = {}
    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
            found[name] = press(Path(folder), KINDS[name], given)
        print(name, file=sys.stderr, flush=True)
    if given.json:
        json.dump({name: one.model_dump(mode="json") for name, one in found.items()}, sys.stdout, indent=1)
        print()
    else:
        show(found)
    return 0


def press(job: Path, options: dict[str, Any], given: argparse.Namespace) -> Report:
    shutil.copytree(smollm_dir(), job / "source")
    speed = {"metric": "generation-speed", "prompt": given.prompts, "tokens": given.tokens, "repeats": 3}
    recipe = {
        "name": "generation-cache",
        "passes": [{"pass": "generation-cache", **options}],
        "exports": ["safetensors"],
        "evaluate": [speed],
    }
    JobSpec(
        job_id="bench",
        attempt=1,
        model_name="SmolLM2-135M-Instruct",
        model_digest="",
        recipe=parse_recipe(recipe),
        threads=given.threads,
    ).save(job)
    pipeline.run(job, lambda _frame: None)
    return read_report((job / "out" / "report.json").read_bytes())


def show(found: dict[str, Report]) -> None:
    first = next(iter(found.values()))
    print(f"{machine_of(first.environment)}\n")
    print(
        "| cache | prompt | prefill, tokens/s | decode, tokens/s | without a cache | faster | kept, MB | peak, MB | tokens alike |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, report in found.items():
        (artifact,) = report.artifacts
        kept = {one["tokens"]: one["bytes"] / 1e6 for one in report.passes[0].summary["cache_bytes"]}
        without = {one.prompt: one for one in artifact.generation if not one.cached}
        for one in artifact.generation:
            if one.cached:
                none = without[one.prompt]
                held = kept.get(
                    one.prompt, max(size for tokens, size in kept.items() if tokens <= max(one.prompt, min(kept)))
                )
                print(
                    f"| {name} | {one.prompt} | {one.prefill_tokens_per_s:,.0f} | {one.decode_tokens_per_s:.1f} | {none.decode_tokens_per_s:.2f} "
                    f"| {one.decode_tokens_per_s / none.decode_tokens_per_s:.1f}× | {held:.1f} | {(one.peak_memory_bytes or 0) / 1e6:,.0f} | {none.alike or 0:.0%} |"
                )
    for name, report in found.items():
        summary = report.passes[0].summary
        if one := summary.get("beyond"):
            print(
                f"\n{name}, behind {one['prompt']} tokens: {one['tokens_alike']:.0%} of {one['tokens'] * one['texts']} tokens as a dynamic cache writes them."
            )
        if one := summary.get("prefix"):
            print(
                f"\nOf a prompt of {one['prompt']} tokens {one['reused']} known: read at {one['prefill_tokens_per_s_reused']:,.0f} tokens/s instead of "
                f"{one['prefill_tokens_per_s']:,.0f}; the next token {'is the same' if one['same_token'] else 'differs'}."
            )


if __name__ == "__main__":
    sys.exit(main())
