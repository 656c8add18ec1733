"""One job: its folder, its clock, and the frames that it sends."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from nightpress.core.compress import environment
from nightpress.core.compress.context import Judge, PassContext
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.compress.stages.clock import Clock, Emit, Report
from nightpress.core.compress.stages.stopwatch import GraphStopwatch
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Checkpoint, Log, Metric, Span
from nightpress.core.handoff.report import PassRecord, Serving, Subject
from nightpress.core.handoff.spec import DATA_DIR, MEASURED_DIR, OUT_DIR, SOURCE_DIR, WORK_DIR, JobSpec
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import PassOptions, catalog

_FITS = 0.6  #: share of a GPU's memory that a model's files may have, for the model to be run on each GPU by itself


class PressJob:
    """The fixed inputs of a job, and the methods that send its frames."""

    def __init__(self, job_dir: Path, emit: Emit) -> None:
        self.emit = emit
        self.spec = JobSpec.load(job_dir)
        self.recipe = self.spec.recipe
        self.brought = job_dir / SOURCE_DIR  #: the model as it was brought
        self.source = self.brought  #: the model that everything reads: a folder of floats
        self.adapter: str | None = None  #: the adapter that was merged into it, e.g. "lora of rank 16 on 64 weights"
        self.work, self.out = job_dir / WORK_DIR, job_dir / OUT_DIR
        self.scratch = job_dir / MEASURED_DIR
        self.data = job_dir / DATA_DIR
        self.data_files = {ref: self.data / name for ref, name in self.spec.data.items()}
        self.clock = Clock(emit)
        self.held = contextlib.ExitStack()  #: processes that stay for later stages

    def close(self) -> None:
        """End the processes that stay, and the clock."""
        self.held.close()
        self.clock.close()

    def context(
        self,
        header: ModelHeader,
        progress: Report,
        *,
        index: int,
        judge: Judge | None = None,
        ranks: Ranks | None = None,
    ) -> PassContext:
        """The context for the pass at this index of the recipe. header: of the model that the pass reads."""
        self.work.mkdir(parents=True, exist_ok=True)
        return PassContext(
            header=header,
            work_dir=self.work,
            origin=self.source,
            device=self.spec.device,
            threads=self.spec.threads,
            seed=self.recipe.seed,
            index=index,
            calibration=self.recipe.calibration,
            data_files=self.data_files,
            judge=judge,
            ranks=ranks,
            stopwatch=GraphStopwatch(self.source, self.scratch / "timed", self.spec.threads),
            progress=progress,
            metric=lambda name, value, step: self.emit(Metric(name=name, value=value, step=step)),
            checkpoint=partial(self.checkpoint, index),
        )

    def device_of(self, export: Export | None) -> Device:
        """Where this artifact is measured; None: the source."""
        return "cuda" if self.spec.device == "cuda" and self.recipe.measured_on_gpu(export) else "cpu"

    def parts_of(self, export: Export | None, folder: Path) -> int:
        """How many processes share out the examples of a model, each on a GPU of its own: one on the processor, and where one GPU is too small."""
        if self.spec.processes == 1 or self.device_of(export) == "cpu":
            return 1
        return self.spec.processes if folder_bytes(folder) < _FITS * (environment.gpu_memory() or 0) else 1

    def checkpoint(self, index: int, path: str, step: int) -> None:
        """Report a complete file below work/, from which a later attempt can resume."""
        self.emit(Checkpoint(path=path, step=step, pass_index=index))

    def log(self, text: str) -> None:
        self.emit(Log(text=text))

    def warn(self, text: str) -> None:
        self.emit(Log(level="warning", text=text))

    def publish(self, subject: Subject) -> None:
        """Send a model's figures as metrics: those that it has."""
        self.emit(Metric(name=f"{subject.name}.size_bytes", value=subject.size_bytes))
        for found in subject.measurements:
            self.emit(Metric(name=f"{subject.name}.{found.name}", value=found.value))
        self.publish_speed(subject)

    def publish_speed(self, subject: Subject) -> None:
        """Send a model's timings as metrics."""
        for timing in subject.timings:
            self.emit(Metric(name=f"{subject.name}.p50_ms.{timing.batch}x{timing.length}", value=timing.p50_ms))
        for writing in subject.generation:
            name = f"{subject.name}.decode_tokens_per_s.{writing.batch}x{writing.prompt}"
            self.emit(Metric(name=name, value=writing.decode_tokens_per_s))

    def publish_serving(self, name: str, serving: Serving) -> None:
        """Send the figures of a model in vLLM as metrics."""
        for timing in serving.timings:
            at = f"{name}.vllm"
            self.emit(Metric(name=f"{at}.tokens_per_s.{timing.requests}", value=timing.tokens_per_s))
            self.emit(Metric(name=f"{at}.first_token_p50_ms.{timing.requests}", value=timing.first_p50_ms))
            self.emit(Metric(name=f"{at}.token_p50_ms.{timing.requests}", value=timing.token_p50_ms))

    def publish_pass(self, record: PassRecord, index: int) -> PassRecord:
        """Send a pass's warnings, metrics and span. index: of the pass in the recipe.

        Returns the pass's record. If another package provides the pass, the record gets that package's name and version.
        """
        name = self.recipe.passes[index].name
        provider = self.spec.packages.get(name)
        if provider is not None:
            package = {"package": provider.package, "package_version": provider.version}
            record = record.model_copy(update={"index": index, "name": name, **package})
        for text in record.warnings:
            self.warn(text)
        for step, layer in enumerate(record.layers):
            self.emit(Metric(name=f"{record.name}.relative_error", value=layer.relative_error, step=step))
        ended_ns = time.time_ns()
        began_ns = ended_ns - int(record.seconds * 1e9)
        self.emit(Span(name=f"pass {record.name}", started_ns=began_ns, ended_ns=ended_ns))
        self.log(f"{record.name}: {len(record.layers)} layers in {record.seconds:.1f} s")
        return record


@contextlib.contextmanager
def naming_the_package(options: PassOptions) -> Iterator[None]:
    """Name the package in an unexpected error of a pass that another package provides. Raises NightpressError(internal)."""
    try:
        yield
    except (NightpressError, MemoryError, torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        provider = catalog.provider_of(options.name)
        if provider is None:
            raise
        raise NightpressError(
            ErrorCode.INTERNAL,
            f"The pass `{options.name}` of the package {provider} failed: {type(error).__name__}: {str(error)[:500]}",
            hint="The traceback is in the job's log; report it to the package's authors.",
        ) from error


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
