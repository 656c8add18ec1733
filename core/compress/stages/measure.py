"""The stage that measures: first the source, before anything is pressed; then each artifact, loaded by its consumer in a fresh process."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from nightpress.core.compress import environment
from nightpress.core.compress.evaluate import quality, speed
from nightpress.core.compress.evaluate.beside import ConsumerBeside
from nightpress.core.compress.evaluate.remarks import remarks, times
from nightpress.core.compress.export import gguf
from nightpress.core.compress.export.consumer import Beside, Consumer, Observed, run_consumer
from nightpress.core.compress.export.probes import PROBED_FORMATS, compare, probed_layers
from nightpress.core.compress.export.program import usage_program
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.export.vllm import interpreter
from nightpress.core.compress.passes.registry import ModelPair, measure_pass_of
from nightpress.core.compress.runners.measure import LOADING
from nightpress.core.compress.stages.baseline import measured_on
from nightpress.core.compress.stages.clock import Report, parts
from nightpress.core.compress.stages.job import PressJob, folder_bytes, naming_the_package
from nightpress.core.compress.stages.state import Exported, State
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Subject, Timing
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.measuring import uncompressed_bytes
from nightpress.core.recipes.passes import ShapeToSpeed
from nightpress.core.recipes.passes.shape import FORMATS
from nightpress.core.recipes.plan import stored

SERVED_FROM = 0.9  #: the part of the job that is done when vLLM serves; without vLLM, the measuring lasts until 0.98


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
            with state.baseline.beside(device) as beside:
                for artifact in artifacts:
                    name = artifact.export.name
                    measured[name] = _measure(job, state, artifact, *spans[name], beside)
                    job.publish(measured[name])
    state.source = state.baseline.finish()
    for artifact in state.exported:
        subject = measured[artifact.export.name]
        noted = (*subject.notes, *remarks(subject, state.source))
        state.artifacts.append(subject.model_copy(update={"notes": noted}))
    _look(job, state)


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
    baseline = state.baseline
    job.clock.at(start, f"loading {name} in a fresh process")
    pressed = state.pressed(artifact.export)
    packed = probed_layers(pressed) if artifact.export.format in PROBED_FORMATS else {}
    with _uncompressed_beside(job, state, artifact) as uncompressed:
        observed = run_consumer(
            artifact.runner,
            artifact.folder,
            task,
            name=name,
            scratch=job.scratch,
            device=device,
            parts=job.parts_of(artifact.export, artifact.folder),
            reference=baseline.observed.outputs_file,
            probes=packed,
            renumber=state.renumber_file(job.scratch),
            beside=beside,
            uncompressed=uncompressed,
            progress=_evaluating(job, start, end, name),
        )
    state.versions |= observed.versions
    of_tokens: tuple[str, ...] = ()
    if artifact.export.format == "gguf":
        of_tokens = gguf.check_tokens(job.source, artifact.folder, name=name, scratch=job.scratch)
    probes = compare(pressed, observed.outputs, observed.loaded_as.get("dtype", "")) if packed else None
    if artifact.export.format == "gguf":
        compared = gguf.compare_layers(pressed, artifact.folder, state.header)
        probes = compared if compared.layers else None
    verification = verify(
        job.recipe,
        artifact.export,
        _by_own_ids(state, observed),
        source=baseline.observed,
        traced=state.traced.get(artifact.export.speed),
        task=replace(task, sets=(replace(task.sets[0], sequences=state.check), *task.sets[1:])),
        probes=probes,
    )
    baseline.took_turns(observed, device)
    timed_source = baseline.timed() if observed.beside is None and device == baseline.device else None
    timings = speed.timings(observed, task, timed_source)
    return Subject(
        name=name,
        format=name,
        size_bytes=folder_bytes(artifact.folder),
        parameters=state.parameters(artifact.export),
        measurements=quality.measurements(state.trial, baseline.observed, observed),
        slices=quality.slices(state.trial, baseline.observed, observed),
        timings=timings,
        generation=speed.generation_timings(observed, task.threads, timed_source),
        measured_on=measured_on(observed),
        peak_memory_bytes=observed.peak_memory,
        peak_gpu_bytes=observed.peak_gpu,
        verification=verification,
        usage=usage_program(artifact.export.format, artifact.folder, state.header),
        notes=(*of_tokens, *_estimated(state, artifact.export, timings)),
    )


def _estimated(state: State, export: Export, timings: Sequence[Timing]) -> Iterator[str]:
    """Say what `shape-to-speed` estimated of an artifact's speed, beside what was measured."""
    for record in state.records:
        told = record.summary
        if record.name != ShapeToSpeed.model_fields["pass_"].default or FORMATS[told["runtime"]] != export.format:
            continue
        stage = next((stage for stage in told["stages"] if stage["speed"] == export.speed), told["stages"][-1])
        shape = f"{told['batch']} × {told['length']} tokens"
        text = f"Estimated by the table of {record.name}: {stage['estimated_speed']:.2f}× the uncompressed model in this runtime at {shape} ({stage['estimated_ms']:.2f} ms)"
        same = next(
            (timing for timing in timings if (timing.batch, timing.length) == (told["batch"], told["length"])), None
        )
        if same is None or same.over_uncompressed is None:
            yield f"{text}. It was not measured at this shape: name it in a `latency` of `evaluate`."
        else:
            yield f"{text}; measured: {times(same.over_uncompressed)} ({same.p50_ms:.2f} ms)."


def _by_own_ids(state: State, observed: Observed) -> Observed:
    """The outputs for the check texts as the pressed model itself gives them: logits over its own tokens alone."""
    values = observed.outputs["check.values"]
    if (
        state.renumbering is None
        or state.trial.task.sets[0].kind not in {"last", "steps"}
        or state.header.task == "token-classification"
    ):
        return observed
    return replace(observed, outputs={**observed.outputs, "check.values": values[..., state.renumbering.kept]})


@contextlib.contextmanager
def _uncompressed_beside(job: PressJob, state: State, artifact: Exported) -> Iterator[Beside]:
    """Yields the function that loads the uncompressed model in the artifact's runtime, if it is timed and memory holds it, too."""
    plain = state.uncompressed.get(artifact.export.format)
    if plain is None:
        yield lambda _peak: None
        return
    with ConsumerBeside(
        plain.runner,
        plain.folder,
        state.trial.task,
        uncompressed_bytes(state.source_header, plain.export),
        name=f"uncompressed-{plain.export.name}",
        scratch=job.scratch,
        limit=job.spec.memory_limit,
        others=lambda: state.baseline.held_beside,
        progress=lambda _fraction, what: job.clock.at(0.0, f"the uncompressed model beside it: {what}"),
    ) as consumer:

        def start(artifact_peak: int | None) -> Consumer | None:
            try:
                return consumer.open(artifact_peak)
            except NightpressError as error:
                if error.code is ErrorCode.DISK_FULL:
                    raise
                state.notes.append(f"The uncompressed model can't be timed as {plain.export.name}: {error}")
                job.warn(state.notes[-1])
                return None

        yield start


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
