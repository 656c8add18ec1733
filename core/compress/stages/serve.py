"""The stage that serves: vLLM loads the artifacts that are made for it, answers, and is timed beside the source."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nightpress.core.compress.evaluate import served
from nightpress.core.compress.evaluate.beside import room_for
from nightpress.core.compress.export import vllm
from nightpress.core.compress.export.consumer import Consumer, Observed, timed_rounds
from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.export.task import Task, TimedServing
from nightpress.core.compress.stages.baseline import measured_on
from nightpress.core.compress.stages.clock import parts
from nightpress.core.compress.stages.job import PressJob
from nightpress.core.compress.stages.measure import SERVED_FROM
from nightpress.core.compress.stages.state import Exported, State
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import ServedTiming, Serving, Subject
from nightpress.core.recipes.serving import serves

NOT_RUN = f"vLLM was not run: {vllm.VARIABLE} names no environment with it on the worker."
_OTHER_TOKENS = "vLLM was not run: the artifact has other tokens than the source that it would be compared with."
Rounds = dict[TimedServing, list[dict[str, Any]]]
Tell = Callable[[float, str], None]


def run(job: PressJob, state: State) -> None:
    """Serve each artifact that is for vLLM, or note that vLLM was not run. Raises the errors of verification."""
    chosen = [artifact for artifact in state.exported if serves(job.recipe, artifact.export, state.source_header)]
    if not chosen:
        return
    python = vllm.interpreter()
    if python is None or state.renumbering is not None:
        for artifact in chosen:
            _note(state, artifact, NOT_RUN if python is None else _OTHER_TOKENS)
        return
    task = vllm.make_task(job.recipe, state.source_header, job.source, threads=job.spec.threads)
    with _Source(job, state, task, python) as source:
        for artifact, (start, end) in zip(chosen, parts(SERVED_FROM, 0.98, len(chosen)), strict=True):
            _serve(job, state, artifact, task, python, source, job.clock.span(start, end))
        if (told := source.serving()) is not None:
            state.source = state.source.model_copy(update={"serving": told})
            job.publish_serving("source", told)


def _note(state: State, artifact: Exported, text: str) -> None:
    _update(state, artifact, lambda subject: {"notes": (*subject.notes, text)})


def _update(state: State, artifact: Exported, change: Callable[[Subject], dict[str, Any]]) -> None:
    state.artifacts[:] = [
        subject.model_copy(update=change(subject)) if subject.name == artifact.export.name else subject
        for subject in state.artifacts
    ]


def _open(job: PressJob, folder: Path, task: Task, python: Path, *, name: str, tell: Tell) -> Consumer:
    scratch = job.scratch / "served"
    return vllm.start(folder, task, python, name=name, scratch=scratch, device=_device(job), progress=tell)


def _device(job: PressJob) -> Device:
    return "cuda" if job.spec.device == "cuda" and job.recipe.evaluate_on != "cpu" else "cpu"


def _serve(
    job: PressJob, state: State, artifact: Exported, task: Task, python: Path, source: "_Source", tell: Tell
) -> None:
    """Load one artifact in vLLM, compare its answers, and time it."""
    job.clock.enter("verifying")
    name = artifact.export.name
    tell(0.0, f"loading {name} in vLLM")
    try:
        with _open(job, artifact.folder, task, python, name=name, tell=lambda _share, what: tell(0.2, what)) as ours:
            observed = ours.run()
            job.clock.enter("evaluating")
            beside = source.open(ours.peak_memory) if task.servings else None
            rounds = _rounds(task, [ours] if beside is None else [ours, beside], tell)
            peak_memory, peak_gpu = ours.peak_memory, ours.peak_gpu
    except NightpressError as error:
        if not _has_no_kernel(error) or _device(job) == "cuda":
            raise
        _note(
            state,
            artifact,
            f"vLLM has no kernel for this form on this processor, so it was not verified there. {error.message}",
        )
        return
    job.clock.enter("verifying")
    tell(0.9, f"{name}: the dequantized weights' answers")
    reference = vllm.dequantized_answers(state.folder, task, observed, scratch=job.scratch, device=_device(job))
    found = served.answers(observed.outputs, reference.outputs)
    rounded = vllm.rounds_inputs(artifact.folder, _device(job))
    bound = served.ROUNDED_INPUTS if rounded else served.FLOAT_INPUTS
    verification = served.verify_served(name, found, observed, bound=bound)
    theirs = source.alone() if beside is None else rounds[1]
    source.keep(theirs)
    subject = Serving(
        measured_on=measured_on(observed),
        verification=verification,
        gap=found.gap,
        chosen=found.chosen,
        wrote=observed.wrote,
        timings=_timings(task, rounds[0], theirs, by_turns=beside is not None),
        peak_memory_bytes=peak_memory,
        peak_gpu_bytes=peak_gpu,
    )
    job.publish_serving(name, subject)
    _update(state, artifact, lambda _subject: {"serving": subject})
    state.versions |= {"vllm": observed.versions["vllm"]}


def _has_no_kernel(error: NightpressError) -> bool:
    return error.code is ErrorCode.VERIFICATION_FAILED and any(
        sign in str(error.details.get("stderr", "")) for sign in vllm.NO_KERNEL
    )


def _rounds(task: Task, models: Sequence[Consumer], tell: Tell) -> list[Rounds]:
    """The timed rounds of each model, which take turns."""
    found: list[Rounds] = [{} for _ in models]
    for at, request in enumerate(task.servings):
        share = 0.3 + 0.6 * at / len(task.servings)
        what = f"serving {request.requests} requests"
        tell(share, what)
        for rounds, runs in zip(found, timed_rounds(request, models, lambda _s: tell(share, what)), strict=True):  # noqa: B023
            rounds[request] = runs
    return found


def _timings(task: Task, ours: Rounds, theirs: Rounds | None, *, by_turns: bool) -> tuple[ServedTiming, ...]:
    return tuple(
        served.served_timing(request, ours[request], None if theirs is None else theirs[request], by_turns=by_turns)
        for request in task.servings
    )


class _Source:
    """The source in vLLM, loaded when it is first needed. A context manager that ends its process.

    A source that vLLM can't load leaves the artifacts' times without a comparison: their verification doesn't need it.
    """

    def __init__(self, job: PressJob, state: State, task: Task, python: Path) -> None:
        self._job, self._state, self._python = job, state, python
        self._task = task.only_timed
        self._left = contextlib.ExitStack()
        self._consumer: Consumer | None = None
        self._observed: Observed | None = None
        self._rounds: Rounds | None = None
        self._refused = not task.servings

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def open(self, artifact_peak: int | None) -> Consumer | None:
        """The source's process, to take turns with an artifact's. None if memory does not hold both, or vLLM can't load the source."""
        if self._consumer is not None or self._refused or artifact_peak is None:
            return self._consumer
        if not room_for(artifact_peak + self._state.source_header.size, artifact_peak, self._job.spec.memory_limit):
            return None
        self._consumer = self._start(self._left)
        return self._consumer

    def alone(self) -> Rounds | None:
        """The source's rounds, timed with no artifact beside it. None if vLLM can't load the source."""
        if self._rounds is None and not self._refused:
            with contextlib.ExitStack() as left:
                consumer = self._start(left)
                if consumer is not None:
                    [self._rounds] = _rounds(self._task, [consumer], self._tell)
        return self._rounds

    def keep(self, rounds: Rounds | None) -> None:
        """Keep the first rounds as the source's own figures."""
        self._rounds = self._rounds or rounds

    def serving(self) -> Serving | None:
        if self._rounds is None or self._observed is None:
            return None
        return Serving(
            measured_on=measured_on(self._observed),
            timings=_timings(self._task, self._rounds, None, by_turns=False),
            peak_memory_bytes=self._observed.peak_memory if self._consumer is None else self._consumer.peak_memory,
            peak_gpu_bytes=self._observed.peak_gpu if self._consumer is None else self._consumer.peak_gpu,
        )

    def _start(self, left: contextlib.ExitStack) -> Consumer | None:
        try:
            with contextlib.ExitStack() as undo:
                consumer = _open(self._job, self._job.source, self._task, self._python, name="source", tell=self._tell)
                undo.enter_context(consumer)
                self._observed = consumer.run()
                left.enter_context(undo.pop_all())
        except NightpressError as error:
            if error.code is not ErrorCode.VERIFICATION_FAILED:
                raise
            self._refused = True
            self._job.warn(f"vLLM can't load the source, so no speed is compared with its: {error.message}")
            return None
        return consumer

    def _tell(self, _share: float, what: str) -> None:
        self._job.clock.at(0.0, f"the source in vLLM: {what}")
