"""One job from end to end, in a folder: validate, measure the source, press, export, verify, evaluate, report.

`run` needs nothing but its folder: no service, no database, no network. It is what a worker's child calls and what
`nightpress press` calls.
"""

import contextlib
import dataclasses
import gc
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from nightpress.core.compress import environment, report
from nightpress.core.compress.data.tokenized import BUILTIN_LICENSE, builtin_digest
from nightpress.core.compress.evaluate import gates, quality, speed
from nightpress.core.compress.evaluate.beside import SourceBeside
from nightpress.core.compress.evaluate.finite import check_weights
from nightpress.core.compress.evaluate.quality import Trial
from nightpress.core.compress.evaluate.remarks import remarks
from nightpress.core.compress.evaluate.roofline import device_of
from nightpress.core.compress.export import compressed_tensors, gguf, onnx, openvino, safetensors, transformersjs
from nightpress.core.compress.export.consumer import Consumer, Observed, run_consumer
from nightpress.core.compress.export.early_exit import trace_exits
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.lineage import read_lineage
from nightpress.core.compress.memory import return_freed_memory
from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.compress.passes.static_int8 import static_int8
from nightpress.core.handoff.checkpoints import FinishedPass, pass_folder, pass_record, prefix_digests
from nightpress.core.handoff.frames import Checkpoint, Frame, Log, Metric, Phase, Progress, Span
from nightpress.core.handoff.manifest import MANIFEST_FILE, ArtifactEntry, Manifest, describe_file, describe_folder
from nightpress.core.handoff.report import DataUsed, PassRecord, Report, Subject
from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR, WORK_DIR, JobSpec
from nightpress.core.recipes.calibration import BUILTIN_DATA
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Quality
from nightpress.core.recipes.passes import DynamicInt8, EarlyExit, Profiling, StaticInt8
from nightpress.core.recipes.plan import make_plan, stored
from nightpress.core.recipes.profile import Profile, profile_of

Emit = Callable[[Frame], None]

_GRAPHS = {"onnx": onnx, "openvino": openvino, "transformers.js": transformersjs}
_FOLDERS = {"safetensors": safetensors, "compressed-tensors": compressed_tensors}


def run(job_dir: Path, emit: Emit) -> Manifest:
    """Press the model in `job_dir/source` as `job_dir/spec.json` says, into `job_dir/out`.

    The manifest is written last. Raises NightpressError; then nothing is left in `out`.
    """
    out = job_dir / OUT_DIR
    try:
        with disk_errors():
            _empty(out)
            press = _Press(job_dir, emit)
            try:
                return press.run()
            finally:
                press.clock.close()
    except BaseException:
        with contextlib.suppress(OSError):
            _empty(out)
        raise


def _empty(folder: Path) -> None:
    """Leave the folder and nothing in it. It stays the same folder: a confined child may write in it, not beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _let_go_of_graphs() -> None:
    """Libraries' graphs point at themselves in rings, which wait for the collector with several times the model's weights in them."""
    gc.collect()
    return_freed_memory()


class _Clock:
    """Says where the job is: phases, their seconds and spans, and a fraction that never falls."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._started = self._phase_started = time.monotonic()
        self._phase_started_ns = time.time_ns()
        self._phase: Phase = "validating"
        self._fraction = 0.0
        self.seconds: dict[str, float] = {}

    def enter(self, phase: Phase) -> None:
        now = time.monotonic()
        with self._lock:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._phase_started
            self._phase_started = now
            if phase == self._phase:
                return
            self.close()
            self._phase, self._phase_started_ns = phase, time.time_ns()

    def close(self) -> None:
        """Say when the phase began and that it is over."""
        self._emit(Span(name=self._phase, started_ns=self._phase_started_ns, ended_ns=time.time_ns()))

    def at(self, fraction: float, message: str, *, pass_index: int | None = None) -> None:
        with self._lock:
            self._fraction = max(self._fraction, min(fraction, 1.0))
            spent = time.monotonic() - self._started
            eta = spent * (1 - self._fraction) / self._fraction if self._fraction > 0.05 else None
            frame = Progress(
                phase=self._phase, fraction=self._fraction, pass_index=pass_index, message=message[:300], eta_s=eta
            )
        self._emit(frame)

    def span(self, start: float, end: float, *, pass_index: int | None = None) -> Callable[[float, str], None]:
        """A progress function for a part of the job."""
        return lambda fraction, message: self.at(
            start + (end - start) * min(max(fraction, 0.0), 1.0), message, pass_index=pass_index
        )


