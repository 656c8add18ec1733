"""What proving costs: seconds of each phase of real jobs, and the share that verification takes.

    python -m bench.overhead [--threads 2] [--json]

The built-in recipes on the real encoder and the real small language model, through the pipeline in one process. Verification is loading
each artifact in a fresh process and comparing its answers on the check texts; the bar is 20% of the job. Evaluation is what the same
processes do after that, and the baseline is the source in a process of its own.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from nightpress.core.compress import pipeline
from nightpress.core.handoff.report import REPORT_FILE, read_report
from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR, JobSpec
from nightpress.core.recipes.builtins import get_recipe
from tests.models import minilm_dir, smollm_dir

BAR = 0.20
JOBS = (("encoder", "cpu-encoder"), ("encoder", "int8-encoder"), ("decoder", "int8-weights"), ("decoder", "gguf-lm"))


def measure(model: Path, recipe: str, threads: int) -> dict[str, Any]:
    """Press once, and read the phases from the report."""
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        job_dir = Path(folder)
        shutil.copytree(model, job_dir / SOURCE_DIR)
        (job_dir / DATA_DIR).mkdir()
        JobSpec(
            job_id="job_bench",
            attempt=1,
            model_name=model.name,
            model_digest="sha256:" + "0" * 64,
            recipe=get_recipe(recipe),
            threads=threads,
        ).save(job_dir)
        pipeline.run(job_dir, lambda _frame: None)
        phases = read_report((job_dir / OUT_DIR / REPORT_FILE).read_bytes()).phases
    total = sum(phases.values())
    verifying = phases.get("verifying", 0.0)
    return {
        "model": model.name,
        "recipe": recipe,
        "seconds": round(total, 1),
        "phases": {name: round(seconds, 2) for name, seconds in phases.items()},
        "verifying_share": round(verifying / total, 3),
        "within_bar": verifying <= BAR * total,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = [measure(minilm_dir() if kind == "encoder" else smollm_dir(), name, given.threads) for kind, name in JOBS]
    if given.json:
        print(json.dumps(found))
        return 0
    names = list(dict.fromkeys(name for one in found for name in one["phases"]))
    print(f"| model | recipe | {' | '.join(f'{name}, s' for name in names)} | verifying | bar {BAR:.0%} |")
    print("|" + " --- |" * (len(names) + 4))
    for one in found:
        seconds = " | ".join(f"{one['phases'].get(name, 0):.1f}" for name in names)
        passed = "PASS" if one["within_bar"] else "MISS"
        print(f"| {one['model']} | {one['recipe']} | {seconds} | {one['verifying_share']:.1%} | {passed} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
