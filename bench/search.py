"""What a study finds, beside the best built-in recipe at the same gate, on real models, with a real worker and two threads.

    python -m bench.search [--models minilm smollm2] [--goals size latency] [--trials 24] [--threads 2] [--alone 6]
    python -m bench.search --classifier MODEL DATA.jsonl [--without openvino]

For each model, every built-in recipe that fits runs as a job of its own, measured as a study measures its winner: on the half of the data
that judges. The best that keeps the gate is compared with the study's winner.

The cost of the study is compared with that of its trials as independent jobs, in CPU seconds of all processes. Some of the trials, evenly
chosen, run again: each for a tenant of its own, so that it shares nothing, measured whole. Their mean stands for all.

Times are measured, so take the machine for yourself. With two cores, a goal of an encoder takes some twenty minutes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import cpu_seconds
from bench.record import Figure, finish, make_parser
from nightpress import migrations
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.builtins import builtin_recipes
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe
from nightpress.core.recipes.search.auto import Goal, auto_space
from nightpress.core.service.compose import Resources
from nightpress.core.service.studies.outcomes import outcome_of
from nightpress.core.service.studies.service import trial_recipe
from nightpress.core.wire.jobs import JobCreate
from nightpress.core.wire.models import DataSetCreate, ModelCreate
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
    data: str = "builtin:prose"
    samples: int = 64


QUESTIONS: dict[str, Sequence[Question]] = {
    "minilm": (
        Question("size", {"centred_cosine": ">= 0.97"}, 128),
        Question("latency", {"centred_cosine": ">= 0.97"}, 128, "cpu-encoder"),
    ),
    "smollm2": (Question("size", {"perplexity": "<= +3%"}, 512),),
    "classifier": (
        Question("size", {"accuracy": ">= -3%"}, 64, data="rows", samples=1000),
        Question("latency", {"accuracy": ">= -3%"}, 64, "cpu-encoder", data="rows", samples=1000),
    ),
}
SOURCES = {"minilm": minilm_dir, "smollm2": smollm_dir}


@dataclass(frozen=True)
class Ended:
    """A job that was measured whole."""

    report: Mapping[str, Any] | None  #: None: it has failed
    cpu_s: float  #: of all processes


class Bench:
    """An installation with a worker of this process and real children."""

    def __init__(self, folder: Path, threads: int, data: Path | None) -> None:
        url = f"sqlite:///{folder / 'nightpress.db'}"
        migrations.upgrade(url)
        self.service = Service(
            folder, url, lease_ttl_s=60, worker_threads=threads, model_roots=["/"], run_limit_s=7200.0
        )
        self.resources = Resources(self.service.settings, self.service.engine)
        self._data = data
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
        self._slot.close(timeout=10)
        self.service.close()

    def register(self, tenant_id: str, name: str, folder: Path) -> None:
        """Register a model, and the data if there is any."""
        self.resources.models.create(tenant_id, ModelCreate(name=name, path=str(folder)))
        if self._data is not None:
            self.resources.datasets.create(tenant_id, DataSetCreate(name="rows", path=str(self._data)))

    def run(self, tenant_id: str, model: str, recipe: Recipe) -> Ended:
        """Run a job to its end. Raises NightpressError if it can't be submitted."""
        before = cpu_seconds(os.getpid())
        wanted = JobCreate(model=model, recipe=recipe.model_dump(mode="json"), promote=False)
        job, _ = self.resources.jobs.submit(tenant_id, wanted)
        while self.service.job(job.id, tenant_id).finished_at is None:
            time.sleep(1)
        report = self.service.store.reader.report(job.id)
        return Ended(report, cpu_seconds(os.getpid()) - before)


@dataclass(frozen=True)
class Best:
    """What keeps the gates best."""

    name: str
    goal: float  #: as a share of the source's
    megabytes: float | None = None
    milliseconds: float | None = None  #: of a forward pass, the first shape

    @classmethod
    def of(cls, name: str, goal: float, report: Mapping[str, Any], artifact: str | None) -> "Best":
        [subject] = [entry for entry in report["artifacts"] if entry["name"] == artifact]
        timings = subject.get("timings") or [{}]
        return cls(name, goal, subject["size_bytes"] / 1e6, timings[0].get("p50_ms"))


def best_builtin(bench: Bench, model: str, question: Question, evaluate: list[dict[str, Any]]) -> Best:
    """The best built-in recipe that keeps the gates on the half of the data that judges."""
    parts = {"evaluate": evaluate, "screen": False}
    found = [Best("the source", 1.0)]
    for recipe in builtin_recipes().values():
        kept = recipe.model_dump(mode="json", exclude={"gates", "evaluate"})
        try:
            ended = bench.run(TENANT, model, trial_recipe(parts, kept, question.gates, "judge"))
        except NightpressError:
            continue  # it is for another kind of model
        if ended.report is not None:
            outcome = outcome_of("succeeded", None, ended.report, question.gates, question.goal)
            print(f"  {recipe.name}: {outcome.state} {outcome.goal} {outcome.reason or ''}", file=sys.stderr)
            if outcome.state == "kept" and outcome.goal is not None:
                found.append(Best.of(recipe.name, outcome.goal, ended.report, outcome.artifact))
    return min(found, key=lambda best: best.goal)