@dataclasses.dataclass(frozen=True)
class _Exported:
    export: Export
    folder: Path
    runner: Path


class _Press:
    """The steps of one job and what they hand on."""

    def __init__(self, job_dir: Path, emit: Emit) -> None:
        self.job_dir, self.emit = job_dir, emit
        self.spec = JobSpec.load(job_dir)
        self.recipe = self.spec.recipe
        self.source, self.work, self.out = job_dir / SOURCE_DIR, job_dir / WORK_DIR, job_dir / OUT_DIR
        self.clock = _Clock(emit)
        self._digests = prefix_digests(
            self.recipe,
            tenant_id="",
            model_digest=self.spec.model_digest,
            data={},
            device=self.spec.device,
            engine=environment.version_of("nightpress"),
        )
        self.records: list[PassRecord] = []
        self.traced: tracing.Traced | None = None

    def run(self) -> Manifest:
        header, trial = self._validate()
        scratch = self.work / "measured"
        shutil.rmtree(scratch, ignore_errors=True)
        source, observed = self._baseline(header, trial, scratch)
        model_dir, model_header = self._press(header)
        exported = self._export(model_dir, model_header, trial)
        artifacts, versions = self._measure(exported, model_header.parameters, trial, source, observed, scratch)
        entries = self._entries(exported, artifacts)
        digests = {one.format: one.digest for one in entries}
        artifacts = [one.model_copy(update={"digest": digests[one.name]}) for one in artifacts]
        found = gates.decide(self.recipe, source, tuple(artifacts))
        self.clock.at(0.98, "writing the report")
        self.clock.enter("evaluating")
        whole = Report(
            job_id=self.spec.job_id,
            model=self._describe_model(header, source),
            recipe=self.recipe.model_dump(mode="json"),
            data=self._data_used(),
            environment=environment.describe(self.spec, observed.versions | versions),
            source=source,
            artifacts=tuple(artifacts),
            passes=tuple(self.records),
            gates=found,
            verdict="accepted" if all(one.passed for one in found) else "rejected",
            phases={phase: round(seconds, 3) for phase, seconds in self.clock.seconds.items()},
            notes=self._notes(header),
            profiles=self._profiles(header, model_header),
        )
        manifest = self._write(whole, entries)
        shutil.rmtree(scratch, ignore_errors=True)
        self.clock.at(1.0, f"{whole.verdict}")
        return manifest

    # Steps -------------------------------------------------------------------------------------------------------------

    def _validate(self) -> tuple[ModelHeader, Trial]:
        self.clock.at(0.0, "checking the model's files")
        header = inspect_model(FolderFiles(self.source))
        for warning in make_plan(self.recipe, header).warnings:
            self.emit(Log(level="warning", text=warning))
        self._log(f"{header.architecture}, {header.parameters:,} parameters, {self.spec.threads} threads")
        check_weights(self.source)
        self.clock.at(0.02, "reading the data")
        files = {ref: self.job_dir / DATA_DIR / name for ref, name in self.spec.data.items()}
        return header, quality.prepare(self.recipe, header, self.source, files, threads=self.spec.threads)

    def _baseline(self, header: ModelHeader, trial: Trial, scratch: Path) -> tuple[Subject, Observed]:
        self.clock.enter("baseline")
        observed = run_consumer(
            safetensors.CONSUMER,
            self.source,
            trial.task,
            name="source",
            scratch=scratch,
            progress=self.clock.span(0.03, 0.3),
        )
        subject = Subject(
            name="source",
            format="safetensors",
            size_bytes=_folder_bytes(self.source),
            parameters=header.parameters,
            measurements=quality.measurements(trial, observed, None),
            timings=speed.timings(observed, trial.task),
            generation=speed.generation_timings(observed, trial.task.threads),
            peak_memory_bytes=observed.peak_memory,
        )
        self._publish(subject)
        return subject, observed

    def _press(self, header: ModelHeader) -> tuple[Path, ModelHeader]:
        """The passes that work on a model folder, one after the other, each into a folder below work/."""
        self.clock.enter("pressing")
        steps = [(index, one) for index, one in enumerate(self.recipe.passes) if one.pass_ in MODEL_PASSES]
        folder = self.source
        taken_over = 0
        for done, (index, options) in reversed(list(enumerate(steps))):
            earlier = FinishedPass.load(self.work, index, options.pass_, made_of=self._digests[index])
            if earlier is not None:
                folder, header = self.work / pass_folder(index, options.pass_), earlier.header
                self.records, taken_over = list(earlier.records), done + 1
                self._log(f"pass {index + 1} ({options.pass_}) was done before: going on behind it")
                break
        for done, (index, options) in list(enumerate(steps))[taken_over:]:
            start, end = (0.3 + 0.2 * (done + part) / len(steps) for part in (0, 1))
            span = self.clock.span(start, end, pass_index=index)
            span(0.0, f"pass {index + 1}: {options.pass_}")
            target = self.work / pass_folder(index, options.pass_)
            with environment.gpu_peak(self.spec.device) as peak:
                record = MODEL_PASSES[options.pass_](folder, target, options, self._context(header, span, index=index))
            self._record(record.model_copy(update={"peak_gpu_bytes": peak()}))
            folder = target
            if not options.last:  # a quantized model is no source for anything, and isn't looked at as one
                header = inspect_model(FolderFiles(folder))
            self._finish_pass(index, options.pass_, header)
        return folder, header

    def _finish_pass(self, index: int, name: str, header: ModelHeader) -> None:
        """Say that a pass is done, for other attempts and for other jobs that begin the same way."""
        folder, record = self.work / pass_folder(index, name), self.work / pass_record(index, name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        done = FinishedPass(made_of=self._digests[index], files=sizes, header=header, records=tuple(self.records))
        write_file(record, done.model_dump_json().encode())
        for step, path in enumerate((*files, record)):
            self._checkpoint(index, path.relative_to(self.work).as_posix(), step)

    def _export(self, model_dir: Path, header: ModelHeader, trial: Trial) -> list[_Exported]:
        self.clock.enter("exporting")
        graph_passes = [(at, one) for at, one in enumerate(self.recipe.passes) if isinstance(one, DynamicInt8)]
        exported = []
        for at, export in enumerate(self.recipe.exports):
            start, end = (0.5 + 0.2 * (at + part) / len(self.recipe.exports) for part in (0, 1))
            self.clock.at(start, f"exporting {export.name}")
            folder = self.out / export.name
            if export.format in _GRAPHS:
                if self.traced is None:
                    context = self._context(header, self.clock.span(start, end), index=len(self.recipe.passes))
                    exits = any(isinstance(one, EarlyExit) for one in self.recipe.passes[-1:])
                    trace = trace_exits if exits else tracing.trace
                    self.traced = trace(model_dir, header, trial.task.sets[0].sequences, context)
                    _let_go_of_graphs()
                    for index, options in enumerate(self.recipe.passes):
                        if isinstance(options, StaticInt8):
                            context = self._context(header, self.clock.span(start, end), index=index)
                            self.traced, record = static_int8(model_dir, self.traced, options, context)
                            self._record(record)
                exporter = _GRAPHS[export.format]
                for record in exporter.save(model_dir, folder, self.traced, graph_passes, weights=export.weights):
                    self._record(record)
                _let_go_of_graphs()
                runner = exporter.CONSUMER
            elif export.format == "gguf":
                assert export.weights is not None
                gguf.save(model_dir, folder, header, weights=export.weights, pooling=trial.task.pooling)
                runner = gguf.CONSUMER
            else:
                _FOLDERS[export.format].save(model_dir, folder, header=header)
                runner = _FOLDERS[export.format].CONSUMER
            exported.append(_Exported(export, folder, runner))
        return exported

    def _measure(
        self,
        exported: list[_Exported],
        parameters: int,
        trial: Trial,
        source: Subject,
        reference: Observed,
        scratch: Path,
    ) -> tuple[list[Subject], dict[str, str]]:
        limit = self.spec.memory_limit
        with SourceBeside(
            safetensors.CONSUMER, self.source, trial.task, reference, scratch=scratch, limit=limit
        ) as beside:
            opener = beside.open if trial.by_turns else lambda _peak: None
            return self._measure_each(exported, parameters, trial, source, reference, scratch, opener)

    def _measure_each(
        self,
        exported: list[_Exported],
        parameters: int,
        trial: Trial,
        source: Subject,
        reference: Observed,
        scratch: Path,
        beside: Callable[[int | None], Consumer | None],
    ) -> tuple[list[Subject], dict[str, str]]:
        subjects: list[Subject] = []
        versions: dict[str, str] = {}
        for at, one in enumerate(exported):
            self.clock.enter("verifying")
            start, end = (0.7 + 0.28 * (at + part) / len(exported) for part in (0, 1))
            name = one.export.name
            self.clock.at(start, f"loading {name} in a fresh process")
            observed = run_consumer(
                one.runner,
                one.folder,
                trial.task,
                name=name,
                scratch=scratch,
                reference=reference.outputs_file,
                beside=beside,
                progress=self._evaluating(start, end, name),
            )
            versions |= observed.versions
            of_tokens: tuple[str, ...] = ()
            if one.export.format == "gguf":
                of_tokens = gguf.check_tokens(self.source, one.folder, name=name, scratch=scratch)
            verification = verify(
                self.recipe,
                one.export,
                observed,
                source=reference,
                traced=self.traced,
                task=trial.task,
            )
            subject = Subject(
                name=name,
                format=name,
                size_bytes=_folder_bytes(one.folder),
                parameters=parameters,
                measurements=quality.measurements(trial, reference, observed),
                timings=speed.timings(observed, trial.task, reference),
                generation=speed.generation_timings(observed, trial.task.threads, reference),
                peak_memory_bytes=observed.peak_memory,
                verification=verification,
            )
            subject = subject.model_copy(update={"notes": (*of_tokens, *remarks(subject, source))})
            self._publish(subject)
            subjects.append(subject)
        return subjects, versions

    def _profiles(self, header: ModelHeader, pressed: ModelHeader) -> tuple[Profile, ...]:
        """What the source and the pressed model cost to run, as often as the recipe asks."""
        found: list[Profile] = []
        for options in self.recipe.passes:
            if isinstance(options, Profiling):
                device = device_of(options.device, device=self.spec.device, threads=self.spec.threads)
                found.append(profile_of(header, "source", options.shapes, device))
                found.append(profile_of(stored(self.recipe, pressed), "pressed", options.shapes, device))
        return tuple(found)

    def _evaluating(self, start: float, end: float, name: str) -> Callable[[float, str], None]:
        """The runner does the verification's texts first; what follows is evaluation."""
        span = self.clock.span(start, end)

        def progress(fraction: float, what: str) -> None:
            if what != "check":
                self.clock.enter("evaluating")
            span(fraction, f"{name}: {what}")

        return progress

    def _entries(self, exported: list[_Exported], subjects: list[Subject]) -> tuple[ArtifactEntry, ...]:
        consumers = {one.name: one.verification.consumer for one in subjects if one.verification}
        return tuple(
            ArtifactEntry(
                format=one.export.name,
                path=one.export.name,
                files=describe_folder(one.folder),
                consumer=consumers[one.export.name],
            )
            for one in exported
        )

    def _write(self, whole: Report, entries: tuple[ArtifactEntry, ...]) -> Manifest:
        drawn = report.draw(whole)
        for name, content in drawn.items():
            write_file(self.out / name, content)
        manifest = Manifest(
            job_id=self.spec.job_id,
            attempt=self.spec.attempt,
            verdict=whole.verdict,
            artifacts=entries,
            report=tuple(describe_file(self.out, self.out / name) for name in drawn),
        )
        write_file(self.out / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode() + b"\n")
        return manifest

    # Sayings -----------------------------------------------------------------------------------------------------------

    def _context(self, header: ModelHeader, progress: Callable[[float, str], None], *, index: int) -> PassContext:
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
            data_files={ref: self.job_dir / DATA_DIR / name for ref, name in self.spec.data.items()},
            progress=progress,
            metric=lambda name, value, step: self.emit(Metric(name=name, value=value, step=step)),
            checkpoint=partial(self._checkpoint, index),
        )

    def _checkpoint(self, index: int, path: str, step: int) -> None:
        self.emit(Checkpoint(path=path, step=step, pass_index=index))

    def _log(self, text: str) -> None:
        self.emit(Log(text=text))

    def _record(self, record: PassRecord) -> None:
        self.records.append(record)
        for text in record.warnings:
            self.emit(Log(level="warning", text=text))
        for step, layer in enumerate(record.layers):
            self.emit(Metric(name=f"{record.name}.relative_error", value=layer.relative_error, step=step))
        ended_ns = time.time_ns()
        began_ns = ended_ns - int(record.seconds * 1e9)
        self.emit(Span(name=f"pass {record.name}", started_ns=began_ns, ended_ns=ended_ns))
        self._log(f"{record.name}: {len(record.layers)} layers in {record.seconds:.1f} s")

    def _publish(self, subject: Subject) -> None:
        self.emit(Metric(name=f"{subject.name}.size_bytes", value=subject.size_bytes))
        for one in subject.measurements:
            self.emit(Metric(name=f"{subject.name}.{one.name}", value=one.value))
        for timing in subject.timings:
            self.emit(Metric(name=f"{subject.name}.p50_ms.{timing.batch}x{timing.length}", value=timing.p50_ms))
        for writing in subject.generation:
            name = f"{subject.name}.decode_tokens_per_s.{writing.batch}x{writing.prompt}"
            self.emit(Metric(name=name, value=writing.decode_tokens_per_s))

    def _describe_model(self, header: ModelHeader, source: Subject) -> dict[str, object]:
        return {
            "name": self.spec.model_name,
            "digest": self.spec.model_digest,
            "architecture": header.architecture,
            "model_type": header.model_type,
            "task": header.task,
            "parameters": header.parameters,
            "size_bytes": source.size_bytes,
            **read_lineage(self.source),
        }

    def _data_used(self) -> tuple[DataUsed, ...]:
        folder = self.job_dir / DATA_DIR
        measured = {one.data for one in self.recipe.evaluate if isinstance(one, Quality)}
        seen = {ref for one in self.recipe.passes for ref in one.data_refs()}
        if any(one.wants == "calibration" for one in self.recipe.passes):
            seen.add(self.recipe.calibration.data)
        purposes: dict[Literal["evaluation", "calibration"], set[str]] = {"evaluation": measured, "calibration": seen}
        brought = {ref: describe_file(folder, folder / name).sha256 for ref, name in self.spec.data.items()}
        return (
            *(DataUsed(ref=ref, sha256=sha256) for ref, sha256 in brought.items()),
            *(
                DataUsed(ref=ref, sha256=builtin_digest(purpose), license=BUILTIN_LICENSE, purpose=purpose)
                for purpose, refs in purposes.items()
                for ref in sorted(refs & BUILTIN_DATA)
            ),
        )

    def _notes(self, header: ModelHeader) -> tuple[str, ...]:
        notes = [*make_plan(self.recipe, header).warnings, *(text for one in self.records for text in one.warnings)]
        if source_dtypes := {one.dtype for one in header.tensors} - {"F32", "I64"}:
            kinds = ", ".join(sorted(source_dtypes))
            notes.append(
                f"The source is stored as {kinds} and was measured in fp32, as were the artifacts' float parts."
            )
        return tuple(notes)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
