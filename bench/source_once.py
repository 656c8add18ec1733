"""Two jobs on one model: the share of each that goes to its source. The second reads the outputs that the first has measured.

    python -m bench.source_once [--threads 2] [--model smollm2|minilm] [--recipe NAME]

Both jobs run in a worker's child, one after the other. They have different passes and the same evaluation: the second keeps one layer in
float. `baseline` is the phase in which the source is measured; `proof` is baseline, verification and evaluation together.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.record import Figure, finish, make_parser
from nightpress.core.handoff.report import Report, read_report
from nightpress.core.ids import new_id
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.models import parse_recipe
from nightpress.migrations import upgrade
from tests.models import minilm_dir, smollm_dir
from tests.service import Service

#: model → the built-in recipe of its jobs
JOBS = {"smollm2": "int4-weights", "minilm": "int8-encoder"}
_MEMORY = 8 * 2**30


def run(service: Service, recipe: dict[str, Any]) -> Report:
    """Run a job to its end, and read its report."""
    job_id = service.submit(parse_recipe(recipe).model_dump(mode="json"), run_limit_s=7200.0, stall_s=1800.0)
    slot, _ = service.slot(None, memory=_MEMORY)
    slot.serve()
    job, report = service.job(job_id), service.store.reader.report(job_id)
    if report is None:
        raise RuntimeError(f"The job has ended as {job.state}: {job.error}\n{service.log(job_id)}")
    return read_report(report)


def measure(model: str, recipe: str, threads: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        url = f"sqlite:///{folder}/nightpress.db"
        upgrade(url)
        service = Service(Path(folder), url, lease_ttl_s=60, worker_threads=threads)
        source = smollm_dir() if model == "smollm2" else minilm_dir()
        service.model_id, service.model_digest = service.register(new_id("mdl"), source, in_place=True)
        given = get_recipe(recipe).model_dump(mode="json") | {"gates": {}}
        first, *others = given["passes"]
        gentler = {**given, "passes": [{**first, "ignore": [*first.get("ignore", []), "re:.*\\.0\\..*"]}, *others]}
        figures = []
        for row, asked in (("first", given), ("second", gentler)):
            report = run(service, asked)
            if (report.source.measurements_by is None) != (row == "first"):
                raise RuntimeError(f"The {row} job: its source was measured by {report.source.measurements_by}.")
            figures += figures_of(f"{model}, {recipe}/{row}", report, bar="<= 10" if row == "second" else "")
        service.close()
    return figures


def figures_of(row: str, report: Report, *, bar: str) -> list[Figure]:
    whole, phases = sum(report.phases.values()), report.phases
    baseline = phases.get("baseline", 0.0)
    proof = baseline + phases.get("verifying", 0.0) + phases.get("evaluating", 0.0)
    return [
        Figure(f"{row}_seconds", round(whole, 1), "s"),
        Figure(f"{row}_baseline", round(baseline, 1), "s"),
        Figure(f"{row}_baseline_share", round(100 * baseline / whole, 1), "% of the job", bar=bar),
        Figure(f"{row}_proof_share", round(100 * proof / whole, 1), "% of the job"),
    ]


def main() -> int:
    parser = make_parser("source_once", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=sorted(JOBS), help="only this model; else each")
    parser.add_argument("--recipe", help="a built-in recipe; else the model's own")
    options: argparse.Namespace = parser.parse_args()
    chosen = [options.model] if options.model else list(JOBS)
    figures = [figure for model in chosen for figure in measure(model, options.recipe or JOBS[model], options.threads)]
    return finish("source_once", figures, parser, options, choices=("model",))


if __name__ == "__main__":
    sys.exit(main())
