"""One job from end to end, in a folder: validate, measure the source, press, export, verify, evaluate, report.

`run` needs only its folder: no service, no database, no network. A worker's child and `nightpress press` both call it.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Literal

import transformers.modeling_utils  # noqa: F401 - each job loads a model with it; imported here, a spare child has it in advance

from nightpress.core.compress import environment, report
from nightpress.core.compress.data.tokenized import BUILTIN_LICENSE, builtin_digest
from nightpress.core.compress.evaluate import gates, quality
from nightpress.core.compress.evaluate.finite import check_weights
from nightpress.core.compress.export import nursery
from nightpress.core.compress.export.consumer_environment import runner_environment, variables_as_now
from nightpress.core.compress.lineage import read_lineage
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.stages import folder, graph, measure, screen, serve, source
from nightpress.core.compress.stages.baseline import Baseline
from nightpress.core.compress.stages.clock import Emit
from nightpress.core.compress.stages.job import PressJob
from nightpress.core.compress.stages.state import State
from nightpress.core.handoff.manifest import MANIFEST_FILE, ArtifactEntry, Manifest, describe_file, describe_folder
from nightpress.core.handoff.report import DataUsed, Report, Subject, Verification, same_device
from nightpress.core.handoff.spec import OUT_DIR
from nightpress.core.recipes.calibration import BUILTIN_DATA, MIXTURE, PROSE, SLICES
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Quality
from nightpress.core.recipes.plan import make_plan

#: The stages in their order. A pass runs in the stage that its options name. Passes of the stage `runtime` run when a graph is exported.
#: A screening that finds that a gate is surely missed ends them.
STAGES = (folder.run, screen.run, graph.run, measure.run, serve.run)


def run(job_dir: Path, emit: Emit) -> Manifest:
    """Press the model in `job_dir/source` as `job_dir/spec.json` says, into `job_dir/out`.

    The manifest is written last. Raises NightpressError; then nothing is left in `out`.
    """
    out = job_dir / OUT_DIR
    try:
        with disk_errors(), variables_as_now():
            _empty(out)
            job = PressJob(job_dir, emit)
            try:
                return _press(job)
            finally:
                job.close()
    except BaseException:
        with contextlib.suppress(OSError):
            _empty(out)
        raise


def _press(job: PressJob) -> Manifest:
    shutil.rmtree(job.scratch, ignore_errors=True)
    state = _begin(job)
    for stage in STAGES:
        stage(job, state)
        if state.screening is not None:
            break
    manifest = _conclude(job, state)
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.clock.at(1.0, manifest.verdict)
    return manifest


def _empty(folder: Path) -> None:
    """Delete everything in the folder, but not the folder itself: a confined child may write only inside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _begin(job: PressJob) -> State:
    """Validate the model, read the data, and measure the source."""
    job.clock.at(0.0, "checking the model's files")
    if (device := job.device_of(None)) == "cuda":
        job.scratch.mkdir(parents=True, exist_ok=True)
        nursery.begin(runner_environment(device, job.spec.threads, job.scratch))
        environment.wake_gpu()
    header = inspect_model(FolderFiles(job.source))
    for warning in make_plan(job.recipe, header).warnings:
        job.warn(warning)
    job.log(f"{header.architecture}, {header.parameters:,} parameters, {job.spec.threads} threads")
    header, records = source.run(job, header)
    check_weights(job.source, job.spec.threads)
    job.clock.at(0.02, "reading the data")
    trial = quality.prepare(job.recipe, header, job.source, job.data_files, threads=job.spec.threads)
    baseline = Baseline(job, header, trial)
    return State(header, trial, baseline, baseline.subject(), folder=job.source, header=header, records=records)


def _conclude(job: PressJob, state: State) -> Manifest:
    """Decide the gates, write the report, and then the manifest."""
    entries = _entries(state)
    digests = {entry.format: entry.digest for entry in entries}
    artifacts = tuple(artifact.model_copy(update={"digest": digests[artifact.name]}) for artifact in state.artifacts)
    found = gates.decide(job.recipe, state.source, artifacts)
    job.clock.at(0.98, "writing the report")
    job.clock.enter("evaluating")
    packages = {package.package: package.version for package in job.spec.packages.values()}
    versions = state.baseline.observed.versions | state.versions | packages
    whole = Report(
        job_id=job.spec.job_id,
        model=_describe_model(job, state),
        recipe=job.recipe.model_dump(mode="json"),
        data=_data_used(job, state),
        environment=environment.describe(job.spec, versions),
        source=state.source,
        artifacts=artifacts,
        passes=tuple(state.records),
        gates=found,
        verdict="accepted" if state.screening is None and all(result.passed for result in found) else "rejected",
        screening=state.screening,
        phases={phase: round(seconds, 3) for phase, seconds in job.clock.seconds.items()},
        notes=_notes(job, state),
        profiles=tuple(state.profiles),
    )
    return _write(job, whole, entries)


