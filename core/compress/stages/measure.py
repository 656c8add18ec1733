"""The stage that measures: first the source, before anything is pressed; then each artifact, loaded by its consumer in a fresh process."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from nightpress.core.compress import environment
from nightpress.core.compress.evaluate import quality, speed
from nightpress.core.compress.evaluate.beside import SourceBeside
from nightpress.core.compress.evaluate.quality import Trial
from nightpress.core.compress.evaluate.remarks import remarks
from nightpress.core.compress.export import gguf, safetensors
from nightpress.core.compress.export.consumer import Consumer, Device, Observed, consumer_name, run_consumer
from nightpress.core.compress.export.probes import compare, probed_layers
from nightpress.core.compress.export.program import usage_program
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.export.vllm import interpreter
from nightpress.core.compress.passes.registry import ModelPair, measure_pass_of
from nightpress.core.compress.runners.measure import LOADING
from nightpress.core.compress.stages.clock import Report, parts
from nightpress.core.compress.stages.job import Exported, PressJob, State, folder_bytes, naming_the_package
from nightpress.core.handoff.report import MeasuredOn, Subject
from nightpress.core.recipes.costs import CONSUMER_BYTES
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.plan import stored

SERVED_FROM = 0.9  #: the part of the job that is done when vLLM serves; without vLLM, the measuring lasts until 0.98
#: Peak memory of an artifact's process → the source's consumer, or None.
Beside = Callable[[int | None], Consumer | None]


def measure_source(job: PressJob, header: ModelHeader, trial: Trial) -> tuple[Subject, Observed]:
    """The source's figures and outputs. All artifacts are compared with them."""
    job.clock.enter("baseline")
    observed = run_consumer(
        safetensors.CONSUMER,
        job.source,
        trial.task,
        name="source",
        scratch=job.scratch,
        device=job.device_of(None),
        progress=job.clock.span(0.03, 0.3),
    )
    subject = Subject(
        name="source",
        format="safetensors",
        size_bytes=folder_bytes(job.source),
        parameters=header.parameters,
        measurements=quality.measurements(trial, observed, None),
        timings=speed.timings(observed, trial.task),
        generation=speed.generation_timings(observed, trial.task.threads),
        measured_on=measured_on(observed),
        peak_memory_bytes=observed.peak_memory,
        peak_gpu_bytes=observed.peak_gpu,
    )
    job.publish(subject)
    return subject, observed


def run(job: PressJob, state: State) -> None:
    """Verify and measure each artifact, and run the passes of the stage `measure`."""
    if job.spec.device == "cuda":
        environment.give_back_gpu_memory()
    end = SERVED_FROM if interpreter() is not None else 0.98
    spans = dict(
        zip((artifact.export.name for artifact in state.exported), parts(0.7, end, len(state.exported)), strict=True)
    )
    measured: dict[str, Subject] = {}
    for device in ("cuda", "cpu"):
        artifacts = [artifact for artifact in state.exported if job.device_of(artifact.export) == device]
        if artifacts:
            with _source_beside(job, state, device) as beside:
                for artifact in artifacts:
                    name = artifact.export.name
                    measured[name] = _measure(job, state, artifact, *spans[name], beside)
                    job.publish(measured[name])
    state.artifacts += [measured[artifact.export.name] for artifact in state.exported]
    _look(job, state)


@contextlib.contextmanager
def _source_beside(job: PressJob, state: State, device: Device) -> Iterator[Beside]:
    """Yields the function that loads the source on this device, to take turns with an artifact there, if memory holds both."""
    seen = state.observed
    if device != job.device_of(None):  # the source was measured on the GPU: what it takes on the processor is estimated
        seen = replace(seen, peak_memory=CONSUMER_BYTES + 4 * state.source_header.parameters, peak_gpu=None)
    with SourceBeside(
        safetensors.CONSUMER,
        job.source,
        state.trial.task,
        seen,
        scratch=job.scratch,
        limit=job.spec.memory_limit,
        device=device,
        progress=lambda _fraction, what: job.clock.at(0.0, f"the source beside it: {what}"),
    ) as source:
        yield source.open if state.trial.by_turns or device == "cuda" else lambda _peak: None


def measured_on(observed: Observed) -> MeasuredOn:
    loaded = observed.loaded_as
    return MeasuredOn(
        device=loaded["device"],
        name=loaded.get("name") or environment.processor(),
        dtype=loaded.get("dtype", ""),
        consumer=consumer_name(observed.versions),
        dispatched=loaded.get("dispatched", False),
    )


def _measure(
    job: PressJob,
    state: State,
    artifact: Exported,
    start: float,
    end: float,
    beside: Beside,
) -> Subject:
    """Load one artifact, verify its outputs, and measure it."""
    job.clock.enter("verifying")
    name, task, device = artifact.export.name, state.trial.task, job.device_of(artifact.export)
    job.clock.at(start, f"loading {name} in a fresh process")
    packed = probed_layers(state.folder) if artifact.export.format == "compressed-tensors" else []
    observed = run_consumer(
        artifact.runner,
        artifact.folder,
        task,
        name=name,
        scratch=job.scratch,
        device=device,
        reference=state.observed.outputs_file,
        probes=packed,
        beside=beside,
        progress=_evaluating(job, start, end, name),
    )
    state.versions |= observed.versions
    of_tokens: tuple[str, ...] = ()
    if artifact.export.format == "gguf":
        of_tokens = gguf.check_tokens(job.source, artifact.folder, name=name, scratch=job.scratch)
    probes = compare(state.folder, observed.outputs, observed.loaded_as["dtype"]) if packed else None
    verification = verify(
        job.recipe, artifact.export, observed, source=state.observed, traced=state.traced, task=task, probes=probes
    )
    timed_source = state.observed if device == job.device_of(None) else None
    subject = Subject(
        name=name,
        format=name,
        size_bytes=folder_bytes(artifact.folder),
        parameters=state.header.parameters,
        measurements=quality.measurements(state.trial, state.observed, observed),
        timings=speed.timings(observed, task, timed_source),
        generation=speed.generation_timings(observed, task.threads, timed_source),
        measured_on=measured_on(observed),
        peak_memory_bytes=observed.peak_memory,
        peak_gpu_bytes=observed.peak_gpu,
        verification=verification,
        usage=usage_program(artifact.export.format, artifact.folder, state.header),
    )
    return subject.model_copy(update={"notes": (*of_tokens, *remarks(subject, state.source))})


def _evaluating(job: PressJob, start: float, end: float, name: str) -> Report:
    """A progress function that enters the phase `evaluating` after the verification's set, which the runner does first."""
    span = job.clock.span(start, end)

    def progress(fraction: float, what: str) -> None:
        if what != "check" and not what.startswith(LOADING):
            job.clock.enter("evaluating")
        span(fraction, f"{name}: {what}")

    return progress


def _look(job: PressJob, state: State) -> None:
    """Run the passes of the stage `measure`: they read the source and the pressed model, and change nothing."""
    models = ModelPair(
        source=job.source,
        source_header=state.source_header,
        pressed=state.folder,
        pressed_header=stored(job.recipe, state.header),
    )
    for index, options in enumerate(job.recipe.passes):
        if options.stage == "measure":
            with naming_the_package(options):
                context = job.context(state.source_header, job.clock.span(0.98, 0.98, pass_index=index), index=index)
                found = measure_pass_of(options)(models, options, context)
            state.profiles += found.profiles
            if found.record is not None:
                state.records.append(job.publish_pass(found.record, index))