def alone(bench: Bench, model: str, folder: Path, recipes: Iterable[dict[str, Any]], gates: dict[str, str]) -> float:
    """Mean CPU seconds of trials as independent jobs: each is measured whole, for a tenant of its own."""
    seconds = []
    for number, recipe in enumerate(recipes):
        tenant = f"alone-{model}-{number}"
        bench.register(tenant, model, folder)
        parts = {"evaluate": recipe["evaluate"], "screen": False}
        seconds.append(bench.run(tenant, model, trial_recipe(parts, recipe, gates, "search")).cpu_s)
    return statistics.mean(seconds)


def space_of(folder: Path, question: Question, without: Sequence[str]) -> Any:
    """The automatic space, less formats that this machine can't run."""
    if not without:
        return "auto"
    recipes = []
    for recipe in auto_space(inspect_model(FolderFiles(folder)), question.target, question.goal, ()).recipes:
        exports = [_without(export, without) for export in recipe["exports"]]
        if None not in exports:
            recipes.append({**recipe, "exports": exports})
    return recipes


def _without(export: Any, formats: Sequence[str]) -> Any:
    """An export of a space without some formats; None if nothing is left. It may name a format, or be a choice of formats."""
    if isinstance(export, str):
        return None if export in formats else export
    if "choice" in export:
        left = [option for option in export["choice"] if option not in formats]
        return {"choice": left} if left else None
    inner = _without(export["format"], formats)
    return None if inner is None else {**export, "format": inner}


def ask(bench: Bench, model: str, folder: Path, question: Question, options: argparse.Namespace) -> list[Figure]:
    row = f"{model}, {question.goal}"
    request = StudyRequest(
        model=model,
        minimize=question.goal,
        gates=question.gates,
        target=question.target,  # type: ignore[arg-type]  # one of the known targets
        space=space_of(folder, question, options.without),
        data=question.data,
        samples=question.samples,
        length=question.length,
        trials=options.trials,
        parallel=1,
        promote=False,
    )
    began, cpu = time.monotonic(), cpu_seconds(os.getpid())
    store = bench.resources.studies.store
    study = bench.resources.studies.create(TENANT, request)
    while store.get(TENANT, study.id).state in {"searching", "judging"}:
        time.sleep(2)
    wall, spent = time.monotonic() - began, cpu_seconds(os.getpid()) - cpu
    report = store.report(TENANT, study.id)
    searched = [trial for trial in store.trials(TENANT, study.id, cursor=None, limit=5000)[0] if trial.role == "search"]
    for trial in searched:
        print(f"  {trial.number}: {trial.state} {trial.goal} {trial.choices} {trial.reason or ''}", file=sys.stderr)
    recipes = [bench.resources.study_ledger.recipe(study.id, trial.number) for trial in searched]
    step = max(1, len(recipes) // options.alone)
    independent = len(recipes) * alone(bench, model, folder, recipes[::step][: options.alone], question.gates)
    builtin = best_builtin(bench, model, question, recipes[0]["evaluate"])
    print(f"{row}: the best built-in recipe is {builtin.name}", file=sys.stderr)
    winner = Best("the source", 1.0)
    if report.winner is not None:
        told = bench.service.store.reader.report(str(report.winner.job_id))
        assert told is not None
        outcome = outcome_of("succeeded", None, told, question.gates, question.goal)
        winner = Best.of(f"trial {report.winner.trial}", report.winner.goal, told, outcome.artifact)
    print(f"{row}: the study's winner is {winner.name}", file=sys.stderr)
    return [
        *of_best(f"{row}/best built-in", builtin),
        *of_best(f"{row}/study", winner),
        Figure(f"{row}/study by built-in", winner.goal / builtin.goal, "", bar="<= 0.85"),
        Figure(f"{row}/wall", wall / 60, "min"),
        Figure(f"{row}/CPU", spent / 60, "min"),
        Figure(f"{row}/CPU of independent jobs", independent / 60, "min"),
        Figure(f"{row}/cost by independent jobs", spent / independent, "", bar="<= 0.5"),
        Figure(f"{row}/screened", report.counts.get("screened", 0), "trials"),
    ]


def of_best(name: str, best: Best) -> list[Figure]:
    figures = [Figure(name, 100 * best.goal, "%")]
    if best.megabytes is not None:
        figures.append(Figure(f"{name} size", best.megabytes, "MB"))
    if best.milliseconds is not None:
        figures.append(Figure(f"{name} time", best.milliseconds, "ms"))
    return figures


def main() -> int:
    parser = make_parser("search", __doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(SOURCES), default=sorted(SOURCES))
    parser.add_argument(
        "--classifier", nargs=2, type=Path, help="a classifier's folder and labelled rows, in place of the models"
    )
    parser.add_argument("--goals", nargs="+", choices=("size", "latency"), default=["size", "latency"])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", type=int, default=6, help="trials that run again as independent jobs")
    parser.add_argument("--without", nargs="+", default=[], help="formats that this machine can't run")
    options: argparse.Namespace = parser.parse_args()
    figures: list[Figure] = []
    data = None
    if options.classifier:
        folders, data = {"classifier": options.classifier[0].resolve()}, options.classifier[1].resolve()
    else:
        folders = {model: SOURCES[model]() for model in options.models}
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        bench = Bench(Path(folder), options.threads, data)
        try:
            for model, source in folders.items():
                bench.register(TENANT, model, source)
                for question in QUESTIONS[model]:
                    if question.goal in options.goals:
                        figures += ask(bench, model, source, question, options)
        finally:
            bench.close()
    return finish("search", figures, parser, options, choices=("models", "classifier", "goals"))


if __name__ == "__main__":
    sys.exit(main())