def _entries(state: State) -> tuple[ArtifactEntry, ...]:
    consumers = {
        artifact.name: found.consumer for artifact in state.artifacts if (found := _proof(artifact)) is not None
    }
    return tuple(
        ArtifactEntry(
            format=artifact.export.name,
            path=artifact.export.name,
            files=describe_folder(artifact.folder),
            consumer=consumers[artifact.export.name],
        )
        for artifact in state.exported
    )


def _proof(artifact: Subject) -> Verification | None:
    """The verification by the consumer that the artifact is made for: vLLM's if it was run, else that of the library that measured it."""
    served = artifact.serving.verification if artifact.serving else None
    return served or artifact.verification


def _write(job: PressJob, whole: Report, entries: tuple[ArtifactEntry, ...]) -> Manifest:
    """Write the report as JSON, Markdown and HTML, and the manifest last."""
    drawn = report.draw(whole)
    for name, content in drawn.items():
        write_file(job.out / name, content)
    manifest = Manifest(
        job_id=job.spec.job_id,
        attempt=job.spec.attempt,
        verdict=whole.verdict,
        artifacts=entries,
        report=tuple(describe_file(job.out, job.out / name) for name in drawn),
    )
    write_file(job.out / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def _describe_model(job: PressJob, state: State) -> dict[str, object]:
    header = state.source_header
    return {
        "name": job.spec.model_name,
        "digest": job.spec.model_digest,
        "architecture": header.architecture,
        "model_type": header.model_type,
        "task": header.task,
        "parameters": header.parameters,
        "size_bytes": state.source.size_bytes,
        **({} if job.adapter is None else {"adapter": job.adapter}),
        **read_lineage(job.source),
    }


def _data_used(job: PressJob, state: State) -> tuple[DataUsed, ...]:
    measured = {evaluation.data for evaluation in job.recipe.evaluate if isinstance(evaluation, Quality)}
    if SLICES in measured:
        measured |= BUILTIN_DATA
    seen = {ref for options in job.recipe.passes for ref in options.data_refs()}
    if any(options.wants == "calibration" for options in job.recipe.passes):
        data = job.recipe.calibration.data
        if data == MIXTURE:
            seen |= BUILTIN_DATA if state.source_header.task == "causal-lm" else {PROSE}
        else:
            seen.add(data)
    purposes: dict[Literal["evaluation", "calibration"], set[str]] = {"evaluation": measured, "calibration": seen}
    return (
        *(DataUsed(ref=ref, sha256=describe_file(job.data, file).sha256) for ref, file in job.data_files.items()),
        *(
            DataUsed(ref=ref, sha256=builtin_digest(ref, purpose), license=BUILTIN_LICENSE, purpose=purpose)
            for purpose, refs in purposes.items()
            for ref in sorted(refs & BUILTIN_DATA)
        ),
    )


def _notes(job: PressJob, state: State) -> tuple[str, ...]:
    header = state.source_header
    screened = [] if state.screening is None else [state.screening.reason]
    notes = [
        *screened,
        *make_plan(job.recipe, header).warnings,
        *state.notes,
        *(text for record in state.records for text in record.warnings),
    ]
    source_dtypes = {tensor.dtype for tensor in header.tensors} - {"F32", "I64"} if header.brought is None else set()
    place = state.source.measured_on
    if source_dtypes and (place is None or place.device == "cpu"):
        kinds = ", ".join(sorted(source_dtypes))
        notes.append(f"The source is stored as {kinds} and was measured in fp32, as were the artifacts' float parts.")
    if state.source.measurements_by is not None:
        notes.append(
            f"The source's outputs, and so its figures of quality, are those that the job {state.source.measurements_by} measured: with the same model, data, kind of device and versions. Its speed was measured again by this job."
        )
    elsewhere = [artifact.name for artifact in state.artifacts if not same_device(artifact, state.source)]
    if elsewhere and place is not None:
        notes.append(
            f"The source's outputs are from {place.name} in {place.dtype}. These run on the processor and were measured there: {', '.join(elsewhere)}."
        )
    return tuple(notes)
