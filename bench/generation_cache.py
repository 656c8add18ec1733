"""SmolLM2-135M decoding with each kind of key/value cache, beside no cache: tokens/s, memory, and agreement of the generated tokens.

    python -m bench.generation_cache [--threads 2] [--prompts 64 256 1024] [--tokens 32] [--only sliding …]

Each kind is a separate job: the pipeline compresses the model, and transformers decodes with the resulting folder in a new process. It also
decodes four tokens without a cache, in three runs. `kept` is the size of the cache; `peak` is the memory of the whole process, including
weights.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.pressing import press
from bench.record import Figure, finish, make_parser
from nightpress.core.handoff.report import Report
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
    parser = make_parser("generation_cache", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    figures: list[Figure] = []
    for name in options.only:
        speed = {"metric": "generation-speed", "prompt": options.prompts, "tokens": options.tokens, "repeats": 3}
        recipe = {
            "name": "generation-cache",
            "passes": [{"pass": "generation-cache", **KINDS[name]}],
            "exports": ["safetensors"],
            "evaluate": [speed],
        }
        with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
            figures += figures_of(name, press(Path(folder), smollm_dir(), parse_recipe(recipe), options.threads))
        print(name, file=sys.stderr, flush=True)
    return finish("generation_cache", figures, parser, options, choices=("only",))


def figures_of(name: str, report: Report) -> Iterator[Figure]:
    (artifact,) = report.artifacts
    kept = {entry["tokens"]: entry["bytes"] / 1e6 for entry in report.passes[0].summary["cache_bytes"]}
    without = {timing.prompt: timing for timing in artifact.generation if not timing.cached}
    for timing in artifact.generation:
        if not timing.cached:
            continue
        none, row = without[timing.prompt], f"caches/{name}, {timing.prompt}"
        shorter = [size for tokens, size in kept.items() if tokens <= max(timing.prompt, min(kept))]
        yield Figure(f"{row}/prefill", round(timing.prefill_tokens_per_s, 1), "tokens/s")
        yield Figure(f"{row}/decode", round(timing.decode_tokens_per_s, 2), "tokens/s")
        yield Figure(f"{row}/without", round(none.decode_tokens_per_s, 2), "tokens/s")
        yield Figure(f"{row}/faster", round(timing.decode_tokens_per_s / none.decode_tokens_per_s, 2), "×")
        yield Figure(f"{row}/kept", round(kept.get(timing.prompt, max(shorter)), 1), "MB")
        yield Figure(f"{row}/peak", round((timing.peak_memory_bytes or 0) / 1e6), "MB")
        yield Figure(f"{row}/alike", none.alike or 0.0, "of four tokens")
    summary = report.passes[0].summary
    if beyond := summary.get("beyond"):
        yield Figure(f"beyond/{name}/prompt", beyond["prompt"], "tokens")
        yield Figure(f"beyond/{name}/tokens", beyond["tokens"] * beyond["texts"], "tokens")
        yield Figure(f"beyond/{name}/alike", beyond["tokens_alike"], "as a dynamic cache writes them")
    if prefix := summary.get("prefix"):
        yield Figure("prefix/prompt", prefix["prompt"], "tokens")
        yield Figure("prefix/known", prefix["reused"], "tokens")
        yield Figure("prefix/prefill", round(prefix["prefill_tokens_per_s_reused"]), "tokens/s")
        yield Figure("prefix/prefill_without", round(prefix["prefill_tokens_per_s"]), "tokens/s")
        yield Figure("prefix/same_token", int(prefix["same_token"]))


if __name__ == "__main__":
    sys.exit(main())
