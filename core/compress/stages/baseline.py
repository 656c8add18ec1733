"""The source as all artifacts are compared with it: its outputs, its figures, and its timed runs.

The outputs are measured first, or an earlier job has measured them. Each job times its source anew. If source and artifact are timed by turns,
those runs are the source's timings, too; otherwise its process is started to be timed alone.

On a GPU whose memory holds it beside the passes, the source's process stays until then, so that the source is loaded once. If an earlier job
has measured the outputs, the process loads while the passes run.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from nightpress.core.compress.environment import free_gpu_memory
from nightpress.core.compress.evaluate import quality, speed
from nightpress.core.compress.evaluate.beside import ConsumerBeside, room_for
from nightpress.core.compress.evaluate.quality import Trial
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import Beside, Consumer, ModelRuns, Observed, consumer_name, run_consumer
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.export.task import Task
from nightpress.core.compress.stages import kept_source
from nightpress.core.compress.stages.job import PressJob, folder_bytes
from nightpress.core.handoff.report import MeasuredOn, Subject
from nightpress.core.handoff.source_outputs import FRESH_FILE, KEPT_FILE
from nightpress.core.processor import processor
from nightpress.core.recipes.costs import CONSUMER_BYTES
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.plan import make_plan

_ROOM = 2.0  #: the GPU's memory that must be free for passes and artifacts beside a source that stays, as a multiple of what is planned


class Baseline:
    """The source of a job. `observed` has its outputs; its timed runs are there after `timed` or `finish`."""

    def __init__(self, job: PressJob, header: ModelHeader, trial: Trial) -> None:
        """Measure the source's outputs, or read those that an earlier job has kept."""
        self._job, self._header, self._trial = job, header, trial
        self.device: Device = job.device_of(None)
        self._beside: ConsumerBeside | None = None
        self._staying: Consumer | None = None  #: the source's process on the GPU, for the artifacts to take turns with
        self._loads = False  #: whether it was not waited for yet
        job.clock.enter("baseline")
        kept = None
        if job.spec.source_measured_by:
            kept = kept_source.read(job.work / KEPT_FILE, trial.source_task)
        self.measured_by = job.spec.source_measured_by if kept is not None else None
        self.observed = kept or self._measure()
        if kept is not None:
            job.log(f"The source's outputs are those that the job {self.measured_by} has measured.")
            if self._may_stay(kept, loaded=False):
                self._staying, self._loads = job.held.enter_context(self._start(trial.task.only_timed)), True
        self._measurements = quality.measurements(trial, self.observed, None)
        self._slices = quality.slices(trial, self.observed, None)
        job.publish(self.subject())

    def _measure(self) -> Observed:
        job, task = self._job, self._trial.source_task
        parts = job.parts_of(None, job.source)
        by_turns = self._may_take_turns(self.device)
        if by_turns and parts == 1:
            with contextlib.ExitStack() as ends:
                consumer = ends.enter_context(self._start(task.only_examples))
                observed = consumer.run()
                if self._may_stay(observed, loaded=True):
                    self._staying = consumer
                    job.held.push(ends.pop_all())
        else:  # the process that runs the examples is also timed, unless another one will be beside the artifacts
            observed = run_consumer(
                safetensors.CONSUMER,
                job.source,
                task.only_examples if by_turns else task,
                name="source",
                scratch=job.scratch,
                device=self.device,
                parts=parts,
                progress=job.clock.span(0.03, 0.3),
            )
        if job.spec.keep_source:
            kept_source.write(job.work / FRESH_FILE, observed, task)
        return observed

    def _start(self, task: Task) -> Consumer:
        """Start the source's process for the artifacts to take turns with, or only to run examples."""
        return Consumer(
            safetensors.CONSUMER,
            self._job.source,
            task,
            name="source",
            scratch=self._job.scratch,
            device=self.device,
            progress=self._job.clock.span(0.03, 0.3),
        )

    def _may_stay(self, seen: Observed, *, loaded: bool) -> bool:
        """Whether the source's process may stay on the GPU while the passes run, to be timed beside the artifacts.

        seen: has the memory that it takes. loaded: it runs already, so that this memory is not free any more.
        """
        job, timed = self._job, self._trial.task
        here = any(job.device_of(export) == "cuda" for export in job.recipe.exports)
        if self.device != "cuda" or not here or not (timed.shapes or timed.writings):
            return False
        if seen.peak_memory is None or seen.peak_gpu is None:
            return False
        planned = make_plan(job.recipe.model_copy(update={"device": "gpu"}), self._header).estimate
        assert planned is not None
        running, to_come = (seen.peak_memory, 0) if loaded else (0, seen.peak_memory)
        if (0 if loaded else seen.peak_gpu) + _ROOM * planned.gpu_bytes > free_gpu_memory():
            return False
        return room_for(planned.memory_bytes + to_come, running, job.spec.memory_limit)

    def subject(self) -> Subject:
        """The source's figures: of quality from the start, of speed once it is timed."""
        observed, task = self.observed, self._trial.task
        return Subject(
            name="source",
            format="safetensors",
            size_bytes=folder_bytes(self._job.brought),
            parameters=self._header.parameters,
            measurements=self._measurements,
            slices=self._slices,
            timings=speed.timings(observed, task),
            generation=speed.generation_timings(observed, task.threads),
            measurements_by=self.measured_by,
            measured_on=measured_on(observed),
            peak_memory_bytes=observed.peak_memory,
            peak_gpu_bytes=observed.peak_gpu,
        )

    def timed(self) -> Observed:
        """The source with all its timed runs. What no artifact took turns with is timed now, alone."""
        missing = self._missing()
        if missing.shapes or missing.writings:
            self._job.clock.enter("baseline")
            alone = run_consumer(
                safetensors.CONSUMER,
                self._job.source,
                missing,
                name="source",
                scratch=self._job.scratch,
                device=self.device,
                stem="source-timed",
                progress=lambda _fraction, what: self._job.clock.at(0.0, f"the source: {what}"),
            )
            self._add(alone)
        return self.observed

    def _missing(self) -> Task:
        """The task with only what the source was not timed at."""
        task, seen = self._trial.task.only_timed, self.observed
        return replace(
            task, shapes=() if seen.timings else task.shapes, writings=() if seen.writings else task.writings
        )

    def _add(self, runs: Observed | ModelRuns) -> None:
        seen = self.observed
        self.observed = replace(
            seen,
            timings=seen.timings or runs.timings,
            writings=seen.writings or runs.writings,
            peak_memory=_larger(seen.peak_memory, runs.peak_memory),
            peak_gpu=_larger(seen.peak_gpu, runs.peak_gpu),
        )

    def took_turns(self, artifact: Observed, device: Device) -> None:
        """Take the source's runs beside an artifact as its timings, if they are the first ones on the source's device."""
        if artifact.beside is not None and device == self.device:
            self._add(artifact.beside)

    def finish(self) -> Subject:
        """The source's figures, with its timings."""
        self.timed()
        subject = self.subject()
        self._job.publish_speed(subject)
        return subject

    def _may_take_turns(self, device: Device) -> bool:
        return self._trial.by_turns or device == "cuda"

    @contextlib.contextmanager
    def beside(self, device: Device) -> Iterator[Beside]:
        """Yields the function that loads the source on this device, to take turns with an artifact there, if memory holds both."""
        job, seen = self._job, self.observed
        if self._staying is not None and device == self.device:
            yield lambda _peak: self._stayed()
            job.held.close()
            self._staying = None
            return
        if device != self.device:  # the source was measured on the GPU: what it takes on the processor is estimated
            seen = replace(seen, peak_memory=CONSUMER_BYTES + 4 * self._header.parameters, peak_gpu=None)
        with ConsumerBeside(
            safetensors.CONSUMER,
            job.source,
            self._trial.task,
            seen.peak_memory,
            peak_gpu=seen.peak_gpu,
            name="source",
            scratch=job.scratch,
            limit=job.spec.memory_limit,
            device=device,
            progress=lambda _fraction, what: job.clock.at(0.0, f"the source beside it: {what}"),
        ) as source:
            self._beside = source
            yield source.open if self._may_take_turns(device) else lambda _peak: None
        self._beside = None

    def _stayed(self) -> Consumer:
        """The process that has stayed, with the source loaded."""
        assert self._staying is not None
        if self._loads:
            self._staying.run()
            self._loads = False
        return self._staying

    @property
    def held_beside(self) -> int:
        """Bytes of the source's process beside the artifacts; 0 if there is none."""
        if self._staying is not None:
            return self._staying.peak_memory or 0
        return 0 if self._beside is None else self._beside.held


def measured_on(observed: Observed) -> MeasuredOn:
    loaded = observed.loaded_as
    return MeasuredOn(
        device=loaded["device"],
        name=loaded.get("name") or processor(),
        dtype=loaded.get("dtype", ""),
        consumer=consumer_name(observed.versions),
        dispatched=loaded.get("dispatched", False),
    )


def _larger(a: int | None, b: int | None) -> int | None:
    return max(a or 0, b or 0) or None
