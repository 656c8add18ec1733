"""Shared by benchmarks that compress a model: a whole job in this process, float graphs for comparison, and timing of forms in turns."""

import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.record import Figure
from nightpress.core.compress import pipeline
from nightpress.core.compress.evaluate import quality, speed
from nightpress.core.compress.export import onnx, openvino
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.static_int8 import weight_bits
from nightpress.core.handoff.report import REPORT_FILE, Report, read_report
from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR, JobSpec
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe
from nightpress.core.recipes.passes import StaticInt8

#: shape (batch × tokens, e.g. `1x128`) → milliseconds
Times = dict[str, float]


@dataclass(frozen=True)
class Form:
    """A form of a model: its folder, and the runner that loads it with the consumer's library."""

    runner: Path
    folder: Path


@dataclass(frozen=True)
class Timed:
    """The times of forms that were measured in turns."""

    rounds: list[dict[str, Times]]  #: medians of each form in each round
    cosines: dict[str, float]  #: form → cosine of its outputs with those of the first form

    def median(self, form: str, shape: str) -> float:
        """The median over the rounds, in milliseconds."""
        return statistics.median(times[form][shape] for times in self.rounds)

    def speedup(self, form: str, others: tuple[str, ...], shape: str) -> float:
        """The speed of a form relative to the fastest of the others: the median of the ratios within a round.

        Ratios are taken within a round because all forms of a round ran under similar conditions.
        """
        return statistics.median(
            min(times[name][shape] for name in others) / times[form][shape] for times in self.rounds
        )

    @property
    def shapes(self) -> list[str]:
        return list(next(iter(self.rounds[0].values())))


def press(job: Path, model: Path, recipe: Recipe, threads: int) -> Report:
    """Run the pipeline in the folder `job`, as a worker's child does. The artifacts are then in job/out."""
    shutil.copytree(model, job / SOURCE_DIR)
    (job / DATA_DIR).mkdir()
    spec = JobSpec(
        job_id="job_bench",
        attempt=1,
        model_name=model.name,
        model_digest="sha256:" + "0" * 64,
        recipe=recipe,
        threads=threads,
    )
    spec.save(job)
    pipeline.run(job, lambda _frame: None)
    return read_report((job / OUT_DIR / REPORT_FILE).read_bytes())


def save_float_graphs(
    source: Path, recipe: Recipe, threads: int, work_dir: Path, onnx_dir: Path, openvino_dir: Path | None
) -> tuple[quality.Trial, tracing.Traced, PassContext]:
    """Export a model in fp32, as a careful user would. If `work_dir` is that of a job on the same model, its trace is reused."""
    header = inspect_model(FolderFiles(source))
    trial = quality.prepare(recipe, header, source, {}, threads=threads)
    context = PassContext(header=header, work_dir=work_dir, threads=threads, calibration=recipe.calibration)
    traced = tracing.trace(source, header, trial.task.sets[0].sequences, context)
    onnx.save(source, onnx_dir, traced, [])
    if openvino_dir is not None:
        openvino.save(source, openvino_dir, traced, [])
    return trial, traced, context


def time_by_turns(forms: Mapping[str, Form], trial: quality.Trial, rounds: int, scratch: Path) -> Timed:
    """Time each form in new processes, in alternating order, so that noise affects all forms equally. The first form is the reference."""
    timed = Timed([], {})
    for turn in range(rounds):
        reference = None
        timed.rounds.append({})
        order = list(forms.items())
        for name, form in order if turn % 2 == 0 else reversed(order):
            plain = name.replace(" ", "-").replace(":", "")
            seen = run_consumer(form.runner, form.folder, trial.task, name=plain, scratch=scratch)
            taken = speed.timings(seen, trial.task)
            timed.rounds[-1][name] = {f"{timing.batch}x{timing.length}": timing.p50_ms for timing in taken}
            if turn == 0:
                reference = reference or seen
                measured = quality.measurements(trial, reference, seen)
                timed.cosines[name] = next(figure.value for figure in measured if figure.name == "cosine")
    return timed


def folder_mb(folder: Path) -> float:
    """The size of all files of a folder, in MB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def where() -> str:
    """The end of a group's name. Without a processor's instructions for int8, figures of int8 forms stand apart: they say another thing."""
    return " without VNNI" if weight_bits(StaticInt8()) < 8 else ""


def form_figures(group: str, forms: Mapping[str, Form], timed: Timed, floats: tuple[str, ...]) -> list[Figure]:
    """Size, cosine and times of each form. `floats`: the names of the forms in fp32; the first is eager torch."""
    source = folder_mb(forms[floats[0]].folder)
    figures = []
    for name, form in forms.items():
        at = f"{group}/{name}/"
        figures += [
            Figure(f"{at}size", round(folder_mb(form.folder), 1), "MB"),
            Figure(f"{at}share", round(folder_mb(form.folder) / source, 3), "of the source's size"),
            Figure(f"{at}cosine", round(timed.cosines[name], 5)),
        ]
        for shape in timed.shapes:
            figures += [
                Figure(f"{at}{shape}", round(timed.median(name, shape), 2), "ms"),
                Figure(f"{at}{shape}_over_torch", round(timed.speedup(name, floats[:1], shape), 2), "×"),
                Figure(f"{at}{shape}_over_best", round(timed.speedup(name, floats, shape), 2), "× the best in fp32"),
            ]
    return figures
