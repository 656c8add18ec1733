"""What a study finds, beside the best built-in recipe at the same gate, on real models, with a real worker and two threads.

    python -m bench.search [--models minilm smollm2] [--trials 24] [--threads 2]

For each model, every built-in recipe that fits runs as a job of its own, measured as a study measures its winner: on the half of the data
that judges. The best that keeps the gate is compared with the study's winner. The cost of the study is compared with that of as many jobs
that are measured whole. Take the machine for yourself: times are measured. It takes hours.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import cpu_seconds
from bench.record import Figure, finish, make_parser
from nightpress import migrations
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.builtins import builtin_recipes
from nightpress.core.recipes.search.auto import Goal
from nightpress.core.service.compose import Resources
from nightpress.core.service.studies.outcomes import outcome_of
from nightpress.core.service.studies.service import trial_recipe
from nightpress.core.wire.jobs import JobCreate
from nightpress.core.wire.models import ModelCreate
from nightpress.core.wire.studies import StudyRequest
from nightpress.worker.control import Control
from tests.models import minilm_dir, smollm_dir
from tests.service import TENANT, Service

GIB = 1024**3


@dataclass(frozen=True)
class Question:
    """What is asked of a model."""

    goal: Goal
    gates: dict[str, str]
    length: int
    target: str | None = None


QUESTIONS: dict[str, Sequence[Question]] = {
    "minilm": (
        Question("size", {"centred_cosine": ">= 0.97"}, 128),
        Question("latency", {"centred_cosine": ">= 0.97"}, 128, "cpu-encoder"),
    ),
    "smollm2": (Question("size", {"perplexity": "<= +3%"}, 512),),
}
SOURCES = {"minilm": minilm_dir, "smollm2": smollm_dir}


class Bench:
    """An installation with a worker of this process and real children."""

    def __init__(self, folder: Path, threads: int) -> None:
        url = f"sqlite:///{folder / 'nightpress.db'}"
        migrations.upgrade(url)
        self.service = Service(folder, url, lease_ttl_s=60, worker_threads=threads, model_roots=["/"])
        self.resources = Resources(self.service.settings, self.service.engine)
        self._control = Control(self.resources, lambda _queue: None)
        self._slot, _ = self.service.slot(None, memory=16 * GIB, spare=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._over.wait(0.5):
            self._control.tick()
            self._slot.serve()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._control.close()
        self.service.close()

    def wait_for_job(self, job_id: str) -> dict[str, Any] | None:
        self.service.await_state(job_id, "succeeded", "failed", within=3600.0)
        return self.service.store.reader.report(job_id)


def best_builtin(
    bench: Bench, model: str, question: Question, evaluate: list[dict[str, Any]]
) -> tuple[float, str, list[float]]:
    """The least goal of a built-in recipe that keeps the gates, its name, and the seconds of every job."""
    parts = {"evaluate": evaluate, "screen": False}
    found, seconds = [(1.0, "the source")], []
    for recipe in builtin_recipes().values():
        kept = recipe.model_dump(mode="json", exclude={"gates", "evaluate"})
        try:
            wanted = trial_recipe(parts, kept, question.gates, "judge").model_dump(mode="json")
            began = time.monotonic()
            job, _ = bench.resources.jobs.submit(TENANT, JobCreate(model=model, recipe=wanted, promote=False))
        except NightpressError:
            continue  # it is for another kind of model
        report = bench.wait_for_job(job.id)
        seconds.append(time.monotonic() - began)
        if report is not None:
            outcome = outcome_of("succeeded", None, report, question.gates, question.goal)
            print(f"  {recipe.name}: {outcome.state} {outcome.goal} {outcome.reason or ''}", file=sys.stderr)
            if outcome.state == "kept" and outcome.goal is not None:
                found.append((outcome.goal, recipe.name))
    return (*min(found), seconds)


def ask(bench: Bench, model: str, question: Question, trials: int) -> list[Figure]:
    row = f"{model}, {question.goal}"
    request = StudyRequest(
        model=model,
        minimize=question.goal,
        gates=question.gates,
        target=question.target,  # type: ignore[arg-type]  # one of the known targets
        length=question.length,
        trials=trials,
        parallel=1,
        promote=False,
    )
    began, cpu = time.monotonic(), cpu_seconds(os.getpid())
    study = bench.resources.studies.create(TENANT, request)
    while bench.resources.studies.store.get(TENANT, study.id).state in {"searching", "judging"}:
        time.sleep(2)
    wall, spent = time.monotonic() - began, cpu_seconds(os.getpid()) - cpu
    report = bench.resources.studies.store.report(TENANT, study.id)
    evaluate = bench.resources.study_ledger.recipe(study.id, 0)["evaluate"]
    builtin, name, alone = best_builtin(bench, model, question, evaluate)
    print(f"{row}: the best built-in recipe is {name}", file=sys.stderr)
    winner = 1.0 if report.winner is None else report.winner.goal
    worker_s = report.cpu_seconds + report.gpu_seconds
    return [
        Figure(f"{row}/best built-in", 100 * builtin, "%"),
        Figure(f"{row}/study", 100 * winner, "%"),
        Figure(f"{row}/study by built-in", winner / builtin, "", bar="<= 0.85"),
        Figure(f"{row}/wall", wall / 60, "min"),
        Figure(f"{row}/CPU", spent / 60, "min"),
        Figure(f"{row}/cost by whole jobs", worker_s / (trials * statistics.mean(alone)), "", bar="<= 0.5"),
        Figure(f"{row}/screened", report.counts.get("screened", 0), "trials"),
    ]


def main() -> int:
    parser = make_parser("search", __doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(SOURCES), default=sorted(SOURCES))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    options: argparse.Namespace = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        bench = Bench(Path(folder), options.threads)
        try:
            for model in options.models:
                bench.resources.models.create(TENANT, ModelCreate(name=model, path=str(SOURCES[model]())))
                for question in QUESTIONS[model]:
                    figures += ask(bench, model, question, options.trials)
        finally:
            bench.close()
    return finish("search", figures, parser, options, choices=("models",))


if __name__ == "__main__":
    sys.exit(main())
