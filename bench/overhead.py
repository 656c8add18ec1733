"""What proving costs: seconds of each phase of real jobs, and the share that verification and evaluation take.

    python -m bench.overhead [--threads 2] [--json]

The built-in recipes on the real encoder and the real small language model, through the pipeline in one process. Verification is loading
each artifact in a fresh process and comparing its answers on the check texts; the bar is 20% of the job. Evaluation is what the same
processes do after that.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from core.compress import pipeline
from core.handoff.report import REPORT_FILE, read_report
from core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR, JobSpec
from core.recipes.builtins import get_recipe
from tests.models import minilm_dir, smollm_dir

BAR = 0.20


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
    verifying, evaluating = phases.get("verifying", 0.0), phases.get("evaluating", 0.0)
    return {
        "model": model.name,
        "recipe": recipe,
        "seconds": round(total, 1),
        "phases": {name: round(seconds, 2) for name, seconds in phases.items()},
        "verifying_share": round(verifying / total, 3),
        "evaluating_share": round((evaluating + phases.get("baseline", 0.0)) / total, 3),
        "within_bar": verifying <= BAR * total,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = [
        measure(minilm_dir(), "int8-encoder", given.threads),
        measure(smollm_dir(), "int8-weights", given.threads),
    ]
    if given.json:
        print(json.dumps(found))
    else:
        for one in found:
            print(
                f"{one['model']} {one['recipe']}: {one['seconds']} s, verifying {one['verifying_share']:.1%}, "
                f"measuring {one['evaluating_share']:.1%}  {one['phases']}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
